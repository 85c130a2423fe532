"""The journal in Redis, with one owner: what it keeps there and for how long, and news and answers that get lost."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.backend.conftest import PARTITIONS, StartWorker, answers, conversation_of, drop_asking, key, settled, url_of
from tests.backend.worker import Answering, Worker, message, reply
from tests.redis_servers import Link, RedisServer, ReplyError

from conftest import wait_until
from hotdesk.backend import ConversationRecord, StoredReply
from hotdesk.backend import redis as redis_room
from hotdesk.errors import BackendUnavailable, MessageLost
from hotdesk_sdk import Message

LUA = Path(redis_room.__file__).with_name("lua")
HALF_DAY_S = 12 * 3600
NOON = 40_000 * HALF_DAY_S
"""A moment at which one bucket of ids ends and the next begins."""

_tags = itertools.count()


def number_of(worker: Worker, conversation: str) -> int:
    return int(worker.backend.partitions.of(conversation).number)  # type: ignore[attr-defined]


async def append_unheard(server: RedisServer, worker: Worker, *said: Message) -> None:
    """Append the way another worker does, but so that nobody is told of it: as if the news of it were lost."""
    source = (LUA / "append.lua").read_text()
    me: str = worker.backend.me  # type: ignore[attr-defined]
    commands: list[tuple[Any, ...]] = []
    for one in said:
        number, conversation = number_of(worker, one.conversation), one.conversation
        keys = [key(number, name) for name in ("own", "in", f"c:{conversation}", f"j:{conversation}", "seen")]
        bucket = key(number, f"id:{int(one.at // HALF_DAY_S)}")
        digest = hashlib.blake2b(f"{conversation}\0{one.id}".encode(), digest_size=16).digest()
        commands.append((
            "EVAL", source, 6, *keys, bucket, f"hotdesk{{{number}}}:", me, conversation, msgspec.json.encode(one),
            digest, one.at, "", "", 0, 999, f"t{next(_tags)}", 0,
        ))  # fmt: skip
    async with await server.open() as connection:
        assert not [answer for answer in await connection.pipeline(commands) if isinstance(answer, ReplyError)]


# -- what is kept, and for how long ------------------------------------------------------------------------------


async def test_an_id_costs_little_and_expires(redis: RedisServer, start_worker: StartWorker) -> None:
    """10,000 ids take at most 150 bytes each, and their bucket is gone within 48 h by itself."""
    worker = await start_worker(url_of(redis, partitions=1))
    for start in range(0, 10_000, 1000):
        await asyncio.gather(
            *(worker.append(f"c{n % 50}", f"visitor-message-{n:032}") for n in range(start, start + 1000))
        )
    [bucket] = await redis.command("KEYS", "hotdesk{0}:id:*")
    assert await redis.command("HLEN", bucket) == 10_000
    each = await redis.command("MEMORY", "USAGE", bucket, "SAMPLES", 0) / 10_000
    print(f"an id takes {each:.0f} bytes")  # noqa: T201
    assert each <= 150
    assert 24 * 3600 < await redis.command("TTL", bucket) <= 48 * 3600


@pytest.mark.parametrize("apart_s", [1, HALF_DAY_S, 24 * 3600 - 2])
async def test_a_repeat_is_found_for_a_day(redis: RedisServer, start_worker: StartWorker, apart_s: int) -> None:
    """A repeat is found for 24 h, in whatever bucket its first time was, also when this host's clock is behind."""
    worker = await start_worker(url_of(redis))
    for n, at in enumerate((NOON - 1, NOON, NOON + 5, NOON + HALF_DAY_S - 1)):
        assert not (await worker.append(f"c{n}", "m", at=at)).duplicate
        for later in (at + apart_s, at + apart_s + 0.5, at - 1):
            again = await worker.append(f"c{n}", "m", at=later)
            assert (again.seq, again.duplicate) == (1, True)
        assert not (await worker.append(f"c{n}", "m", at=at + 4 * HALF_DAY_S)).duplicate


async def test_the_stream_holds_what_is_open(redis: RedisServer, start_worker: StartWorker) -> None:
    """The streams hold just the messages whose turn has not ended, and nothing once all have."""
    worker = await start_worker(url_of(redis))
    await asyncio.gather(*(worker.append(f"c{n % 30}", f"m{n}") for n in range(300)))

    async def open_turns() -> int:
        return sum([await redis.command("XLEN", key(n, "in")) for n in range(PARTITIONS)])

    assert await open_turns() == 300
    await wait_until(lambda: len(worker.heard.begun) == 300, "all are begun")
    await asyncio.gather(*(worker.answer(begun) for begun in worker.heard.begun[:200]))
    assert await open_turns() == 100
    await asyncio.gather(*(worker.answer(begun) for begun in worker.heard.begun[200:]))
    assert await open_turns() == 0


async def test_nothing_is_left_of_what_was_purged(redis: RedisServer, start_worker: StartWorker) -> None:
    """After a purge of everything what is left is who owns what, empty streams, ids that expire, and the workers."""
    worker = await start_worker(url_of(redis))
    old = time.time() - 7 * 86400
    for n in range(20):
        await worker.append(f"c{n}", "m", at=old)
        answer = StoredReply("r", f"c{n}", 0, "m", "x", "p", 1, {}, old)
        changed = ConversationRecord(f"c{n}", "", "de", "ann", ("vip",), b'{"a":1}')
        await worker.end(f"c{n}", 1, answer, changed=changed, closed=n % 2 == 0, deliver=True)
    assert await worker.backend.purge(time.time() - 86400) == 20
    left = sorted(await redis.command("KEYS", "*"))
    needed = {key(n, name) for n in range(PARTITIONS) for name in ("own", "in")} | {
        f"hotdesk{{ctl}}:{name}" for name in ("members", "leases", "meta")
    }
    assert [name for name in left if name not in needed and ":id:" not in name] == []
    for name in left:
        if ":id:" in name:
            assert 0 < await redis.command("TTL", name) <= 48 * 3600


async def test_a_long_record_is_read_in_pieces(redis: RedisServer, start_worker: StartWorker) -> None:
    """What is read is what was asked for, whatever it is cut into: pieces of a quarter MiB, or one longer entry."""
    worker = await start_worker(url_of(redis))
    sizes = [300_000, 10, 100_000, 100_000, 100_000, *[20] * 40, 260_000, 262_144, *[70_000] * 8, *[30] * 15]
    texts = [str(n).ljust(size, ".") for n, size in enumerate(sizes)]
    for n, text in enumerate(texts):
        await worker.append("c", f"m{n}", text)
    for after, limit in itertools.product((0, 1, 3, 44, 47, len(sizes) - 1, len(sizes)), (1, 2, 16, 50, 10**6)):
        entries = await worker.backend.read("c", after, limit)
        assert entries is not None
        assert [(one.seq, one.text) for one in entries] == list(enumerate(texts, 1))[after : after + limit]
        history = await worker.backend.history("c", len(sizes) - after + 1, limit)
        below = list(enumerate(texts, 1))[: len(sizes) - after]
        assert [(one.seq, one.text) for one in history] == below[-limit:]
    assert await worker.backend.read("nobody", 0, 10) is None
    assert await worker.backend.read("nobody", 5, 10) is None
    assert await worker.backend.history("nobody", 5, 10) == []

    async def scripts() -> int:
        stats = (await redis.command("INFO", "commandstats")).split("cmdstat_evalsha:calls=")[1]
        return int(stats.partition(",")[0])

    before = await scripts()
    await worker.backend.read("c", 0, 10**6)
    assert await scripts() - before >= sum(sizes) // (256 * 1024)


async def test_an_outcome_is_of_the_message_that_was_meant(redis: RedisServer, start_worker: StartWorker) -> None:
    """Where Redis lost a message another may have its place: what became of the lost one, nobody knows."""
    worker = await start_worker(url_of(redis))
    await worker.append("c", "m1")
    assert not (await worker.backend.outcome("c", 1, "m1")).ended
    await worker.end("c", 1, reply("c", "m1"))
    assert [one.to for one in (await worker.backend.outcome("c", 1, "m1")).replies] == ["m1"]
    for seq, id in ((1, "another"), (2, "m1"), (3, "m3")):
        with pytest.raises(MessageLost):
            await worker.backend.outcome("c", seq, id)


async def test_commands_of_a_moment_travel_together(redis: RedisServer, start_worker: StartWorker) -> None:
    """2,000 writes that are asked for together go in far fewer batches, and are counted."""
    worker = await start_worker(url_of(redis))
    writes, batches = "hotdesk_backend_writes_total", "hotdesk_backend_commit_seconds_count"
    before = worker.metric(writes), worker.metric(batches)
    await asyncio.gather(*(worker.append(f"c{n % 50}", f"m{n}") for n in range(2000)))
    assert worker.metric(writes) - before[0] >= 2000
    assert worker.metric(batches) - before[1] < 100


# -- news that were lost -----------------------------------------------------------------------------------------


async def test_a_message_whose_news_is_lost_is_found(redis: RedisServer, start_worker: StartWorker) -> None:
    """Messages that nobody told of are run, in order, before the next one of their partition that is heard of."""
    worker = await start_worker(url_of(redis, partitions=1))
    await worker.append("c", "m1")
    await append_unheard(redis, worker, *(message("c", f"m{n}") for n in range(2, 6)))
    await worker.append("c", "m6")
    await wait_until(lambda: len(worker.heard.begun) >= 6, "all are begun")
    assert worker.heard.seqs("c") == [1, 2, 3, 4, 5, 6]


async def test_a_long_gap_is_filled_in_order(redis: RedisServer, start_worker: StartWorker) -> None:
    """A gap of more messages than one look shows is run in order too, before what was heard of behind it."""
    worker = await start_worker(url_of(redis, partitions=1))
    await worker.append("c", "m0")
    await append_unheard(redis, worker, *(message("c", f"m{n}") for n in range(1, 1201)))
    await worker.append("c", "last")
    await wait_until(lambda: len(worker.heard.begun) >= 1202, "all are begun")
    assert worker.heard.seqs("c") == list(range(1, 1203))


async def test_a_message_without_a_successor_is_found(redis: RedisServer, start_worker: StartWorker) -> None:
    """A message whose news is lost is run also when no other comes after it."""
    worker = await start_worker(url_of(redis))
    names = [conversation_of(worker) for _ in range(20)]
    await append_unheard(redis, worker, *(message(name, "m") for name in names))
    await wait_until(lambda: len(worker.heard.begun) == 20, "all are begun")
    assert sorted(begun.message.conversation for begun in worker.heard.begun) == sorted(names)


async def test_what_is_said_while_nobody_hears_is_made_up_for(redis: RedisServer, start_worker: StartWorker) -> None:
    """The listening connections are killed again and again under load: every message is begun once, in order."""
    url = url_of(redis, partitions=32)
    a, b = await start_worker(url), await start_worker(url)
    await settled(a, b)
    names = [conversation_of(worker) for worker in (a, b) for _ in range(10)]
    followed = names[0]
    b.backend.follow(followed, True)
    await wait_until(lambda: followed in b.heard.resynced, "it listens")
    killed, sent = 0, 0
    while killed < 8:
        await asyncio.gather(*((a, b)[n % 2].append(names[n % 20], f"m{sent}-{n}") for n in range(60)))
        sent += 1
        if sent % 3 == 0:
            b.heard.resynced.clear()
            a.heard.resyncs_of_turns = b.heard.resyncs_of_turns = 0
            killed += await redis.command("CLIENT", "KILL", "TYPE", "pubsub") > 0
            await wait_until(lambda: a.heard.resyncs_of_turns and b.heard.resyncs_of_turns, "both hear again")
            await wait_until(lambda: followed in b.heard.resynced, "readers are told to look")
    for n, name in enumerate(names):
        owner = a if n < 10 else b
        await wait_until(lambda owner=owner, name=name: len(owner.heard.seqs(name)) >= 3 * sent, "all are begun")
        assert owner.heard.seqs(name) == list(range(1, 3 * sent + 1))
    b.backend.follow(followed, False)


async def test_what_is_said_in_a_break_is_found_at_its_end(redis: RedisServer, start_worker: StartWorker) -> None:
    """Messages that came while a worker heard nothing are run as soon as it hears again, of however many partitions."""
    url = url_of(redis, partitions=256)
    a, b = await start_worker(url), await start_worker(url)
    await settled(a, b)
    names = [conversation_of(a) for _ in range(60)]
    await redis.command("CLIENT", "KILL", "TYPE", "pubsub")
    await asyncio.gather(*(b.append(name, "m1") for name in names))
    assert len(a.heard.begun) < 60
    await wait_until(lambda: len(a.heard.begun) == 60, "all are begun", 3)  # a look through all takes 32 s


# -- answers that were lost --------------------------------------------------------------------------------------


async def in_redis(server: RedisServer, worker: Worker, conversation: str, count: int) -> None:
    """Wait until *count* entries of a conversation are there."""
    name = key(number_of(worker, conversation), f"j:{conversation}")

    async def kept() -> bool:
        return bool(await server.command("LLEN", name) >= count)

    await wait_until(kept, f"{count} entries are in Redis")


async def test_an_append_whose_answer_is_lost_is_run(redis: RedisServer, start_worker: StartWorker) -> None:
    """The answer to an append is cut off: it fails as unsure, its turn is run soon all the same, a repeat finds it."""
    async with await Link.open(redis.port) as link:
        worker = await start_worker(url_of(redis, partitions=256, port=link.port))
        await worker.append("c", "m0")
        link.delay_s = 0.2
        lost = worker.append("c", "m1")
        await in_redis(redis, worker, "c", 2)
        await drop_asking(link, redis)
        with pytest.raises(BackendUnavailable) as failed:
            await lost
        assert failed.value.unsure
        link.delay_s = 0.0

        async def is_repeat() -> bool:
            try:
                again = await worker.append("c", "m1")
            except BackendUnavailable:
                return False
            assert (again.seq, again.duplicate, again.open, again.here) == (2, True, True, False)
            return True

        await wait_until(is_repeat, "the repeat is answered")
        await wait_until(lambda: worker.heard.seqs("c") == [1, 2], "its turn runs", 3)


@pytest.mark.parametrize("count", [0, 1, 2])
async def test_an_end_whose_answer_is_lost_is_kept_once(
    redis: RedisServer, start_worker: StartWorker, count: int
) -> None:
    """The answer to a turn's end is cut off: it fails as unsure, and when it is tried again it is found to be kept."""
    changed = ConversationRecord("c", "", "de", "ann", (), b'{"n":1}')
    replies = [reply("c", "m1", f"r{n}") for n in range(count)]
    async with await Link.open(redis.port) as link:
        worker = await start_worker(url_of(redis, port=link.port))
        await worker.append("c", "m1")
        await wait_until(lambda: worker.heard.begun, "it is begun")
        begun = worker.heard.begun[0]
        link.delay_s = 0.2
        lost = worker.end("c", 1, *replies, changed=changed, begun=begun)
        stream = key(number_of(worker, "c"), "in")

        async def ended() -> bool:
            return bool(await redis.command("XLEN", stream) == 0)

        await wait_until(ended, "the end is in Redis")
        await drop_asking(link, redis)
        with pytest.raises(BackendUnavailable) as failed:
            await lost
        assert failed.value.unsure
        link.delay_s = 0.0
        kept: list[Any] = []

        async def ends() -> bool:
            try:
                kept.append(await worker.end("c", 1, *replies, changed=changed, begun=begun))
            except BackendUnavailable:
                return False
            return True

        await wait_until(ends, "the end is tried again")
        await answers(worker)
        assert kept[0] is not None
        assert [(one.id, one.seq) for one in kept[0]] == [(f"r{n}", n + 2) for n in range(count)]
        assert len(await worker.backend.read("c", 0, 10) or []) == 1 + count
        again = await worker.append("c", "m2")
        assert again.conversation == changed
        assert await worker.backend.record("c") == changed


async def test_nothing_is_lost_or_doubled_when_all_connections_are_killed(
    redis: RedisServer, start_worker: StartWorker
) -> None:
    """All connections are killed again and again under load: what is kept has just one reply."""
    url = url_of(redis, partitions=256)
    workers = [await start_worker(url), await start_worker(url)]
    answering = [Answering(worker) for worker in workers]
    accepted: dict[str, set[str]] = {f"c{n}": set() for n in range(40)}
    tried: dict[str, set[str]] = {name: set() for name in accepted}
    stop = asyncio.Event()

    async def speak(worker: Worker, name: str) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            id = f"m{number}"
            tried[name].add(id)
            try:
                await worker.append(name, id)
                accepted[name].add(id)
            except BackendUnavailable:
                await asyncio.sleep(0.02)
                if number % 2:
                    number -= 1

    speaking = [asyncio.ensure_future(speak(workers[n % 2], name)) for n, name in enumerate(accepted)]
    for _ in range(10):
        count = sum(map(len, accepted.values()))
        await wait_until(lambda count=count: sum(map(len, accepted.values())) > count + 150, "messages are accepted")
        async with await redis.open() as connection:
            await connection.pipeline([("CLIENT", "KILL", "TYPE", kind) for kind in ("normal", "pubsub")])
    stop.set()
    await asyncio.gather(*speaking)

    async def all_ended() -> bool:
        try:
            return not await workers[0].backend.unfinished()
        except BackendUnavailable:
            return False

    await wait_until(all_ended, "every turn has ended", 5)
    for one in answering:
        await one.aclose()
    for name, ids in accepted.items():
        entries = await workers[0].backend.read(name, 0, 100_000) or []
        messages = [entry.id for entry in entries if not isinstance(entry, StoredReply)]
        assert len(messages) == len(set(messages))
        assert ids <= set(messages) <= tried[name]
        assert [entry.to for entry in entries if isinstance(entry, StoredReply)] == messages


async def test_scripts_that_are_flushed_are_loaded_again(redis: RedisServer, start_worker: StartWorker) -> None:
    """SCRIPT FLUSH under load: every append is kept, in order, and every turn ends."""
    worker = await start_worker(url_of(redis))
    Answering(worker)
    asked: list[asyncio.Future[Any]] = []
    for n in range(30):
        asked += [worker.append(f"c{n % 5}", f"m{n}-{k}") for k in range(20)]
        if n % 5 == 0:
            await redis.command("SCRIPT", "FLUSH")
            await asyncio.gather(*asked)
    await asyncio.gather(*asked)
    await wait_until(lambda: len(worker.heard.begun) >= 600, "all are begun")
    for n in range(5):
        assert worker.heard.seqs(f"c{n}") == sorted(worker.heard.seqs(f"c{n}"))
        assert len(worker.heard.seqs(f"c{n}")) == 120

    async def all_ended() -> bool:
        return not await worker.backend.unfinished()

    await wait_until(all_ended, "every turn has ended")


async def test_an_append_that_waits_for_a_record_ends_with_its_partition(
    redis: RedisServer, start_worker: StartWorker
) -> None:
    """An append that is kept says so also when its partition goes to another worker in that moment."""
    async with await Link.open(redis.port) as link:
        a, b = await start_worker(url_of(redis, port=link.port)), await start_worker(url_of(redis))
        await settled(a, b)
        name = conversation_of(a)
        await b.append(name, "m1")
        await wait_until(lambda: a.heard.seqs(name) == [1], "it runs")
        backend: Any = a.backend
        backend.partitions.of(name).records.clear()  # as when 20,000 others were talked to since
        link.delay_s = 0.15
        await b.append(name, "m2")
        mine = asyncio.ensure_future(a.append(name, "m3"))
        await wait_until(lambda: name in backend.partitions.of(name).waiting_record, "the record is asked for")
        await in_redis(redis, a, name, 3)
        waiting = backend.partitions.of(name).waiting_record[name]
        await wait_until(lambda: len(waiting) == 2 or mine.done(), "the append waits for it too")
        link.delay_s = 0.0
        await a.aclose()
        async with asyncio.timeout(5):
            appended = await mine
        assert (appended.seq, appended.here) == (3, False)
        await wait_until(lambda: b.heard.seqs(name)[-2:] == [2, 3], "the other runs them")
