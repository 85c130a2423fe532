"""Four hosts on one Redis: killed, stopped, cut off and restarted under traffic, Redis too, with swaps throughout.

Nothing that was accepted is lost, nobody gets two answers, each conversation stays in order, no owner that was robbed
has a write taken, and a conversation goes on within 2 s of its owner's death.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import signal
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from time import perf_counter

from tests.chaos.fleet import ChaosHost, Fleet, open_fleet
from tests.chaos.owners import Owners
from tests.chaos.power import PoweredRedis, can_lose_power
from tests.chaos.resume import Outage, Return, accepted_within, first_accepts, loss_windows, resume_times
from tests.chaos.topology import Topology
from tests.chaos.visitors import Crowd, make_visitors
from tests.load.checker import judge
from tests.load.client import percentile
from tests.load.desk import Desk
from tests.load.hosts import OUT
from tests.load.report import Figure, judged, run_main
from tests.redis_servers import Link, Namespace
from tests.redis_servers.server import Fsync

__all__ = ["measure"]

WATCHED_S = 2.4
"""After a blow the next waits so long: what resumes within 2 s is not to be laid at another's door."""

SHORT_S = 1.6
"""In the short form, which asserts no times: a lease is over by then."""

STARTS = 5
QUIET_S = 20.0


class Director:
    """Deals the blows, one after the other; a stop of a host may go on while others fall."""

    def __init__(self, fleet: Fleet, owners: Owners, *, short: bool) -> None:
        self.outages: list[Outage] = []
        self.returns: list[Return] = []
        self.crashes: list[float] = []
        self.lost_bytes: list[int] = []
        self.failed_starts = 0
        self.dealt: Counter[str] = Counter()
        self.fleet = fleet
        self._owners = owners
        self._short = short
        self._watched_s = SHORT_S if short else WATCHED_S
        self._later: set[asyncio.Task[None]] = set()
        self._blows: dict[str, tuple[int, Callable[[], Awaitable[None]]]] = {
            "kill": (25, self.kill),
            "stop": (20, self.stop),
            "restart": (10, self.restart),
            "freeze": (8, self.freeze_redis),
        }
        if "kill" in fleet.redis.faults:
            self._blows["kill redis"] = (10, self.kill_redis)
        if "lose power" in fleet.redis.faults:
            self._blows["lose power"] = (10, self.lose_power)
        if "fail over" in fleet.redis.faults:
            self._blows["fail over"] = (12, self.fail_over)
        if any(isinstance(host.way, Link) for host in fleet.hosts):
            self._blows["cut"] = (8, lambda: self.cut("cut"))
            self._blows["stall"] = (8, lambda: self.cut("stall"))
        if any(isinstance(host.way, Namespace) for host in fleet.hosts):
            self._blows["vanish"] = (10, lambda: self.cut("vanish"))

    async def deal(self, count: int) -> None:
        """*count* blows: each kind at least once, the rest as they fall; at the end all are well."""
        kinds = list(self._blows)
        weights = [weight for weight, _ in self._blows.values()]
        dealt = (kinds + random.choices(kinds, weights, k=max(0, count - len(kinds))))[:count]
        random.shuffle(dealt)
        for kind in dealt:
            self.dealt[kind] += 1
            began = perf_counter()
            await self._blows[kind][1]()
            self.told(kind, began)
            await asyncio.sleep(random.uniform(0.05, 0.2 if self._short else 1.5))
        for task in self._later:
            await task

    def told(self, kind: str, began: float) -> None:
        """Say what was dealt, for who reads a history of it."""
        print(f"{began:.2f} {kind}: {perf_counter() - began:.1f} s", file=sys.stderr)

    async def _victim(self, kind: type | None = None) -> ChaosHost:
        """One that is well, once there are two others that are."""
        while True:
            well = [host for host in self.fleet.well if kind is None or isinstance(host.way, kind)]
            if well and len(self.fleet.well) > 2:
                return random.choice(well)
            await asyncio.wait(self._later, return_when=asyncio.FIRST_COMPLETED)
            self._later = {task for task in self._later if not task.done()}

    async def _befalls(self, kind: str, host: ChaosHost) -> None:
        """Note what *host* owns just now; what follows befalls it."""
        await self._owners.look()
        self.outages.append(Outage.now(kind, self._owners.of(host.processes())))
        host.leaves()

    async def _start(self, host: ChaosHost) -> None:
        """Start it as a service manager would: again, where it ended because it found no Redis in time."""
        for left in reversed(range(STARTS)):
            try:
                await host.start()
                break
            except RuntimeError:
                await host.kill()
                if not left:
                    raise
                self.failed_starts += 1
        host.returns()

    async def kill(self) -> None:
        """SIGKILL a host, and start it again."""
        host = await self._victim()
        await self._befalls("kill", host)
        await host.kill()
        await asyncio.sleep(self._watched_s / 2 if self._short else self._watched_s)
        await self._start(host)

    async def stop(self) -> None:
        """SIGSTOP a host for longer than its lease; it wakes and takes itself for the owner."""
        host = await self._victim()
        await self._befalls("stop", host)
        host.signal(signal.SIGSTOP)

        async def thaw(seconds: float) -> None:
            await asyncio.sleep(seconds)
            host.signal(signal.SIGCONT)
            host.returns()

        seconds = random.uniform(2.0, 3.0) if self._short else random.uniform(10.0, 30.0)
        self._later.add(asyncio.create_task(thaw(seconds)))
        await asyncio.sleep(self._watched_s)

    async def restart(self) -> None:
        """SIGTERM a host, and start it again once it has handed everything over."""
        host = await self._victim()
        await self._befalls("restart", host)
        began = perf_counter()
        await host.stop()
        self.told("restart: the stop of it", began)
        await self._start(host)

    async def cut(self, how: str) -> None:
        """Cut a host off from Redis: refused, without an answer, or without a sound."""
        host = await self._victim(Namespace if how == "vanish" else Link)
        await self._befalls(how, host)
        await host.cut(how)
        await asyncio.sleep(self._watched_s if self._short else random.uniform(WATCHED_S, 12.0))
        await host.heal()
        host.returns()

    async def kill_redis(self) -> None:
        """SIGKILL Redis, and start it again."""
        server = await self.fleet.redis.victim()
        await server.kill()
        await asyncio.sleep(0.5 if self._short else random.uniform(0.0, 5.0))
        await server.start()
        await self._see_return()

    async def lose_power(self) -> None:
        """Have Redis end as its machine does that loses power: what was not synced is gone."""
        server = await self.fleet.redis.victim()
        assert isinstance(server, PoweredRedis)
        self.lost_bytes.append(await server.lose_power())
        self.crashes.append(perf_counter())
        await server.start()
        await self._see_return()

    async def freeze_redis(self) -> None:
        """SIGSTOP Redis for a while."""
        server = await self.fleet.redis.victim()
        server.freeze()
        await asyncio.sleep(0.5 if self._short else random.uniform(0.2, 6.0))
        server.thaw()
        await self.fleet.redis.wait_ready()
        await self._see_return()

    async def fail_over(self) -> None:
        """Kill a server that takes writes, and wait until another does."""
        await self.fleet.redis.fail_over()
        await self._see_return()

    async def _see_return(self) -> None:
        self.returns.append(Return(perf_counter(), frozenset(host.number for host in self.fleet.well)))
        await asyncio.sleep(self._watched_s / 2 if self._short else self._watched_s)


async def measure(
    short: bool, *, events: int | None = None, fsync: Fsync = "always", topology: Topology = "one", workers: int = 1
) -> list[Figure]:
    """Deal the blows under traffic; then read everything back and judge."""
    count = events if events is not None else 9 if short else 300 if topology == "one" else 100
    if reason := can_lose_power():
        print(f"no machine loses its power: {reason}", file=sys.stderr)
    conversations, think_s, swap_s = (60, 0.4, 1.0) if short else (1000, 8.0, 4.0)
    name = "chaos-hosts"
    async with open_fleet(name, topology=topology, fsync=fsync, workers=workers) as fleet:
        crowd = Crowd(fleet.hosts, think_s)
        owners = Owners(fleet.redis, crowd.history)
        director = Director(fleet, owners, short=short)
        await owners.wait_shared_out(len(fleet.hosts) * workers)

        async def swap_now_and_then() -> None:
            while not crowd.over:
                await asyncio.sleep(swap_s)
                await fleet.swap()

        began = perf_counter()
        watching = asyncio.create_task(owners.watch())
        async with asyncio.TaskGroup() as group:
            for visitor in make_visitors(crowd, conversations):
                group.create_task(visitor.run())
            group.create_task(swap_now_and_then())
            try:
                await asyncio.sleep(1.0)
                await director.deal(count)
                await asyncio.sleep(1.0)
            finally:
                crowd.over = True
        seconds = perf_counter() - began
        unended = await owners.wait_quiet(QUIET_S)
        watching.cancel()
        await asyncio.wait([watching])
        await owners.look()
        refused, given_up = await owners.refused(), await owners.dead_letters()
        await read_back(fleet, crowd)
    crowd.history.save(OUT / f"{name}.jsonl")
    return [
        *(Figure(f"blows: {kind}", times) for kind, times in sorted(director.dealt.items())),
        Figure("starts that found no Redis in time", director.failed_starts),
        Figure("seconds of traffic", seconds, "s"),
        Figure("swaps, on every host", fleet.version),
        *_figures(crowd, director, fsync),
        Figure("turns that never ended", unended, at_most=0),
        Figure("given up as dead letters", given_up, at_most=0),
        Figure("stale writes refused", refused),
    ]


def _figures(crowd: Crowd, director: Director, fsync: Fsync) -> list[Figure]:
    """What the history says."""
    events = crowd.history.events
    verdict = judge(events)
    for fault in verdict.faults[:20]:
        print(fault, file=sys.stderr)
    for said, times in [*crowd.strange.most_common(), *crowd.said.most_common(20)]:
        print(f"{times} times {said}", file=sys.stderr)
    kinds = judged(verdict)
    lossy = fsync != "always" and bool(director.crashes)
    if lossy:  # it was told so: here it is measured
        kinds = [Figure(f"{figure.name}, with what Redis had not synced", figure.value) for figure in kinds]
        windows = loss_windows(events, director.crashes)
        unexplained = [window for window in windows if window == math.inf]
        windows = [window for window in windows if window < math.inf]
        kinds.append(Figure("accepted and lost with no crash behind it", len(unexplained), at_most=0))
        kinds.append(Figure("accepted and lost, at a crash of the machine", len(windows) / len(director.crashes)))
        kinds.append(Figure("the same: so long before the crash, max", max(windows, default=0.0), "s"))
        kinds.append(Figure("not synced at a crash, max", max(director.lost_bytes) / 1024, "KiB"))
    return [
        Figure("sent", verdict.sent),
        Figure("accepted", verdict.accepted),
        Figure("replies", verdict.replies),
        *kinds,
        Figure("streams", verdict.streams),
        Figure("streams begun anew", verdict.restarts),
        Figure("streams that ended with the reply of a later try", crowd.overtaken),
        Figure("answers that no host may give", crowd.strange.total(), at_most=None if lossy else 0),
        Figure("accepted within 1 s of being sent", accepted_within(events, 1.0), "%"),
        *_pauses(crowd, director),
    ]


def _pauses(crowd: Crowd, director: Director) -> list[Figure]:
    """How long who stood still: those whose door stood, and all, some of whom had to find out that theirs was lost."""
    figures: list[Figure] = []
    absences = [absence for host in director.fleet.hosts for absence in host.absences]
    resumed = resume_times(crowd.history.events, director.outages, crowd.doors, absences, crowd.given_up)
    for kind in sorted({one.kind for one in resumed}):
        waits = [one.seconds for one in resumed if one.kind == kind and one.stood]
        if waits:
            figures.append(Figure(f"resumed after {kind}, p50 of {len(waits)}", percentile(waits, 50), "s"))
            figures.append(Figure(f"resumed after {kind}, p99", percentile(waits, 99), "s"))
    stood = [one.seconds for one in resumed if one.stood]
    every = [one.seconds for one in resumed]
    figures += [
        Figure(f"resumed after any loss of an owner, p99 of {len(stood)}", percentile(stood, 99), "s", at_most=2),
        Figure(f"the same, lost doors too, p99 of {len(every)}", percentile(every, 99), "s"),
    ]
    first, last = first_accepts(crowd.accepts, director.returns)
    if first:
        figures.append(Figure("Redis' return to the first accepted, max", max(first), "s", at_most=2))
        figures.append(Figure("the same, of the last host", max(last), "s", at_most=2))
    return figures


async def read_back(fleet: Fleet, crowd: Crowd) -> None:
    """Put the record into the history, read over all hosts in turn."""
    desks = [Desk(host) for host in fleet.hosts]
    conversations = dict.fromkeys(event.conversation for event in crowd.history.events if event.conversation)
    for number, conversation in enumerate(conversations):
        for entry in await desks[number % len(desks)].read_record(conversation, perf_counter()):
            crowd.history.add(entry)
    for desk in desks:
        desk.close()


def own_options() -> argparse.ArgumentParser:
    """What can be said beside --short and --json."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--events", type=int, metavar="N", help="blows; 300, 100 in a topology, 9 in the short form")
    parser.add_argument("--fsync", choices=["always", "everysec"], default="always", help="Redis' appendfsync")
    parser.add_argument("--topology", choices=["one", "sentinel", "cluster"], default="one", help="which Redis")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="worker processes of each host")
    return parser


if __name__ == "__main__":
    run_main(measure, own_options())
