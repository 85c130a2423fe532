"""A Redis that stands still, dies, loses its data or has no memory left: nothing false is promised, and it passes."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from tests.backend.conftest import PARTITIONS, StartWorker, answers, conversation_of, die, key, settled, url_of
from tests.backend.worker import Answering, Worker, reply
from tests.redis_servers import Link, RedisServer

from conftest import wait_until
from hotdesk.backend import StoredReply
from hotdesk.errors import BackendUnavailable

SOON_S = 10.0
"""For what is promised within 2 s and takes a fraction of that: `tests/chaos` measures it."""


async def epochs(server: RedisServer) -> list[tuple[str, str]]:
    """Owner and epoch of each partition."""
    return [tuple(await server.command("HMGET", key(n, "own"), "owner", "epoch")) for n in range(PARTITIONS)]


async def is_taken(worker: Worker, conversation: str, id: str) -> bool:
    try:
        await worker.append(conversation, id)
    except BackendUnavailable:
        return False
    return True


@pytest.mark.slow
async def test_a_redis_that_stands_still_takes_nothing_and_nobody_loses_a_partition(
    own_redis: RedisServer, start_worker: StartWorker
) -> None:
    """Redis stands still for longer than a lease: writes fail in time, then are taken; every owner is who it was."""
    a, b = await start_worker(url_of(own_redis)), await start_worker(url_of(own_redis))
    await settled(a, b)
    mine, theirs = conversation_of(a), conversation_of(b)
    await a.append(mine, "m0")
    before = await epochs(own_redis)
    own_redis.freeze()
    began = time.monotonic()
    asked: list[asyncio.Future[Any]] = [a.append(mine, "m1"), a.append(theirs, "m1"), b.append(theirs, "m2")]
    asked += [a.end(mine, 1, reply(mine, "m0")), asyncio.ensure_future(a.backend.ping())]
    asked += [asyncio.ensure_future(a.backend.read(mine, 0, 10)), a.backend.post(reply(mine, None), deliver=False)]
    for problem in await asyncio.gather(*asked, return_exceptions=True):
        assert isinstance(problem, BackendUnavailable), problem
    took = time.monotonic() - began
    with pytest.raises(BackendUnavailable):
        await a.append(mine, "late")
    again = time.monotonic() - began - took
    own_redis.thaw()
    thawed = time.monotonic()
    for worker, name in ((a, mine), (a, theirs), (b, theirs), (b, mine)):
        await wait_until(lambda w=worker, n=name: is_taken(w, n, f"after-{id(w)}"), "messages are taken", SOON_S)
    print(f"refused after {took:.1f} s and {again:.1f} s, taken {time.monotonic() - thawed:.2f} s after")  # noqa: T201
    await settled(a, b)
    assert await epochs(own_redis) == before
    ended = await a.end(mine, 1, reply(mine, "m0"), begun=a.heard.begun[0])
    assert ended is not None
    found = await a.backend.read(mine, 0, 100) or []
    assert [entry.id for entry in found].count("r1") <= 2  # the end, and the post, which was unsure
    assert [entry.id for entry in found if isinstance(entry, StoredReply) and entry.to == "m0"] == ["r1"]
    for worker, name in ((a, mine), (b, theirs)):
        entries = await worker.backend.read(name, 0, 100) or []
        messages = [entry.seq for entry in entries if not isinstance(entry, StoredReply)]
        await wait_until(lambda w=worker, n=name, m=messages: w.heard.seqs(n) == m, "all are begun, in order")
    assert a.heard.dropped == b.heard.dropped == []


async def test_nothing_accepted_is_lost_when_redis_is_killed(own_redis: RedisServer, start_worker: StartWorker) -> None:
    """Redis is killed under load and started again: all that was accepted is there with one reply, and it goes on."""
    a, b = await start_worker(url_of(own_redis)), await start_worker(url_of(own_redis))
    await settled(a, b)
    answering = [Answering(a), Answering(b)]
    accepted: dict[str, list[str]] = {f"k{n}": [] for n in range(20)}
    stop = asyncio.Event()

    async def speak(worker: Worker, name: str) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            if await is_taken(worker, name, f"m{number}"):
                accepted[name].append(f"m{number}")
            else:
                await asyncio.sleep(0.02)

    speaking = [asyncio.ensure_future(speak((a, b)[n % 2], name)) for n, name in enumerate(accepted)]

    def count() -> int:
        return sum(map(len, accepted.values()))

    for _ in range(3):
        before = count()
        await wait_until(lambda before=before: count() > before + 300, "messages are accepted", SOON_S)
        await own_redis.kill()
        await own_redis.start()
    before = count()
    await wait_until(lambda: count() > before + 100, "messages are accepted", SOON_S)
    stop.set()
    await asyncio.gather(*speaking)
    await settled(a, b)
    await answers(a, b)

    async def all_ended() -> bool:
        return not await a.backend.unfinished()

    await wait_until(all_ended, "every turn has ended")
    for one in answering:
        await one.aclose()
    for name, ids in accepted.items():
        entries = await a.backend.read(name, 0, 100_000) or []
        assert [entry.seq for entry in entries] == list(range(1, len(entries) + 1))
        messages = [entry.id for entry in entries if not isinstance(entry, StoredReply)]
        assert len(messages) == len(set(messages))
        assert set(ids) <= set(messages)
        assert [id for id in messages if id in set(ids)] == ids
        assert [entry.to for entry in entries if isinstance(entry, StoredReply)] == messages


@pytest.mark.parametrize("stays", [True, False], ids=["a worker is there", "a worker comes"])
async def test_what_redis_tore_in_its_file_when_it_was_killed_never_comes_to_be(
    own_redis: RedisServer, start_worker: StartWorker, stays: bool
) -> None:
    """Redis serves without a transaction that it had half written, and leaves that half for its next start to run."""
    a = await start_worker(url_of(own_redis))
    other = await start_worker(url_of(own_redis)) if stays else None
    if other is not None:
        await settled(a, other)
    name = conversation_of(a)
    await a.append(name, "m1")
    await a.end(name, 1, reply(name, "m1"))
    await a.append(name, "torn")
    await die(a)
    await own_redis.kill()
    tear(own_redis, b"torn")
    await own_redis.start()
    worker = other or await start_worker(url_of(own_redis))
    await answers(worker)
    await worker.append(name, "m2")
    await wait_until(own_redis.has_written_anew, "Redis has written its file anew")
    await own_redis.kill()
    await own_redis.start()
    await answers(worker)
    await worker.append(name, "m3")
    found = await worker.backend.read(name, 0, 100) or []
    assert [(entry.id, entry.seq) for entry in found] == [("m1", 1), ("r1", 2), ("m2", 3), ("m3", 4)]
    open_now = [(said.id, said.seq) for said, _ in await worker.backend.unfinished()]
    assert open_now == [("m2", 3), ("m3", 4)]


def tear(server: RedisServer, what: bytes) -> None:
    """Leave in its append-only file what a server has written that is killed while it writes down *what*."""
    path = max(server.folder.glob("appendonlydir/*.incr.aof"), key=lambda path: int(path.name.split(".")[2]))
    content = path.read_bytes()
    end = content.index(b"EXEC", content.rindex(what))
    path.write_bytes(content[: end + 2])


async def test_who_is_cut_off_is_succeeded_and_comes_back(own_redis: RedisServer, start_worker: StartWorker) -> None:
    """A worker that is cut off from Redis says so, is succeeded, can end nothing, and has its share again after."""
    async with await Link.open(own_redis.port) as link:
        a, b = await start_worker(url_of(own_redis, port=link.port)), await start_worker(url_of(own_redis))
        await settled(a, b)
        name = conversation_of(a)
        await a.append(name, "m1")
        await wait_until(lambda: a.heard.begun, "it is begun")
        begun = a.heard.begun[0]
        link.cut()
        with pytest.raises(BackendUnavailable):
            await a.append(name, "m2")
        await wait_until(lambda: b.heard.seqs(name) == [1], "another runs its turn", SOON_S)
        assert b.heard.begun[-1].attempt == 2
        await b.end(name, 1, reply(name, "m1", "by-b"))
        await link.heal()
        await answers(a)
        with pytest.raises(Exception, match="another worker"):
            await a.end(name, 1, reply(name, "m1", "by-a"), begun=begun)
        await settled(a, b)
        assert [entry.id for entry in await a.backend.read(name, 0, 10) or []] == ["m1", "by-b"]
        fresh = conversation_of(a)
        await b.append(fresh, "m1")
        await wait_until(lambda: a.heard.seqs(fresh) == [1], "it runs turns again")


async def test_a_redis_that_lost_its_data_goes_on(redis: RedisServer, start_worker: StartWorker) -> None:
    """All keys are gone under two workers: conversations begin anew at 1, and are run, and the shares are as before."""
    a, b = await start_worker(url_of(redis)), await start_worker(url_of(redis))
    await settled(a, b)
    name, other = conversation_of(a), conversation_of(b)
    for worker, one in ((a, name), (b, other)):
        for n in range(5):
            await worker.append(one, f"m{n}")
        await worker.end(one, 1, reply(one, "m0"))
    await redis.command("FLUSHALL")
    for worker in (a, b):
        worker.heard.begun.clear()
    for number, (worker, one) in enumerate([(a, name), (b, other), (b, name), (a, other)]):
        appended = await worker.append(one, f"m{number}")
        assert (appended.seq, appended.duplicate) == (number // 2 + 1, False)
    for one in (name, other):
        await wait_until(
            lambda one=one: sorted(a.heard.seqs(one) + b.heard.seqs(one)) == [1, 2], "both are run, once", SOON_S
        )
    await asyncio.gather(*(worker.answer(begun) for worker in (a, b) for begun in worker.heard.begun))
    await settled(a, b)
    for number in range(40):
        assert (await b.append(f"new{number}", "m")).seq == 1
    await wait_until(
        lambda: sum(len(worker.heard.seqs(f"new{n}")) for worker in (a, b) for n in range(40)) == 40, "all are run"
    )


async def test_a_redis_that_lost_its_data_under_one_worker_goes_on(
    redis: RedisServer, start_worker: StartWorker
) -> None:
    """All keys are gone under the only worker: it finds out, takes the partitions anew, and runs what comes."""
    worker = await start_worker(url_of(redis, partitions=256))
    await worker.append("c", "m1")
    await redis.command("FLUSHALL")
    worker.heard.begun.clear()
    assert (await worker.append("c", "m1")).seq == 1
    await wait_until(lambda: worker.heard.seqs("c") == [1], "it is run", 3)
    assert worker.heard.begun[0].record.state == b"{}"


async def test_a_redis_without_memory_takes_nothing_and_ends_turns(
    own_redis: RedisServer, start_worker: StartWorker
) -> None:
    """At its maxmemory Redis takes no message: that is said, and nothing of it is kept; with room again it goes on."""
    worker = await start_worker(url_of(own_redis))
    await worker.append("c", "m1")
    used = int((await own_redis.info("memory"))["used_memory"])
    await own_redis.command("CONFIG", "SET", "maxmemory", used // 2)
    for id in ("m2", "m3"):
        with pytest.raises(BackendUnavailable, match="memory") as failed:
            await worker.append("c", id, "x" * 1000)
        assert not failed.value.unsure
    assert [entry.id for entry in await worker.backend.read("c", 0, 10) or []] == ["m1"]
    assert int(await own_redis.command("XLEN", key(number_of(worker, "c"), "in"))) == 1
    await own_redis.command("CONFIG", "SET", "maxmemory", 0)
    appended = await worker.append("c", "m2")
    assert (appended.seq, appended.duplicate) == (2, False)
    ended = await worker.end("c", 1, reply("c", "m1"))
    assert ended is not None
    await wait_until(lambda: worker.heard.seqs("c") == [1, 2], "both are begun")


def number_of(worker: Worker, conversation: str) -> int:
    return int(worker.backend.partitions.of(conversation).number)  # type: ignore[attr-defined]
