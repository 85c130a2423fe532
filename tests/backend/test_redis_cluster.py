"""A journal in a Redis Cluster: slots move, masters die and are replaced, and every promise holds."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import pytest_asyncio
from tests.backend.conftest import StartWorker, conversation_of, settled
from tests.backend.traffic import Traffic, clients_of
from tests.backend.worker import Worker, message, reply
from tests.redis_servers import Cluster, RedisServer, free_port

from conftest import wait_until
from hotdesk.errors import BackendError, BackendUnavailable

PARTITIONS = 32
SERVING_S = 2.0
_numbers = itertools.count()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_cluster() -> AsyncIterator[Cluster]:
    """Three masters with a replica each."""
    async with Cluster(replicas=1, node_timeout_ms=600) as made:
        yield made


@pytest.fixture
async def cluster(shared_cluster: Cluster) -> AsyncIterator[Cluster]:
    """The same for each test; afterwards all its nodes are brought back."""
    yield shared_cluster
    for node in shared_cluster.nodes:
        node.thaw()
        if not node.running:
            await node.start()
    await shared_cluster.wait_ready()


@pytest.fixture
def url(cluster: Cluster) -> str:
    """A journal of the test's own. A write counts once the replica has it: what a failover may lose was not kept."""
    return f"{cluster.url}?partitions={PARTITIONS}&replicas=1&prefix=t{next(_numbers)}"


@pytest.fixture
async def traffic(url: str, start_worker: StartWorker) -> AsyncIterator[Traffic]:
    """Fifty conversations over all partitions."""
    made = Traffic(await start_worker(url), [f"c{n}" for n in range(50)])
    yield made
    await made.aclose()


def slot_of(worker: Worker, conversation: str) -> int:
    backend: Any = worker.backend
    return int(backend.partitions.of(conversation).slot)


def base_of(worker: Worker, conversation: str) -> str:
    """What every key of the conversation's partition begins with."""
    backend: Any = worker.backend
    return str(backend.partitions.of(conversation).base)


def slots_of(worker: Worker) -> set[int]:
    """The slots of all partitions."""
    backend: Any = worker.backend
    return {partition.slot for partition in backend.partitions.all}


async def owner_of(cluster: Cluster, slot: int) -> RedisServer:
    """The node that has *slot*, as the first that runs has it."""
    node = next(node for node in cluster.nodes if node.running)
    for first, last, (_, port, *_), *_ in await node.command("CLUSTER", "SLOTS"):
        if first <= slot <= last:
            return next(node for node in cluster.nodes if node.port == port)
    raise LookupError(slot)


async def masters(cluster: Cluster) -> list[RedisServer]:
    running = [node for node in cluster.nodes if node.running]
    return [node for node in running if (await node.command("ROLE"))[0] == "master"]


async def replica_of(cluster: Cluster, master: RedisServer) -> RedisServer:
    for node in cluster.nodes:
        if node is not master and (await node.command("ROLE"))[2:3] == [master.port]:
            return node
    raise LookupError(master)


async def refusals(cluster: Cluster, kind: str) -> int:
    """How often the nodes answered with this error since they were started."""
    running = [node for node in cluster.nodes if node.running]
    found = [(await node.info("errorstats")).get(f"errorstat_{kind}", "count=0") for node in running]
    return sum(int(one.removeprefix("count=")) for one in found)


async def move(cluster: Cluster, slot: int, **options: Any) -> RedisServer:
    """Move a slot to another master, which is returned."""
    source = await owner_of(cluster, slot)
    target = next(node for node in await masters(cluster) if node is not source)
    await cluster.move_slots([slot], source, target, **options)
    return target


@asynccontextmanager
async def on_its_way(cluster: Cluster, slot: int, target: RedisServer | None = None) -> AsyncIterator[None]:
    """The slot is being moved: none of its keys has been yet. At the end they all are."""
    source = await owner_of(cluster, slot)
    target = target or next(node for node in await masters(cluster) if node is not source)
    await target.command("CLUSTER", "SETSLOT", slot, "IMPORTING", await source.command("CLUSTER", "MYID"))
    await source.command("CLUSTER", "SETSLOT", slot, "MIGRATING", await target.command("CLUSTER", "MYID"))
    try:
        yield
    finally:
        if await owner_of(cluster, slot) is source:
            await cluster.move_slots([slot], source, target)


async def wait_refused(cluster: Cluster, kind: str, more: int) -> None:
    """Wait until the nodes have answered so many times more with this error."""
    known = await refusals(cluster, kind)

    async def are_there() -> bool:
        return await refusals(cluster, kind) >= known + more

    await wait_until(are_there, f"{more} more {kind}")


# -- slots move --------------------------------------------------------------------------------------------------


async def test_every_master_writes_its_file_anew_after_its_start(
    cluster: Cluster, url: str, start_worker: StartWorker
) -> None:
    """What a crash tore in it is gone then: one is asked when the first worker comes, and when it is back."""
    await start_worker(url)
    nodes = await masters(cluster)
    for node in nodes:
        await wait_until(node.has_written_anew, "its file was written anew")
    await nodes[0].kill()
    await nodes[0].start()
    await wait_until(nodes[0].has_written_anew, "so was that of the one that was killed")


async def test_nothing_fails_or_is_overtaken_while_slots_move(cluster: Cluster, traffic: Traffic) -> None:
    """Partitions move under load: each append succeeds, in the order of asking, and each turn has one end.

    Reads too, wherever the key is by then.
    """
    backend = traffic.worker.backend

    async def halfway(slot: int) -> None:
        await wait_refused(cluster, "TRYAGAIN", 3)
        for name in traffic.said:
            if slot_of(traffic.worker, name) == slot:
                assert [entry.seq for entry in await backend.read(name, 0, 3) or []] == [1, 2, 3]

    asked_elsewhere = await refusals(cluster, "ASK")
    await traffic.wait_spoken(300)
    for slot in sorted(slots_of(traffic.worker))[::2]:
        await move(cluster, slot, halfway=halfway)
    await traffic.finish()
    assert traffic.problems == []
    assert len(traffic.asks) >= 2000
    await traffic.judge(traffic.worker)
    assert await refusals(cluster, "ASK") > asked_elsewhere


@pytest.mark.parametrize("under_way", [False, True], ids=["one moment", "under way"])
async def test_a_refused_message_is_not_overtaken_by_the_next(
    cluster: Cluster, url: str, start_worker: StartWorker, under_way: bool
) -> None:
    """Redis refuses the first message, with keys that there are none of, and would take the next: neither is kept.

    That comes in the same moment, or while the first is under way; a third one while they wait for the slot to move.
    """
    worker = await start_worker(url)
    assert (await worker.append("c", "m1")).seq == 1
    async with on_its_way(cluster, slot_of(worker, "c")):
        first = worker.backend.append(message("c", "m2"), channel="", locale=None)
        if under_way:
            await asyncio.sleep(0)
        second = worker.backend.append(message("c", "m3"), channel="", locale=None, given=False)
        await wait_refused(cluster, "TRYAGAIN", 3)
        third = worker.backend.append(message("c", "m4"), channel="", locale=None, given=False)
        assert not first.done()
        assert not second.done()
    assert [(await asked).seq for asked in (first, second, third)] == [2, 3, 4]


async def test_what_waits_for_the_old_server_comes_first(cluster: Cluster, url: str, start_worker: StartWorker) -> None:
    """The slot has moved, which is known, while a message waited for the server that had it: the next is behind it."""
    worker = await start_worker(url)
    names = [f"c{n}" for n in range(200)]
    homes = {name: await owner_of(cluster, slot_of(worker, name)) for name in names}
    name, slot = names[0], slot_of(worker, names[0])
    source = homes[name]
    other = next(one for one in names if homes[one] is source and slot_of(worker, one) != slot)
    assert (await worker.append(name, "m1")).seq == 1
    await (await replica_of(cluster, source)).kill()
    waiting = asyncio.gather(worker.append(other, "m1"), return_exceptions=True)

    async def is_waited_for() -> bool:
        return (await source.info("clients"))["blocked_clients"] == "1"

    await wait_until(is_waited_for, "the server waits for its replica, and takes nothing else on this connection")
    first = worker.append(name, "m2")
    target = await move(cluster, slot)

    async def is_known() -> bool:
        heard = await target.command("PUBSUB", "SHARDCHANNELS")
        return any(channel.startswith(base_of(worker, name)) for channel in heard)

    await wait_until(is_known, "what is said there is heard")
    second = worker.append(name, "m3")
    assert [(await asked).seq for asked in (first, second)] == [2, 3]
    assert not waiting.done(), "there was no hurry"
    await waiting


async def test_a_slot_that_stays_on_its_way_fails_after_3_s(
    cluster: Cluster, url: str, start_worker: StartWorker
) -> None:
    """Nothing was done, and the error says so and why; other partitions are served meanwhile, and it is afterwards."""
    worker = await start_worker(url)
    slot = slot_of(worker, "c")
    other = next(name for name in (f"d{n}" for n in range(100)) if slot_of(worker, name) != slot)
    async with on_its_way(cluster, slot):
        asked = [asyncio.ensure_future(worker.append("c", f"m{n}")) for n in range(3)]
        n = 0
        while not all(one.done() for one in asked):
            n += 1
            assert (await worker.append(other, f"o{n}")).seq == n
            await asyncio.sleep(0.01)
    assert n > 20
    for one in asked:
        problem = one.exception()
        assert isinstance(problem, BackendUnavailable)
        assert not problem.unsure
        assert f"slot {slot} is being moved to another server, for 3 s by now" in str(problem)
    assert (await worker.append("c", "m1")).seq == 1


async def test_what_moves_is_heard_at_its_new_place(cluster: Cluster, url: str, start_worker: StartWorker) -> None:
    """A reader elsewhere is told to read again when its conversation has moved, and hears what is said from then on."""
    owner, other = await start_worker(url), await start_worker(url)
    await settled(owner, other)
    here, there = conversation_of(owner), conversation_of(owner)
    while slot_of(owner, there) == slot_of(owner, here):
        there = conversation_of(owner)
    for name in (here, there):
        other.backend.follow(name, True)
        await wait_until(lambda name=name: name in other.heard.resynced, "it is heard")  # type: ignore[misc]
    other.heard.resynced.clear()
    resyncs = other.heard.resyncs_of_turns
    await move(cluster, slot_of(owner, here))
    await wait_until(lambda: here in other.heard.resynced, "it is heard again")
    assert there not in other.heard.resynced, "nothing of it was missed"
    await wait_until(lambda: other.heard.resyncs_of_turns > resyncs, "what the inbox missed is asked for")
    for name in (here, there):
        appended = await owner.append(name, "m1")
        await wait_until(
            lambda name=name: [entry.id for entry, _, _ in other.heard.entries if entry.conversation == name] == ["m1"],  # type: ignore[misc]
            "the message is heard",
        )
        await wait_until(lambda name=name: owner.heard.seqs(name), "its turn has begun")  # type: ignore[misc]
        await owner.end(name, appended.seq, reply(name, "m1"))
        await wait_until(
            lambda name=name: [end.to for end in other.heard.ends if end.conversation == name] == ["m1"],  # type: ignore[misc]
            "the reply is heard",
        )
    # The inbox too: the turn of what is appended elsewhere is begun where its partition is.
    appended = await other.append(here, "m2")
    await wait_until(lambda: owner.heard.seqs(here) == [1, appended.seq], "the owner has begun it")


# -- masters come and go -----------------------------------------------------------------------------------------


async def wait_served(traffic: Traffic, since: float, slots: set[int]) -> float:
    """Wait until a message is kept in one of *slots* after *since*; how many seconds after."""
    moment = await wait_until(
        lambda: traffic.successes(since, of=lambda name: slot_of(traffic.worker, name) in slots), "it serves again"
    )
    return float(moment[0] - since)


async def slots_at(cluster: Cluster, traffic: Traffic, master: RedisServer) -> set[int]:
    return {slot for slot in slots_of(traffic.worker) if await owner_of(cluster, slot) is master}


async def busiest(cluster: Cluster, traffic: Traffic) -> RedisServer:
    """The master of most partitions."""
    found = Counter([await owner_of(cluster, slot) for slot in slots_of(traffic.worker)])
    return found.most_common(1)[0][0]


async def test_a_new_master_is_served_from_soon_after_its_promotion(
    cluster: Cluster, url: str, start_worker: StartWorker
) -> None:
    """A master dies, and 2 s after another has its slots at the latest messages are kept and known there."""
    worker = await start_worker(url)
    assert (await worker.append("c", "m1")).seq == 1
    await worker.aclose()
    worker = await start_worker(url.replace("replicas=1", "replicas=0"))
    master = await owner_of(cluster, slot_of(worker, "c"))
    failing = asyncio.ensure_future(cluster.failover(master))
    await wait_until(lambda: not master.running, "it is dead")
    kept = None
    while kept is None:
        try:
            kept = await worker.append("c", "m2")
        except BackendUnavailable:
            await asyncio.sleep(0.01)
        if not failing.done():
            since = time.monotonic()
    await failing
    assert time.monotonic() - since < SERVING_S
    assert kept.seq == 2
    assert (await worker.append("c", "m1")).duplicate


async def test_what_was_kept_survives_the_death_of_its_master(cluster: Cluster, traffic: Traffic) -> None:
    """A master is killed under load, its replica promoted, and it comes back: all is there once, in order, answered."""
    await traffic.wait_spoken(300)
    master = await busiest(cluster, traffic)
    slots = await slots_at(cluster, traffic, master)
    await cluster.failover(master)
    assert traffic.problems, "nobody noticed"
    await master.start()  # the new one needs a replica to have its writes confirmed
    await wait_served(traffic, time.monotonic(), slots)
    await traffic.wait_spoken(300)
    await traffic.finish()
    await traffic.judge(traffic.worker)


async def test_a_master_that_stands_still_is_replaced(cluster: Cluster, traffic: Traffic) -> None:
    """A master is stopped, its replica promoted, and it goes on: the same holds, and it is not waited for."""
    await traffic.wait_spoken(300)
    master = await busiest(cluster, traffic)
    slots = await slots_at(cluster, traffic, master)
    replica = await replica_of(cluster, master)
    master.freeze()
    others = [node for node in cluster.nodes if node is not master]

    async def is_replaced() -> bool:
        spans = await others[0].command("CLUSTER", "SLOTS")
        return all(port != master.port for _, _, (_, port, *_), *_ in spans)

    await wait_until(is_replaced, "the replica is promoted")
    since = time.monotonic()
    await wait_until(lambda: clients_of(replica), "the new one is asked, though no replica confirms what it does")
    assert time.monotonic() - since < SERVING_S
    master.thaw()
    await wait_served(traffic, time.monotonic(), slots)
    await traffic.wait_spoken(300)
    await traffic.finish()
    await traffic.judge(traffic.worker)


async def test_a_failover_by_order_loses_nothing(cluster: Cluster, traffic: Traffic) -> None:
    """A replica takes over from a master that lives: what succeeded is there once, and news is heard again."""
    await traffic.wait_spoken(300)
    master = await busiest(cluster, traffic)
    resyncs = traffic.worker.heard.resyncs_of_turns
    await cluster.failover(master, kill=False)
    await traffic.wait_spoken(300)
    await wait_until(lambda: traffic.worker.heard.resyncs_of_turns > resyncs, "the inboxes are heard again")
    await traffic.finish()
    await traffic.judge(traffic.worker)


async def test_while_slots_have_no_master_every_write_fails_at_once(cluster: Cluster, traffic: Traffic) -> None:
    """A master and its replica are away: the error comes at once; when they are back, so is the backend."""
    await traffic.wait_spoken(300)
    backend: Any = traffic.worker.backend
    master = await busiest(cluster, traffic)
    slots = await slots_at(cluster, traffic, master)
    pair = [master, await replica_of(cluster, master)]
    for node in reversed(pair):
        await node.kill()
    name = next(name for name in traffic.said if slot_of(traffic.worker, name) in slots)
    await wait_until(backend._servers.trouble, "there is trouble")
    for n in range(20):
        asked_at = time.monotonic()
        with pytest.raises(BackendUnavailable):
            await traffic.worker.append(name, f"refused{n}")
        assert time.monotonic() - asked_at < 0.5
    for node in pair:
        await node.start()
    await wait_served(traffic, time.monotonic(), slots)
    await wait_until(lambda: backend._servers.trouble() is None, "all is well")
    await traffic.finish()
    await traffic.judge(traffic.worker)


async def test_a_write_that_its_replica_has_not_is_not_called_kept(
    cluster: Cluster, url: str, start_worker: StartWorker
) -> None:
    """With replicas=1 a write that no replica confirms fails, and may have been done; asked again it is one message."""
    worker = await start_worker(url)
    assert (await worker.append("c", "m0")).seq == 1
    slot = slot_of(worker, "c")
    source = await owner_of(cluster, slot)
    target = next(node for node in await masters(cluster) if node is not source)
    await (await replica_of(cluster, target)).kill()
    async with on_its_way(cluster, slot, target):
        asked = [asyncio.ensure_future(worker.append("c", f"m{n}")) for n in range(1, 11)]
        await wait_refused(cluster, "TRYAGAIN", 3)
    # A write waits a second for its replica; those that were held do so together.
    await wait_until(lambda: all(one.done() for one in asked), "all have failed", 5.0)
    for one in asked:
        problem = one.exception()
        assert isinstance(problem, BackendUnavailable)
        assert "reached 0 of the 1 replicas" in problem.reason
        assert problem.unsure
    for node in cluster.nodes:
        if not node.running:
            await node.start()
    await cluster.wait_ready()
    for n in range(1, 11):
        again = await worker.append("c", f"m{n}")
        assert (again.seq, again.duplicate) == (n + 1, True)


# -- the way in --------------------------------------------------------------------------------------------------


async def test_any_server_of_the_url_will_do(cluster: Cluster, url: str, start_worker: StartWorker) -> None:
    """Servers that are gone, stand still or are replicas are passed over at the start."""
    _, _, places = url.replace("replicas=1", "replicas=0").partition("://")
    replicas = [await replica_of(cluster, master) for master in await masters(cluster)]
    replica = next(one for one in replicas if str(one.port) not in places)
    gone = f"127.0.0.1:{free_port()}"
    replica.freeze()
    opening = asyncio.ensure_future(Worker.open(f"redis+cluster://{gone},{replica.address}:{replica.port},{places}"))
    await wait_until(opening.done, "it is open")
    await (await opening).aclose()
    replica.thaw()


async def test_a_cluster_that_is_none_is_named(redis: RedisServer) -> None:
    """A single server is refused with the scheme that is right for it; nobody there, with the reason."""
    with pytest.raises(BackendError, match="write redis://"):
        await Worker.open(f"redis+cluster://{redis.address}:{redis.port}")
    with pytest.raises(BackendUnavailable, match="Connect"):
        await Worker.open(f"redis+cluster://127.0.0.1:{free_port()},127.0.0.1:{free_port()}")
