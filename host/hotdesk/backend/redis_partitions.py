"""The partitions of the journal: which are this worker's, and what of them is to be run, in order.

Conversations hash to partitions; all keys of one stand under one hash tag. A partition has one owner, named in Redis
with an **epoch** that grows with every change of hands; what an owner writes goes through a script that looks at both,
so one that was stopped, cut off or robbed can do no harm (the fencing token of Kleppmann, "How to do distributed
locking", 2016). Messages are numbered within their partition (`n`), whoever appends them; the owner begins them in that
order, by its own count: a gap is looked up in the stream, which holds just the messages whose turn has not ended.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
from redis.crc import key_slot

from hotdesk_sdk import Message

from ..errors import BackendError, BackendUnavailable
from ..logs import get_log
from . import SUSPECT_TRIES, ConversationRecord, Entry, Listener, StoredReply
from .redis_servers import Servers
from .redis_wire import Command, Scripts, Way, own_task

__all__ = ["Calls", "Fence", "Partition", "Partitions", "decode_entry", "read_record"]

PAGE = 500
"""Open messages that are looked at in one go, at the most."""

PAGE_BYTES = 1 << 20
"""And how long their texts are together, but for the last twenty: an answer holds up Redis and this worker's loop."""

UNTOLD_S = 30
"""How old an entry may be whose news its worker took to the grave, with the clocks of hosts apart."""

GAP_S = 0.03
"""How long the news of a message may take before it is looked up."""

WARM = 20_000
"""Conversations whose records are kept in memory, of all partitions together."""

decode_entry = msgspec.json.Decoder(Entry).decode
_decode_tags = msgspec.json.Decoder(tuple[str, ...]).decode

FIELDS = ("ch", "lo", "as", "tg", "st")


def read_record(conversation: str, row: list[bytes | None]) -> ConversationRecord:
    """A conversation's record from its fields."""
    channel, locale, assignee, tags, state = row
    return ConversationRecord(
        conversation,
        channel.decode() if channel else "",
        locale.decode() if locale else None,
        assignee.decode() if assignee is not None else None,
        _decode_tags(tags) if tags else (),
        state or b"{}",
    )


class Calls:
    """Scripts and commands, with a future for each answer."""

    def __init__(self, servers: Servers, scripts: Scripts) -> None:
        self._servers = servers
        self._scripts = scripts
        self._loop = asyncio.get_running_loop()

    def script(
        self, name: str, slot: int, keys: tuple[str | bytes, ...], *args: Any, way: Way = Way.TURNS
    ) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = self._loop.create_future()
        self._servers.send(Command(self._scripts.pack(name, keys, args), future, slot, way is Way.TURNS), way)
        return future

    def command(self, slot: int, *args: Any, way: Way = Way.ASIDE) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = self._loop.create_future()
        self._servers.send(Command(args, future, slot, way is Way.TURNS), way)
        return future

    def tell(self, partition: Partition, channel: str, news: bytes) -> asyncio.Future[Any]:
        """Say *news* after what was asked for before."""
        future: asyncio.Future[Any] = self._loop.create_future()
        self._servers.send(Command(("SPUBLISH", channel, news), future, partition.slot, False))
        return future


class Fence:
    """What a turn shows when it writes: by whose leave it runs, and which message it is for."""

    __slots__ = (
        "chunks",
        "conversation",
        "epoch",
        "heard",
        "joined",
        "n",
        "origin",
        "partition",
        "seq",
        "tag",
        "tracked",
        "tries",
        "unsure",
    )

    def __init__(
        self, partition: Partition, n: int, tag: str, *, conversation: str, seq: int, origin: str, chunks: bool,
        tries: int = 0, tracked: bool = False,
    ) -> None:  # fmt: skip
        self.partition = partition
        self.epoch = partition.epoch
        self.n = n
        self.tag = tag
        self.conversation = conversation
        self.seq = seq
        self.origin = origin
        self.chunks = chunks
        self.tries = tries
        self.tracked = tracked
        """It was begun before, and Redis has a count of the tries that may have ended their worker."""

        self.unsure = False
        """An end of it was sent and its answer never came."""

        self.joined = 0
        """How often somebody elsewhere began to listen while it ran."""

        self.heard = True
        """Somebody may listen to its chunks elsewhere."""

    def close(self) -> None:
        """Nothing runs by this leave any more."""
        partition = self.partition
        if partition.open.get(self.n) is self:
            del partition.open[self.n]
            if partition.on_quiet is not None and not partition.open:
                partition.on_quiet()


class Partition:
    """One partition, as this worker knows it."""

    __slots__ = (
        "base", "done", "epoch", "followed", "giving", "heir", "held", "holding", "keys", "loading", "next", "number",
        "on_quiet", "open", "own", "records", "slot", "waiting_record",
    )  # fmt: skip

    def __init__(self, prefix: str, number: int) -> None:
        self.number = number
        self.base = f"{prefix}{{{number}}}:"
        self.own = self.base + "own"
        self.slot: int = key_slot(self.own.encode())
        self.epoch: str | None = None
        """Not None: it is this worker's."""

        self.loading = False
        """It is being taken over: what comes is held."""

        self.heir = False
        """It was taken from a worker that died, and not yet looked at."""

        self.holding = False
        """It is being handed over: nothing new is begun."""

        self.giving: asyncio.Task[None] | None = None
        self.on_quiet: Callable[[], None] | None = None
        """Called the moment nothing of it runs."""

        self.next = 1
        """The number of the message to begin next: this worker's own watermark."""

        self.held: dict[int, Callable[[bool], None]] = {}
        self.open: dict[int, Fence] = {}
        self.done: set[int] | None = None
        self.followed: dict[str, int] = {}
        """Conversations that somebody listens to here, and how many."""

        self.records: dict[str, ConversationRecord] = {}
        self.waiting_record: dict[str, list[tuple[Callable[[ConversationRecord], None], Callable[[], None]]]] = {}
        self.keys = {name: self.base + name for name in ("in", "seen", "dlv", "tries", "dead")}

    @property
    def mine(self) -> bool:
        return self.epoch is not None

    def conversation_key(self, conversation: str) -> str:
        return f"{self.base}c:{conversation}"

    def journal_key(self, conversation: str) -> str:
        return f"{self.base}j:{conversation}"

    def inbox(self, worker: str) -> str:
        return f"{self.base}h:{worker}"

    def channel(self, conversation: str) -> str:
        return f"{self.base}e:{conversation}"


class Partitions:
    """All partitions, and what comes to those that are this worker's."""

    def __init__(self, prefix: str, count: int, calls: Calls, me: str, url: str) -> None:
        self.all = tuple(Partition(prefix, number) for number in range(count))
        self._calls = calls
        self._me = me
        self._url = url
        self._loop = asyncio.get_running_loop()
        self._warm = max(32, WARM // count)
        self._tasks: set[asyncio.Task[Any]] = set()
        self.doubtful: set[Partition] = set()
        """To be compared with Redis at the next beat: an answer was lost, or the last try failed."""

        self.listener: Listener
        self.on_robbed: Callable[[], None] = lambda: None
        """Told when a partition turns out to be another's, or nobody's."""

        self.on_change: Callable[[Partition], None] = lambda partition: None
        """Told when a partition became this worker's, or is so no longer."""

        self.on_load: Callable[[Partition], object] = lambda partition: None
        """Told when a partition became this worker's, once what is open of it is begun."""

        self.untold: set[tuple[Partition, str]] = set()
        """Conversations whose readers may not have been told of all that was kept: to be told at the next beat."""

        self.unread: set[Partition] = set()
        """Partitions of whose newest conversations the same is true."""

    def of(self, conversation: str) -> Partition:
        """The partition of a conversation: the same on every host, for ever."""
        return self.all[zlib.crc32(conversation.encode()) % len(self.all)]

    def spawn(self, coro: Any) -> asyncio.Task[Any]:
        task = own_task(coro)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # -- what comes, in order --------------------------------------------------------------------------------

    def arrive(self, partition: Partition, n: int, begin: Callable[[bool], None]) -> None:
        """Message *n* is there: *begin* is called in its place with True, or with False when it is not to be begun."""
        if partition.loading:
            partition.held[n] = begin
        elif not partition.mine or partition.holding or n < partition.next:
            begin(False)
        elif n == partition.next:
            partition.next += 1
            begin(True)
            if partition.held:
                self._begin_held(partition)
        else:
            partition.held[n] = begin
            self._expect(partition)

    def _begin_held(self, partition: Partition) -> None:
        while (begin := partition.held.pop(partition.next, None)) is not None:
            partition.next += 1
            begin(True)
        if partition.held:
            self._expect(partition)

    def _expect(self, partition: Partition) -> None:
        """Look for the next message in the stream unless its news comes soon."""
        self._loop.call_later(GAP_S, self._look_for_gap, partition, partition.next)

    def _look_for_gap(self, partition: Partition, missing: int) -> None:
        if partition.mine and partition.held and partition.next == missing and not partition.loading:
            self.spawn(self.resync(partition))

    def with_record(
        self, partition: Partition, conversation: str, record: ConversationRecord | None,
        use: Callable[[ConversationRecord], None], lost: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """Call *use* with the conversation's record, after those who asked before, or *lost* if it is lost first."""
        waiting = partition.waiting_record.get(conversation)
        if waiting is not None:
            waiting.append((use, lost))
            return
        known = partition.records.get(conversation)
        if known is None and record is not None:
            known = self.keep_record(partition, record)
        if known is not None:
            use(known)
            return
        partition.waiting_record[conversation] = [(use, lost)]
        self.spawn(self._load_record(partition, conversation, partition.epoch))

    def keep_record(self, partition: Partition, record: ConversationRecord) -> ConversationRecord:
        records = partition.records
        records[record.id] = record
        if len(records) > self._warm:
            for name in list(records)[: len(records) // 4]:
                del records[name]
        return record

    async def _load_record(self, partition: Partition, conversation: str, epoch: str | None) -> None:
        while partition.epoch == epoch:
            try:
                row = await self._calls.command(
                    partition.slot, "HMGET", partition.conversation_key(conversation), *FIELDS
                )
                break
            except BackendError:
                await asyncio.sleep(0.1)
        if partition.epoch != epoch:
            return  # who owns it now runs them
        record = self.keep_record(partition, read_record(conversation, row))
        for use, _ in partition.waiting_record.pop(conversation, []):
            use(record)

    def run(
        self, partition: Partition, message: Message, *, n: int, tag: str, origin: str, chunks: bool, opened: bool,
        tries: int = 0, tracked: bool = False,
    ) -> None:  # fmt: skip
        """Have the turn of a message that came from elsewhere begun."""
        conversation = message.conversation

        def use(record: ConversationRecord) -> None:
            if not partition.mine:
                return
            fence = Fence(
                partition, n, tag, conversation=conversation, seq=message.seq, origin=origin, chunks=chunks,
                tries=tries, tracked=tracked,
            )  # fmt: skip
            attempt = max(tries + 1, 2 if tracked else 1)
            partition.open[n] = fence
            own = origin == self._me

            def begin() -> None:
                if partition.open.get(n) is fence:
                    self.listener.run(message, record, attempt=attempt, opened=opened, fence=fence, own=own)

            # not before those whose append was answered just now: who waits for the answer begins them in the next tick
            self._loop.call_soon(begin, context=contextvars.Context())

        self.with_record(partition, conversation, None, use)

    # -- changes of hands ------------------------------------------------------------------------------------

    async def load(self, partition: Partition, epoch: str, *, crashed: bool) -> int:
        """This worker owns *partition* now: run what is open. Returns how many that are; 0 too when it is lost again.

        *crashed*: whoever owned it before may have died of the first open turn of any conversation.
        """
        partition.loading = True
        partition.records.clear()
        entries: list[Any] = []
        tries: dict[bytes, bytes] = {}
        undelivered: list[bytes] = []
        try:
            after, highest = 0, 0
            while True:
                owner, has, last, page, more, waiting, tried = await self._look(
                    partition, after, undelivered=not after, tries=not after
                )
                if (owner, has) != (self._me, epoch):
                    self._release_held(partition)
                    return 0
                highest = max(highest, last)
                entries += page
                if not after:
                    undelivered, tries = waiting, dict(zip(tried[::2], tried[1::2], strict=True))
                if not more:
                    break
                after = int(page[-1][0].partition(b"-")[0])
            records = await self._read_records(
                partition, {decode_entry(_fields(entry)[b"b"]).conversation for entry in entries}
            )
            replies = _undelivered(undelivered)
            records |= await self._read_records(
                partition, {reply.conversation for reply in replies if reply.conversation not in records}
            )
        except BaseException:
            partition.loading = False
            self._release_held(partition)
            raise
        partition.epoch = epoch
        partition.loading = partition.heir = False
        for name, record in records.items():
            partition.records[name] = record
        partition.next = highest + 1
        self.on_change(partition)
        heads: set[str] = set()
        for entry in entries:
            begin = self._begin_of(partition, entry, tries, heads if crashed else None)
            if partition.mine:
                begin(True)
        for reply in replies:
            if partition.mine and reply.conversation in records:
                self.listener.redeliver(reply, records[reply.conversation])
        for n in sorted(n for n in partition.held if n <= highest):
            partition.held.pop(n)(False)  # begun just now
        self._begin_held(partition)
        self.on_load(partition)
        return len(entries)

    def _begin_of(
        self, partition: Partition, entry: Any, tries: dict[bytes, bytes], heads: set[str] | None
    ) -> Callable[[bool], None]:
        n = int(entry[0].partition(b"-")[0])
        fields = _fields(entry)
        message = decode_entry(fields[b"b"])
        assert isinstance(message, Message)
        msgspec.structs.force_setattr(message, "seq", int(fields[b"s"]))
        tracked = str(n).encode() in tries
        tried = int(tries.get(str(n).encode(), 0))
        is_head = heads is not None and message.conversation not in heads
        if heads is not None:
            heads.add(message.conversation)
        if is_head and tried < SUSPECT_TRIES:  # more often than that, each try is counted as it begins
            tried, tracked = tried + 1, True
            counting = self._calls.command(partition.slot, "HINCRBY", partition.keys["tries"], str(n), 1, way=Way.TURNS)
            counting.add_done_callback(swallow)

        def begin(now: bool) -> None:
            if now:
                self.run(
                    partition, message, n=n, tag=fields[b"t"].decode(), origin=fields[b"o"].decode(),
                    chunks=fields[b"w"] == b"1", opened=message.seq == 1 and not tracked, tries=tried, tracked=tracked,
                )  # fmt: skip

        return begin

    async def _look(
        self, partition: Partition, after: int, *, undelivered: bool = False, tries: bool = True
    ) -> tuple[str, str, int, list[Any], bool, list[bytes], list[bytes]]:
        keys = partition.keys
        owner, epoch, last, page, more, waiting, tried = await self._calls.script(
            "look", partition.slot, (partition.own, keys["in"], keys["dlv"], keys["tries"]),
            after, PAGE, PAGE_BYTES, int(undelivered), int(tries), way=Way.ASIDE,
        )  # fmt: skip
        return owner.decode(), epoch.decode(), int(last), page, bool(more), waiting, tried

    async def _read_records(self, partition: Partition, names: Iterable[str]) -> dict[str, ConversationRecord]:
        asked = {
            name: self._calls.command(partition.slot, "HMGET", partition.conversation_key(name), *FIELDS)
            for name in names
        }
        await asyncio.gather(*asked.values(), return_exceptions=True)
        return {name: read_record(name, await row) for name, row in asked.items()}

    async def resync(self, partition: Partition) -> None:
        """Compare what is open in Redis with what runs here: news may have been missed, or data lost."""
        if partition.done is not None:
            self.doubtful.add(partition)  # what is in doubt since may not be in what is looked at now
            return
        if not partition.mine or partition.loading:
            return
        epoch = partition.epoch
        done: set[int] = set()
        partition.done = done
        try:
            after = 0
            while True:
                begun = partition.next - 1
                owner, has, last, page, more, _, tried = await self._look(partition, after)
                if partition.epoch != epoch:
                    return
                if (owner, has) != (self._me, epoch):
                    self.rob(partition)
                    return
                if last < begun:
                    get_log().error("partition_went_back", partition=partition.number, to=last, was=begun)
                    partition.next = last + 1
                if not more:
                    self._catch_up(partition, page, tried, last, done)
                    return
                after = int(page[-1][0].partition(b"-")[0])
                self._catch_up(partition, page, tried, after, done)
        except BackendUnavailable:
            self.doubtful.add(partition)
        finally:
            partition.done = None

    def _catch_up(self, partition: Partition, page: list[Any], tried: list[bytes], last: int, done: set[int]) -> None:
        """Run what *page*, which shows all that is open up to the message *last*, has and this worker did not know."""
        tries = dict(zip(tried[::2], tried[1::2], strict=True))
        for entry in page:
            n = int(entry[0].partition(b"-")[0])
            fence = partition.open.get(n)
            if n in done or (fence is not None and fence.tag == _fields(entry)[b"t"].decode()):
                continue
            begin = self._begin_of(partition, entry, tries, None)
            if n < partition.next:
                if fence is not None:  # of a message that Redis lost: its number is another's by now
                    del partition.open[n]
                if not partition.holding and not self._waits(partition, entry):
                    begin(True)
            elif n <= last:
                partition.held.setdefault(n, begin)
        while partition.next <= last:  # what is not in the stream has ended, or never was
            held = partition.held.pop(partition.next, None)
            partition.next += 1
            if held is not None:
                held(not partition.holding)
        self._begin_held(partition)

    def _waits(self, partition: Partition, entry: Any) -> bool:
        """Whether the message waits for its conversation's record already."""
        return decode_entry(_fields(entry)[b"b"]).conversation in partition.waiting_record

    # -- news that may not have been told ---------------------------------------------------------------------

    def doubt_news(self, partition: Partition) -> None:
        """Who had *partition* may have kept what it had not told yet."""
        self.unread.add(partition)

    def doubt_all_news(self) -> None:
        """A worker has gone, and may have kept what it had not told yet: to readers, or to this one as the owner."""
        mine = [partition for partition in self.all if partition.mine]
        self.unread.update(mine)
        self.doubtful.update(mine)

    async def have_read(self) -> None:
        """Have readers everywhere look at what they may not have been told of."""
        untold, self.untold = self.untold, set()
        unread, self.unread = self.unread, set()
        for partition, conversation in untold:
            self._have_read(partition, conversation)
        await asyncio.gather(*map(self._have_newest_read, unread))

    async def _have_newest_read(self, partition: Partition) -> None:
        newest = (partition.keys["seen"], time.time() - UNTOLD_S, "+inf", "BYSCORE")
        try:
            names = await self._calls.command(partition.slot, "ZRANGE", *newest)
        except BackendError:
            self.unread.add(partition)
            return
        for name in names:
            self._have_read(partition, name.decode())

    def _have_read(self, partition: Partition, conversation: str) -> None:
        def said(done: asyncio.Future[Any]) -> None:
            if not done.cancelled() and done.exception() is not None:
                self.untold.add((partition, conversation))

        self._calls.tell(partition, partition.channel(conversation), b"R").add_done_callback(said)
        if conversation in partition.followed:
            self.listener.resync(conversation)

    def rob(self, partition: Partition) -> None:
        """*partition* turns out not to be this worker's."""
        self.lose(partition)
        self.on_robbed()

    def lose(self, partition: Partition) -> None:
        """Another worker owns *partition*: nothing of it is run here any more."""
        if partition.epoch is None:
            return
        partition.epoch = None
        partition.holding = False
        partition.open.clear()
        partition.records.clear()
        waiting, partition.waiting_record = partition.waiting_record, {}
        for uses in waiting.values():
            for _, lost in uses:
                lost()
        self._release_held(partition)
        self.listener.drop(lambda conversation: self.of(conversation) is partition)
        self.on_change(partition)

    def _release_held(self, partition: Partition) -> None:
        held, partition.held = partition.held, {}
        partition.loading = False
        for begin in held.values():
            begin(False)

    def ended(self, fence: Fence) -> None:
        """A turn's end is in Redis, and was told to who waits for it.

        It counts as open until that one has dealt with it: a partition that is given away before would take it along.
        """
        if fence.partition.done is not None:
            fence.partition.done.add(fence.n)
        self._loop.call_soon(fence.close, context=contextvars.Context())

    async def aclose(self) -> None:
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def swallow(future: asyncio.Future[Any]) -> None:
    """Nobody waits for this answer; a failure of it is another's to tell."""
    if not future.cancelled():
        future.exception()


def _fields(entry: Any) -> dict[bytes, bytes]:
    flat = entry[1]
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _undelivered(rows: list[bytes]) -> list[StoredReply]:
    """Replies by their conversation and seq."""
    replies = []
    for field, body in zip(rows[::2], rows[1::2], strict=True):
        reply = decode_entry(body)
        assert isinstance(reply, StoredReply)
        msgspec.structs.force_setattr(reply, "seq", int(field.partition(b" ")[0]))
        replies.append(reply)
    return sorted(replies, key=lambda reply: (reply.conversation, reply.seq))
