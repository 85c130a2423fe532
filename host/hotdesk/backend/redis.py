"""The journal in Redis, shared by many workers on many hosts.

Any worker appends to any conversation; the owner of its partition runs the turn (`redis_partitions`), by a lease
(`redis_members`); all that has to hold together is one script (`lua/`). Keys of partition p, below `PREFIX{p}:`

own     hash    owner, epoch, n (messages ever numbered), refused (writes of owners with an old epoch)
in      stream  messages whose turn has not ended, `n-0`: what is answered is deleted, what is not is never trimmed
c:NAME  hash    a conversation's record; o<seq> for each open turn; x while it is closed
j:NAME  list    its journal: the entry with seq s is the s-th
id:B    hash    ids that came in the twelve hours B, by a digest of 16 bytes
seen    zset    conversations by the time of their last entry
dlv     hash    replies that a channel has not confirmed
tries   hash    how often an open turn was begun by a worker that died

and PREFIX{ctl}:members, PREFIX{ctl}:leases, PREFIX{ctl}:meta, PREFIX{kv:PLUGIN}:kv, PREFIX{shelf}:… (`redis_shelf`).
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
from redis.crc import key_slot

from hotdesk_sdk import Message

from ..errors import BackendError, BackendUnavailable, MessageLost, StaleOwner
from ..logs import get_log
from ..metrics import Metrics
from . import Appended, ConversationRecord, DeadLetter, Listener, StoredReply, TurnEnd
from .redis_durability import look_at_servers, renew_files
from .redis_hearing import Head, Hearing
from .redis_members import About, Members
from .redis_partitions import Calls, Fence, Partition, Partitions, read_record
from .redis_servers import Servers, open_servers
from .redis_shelf import RedisShelf
from .redis_url import RedisUrl, read_redis_url
from .redis_wire import Scripts, Way

__all__ = ["RedisBackend"]

T = TypeVar("T")

BUCKET_S = 12 * 3600
"""An id is looked for in the bucket of now, the one after (another host's clock may be ahead) and two before."""

BUCKET_TTL_S = 4 * BUCKET_S

LOOK_S = 30.0
"""How often Redis' own settings are read again."""

LOOK_AGAIN_S = 0.5
"""And how soon where they could not be."""

SIGNAL_S = 2.0
"""How long the owner of a conversation has to answer another worker."""


_encode = msgspec.json.Encoder().encode


class RedisBackend(Hearing):
    """See `backend.Backend` for what is promised."""

    def __init__(self, url: RedisUrl, metrics: Metrics, name: str) -> None:
        self.url = url.text
        self.durability = "unknown"
        self.warnings: tuple[str, ...] = ()
        self._url = url
        self._tells = url.replicas > 0
        """What a script did is told by this worker, once replicas have it, and not by the script."""

        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._prefix = url.prefix
        self.me = f"w{time.time_ns() // 1_000_000:011x}{random.SystemRandom().getrandbits(40):010x}"
        scripts = Scripts()
        self._servers: Servers = open_servers(url, scripts, self)
        self._calls = Calls(self._servers, scripts)
        self.partitions = Partitions(url.prefix, url.partitions, self._calls, self.me, self.url)
        self.members = Members(url.prefix, self._calls, self.partitions, self.me, About.me(name or "host"))
        if self._tells:
            self.partitions.on_load = self.partitions.doubt_news
            self.members.on_gone = self.partitions.doubt_all_news
        self.shelf = RedisShelf(url.prefix, self._servers, self._calls, self.me)
        self._inboxes = {partition.inbox(self.me): partition for partition in self.partitions.all}
        self._channels: dict[str, tuple[Partition, str]] = {}
        self._listener: Listener | None = None
        self._answers: dict[str, asyncio.Future[bool]] = {}
        self._tokens = 0
        self._unheard = {}
        self._closing = False
        self._back = asyncio.Event()
        """Redis is there again: it may be another process than before."""

        self._drawn = random.Random()

    @classmethod
    async def open(cls, url: str, metrics: Metrics, *, name: str = "") -> RedisBackend:
        read = read_redis_url(url)
        backend = cls(read, metrics, name)
        try:
            backend.durability, backend.warnings = await backend._look()
            backend._warn()
            await backend._agree()
        except BaseException:
            await backend._servers.aclose()
            raise
        return backend

    def _warn(self) -> None:
        for warning in self.warnings:
            get_log().warning("backend_unsafe", backend=self.url, problem=warning)

    async def _look(self) -> tuple[str, tuple[str, ...]]:
        durability, warnings = await look_at_servers(self._url, self._servers)
        return durability, warnings + await renew_files(self._servers)

    async def _keep_looking(self) -> None:
        """What Redis promises may be changed while it runs, and what was torn in its file has to go when it is back."""
        wait_s = LOOK_S
        while True:
            try:
                async with asyncio.timeout(wait_s):
                    await self._back.wait()
            except TimeoutError:
                pass
            self._back.clear()
            try:
                found = await self._look()
            except BackendError:
                wait_s = LOOK_AGAIN_S
                continue
            wait_s = LOOK_S
            if found != (self.durability, self.warnings):
                self.durability, self.warnings = found
                self._warn()

    def on_open(self) -> None:
        super().on_open()
        self._back.set()

    async def _agree(self) -> None:
        """All workers must count the same partitions."""
        key = f"{self._prefix}{{ctl}}:meta"
        slot = key_slot(key.encode())
        await self._calls.command(slot, "HSETNX", key, "partitions", self._url.partitions, way=Way.TURNS)
        kept = int(await self._calls.command(slot, "HGET", key, "partitions", way=Way.TURNS))
        if kept != self._url.partitions:
            raise BackendError(
                f"backend {self.url}: this journal has {kept} partitions; write ?partitions={kept} (they can't be"
                " changed, but for an empty Redis or another prefix)"
            )

    async def start(self, listener: Listener) -> int:
        self._listener = self.partitions.listener = listener
        self.partitions.on_change = self._owner_changed
        for channel in self._inboxes:
            self._servers.subscribe(channel)
        self._servers.start_news()
        try:
            async with asyncio.timeout(5.0):
                await self._servers.wait_news()
        except TimeoutError:
            raise BackendUnavailable(
                self.url, self._servers.trouble() or "its channels can't be subscribed to"
            ) from None
        await self.members.join()
        self.partitions.spawn(self._keep_looking())
        return self.members.taken

    async def aclose(self) -> None:
        self._closing = True
        if self._listener is not None:
            await self.members.leave(0.0)
        await self.partitions.aclose()
        await self._servers.aclose()
        for future in self._answers.values():
            future.cancel()

    async def hand_over(self, timeout_s: float) -> None:
        """Leave while the servers are still there: each partition goes as soon as nothing of it runs."""
        await self.members.leave(timeout_s)

    # -- messages --------------------------------------------------------------------------------------------

    def append(
        self, message: Message, *, channel: str, locale: str | None, given: bool = True, chunks: bool = False
    ) -> asyncio.Future[Appended]:
        future: asyncio.Future[Appended] = self._loop.create_future()
        conversation = message.conversation
        partition = self.partitions.of(conversation)
        tag = f"{self._drawn.getrandbits(40):x}"
        bucket = int(message.at // BUCKET_S)
        buckets = (bucket, bucket + 1, bucket - 1, bucket - 2) if given else (bucket,)
        try:
            body, channel_name, locale_name = _encode(message), channel.encode(), (locale or "").encode()
            digest = _digest(conversation, message.id) if given else b""
        except UnicodeEncodeError as exc:
            future.set_exception(exc)
            return future

        def appended(result: Any) -> None:
            if self._tells and not result[0]:
                self._tell_message(partition, conversation, body, result, tag, chunks)
            self._appended(future, partition, message, result, chunks, tag, channel, locale)

        def send() -> None:
            sending = self._calls.script(
                "append",
                partition.slot,
                (
                    partition.own,
                    partition.keys["in"],
                    partition.conversation_key(conversation),
                    partition.journal_key(conversation),
                    partition.keys["seen"],
                    *(f"{partition.base}id:{number}" for number in buckets),
                ),
                "" if self._tells else partition.base,
                self.me,
                conversation,
                body,
                digest,
                message.at,
                channel_name,
                locale_name,
                int(chunks),
                BUCKET_TTL_S,
                tag,
                int(conversation not in partition.records),
            )
            self._note_unsure(sending, partition, conversation)
            _answered(sending, future, appended)

        self._once_heard(partition, conversation, send)
        return future

    def _tell_message(
        self, partition: Partition, conversation: str, body: bytes, result: list[Any], tag: str, chunks: bool
    ) -> None:
        _, seq, n, owner, opened, *_ = result
        self._tell(partition, conversation, partition.channel(conversation), b"M %d\n%b" % (seq, body))
        if owner and owner.decode() != self.me:
            head = f"m {n} {seq} {opened} {tag} {int(chunks)} {self.me}\n"
            self._tell(partition, conversation, partition.inbox(owner.decode()), head.encode() + body)

    def _appended(
        self, future: asyncio.Future[Appended], partition: Partition, message: Message, result: list[Any], chunks: bool,
        tag: str, channel: str, locale: str | None,
    ) -> None:  # fmt: skip
        conversation = message.conversation
        fresh = ConversationRecord(conversation, channel, locale)
        if result[0]:
            future.set_result(Appended(result[1], message.at, True, False, fresh, here=False, open=bool(result[2])))
            return
        _, seq, n, owner, opened, *more = result
        if owner.decode() != self.me:
            if partition.mine:
                self.partitions.spawn(self.partitions.resync(partition))  # it is not, or was not when this was kept
            future.set_result(Appended(seq, message.at, False, bool(opened), fresh, here=False))
            return
        record = read_record(conversation, more[0]) if more else None

        def begin(now: bool) -> None:
            if not now:
                use(fresh, here=False)
                return
            self.partitions.with_record(partition, conversation, record, use, lambda: use(fresh, here=False))

        def use(record: ConversationRecord, here: bool = True) -> None:
            fence = None
            here = here and partition.mine
            if here:
                fence = Fence(partition, n, tag, conversation=conversation, seq=seq, origin=self.me, chunks=chunks)
                partition.open[n] = fence
            if not future.done():
                future.set_result(Appended(seq, message.at, False, bool(opened), record, here=here, fence=fence))

        self.partitions.arrive(partition, n, begin)

    def finish(self, end: TurnEnd) -> asyncio.Future[tuple[StoredReply, ...] | None]:
        future: asyncio.Future[tuple[StoredReply, ...] | None] = self._loop.create_future()
        fence: Fence | None = end.fence
        if fence is None or fence.epoch is None:
            future.set_exception(StaleOwner(self.url, end.conversation))
            return future
        partition = fence.partition
        fields, gone = _changes(end)
        news = b"%s" % _encode(Head(end.conversation, end.to, end.error))
        sending = self._calls.script(
            "finish",
            partition.slot,
            (
                partition.own,
                partition.keys["in"],
                partition.conversation_key(end.conversation),
                partition.journal_key(end.conversation),
                partition.keys["dlv"],
                partition.keys["tries"],
                partition.keys["dead"],
                partition.keys["seen"],
            ),
            "" if self._tells else partition.base,
            self.me,
            fence.epoch,
            end.conversation,
            end.seq,
            fence.tag,
            fence.origin,
            news,
            int(end.deliver),
            int(fence.tracked or fence.tries > 0),
            int(end.closed),
            _encode(DeadLetter(end.conversation, end.seq, end.to, end.tries, time.time())) if end.tries else b"",
            len(fields) // 2,
            len(gone),
            *fields,
            *gone,
            max((reply.at for reply in end.replies), default=0.0),
            *(_encode(reply) for reply in end.replies),
        )

        def finished(sent: asyncio.Future[Any]) -> None:
            if sent.cancelled():
                future.cancel()
                return
            exc = sent.exception()
            if exc is not None:
                if isinstance(exc, BackendUnavailable) and exc.unsure:
                    fence.unsure = True
                if not future.done():
                    future.set_exception(exc)
                return
            self._finished(future, end, fence, sent.result())

        sending.add_done_callback(finished)
        return future

    def _finished(
        self, future: asyncio.Future[tuple[StoredReply, ...] | None], end: TurnEnd, fence: Fence, result: list[int]
    ) -> None:
        partition = fence.partition
        if result[0] == -1:
            self._metrics.refused_writes.inc()
            get_log().warning("stale_owner_refused", partition=partition.number, conversation=end.conversation)
            if partition.epoch == fence.epoch:
                self.partitions.rob(partition)
            if not future.done():
                future.set_exception(StaleOwner(self.url, end.conversation))
            return
        if result[0] == 1:
            self._kept(future, end, fence, result[1])
        elif fence.unsure and end.replies:
            self.partitions.spawn(self._find_out(future, end, fence))
            return
        elif fence.unsure:
            self._kept(future, end, fence, 0)
        elif not future.done():
            future.set_result(None)
        self.partitions.ended(fence)

    def _kept(
        self, future: asyncio.Future[tuple[StoredReply, ...] | None], end: TurnEnd, fence: Fence, first: int
    ) -> None:
        if self._tells:
            self._tell_end(end, fence, first)
        for seq, reply in enumerate(end.replies, first):
            msgspec.structs.force_setattr(reply, "seq", seq)  # nobody has seen it yet: it is numbered here
        if end.changed is not None and fence.partition.epoch == fence.epoch:
            changed = end.changed
            if end.closed:
                changed = ConversationRecord(changed.id, changed.channel, changed.locale)
            self.partitions.keep_record(fence.partition, changed)
        if not future.done():
            future.set_result(end.replies)

    def _tell(self, partition: Partition, conversation: str, channel: str, news: bytes) -> None:
        """Say what replicas have by now. Where that fails, readers are told to look, and the owner."""

        def said(done: asyncio.Future[Any]) -> None:
            if not done.cancelled() and done.exception() is not None:
                self._may_be_untold(partition, conversation)

        self._calls.tell(partition, channel, news).add_done_callback(said)

    def _may_be_untold(self, partition: Partition, conversation: str) -> None:
        self.partitions.doubtful.add(partition)
        if self._tells:
            self.partitions.untold.add((partition, conversation))

    def _note_unsure(self, sending: asyncio.Future[Any], partition: Partition, conversation: str) -> None:
        """What may be in Redis, and nobody knows of it, is looked for."""

        def sent(done: asyncio.Future[Any]) -> None:
            exc = None if done.cancelled() else done.exception()
            if isinstance(exc, BackendUnavailable) and exc.unsure:
                self._may_be_untold(partition, conversation)

        sending.add_done_callback(sent)

    def _tell_end(self, end: TurnEnd, fence: Fence, first: int) -> None:
        lines = (b"E %d" % first, _encode(Head(end.conversation, end.to, end.error)), *map(_encode, end.replies))
        news = b"\n".join(lines)
        self._tell(fence.partition, end.conversation, fence.partition.channel(end.conversation), news)
        if fence.origin not in ("", self.me):
            self._tell(fence.partition, end.conversation, fence.partition.inbox(fence.origin), news)

    async def _find_out(
        self, future: asyncio.Future[tuple[StoredReply, ...] | None], end: TurnEnd, fence: Fence
    ) -> None:
        """An end was sent before and its answer never came: was it this one that ended the turn?"""
        replies: tuple[StoredReply, ...] = ()
        try:
            replies = (await self.outcome(end.conversation, end.seq, end.to)).replies
        except MessageLost:
            pass  # nobody's end is there
        except BackendError as exc:
            if not future.done():
                future.set_exception(exc)
            return
        if [reply.id for reply in replies] == [reply.id for reply in end.replies]:
            self._kept(future, end, fence, replies[0].seq)
        elif not future.done():
            future.set_result(None)
        self.partitions.ended(fence)

    def post(self, reply: StoredReply, *, deliver: bool) -> asyncio.Future[StoredReply | None]:
        partition = self.partitions.of(reply.conversation)
        future: asyncio.Future[StoredReply | None] = self._loop.create_future()
        sending = self._calls.script(
            "post",
            partition.slot,
            (
                partition.own,
                partition.conversation_key(reply.conversation),
                partition.journal_key(reply.conversation),
                partition.keys["seen"],
                partition.keys["dlv"],
            ),
            "" if self._tells else partition.base,
            self.me,
            reply.conversation,
            _encode(reply),
            int(deliver),
            reply.at,
        )

        def posted(result: Any) -> None:
            if result[0]:
                if self._tells:
                    self._tell_post(partition, reply, result[0], result[1].decode(), deliver)
                msgspec.structs.force_setattr(reply, "seq", result[0])
            future.set_result(reply if result[0] else None)

        self._note_unsure(sending, partition, reply.conversation)
        return _answered(sending, future, posted)

    def _tell_post(self, partition: Partition, reply: StoredReply, seq: int, owner: str, deliver: bool) -> None:
        body = _encode(reply)
        self._tell(partition, reply.conversation, partition.channel(reply.conversation), b"P %d\n%b" % (seq, body))
        if owner not in ("", self.me):
            self._tell(partition, reply.conversation, partition.inbox(owner), b"p %d %d\n%b" % (seq, deliver, body))

    def delivered(self, conversation: str, seq: int) -> asyncio.Future[None]:
        partition = self.partitions.of(conversation)
        future: asyncio.Future[None] = self._loop.create_future()
        sending = self._calls.script(
            "delivered", partition.slot, (partition.own, partition.keys["dlv"]), self.me, partition.epoch or "0",
            f"{seq} {conversation}",
        )  # fmt: skip

        def told(result: int) -> None:
            if result == -1:
                self._metrics.refused_writes.inc()
                future.set_exception(StaleOwner(self.url, conversation))
            else:
                future.set_result(None)

        return _answered(sending, future, told)

    # -- dead letters ----------------------------------------------------------------------------------------

    def count_try(self, conversation: str, seq: int, fence: Any) -> asyncio.Future[None]:
        turn: Fence = fence
        turn.tries += 1
        return self._calls.command(
            turn.partition.slot, "HINCRBY", turn.partition.keys["tries"], str(turn.n), 1, way=Way.TURNS
        )

    async def requeue(self, conversation: str, seq: int) -> bool:
        partition = self.partitions.of(conversation)
        tag = f"{self._drawn.getrandbits(40):x}"
        done, *more = await self._calls.script(
            "requeue",
            partition.slot,
            (
                partition.own,
                partition.keys["in"],
                partition.conversation_key(conversation),
                partition.journal_key(conversation),
                partition.keys["dead"],
            ),
            partition.base,
            self.me,
            conversation,
            seq,
            tag,
        )
        if not done:
            return False
        n, owner, body = more
        if owner.decode() == self.me:
            self._take_message(partition, f"m {n} {seq} 0 {tag} 0 -\n".encode() + body)
        return True

    async def purge(self, before: float) -> int:
        count = 0
        for partition in self.partitions.all:
            stay = 0
            while partition.mine:
                names = await self._calls.command(
                    partition.slot, "ZRANGE", partition.keys["seen"], "-inf", f"({before!r}", "BYSCORE",
                    "LIMIT", stay, 200,
                )  # fmt: skip
                gone = sum(await asyncio.gather(*(self._purge_one(partition, one.decode(), before) for one in names)))
                count += gone
                stay += len(names) - gone
                if len(names) < 200:
                    break
        return count

    async def _purge_one(self, partition: Partition, name: str, before: float) -> int:
        keys = (
            partition.own, partition.conversation_key(name), partition.journal_key(name), partition.keys["seen"],
            partition.keys["dlv"], partition.keys["dead"],
        )  # fmt: skip
        gone: int = await self._calls.script(
            "purge", partition.slot, keys, self.me, partition.epoch or "0", name, before, way=Way.ASIDE
        )
        if gone == 1:
            partition.records.pop(name, None)
        elif gone == -1:
            self._metrics.refused_writes.inc()
        return max(0, gone)


def _answered(sending: asyncio.Future[Any], future: asyncio.Future[T], use: Callable[[Any], None]) -> asyncio.Future[T]:
    """Give *future* what *sending* comes to: its failure, or what *use* makes of its result."""

    def done(sent: asyncio.Future[Any]) -> None:
        if future.done():
            return
        if sent.cancelled():
            future.cancel()
        elif (exc := sent.exception()) is not None:
            future.set_exception(exc)
            future.exception()  # nobody may wait for it any more
        else:
            use(sent.result())

    sending.add_done_callback(done)
    return future


def _digest(conversation: str, id: str) -> bytes:
    return hashlib.blake2b(f"{conversation}\0{id}".encode(), digest_size=16).digest()


def _changes(end: TurnEnd) -> tuple[list[Any], list[str]]:
    """The fields of the record that a turn sets, as names and values, and those that go."""
    changed = end.changed
    if changed is None:
        return [], []
    state: dict[str, Any] = {"lo": changed.locale}
    if end.closed:
        state |= {"as": None, "tg": None, "st": None}
    else:
        state |= {"as": changed.assignee, "tg": _encode(changed.tags) if changed.tags else None, "st": changed.state}
    fields = [part for name, value in state.items() if value is not None for part in (name, value)]
    return fields, [name for name, value in state.items() if value is None]
