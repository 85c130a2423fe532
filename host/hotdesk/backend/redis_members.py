"""Who is alive, and which partitions each owns: leases by heartbeat, partitions by rendezvous hashing.

Every worker renews one lease, whatever it owns, so the cost of being alive does not grow with the partitions. Each
works out for itself who should own what (highest random weight, Thaler and Ravishankar 1998): when a worker comes or
goes, only its own partitions change hands. What is a dead worker's is taken; what is a living one's, that one hands
over at a quiet moment.
"""

from __future__ import annotations

import asyncio
import math
import os
import socket
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from redis.crc import key_slot

from ..errors import BackendError, BackendUnavailable
from ..logs import get_log
from .redis_partitions import Calls, Partition, Partitions, swallow
from .redis_wire import Way

__all__ = ["LEASE_MS", "LOOK", "About", "Clock", "Members", "members_keys"]

LEASE_MS = 1200
"""How long a worker that says nothing counts as alive."""

BEAT_S = 0.25

DRIFT_MS = 1.0
"""How far two clocks may drift apart in a second: ten times what hardware and a time server together make of it."""

LOOK = b"l"
"""News to an owner: something of the partition may be in Redis that it was not told of."""

FORGET_MS = 60_000

QUIET_S = 10.0
"""How long a partition that is to be handed over may wait for a moment in which nothing of it runs."""

HOLD_S = 2.0
"""Then nothing new of it is begun; what still runs after so long begins anew at its next owner."""

GIVE_AGAIN_S = 0.1

SETTLE_S = 5.0
"""How long a start waits for its share of partitions."""

SWEEP_BEATS = 32
"""In so many beats each owned partition is compared with Redis once, for news that went missing unseen."""


class About(msgspec.Struct, frozen=True):
    """What the others know of a worker."""

    name: str
    host: str
    pid: int
    space: str
    """Where its pid means something: one boot of one machine, and one namespace of pids in it."""

    leaving: bool = False
    """It takes nothing more, and finishes what it has."""

    @classmethod
    def me(cls, name: str) -> About:
        return cls(name, socket.gethostname(), os.getpid(), _pid_space())

    def is_dead(self, space: str) -> bool:
        """Whether it is known to have ended, by a process that sees *space*."""
        if not space or self.space != space:
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass  # somebody else's, so it is there
        return False


class Clock:
    """What Redis' clock shows, by its answers; never less than that, but when it has been set forward since."""

    def __init__(self) -> None:
        self._ahead: float | None = None
        """How much more it shows than the clock of this process, in ms."""

        self._set_at = 0.0

    def set(self, shown: int, before: float, after: float) -> None:
        """It showed *shown* ms at some moment between *before* and *after*, in seconds of this process."""
        ahead = shown - before * 1000
        if self._ahead is not None and shown - after * 1000 <= self._ahead:
            ahead = min(ahead, self._ahead + (before - self._set_at) * DRIFT_MS)
        self._ahead = ahead
        self._set_at = before

    def read(self, at: float) -> int | None:
        """What it shows at the moment *at*, in ms; None while that is not known."""
        return None if self._ahead is None else math.ceil(at * 1000 + self._ahead)


def _pid_space() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""  # no Linux: whoever dies is found out by its lease


_encode = msgspec.json.Encoder().encode
_about = msgspec.json.Decoder(About).decode


def members_keys(prefix: str) -> tuple[str, str]:
    """Who is alive, and what is to be known of each; and when their leases end."""
    return f"{prefix}{{ctl}}:members", f"{prefix}{{ctl}}:leases"


class Members:
    """This worker among the others."""

    def __init__(self, prefix: str, calls: Calls, partitions: Partitions, me: str, about: About) -> None:
        self._keys = members_keys(prefix)
        self._slot: int = key_slot(self._keys[0].encode())
        self._calls = calls
        self._partitions = partitions
        self._me = me
        self._about = about
        self.alive: dict[str, About] = {}
        """The names of the living, this worker's too, and what is to be known of each."""

        self._number = b""
        """Of what `alive` was read from: while it is the same nobody has come or gone, and nothing is read again."""

        partitions.on_robbed = self._robbed
        self._homes: dict[int, int | None] = {}
        self._settled = False
        """Every partition is whose it should be, as far as that is this worker's doing."""

        self._doubts = 0
        self._share: list[Partition] = []
        """What should be this worker's, with those who were alive when that was last worked out."""

        self._tasks: list[asyncio.Task[None]] = []
        self._leaving = False
        self._taking = False
        self._swept = 0
        self._due = 0.0
        self._clock = Clock()
        self._away_since: float | None = None
        self._wake = asyncio.Event()
        self._beaten = asyncio.Event()
        self.taken = 0
        """Turns that were taken over."""

        self.hand_overs = 0
        self.on_gone: Callable[[], None] = lambda: None

    # -- leases ----------------------------------------------------------------------------------------------

    async def join(self) -> None:
        """Begin to live, and take this worker's share. Raises `BackendUnavailable`."""
        await self._beat()
        self._tasks = [self._partitions.spawn(self._live()), self._partitions.spawn(self._tend())]
        deadline = time.monotonic() + SETTLE_S
        while not self._settled and time.monotonic() < deadline:
            await self._plan()
            if not self._settled:
                await asyncio.sleep(0.02)

    async def _live(self) -> None:
        """Renew the lease, and nothing else: what there is to do with partitions may take longer than a lease does."""
        while True:
            try:
                async with asyncio.timeout(BEAT_S):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()
            try:
                await self._beat()
                self._beaten.set()
            except BackendUnavailable as exc:
                self._note_away(exc)
            except Exception as exc:  # a fault of ours in one beat must not end this worker's life
                get_log().error("beat_failed", exc_info=exc)

    async def _tend(self) -> None:
        """After each beat: have the partitions that this worker should have, and see that none was forgotten."""
        while True:
            await self._beaten.wait()
            self._beaten.clear()
            try:
                if not self._settled or not all(partition.mine for partition in self._share):
                    await self._plan()
                await self._sweep()
                self._note_back()
            except BackendUnavailable as exc:
                self._note_away(exc)
            except Exception as exc:
                get_log().error("tending_failed", exc_info=exc)

    def _note_away(self, exc: BackendUnavailable) -> None:
        if self._away_since is None:
            self._away_since = time.monotonic()
            get_log().warning("backend_away", backend=exc.url, problem=exc.reason)

    def _note_back(self) -> None:
        if self._away_since is not None:
            get_log().info("backend_back", away_s=round(time.monotonic() - self._away_since, 1))
            self._away_since = None

    async def _beat(self) -> bool:
        """Renew the lease; whether somebody came or went.

        It lasts from the moment in which that was asked for, whenever it arrives: a network that comes back delivers
        what was sent while it was away, and by then its sender may be dead.
        """
        about = msgspec.structs.replace(self._about, leaving=self._leaving)
        sent = time.monotonic()
        at = self._clock.read(sent)
        latest = "" if at is None else at + LEASE_MS
        now, _, number, *rows = await self._calls.script(
            "beat", self._slot, self._keys, self._me, LEASE_MS, _encode(about), self._number, latest, way=Way.LEASE
        )
        self._clock.set(now, sent, time.monotonic())
        if at is not None and now - at > LEASE_MS / 2:
            self._wake.set()  # it was long on its way: half of the lease is over
        if rows and self._me.encode() not in rows[1]:
            return False  # all of it: who else is there is asked by the next one
        alive = await self._read(now, rows[0], set(rows[1])) if rows else dict(self.alive)
        self._number = number
        for name, who in tuple(alive.items()):
            if name != self._me and who.is_dead(self._about.space):
                await self.bury(name)  # its lease need not be waited for: it died on this machine
                del alive[name]
        changed = alive != self.alive
        if changed and self.alive:
            if self.alive.keys() - alive.keys():
                self.on_gone()
            for name in self.alive.keys() - alive.keys():
                gone = self.alive[name]
                get_log().info("worker_gone", member=gone.name, host=gone.host, pid=gone.pid)
        self.alive = alive
        if changed:
            self._homes.clear()
            self._unsettle()
        return changed

    async def _read(self, now: int, rows: list[bytes], living: set[bytes]) -> dict[str, About]:
        """Who is alive, by *rows* of names and leases; those of whom nothing was heard for a minute are deleted."""
        alive: dict[str, About] = {}
        forgotten = []
        for name, value in zip(rows[::2], rows[1::2], strict=True):
            if name.startswith(b"@"):
                continue
            until, _, about = value.partition(b" ")
            if name in living:
                alive[name.decode()] = _about(about)
            elif not now - FORGET_MS < int(until) < now + FORGET_MS:
                forgotten.append(name)
        if forgotten:
            await self._calls.command(self._slot, "HDEL", self._keys[0], *forgotten, way=Way.LEASE)
        return alive

    async def bury(self, name: str) -> None:
        """A worker is known to be dead: its lease ends now."""
        await self._calls.script("beat", self._slot, self._keys, name, 0, "", self._number, way=Way.LEASE)

    def _unsettle(self) -> None:
        """Shares have to be worked out, and once more where that is under way."""
        self._settled = False
        self._doubts += 1

    def _robbed(self) -> None:
        """What this worker has is not what it thought: look at once who is alive, and who should have what."""
        self._unsettle()
        self._wake.set()

    # -- partitions ------------------------------------------------------------------------------------------

    def _staying(self) -> tuple[str, ...]:
        """Who is to have a share: those who leave finish what they have, and get nothing more."""
        return tuple(name for name, who in self.alive.items() if not who.leaving)

    def owner_of(self, number: int, names: tuple[str, ...]) -> str:
        """Who of *names* should own a partition."""
        tail = f"/{number}".encode()
        return max(names, key=lambda name: (_weight(name.encode() + tail), name))

    def home_of(self, number: int) -> int | None:
        """The process on this machine that a partition should belong to; None where it should be another machine's."""
        if number not in self._homes:
            names = self._staying()
            who = self.alive[self.owner_of(number, names)] if names else None
            self._homes[number] = who.pid if who is not None and who.space == self._about.space != "" else None
        return self._homes[number]

    async def _plan(self) -> None:
        """Take what is this worker's share and nobody's, hand over what is another's."""
        if self._leaving or self._taking:
            return
        self._taking = True
        doubts = self._doubts
        try:
            names = self._staying()
            share = []
            for partition in self._partitions.all:
                to = self.owner_of(partition.number, names) if names else self._me
                if to == self._me:
                    share.append(partition)
                elif partition.mine and partition.giving is None:
                    partition.giving = self._partitions.spawn(self._hand_over(partition))
            self._share = share
            missing = [partition for partition in share if not partition.mine and not partition.loading]
            settled = not missing or await self._take(missing)
            self._settled = settled and names == self._staying() and doubts == self._doubts  # whatever came meanwhile
        finally:
            self._taking = False

    async def _take(self, missing: list[Partition]) -> bool:
        """Take those of *missing* that nobody alive has; whether none is left."""
        looking = [
            self._calls.command(partition.slot, "HMGET", partition.own, "owner", "epoch") for partition in missing
        ]
        await asyncio.gather(*looking, return_exceptions=True)
        free: list[tuple[Partition, str, str]] = []
        for partition, row in zip(missing, looking, strict=True):
            owner, epoch = await row
            owner = owner.decode() if owner else ""
            if owner == "" or owner not in self.alive or owner == self._me:
                free.append((partition, owner, epoch.decode() if epoch else "0"))
        results = await asyncio.gather(*(self._take_one(*one) for one in free), return_exceptions=True)
        for result in results:
            if isinstance(result, int):
                self.taken += result
            elif not isinstance(result, BackendError):
                raise result
        return all(partition.mine for partition in missing)

    async def _take_one(self, partition: Partition, owner: str, epoch: str) -> int:
        if partition.mine or partition.loading:
            return 0
        partition.loading = True
        of_the_dead = owner not in ("", self._me)
        try:
            taken, *now = await self._calls.script("take", partition.slot, (partition.own,), self._me, owner, epoch)
        except BaseException as exc:
            partition.loading = False
            partition.heir = partition.heir or (of_the_dead and isinstance(exc, BackendUnavailable) and exc.unsure)
            raise
        if not taken:
            partition.loading = False
            return 0
        partition.heir = partition.heir or of_the_dead
        return await self._partitions.load(partition, now[0].decode(), crashed=partition.heir)

    def given(self, partition: Partition, epoch: str, by: str) -> None:
        """Another worker handed *partition* to this one."""
        if self._leaving:  # that one did not know it yet
            self._partitions.spawn(self._say_given(partition, epoch, "", ())).add_done_callback(swallow)
            return
        if partition.loading:
            return
        if partition.mine:
            if partition.epoch == epoch:
                return
            self._partitions.lose(partition)  # it was stopped, and has not noticed yet that another had it meanwhile
        partition.loading = True

        async def load() -> None:
            try:
                self.taken += await self._partitions.load(partition, epoch, crashed=False)
            except BackendError:
                self._unsettle()
            if self.owner_of(partition.number, self._staying() or (self._me,)) != self._me:
                self._unsettle()  # somebody has come meanwhile, whose it should be

        self._partitions.spawn(load())

    async def _hand_over(self, partition: Partition) -> None:
        """Give *partition* to whom it should belong, at a moment in which nothing of it runs."""
        try:
            await self._give_when_quiet(partition, QUIET_S)
            if partition.mine:
                partition.holding = True
                await self._give_when_quiet(partition, HOLD_S)
            if partition.mine:
                await self._give(partition)
        except BackendError:
            self._unsettle()
        finally:
            if partition.holding and partition.mine:  # what came meanwhile was not begun
                self._partitions.doubtful.add(partition)
            partition.holding = False
            partition.giving = None

    def _give(self, partition: Partition) -> asyncio.Future[Any]:
        """Let go of *partition* now, and say so. What of it still runs is begun anew by whom it is given to."""
        names = tuple(name for name in self._staying() if name != self._me or not self._leaving)
        to = self.owner_of(partition.number, names) if names else ""
        given: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if to == self._me:  # whoever it was for has gone meanwhile
            given.set_result(0)
            return given
        epoch, begun = partition.epoch, tuple(partition.open)
        self._partitions.lose(partition)
        self.hand_overs += 1
        return self._partitions.spawn(self._say_given(partition, epoch, to, begun))

    async def _say_given(self, partition: Partition, epoch: str | None, to: str, begun: tuple[int, ...]) -> None:
        """Have it in Redis that *partition* is another's, however long that takes: until then nobody runs it."""
        while True:
            try:
                keys = (partition.own, partition.keys["in"], partition.keys["tries"])
                await self._calls.script("give", partition.slot, keys, partition.base, self._me, epoch, to, *begun)
                return
            except BackendUnavailable:
                if self._leaving:
                    raise  # the lease runs out
                await asyncio.sleep(GIVE_AGAIN_S)

    async def _give_when_quiet(self, partition: Partition, seconds: float) -> None:
        """Give it the moment nothing of it runs: not a tick later, for the next message may be there by then."""
        given: asyncio.Future[Any] | None = None
        quiet = asyncio.Event()

        def give() -> None:
            nonlocal given
            partition.on_quiet = None
            if partition.mine:
                given = self._give(partition)
            quiet.set()

        if partition.open:
            partition.on_quiet = give
            try:
                async with asyncio.timeout(seconds):
                    await quiet.wait()
            except TimeoutError:
                pass
            finally:
                partition.on_quiet = None
        else:
            give()
        if given is not None:
            await given

    async def _sweep(self) -> None:
        doubtful, self._partitions.doubtful = self._partitions.doubtful, set()
        await asyncio.gather(*(self._look_after(partition) for partition in doubtful))
        await self._partitions.have_read()
        owned = [partition for partition in self._partitions.all if partition.mine]
        self._due = min(self._due + len(owned) / SWEEP_BEATS, len(owned))
        count = int(self._due)
        self._due -= count
        self._swept += count
        looked_at = (owned[(self._swept - n) % len(owned)] for n in range(count))
        await asyncio.gather(*map(self._partitions.resync, looked_at))

    async def _look_after(self, partition: Partition) -> None:
        """Have *partition* compared with Redis by its owner."""
        if partition.mine:
            await self._partitions.resync(partition)
            return
        try:
            await self._calls.script("signal", partition.slot, (partition.own,), partition.base, LOOK)
        except BackendUnavailable:
            self._partitions.doubtful.add(partition)

    async def resync(self) -> None:
        """News may have been missed: compare every owned partition with Redis."""
        self._unsettle()
        self._wake.set()
        for one in self._partitions.all:
            one.records.clear()  # the server may be another, or have lost what it had
        await asyncio.gather(*(self._partitions.resync(one) for one in self._partitions.all if one.mine))

    async def leave(self, timeout_s: float) -> None:
        """Hand everything over, and be no more. What is open then begins anew elsewhere."""
        self._leaving = True
        self._wake.set()  # the others are told, and keep off what still runs here

        async def give(partition: Partition) -> None:
            partition.holding = True
            await self._give_when_quiet(partition, timeout_s)
            if partition.mine:
                await self._give(partition)

        while True:
            given = await asyncio.gather(
                *(give(partition) for partition in self._partitions.all if partition.mine), return_exceptions=True
            )
            for result in given:
                if isinstance(result, BaseException) and not isinstance(result, BackendError):
                    raise result
            if not any(partition.mine or partition.loading for partition in self._partitions.all):
                break
            await asyncio.sleep(0.01)  # what was being taken over comes yet
        for task in self._tasks:
            task.cancel()
        try:
            await self._calls.script("beat", self._slot, self._keys, self._me, 0, "", self._number, way=Way.LEASE)
        except BackendError:
            pass  # the lease runs out by itself


def _weight(key: bytes) -> int:
    """A hash that is the same in every process, spread over 32 bits also where keys differ in their last digit only."""
    value = zlib.crc32(key)
    value = (value ^ (value >> 16)) * 0x45D9F3B & 0xFFFFFFFF
    value = (value ^ (value >> 16)) * 0x45D9F3B & 0xFFFFFFFF
    return value ^ (value >> 16)
