"""A journal in a Redis that Sentinel watches: masters die, stand still and are replaced, and every promise holds."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from tests.backend.conftest import StartWorker, conversation_of, die, settled
from tests.backend.traffic import Traffic, clients_of
from tests.backend.worker import Worker, reply
from tests.redis_servers import Connection, RedisServer, Sentinel, SentinelSet, free_port

from conftest import wait_until
from hotdesk.errors import BackendUnavailable

PARTITIONS = 32
SERVING_S = 2.0
_numbers = itertools.count()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_servers() -> AsyncIterator[SentinelSet]:
    """A master and one replica, so that what a replica has confirmed is known to whoever is promoted."""
    async with SentinelSet(replicas=1) as made:
        yield made


@pytest.fixture
async def servers(shared_servers: SentinelSet) -> AsyncIterator[SentinelSet]:
    """The same for each test; afterwards all are brought back."""
    yield shared_servers
    for process in (*shared_servers.servers, *shared_servers.sentinels):
        process.thaw()
        if not process.running:
            await process.start()
    await shared_servers.wait_ready()


@pytest.fixture
def url(servers: SentinelSet) -> str:
    """A journal of the test's own."""
    return f"{servers.url}?partitions={PARTITIONS}&replicas=1&prefix=t{next(_numbers)}"


@pytest.fixture
async def traffic(url: str, start_worker: StartWorker) -> AsyncIterator[Traffic]:
    """Fifty conversations."""
    made = Traffic(await start_worker(url), [f"c{n}" for n in range(50)])
    yield made
    await made.aclose()


def other_than(servers: SentinelSet, master: RedisServer) -> RedisServer:
    return next(server for server in servers.servers if server is not master)


async def heard_of(name: str, sender: Worker, *others: Worker) -> None:
    """*sender* takes a message in, of which all hear; from now on whoever is told to look has a new reason."""

    def nothing_is_due() -> bool:
        backends: list[Any] = [worker.backend for worker in (sender, *others)]
        return not any(one.partitions.unread or one.partitions.untold for one in backends)

    await wait_until(nothing_is_due, "what came with a new owner is done")
    for worker in (sender, *others):
        worker.backend.follow(name, True)
    await wait_until(lambda: all(worker.heard.resynced == [name] for worker in others), "they listen")
    await sender.append(name, "m1")
    await wait_until(lambda: all(worker.heard.entries for worker in others), "they hear of it")
    for worker in (sender, *others):
        worker.heard.resynced.clear()


async def is_master(server: RedisServer) -> bool:
    try:
        return bool((await server.command("ROLE"))[0] == "master")
    except (OSError, EOFError):  # whoever changes its role closes its connections
        return False


async def test_a_new_master_is_served_from_soon_after_its_promotion(
    servers: SentinelSet, url: str, start_worker: StartWorker
) -> None:
    """The master dies, and 2 s after another is one at the latest messages are kept and known there.

    One sentinel stands still, and the URL names one that is gone before it: they keep nobody waiting.
    """
    scheme, _, places = url.partition("://")
    servers.sentinels[0].freeze()
    worker = await start_worker(f"{scheme}://127.0.0.1:{free_port()},{places}")
    assert (await worker.append("c", "m1")).seq == 1
    await worker.aclose()
    worker = await start_worker(f"{scheme}://127.0.0.1:{free_port()},{places.replace('replicas=1', 'replicas=0')}")
    master = await servers.master()
    other = other_than(servers, master)
    await master.kill()
    promoted = asyncio.ensure_future(wait_until(lambda: is_master(other), "another is the master"))
    kept, since = None, time.monotonic()
    while kept is None:
        try:
            kept = await worker.append("c", "m2")
        except BackendUnavailable:
            await asyncio.sleep(0.01)
        if not promoted.done():
            since = time.monotonic()
    assert time.monotonic() - since < SERVING_S
    await promoted
    assert kept.seq == 2
    assert (await worker.append("c", "m1")).duplicate


async def test_a_master_whose_replicas_need_not_confirm_is_a_warning(
    servers: SentinelSet, url: str, open_worker: StartWorker
) -> None:
    """What a failover may lose is said at the start, with the remedy."""
    assert (await open_worker(url)).backend.warnings == ()
    [warning] = (await open_worker(url.replace("replicas=1", "replicas=0"))).backend.warnings
    assert warning == (
        "a failover may lose what was accepted: a master has 1 replicas, and none must confirm it; write ?replicas=1"
    )


async def test_a_message_known_to_the_master_alone_is_not_said_to_be_kept(
    servers: SentinelSet, url: str, start_worker: StartWorker
) -> None:
    """Sent again, by the same way or another, it is as unsure as before, until the replica has it."""
    worker, other = await start_worker(url), await start_worker(url)
    assert (await worker.append("c", "m1")).seq == 1
    master = await servers.master()
    replica = other_than(servers, master)
    replica.freeze()
    for sender in (worker, other, worker):
        with pytest.raises(BackendUnavailable, match="reached 0 of the 1 replicas") as failed:
            await sender.append("c", "m2")
        assert failed.value.unsure
    replica.thaw()
    await servers.wait_ready()
    assert (await other.append("c", "m2")).seq == 2


async def test_an_owner_is_told_to_look_for_what_may_have_been_kept(
    servers: SentinelSet, url: str, start_worker: StartWorker
) -> None:
    """A message that was written and not confirmed is run, though nobody says it again, long before a sweep."""
    url = url.replace(f"partitions={PARTITIONS}", "partitions=1024")
    a, b = await start_worker(url), await start_worker(url)
    await settled(a, b)
    names = [conversation_of(a) for _ in range(20)]
    replica = other_than(servers, await servers.master())
    replica.freeze()
    for refused in await asyncio.gather(*(b.append(name, "m1") for name in names), return_exceptions=True):
        assert isinstance(refused, BackendUnavailable)
    replica.thaw()
    await wait_until(lambda: all(a.heard.seqs(name) == [1] for name in names), "its owner runs it", timeout_s=5.0)


async def test_nobody_hears_of_what_no_replica_has(servers: SentinelSet, url: str, start_worker: StartWorker) -> None:
    """The news of a message, of an answer and of a word between goes out once a replica has what it tells."""
    a, b = await start_worker(url), await start_worker(url)
    await settled(a, b)
    name = conversation_of(a)
    b.backend.follow(name, True)
    await b.append(name, "m1")
    await wait_until(lambda: a.heard.seqs(name) == [1] and b.heard.entries, "its owner runs it")
    replica = other_than(servers, await servers.master())
    replica.freeze()
    with pytest.raises(BackendUnavailable, match="reached 0 of the 1 replicas"):
        await a.end(name, 1, reply(name, "m1", "r1"))
    with pytest.raises(BackendUnavailable, match="reached 0 of the 1 replicas"):
        await a.backend.post(reply(name, None, "p1"), deliver=False)
    assert b.heard.ends == []
    assert [entry.id for entry, *_ in b.heard.entries] == ["m1"]
    replica.thaw()
    await servers.wait_ready()
    kept = await a.end(name, 1, reply(name, "m1", "r1"))
    assert kept is not None
    await wait_until(lambda: len(b.heard.ends) == 2, "it is told, to who took it in and to who listens")
    assert [[one.id for one in end.replies] for end in b.heard.ends] == [["r1"], ["r1"]]
    await a.backend.post(reply(name, None, "p2"), deliver=False)
    await wait_until(lambda: [entry.id for entry, *_ in b.heard.entries] == ["m1", "p2"], "so is a word between")


async def test_what_a_dead_worker_had_not_told_is_looked_for(
    servers: SentinelSet, url: str, start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker dies after a replica has its answer and before it told it: who listens reads it all the same."""
    a, b, c = [await start_worker(url) for _ in range(3)]
    await settled(a, b, c)
    name = conversation_of(a)
    await heard_of(name, a, b, c)
    dying: Any = a.backend
    monkeypatch.setattr(dying._calls, "tell", lambda *args: asyncio.get_running_loop().create_future())
    assert await a.end(name, 1, reply(name, "m1")) is not None
    await die(a)
    await settled(b, c)
    await wait_until(lambda: name in b.heard.resynced and name in c.heard.resynced, "they read what they missed")
    assert b.heard.ends == c.heard.ends == []


async def test_what_a_dead_door_had_not_told_is_run_and_read(
    servers: SentinelSet, url: str, start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who took messages in dies before it told their owner: it looks, and has readers look, long before a sweep."""
    url = url.replace(f"partitions={PARTITIONS}", "partitions=1024")
    a, b, door = [await start_worker(url) for _ in range(3)]
    await settled(a, b, door)
    names = [conversation_of(a) for _ in range(20)]
    await heard_of(names[0], a, b)
    dying: Any = door.backend
    monkeypatch.setattr(dying._calls, "tell", lambda *args: asyncio.get_running_loop().create_future())
    await asyncio.gather(*(door.append(name, "m2") for name in names))

    def run() -> set[str]:
        return {begun.message.conversation for begun in a.heard.begun if begun.message.id == "m2"}

    assert run() == set()
    await die(door)
    await wait_until(lambda: run() == set(names), "their owner runs them", timeout_s=5.0)
    await wait_until(lambda: b.heard.resynced == [names[0]], "who listens is told to look")


async def test_news_that_could_not_be_told_is_read(
    servers: SentinelSet, url: str, start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica has the answer, and the way to say so is cut, twice: who listens is told to look at a later beat."""
    a, b = await start_worker(url), await start_worker(url)
    await settled(a, b)
    name = conversation_of(a)
    await heard_of(name, a, b)
    calls: Any = a.backend._calls  # type: ignore[attr-defined]
    tell, failed = calls.tell, []

    def cut(*args: Any) -> asyncio.Future[Any]:
        if len(failed) == 2:
            return tell(*args)  # type: ignore[no-any-return]
        failed.append(args)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        future.set_exception(BackendUnavailable("redis://", "cut off"))
        return future

    monkeypatch.setattr(calls, "tell", cut)
    assert await a.end(name, 1, reply(name, "m1")) is not None
    await wait_until(lambda: b.heard.resynced == [name], "it is told to look")
    assert name in a.heard.resynced
    assert len(failed) == 2
    assert b.heard.ends == []


async def test_what_was_kept_survives_the_death_of_the_master(servers: SentinelSet, traffic: Traffic) -> None:
    """The master is killed under load, the replica promoted, and it comes back: all is there once, in order, answered.

    When it comes back it takes itself for the master still, and nothing is written to it.
    """
    await traffic.wait_spoken(300)
    master = await servers.master()
    await servers.failover()
    assert traffic.problems, "nobody noticed"
    await master.start()
    await servers.wait_ready()  # the new one needs a replica to have its writes confirmed
    await traffic.wait_spoken(300)
    await traffic.finish()
    await traffic.judge(traffic.worker)


async def test_a_master_that_stands_still_is_replaced(servers: SentinelSet, traffic: Traffic) -> None:
    """The master is stopped, the replica promoted, and it goes on: the same holds, and it is not waited for."""
    await traffic.wait_spoken(300)
    master = await servers.master()
    other = other_than(servers, master)
    master.freeze()
    await wait_until(lambda: is_master(other), "the replica is promoted")
    since = time.monotonic()
    await wait_until(lambda: clients_of(other), "the new one is asked, though no replica confirms what it does")
    assert time.monotonic() - since < SERVING_S
    master.thaw()
    await servers.wait_ready()
    await traffic.wait_spoken(300)
    await traffic.finish()
    await traffic.judge(traffic.worker)


async def test_a_master_that_does_not_know_that_it_was_replaced_is_left(servers: SentinelSet, traffic: Traffic) -> None:
    """A failover by order: the old master takes writes for some time yet, and they are lost; nobody stays with it."""
    await traffic.wait_spoken(300)
    master = await servers.master()
    other = other_than(servers, master)
    await servers.failover(kill=False)

    async def is_left() -> bool:
        return await clients_of(master) == 0 and await clients_of(other) > 0

    await wait_until(is_left, "all connections are the new master's")
    assert await is_master(master), "it has been told before anybody left"
    await servers.wait_ready()
    await traffic.wait_spoken(300)
    await traffic.finish()
    await traffic.judge(traffic.worker)


async def test_a_replica_that_is_named_as_the_master_is_refused(servers: SentinelSet) -> None:
    """Sentinels that take a replica for a master, as they do for a while when set up so: nobody writes to it."""
    replica = other_than(servers, await servers.master())
    never = len(servers.sentinels) + 1
    for sentinel in servers.sentinels:
        await sentinel.command("SENTINEL", "MONITOR", "second", replica.address, replica.port, never)
    try:
        with pytest.raises(BackendUnavailable, match="no master yet"):
            await Worker.open(servers.url.replace("/mymaster/", "/second/"))
        assert await clients_of(replica) == 0
    finally:
        for sentinel in servers.sentinels:
            await sentinel.command("SENTINEL", "REMOVE", "second")


class Locked(Sentinel):
    """A sentinel with a password, behind the certificate of its master."""

    master: RedisServer

    async def open(self) -> Connection:
        return await Connection.open(self.address, self.port, password="secret", tls=self.master._tls)


async def test_sentinels_with_a_password_and_tls(start_worker: StartWorker) -> None:
    """They are logged in to with the URL's password, and their certificate is checked as the master's is."""
    replication = {"tls_replication": True, "repl_diskless_sync_delay": 0}
    async with RedisServer(password="secret", tls=True, **replication) as master:
        port = free_port()
        sentinel = Locked(address="127.0.0.1", port=port, folder=None)
        sentinel.master = master
        sentinel.watches = [
            "port 0",
            "requirepass secret",
            f"sentinel monitor mymaster {master.address} {master.port} 1",
            "sentinel auth-pass mymaster secret",
            f"tls-port {port}",
            f"tls-cert-file {master.folder / 'server.pem'}",
            f"tls-key-file {master.folder / 'server.key'}",
            f"tls-ca-cert-file {master.ca_file}",
            "tls-auth-clients no",
            "tls-replication yes",
        ]
        async with sentinel:
            at = f"127.0.0.1:{port}/mymaster/0?partitions=4&ca={master.ca_file}"
            worker = await start_worker(f"rediss+sentinel://:secret@{at}")
            assert (await worker.append("c", "m1")).seq == 1
            await worker.aclose()
            with pytest.raises(BackendUnavailable, match="password"):
                await start_worker(f"rediss+sentinel://:wrong@{at}")
            with pytest.raises(BackendUnavailable, match="certificate"):
                await start_worker(f"rediss+sentinel://:secret@{at.partition('&ca=')[0]}")
