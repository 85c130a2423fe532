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

and PREFIX{ctl}:members (leases), PREFIX{ctl}:meta, PREFIX{kv:PLUGIN}:kv.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from typing import Any

import msgspec
from redis.crc import key_slot

from hotdesk_sdk import Message

from ..errors import BackendError, BackendUnavailable, StaleOwner
from ..logs import get_log
from ..metrics import Metrics
from . import Appended, ConversationRecord, DeadLetter, Entry, Listener, Outcome, StoredReply, TurnEnd
from .redis_members import About, Members
from .redis_partitions import FIELDS, Calls, Fence, Partition, Partitions, decode_entry, read_record, swallow
from .redis_servers import OneServer, Servers
from .redis_url import RedisUrl, read_redis_url
from .redis_wire import Scripts

__all__ = ["RedisBackend"]

BUCKET_S = 12 * 3600
"""An id is looked for in the bucket of now, the one after (another host's clock may be ahead) and two before."""

BUCKET_TTL_S = 4 * BUCKET_S

SIGNAL_S = 2.0
"""How long the owner of a conversation has to answer another worker."""

FLOOR = (7, 0)

OUTCOME_PAGE = 200

_encode = msgspec.json.Encoder().encode


class _Head(msgspec.Struct, frozen=True, array_like=True):
    """What the news of a turn's end says before its replies."""

    conversation: str
    to: str
    error: tuple[str, str] | None


class _Chunks(msgspec.Struct, frozen=True, array_like=True):
    conversation: str
    to: str
    index: int
    texts: list[str]


class _Signal(msgspec.Struct, frozen=True, array_like=True):
    conversation: str
    signal: str
    message: str
    asker: str
    token: str


_dead_letter = msgspec.json.Decoder(DeadLetter).decode
_head = msgspec.json.Decoder(_Head).decode
_chunks = msgspec.json.Decoder(_Chunks).decode
_signal = msgspec.json.Decoder(_Signal).decode


class RedisBackend:
    """See `backend.Backend` for what is promised."""

    def __init__(self, url: RedisUrl, metrics: Metrics, name: str) -> None:
        self.url = url.text
        self.durability = "unknown"
        self.warnings: tuple[str, ...] = ()
        self._url = url
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._prefix = url.prefix
        self.me = f"w{time.time_ns() // 1_000_000:011x}{random.SystemRandom().getrandbits(40):010x}"
        scripts = Scripts()
        self._servers: Servers = _open_servers(url, scripts, self)
        self._calls = Calls(self._servers, scripts)
        self.partitions = Partitions(url.prefix, url.partitions, self._calls, self.me, self.url)
        self.members = Members(url.prefix, self._calls, self.partitions, self.me, About.me(name or "host"))
        self._inboxes = {partition.inbox(self.me): partition for partition in self.partitions.all}
        self._channels: dict[str, tuple[Partition, str]] = {}
        self._followed: dict[str, int] = {}
        self._listener: Listener | None = None
        self._answers: dict[str, asyncio.Future[bool]] = {}
        self._tokens = 0
        self._closing = False
        self._drawn = random.Random()

    @classmethod
    async def open(cls, url: str, metrics: Metrics, *, name: str = "") -> RedisBackend:
        backend = cls(read_redis_url(url), metrics, name)
        try:
            await backend._look_at_servers()
            await backend._agree()
        except BaseException:
            await backend._servers.aclose()
            raise
        return backend

    async def _look_at_servers(self) -> None:
        """Their version, and how durable they are. Raises `BackendError`."""
        said: set[str] = set()
        warnings: list[str] = []
        for info in await self._servers.each("INFO", "server"):
            version = _info(info).get("redis_version", "0")
            if tuple(int(part) for part in version.split(".")[:2]) < FLOOR:
                raise BackendError(f"backend {self.url}: it is Redis {version}; hotdesk needs 7.0 or newer, or Valkey")
        for option, judge in (("append*", _judge_append), ("maxmemory-policy", _judge_eviction)):
            try:
                for rows in await self._servers.each("CONFIG", "GET", option):
                    values = {key.decode(): value.decode() for key, value in zip(rows[::2], rows[1::2], strict=True)}
                    judge(values, said, warnings)
            except BackendUnavailable:
                raise
            except BackendError:
                warnings.append(f"CONFIG GET {option} is not allowed here: nobody can say how durable this Redis is")
        self.durability = "redis " + ("; ".join(sorted(said)) or "of unknown durability")
        if self._url.replicas:
            self.durability += f"; confirmed by {self._url.replicas} replicas"
        self.warnings = tuple(dict.fromkeys(warnings))
        for warning in self.warnings:
            get_log().warning("backend_unsafe", backend=self.url, problem=warning)

    async def _agree(self) -> None:
        """All workers must count the same partitions."""
        key = f"{self._prefix}{{ctl}}:meta"
        slot = key_slot(key.encode())
        await self._calls.command(slot, "HSETNX", key, "partitions", self._url.partitions, aside=False)
        kept = int(await self._calls.command(slot, "HGET", key, "partitions", aside=False))
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
            digest = _digest(conversation, message.id) if given else b""
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
                partition.base,
                self.me,
                conversation,
                _encode(message),
                digest,
                message.at,
                channel.encode(),
                (locale or "").encode(),
                int(chunks),
                BUCKET_TTL_S,
                tag,
                int(conversation not in partition.records),
            )
        except UnicodeEncodeError as exc:
            future.set_exception(exc)
            return future

        def appended(sent: asyncio.Future[Any]) -> None:
            if future.done():
                return
            if sent.cancelled():
                future.cancel()
            elif (exc := sent.exception()) is not None:
                future.set_exception(exc)
            else:
                self._appended(future, partition, message, sent.result(), chunks, tag, channel, locale)

        sending.add_done_callback(appended)
        return future

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
            future.set_result(Appended(seq, message.at, False, bool(opened), fresh, here=False))
            return
        record = read_record(conversation, more[0]) if more else None

        def begin(now: bool) -> None:
            if not now:
                use(fresh, here=False)
                return
            self.partitions.with_record(partition, conversation, record, use)

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
        news = b"%s" % _encode(_Head(end.conversation, end.to, end.error))
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
            ),
            partition.base,
            self.me,
            fence.epoch,
            end.conversation,
            end.seq,
            fence.tag,
            fence.origin,
            news,
            int(end.deliver),
            int(fence.tries > 0),
            int(end.closed),
            _encode(DeadLetter(end.conversation, end.seq, end.to, end.tries, time.time())) if end.tries else b"",
            len(fields) // 2,
            len(gone),
            *fields,
            *gone,
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
                self.partitions.lose(partition)
                self.members.wake()
            if not future.done():
                future.set_exception(StaleOwner(self.url, end.conversation))
            return
        self.partitions.ended(fence)
        if result[0] == 0:
            if fence.unsure and end.replies:
                self.partitions.spawn(self._find_out(future, end, fence))
            elif not future.done():
                future.set_result(None)
            return
        self._kept(future, end, fence, result[1])

    def _kept(
        self, future: asyncio.Future[tuple[StoredReply, ...] | None], end: TurnEnd, fence: Fence, first: int
    ) -> None:
        for seq, reply in enumerate(end.replies, first):
            msgspec.structs.force_setattr(reply, "seq", seq)  # nobody has seen it yet: it is numbered here
        if end.changed is not None and fence.partition.epoch == fence.epoch:
            changed = end.changed
            if end.closed:
                changed = ConversationRecord(changed.id, changed.channel, changed.locale)
            self.partitions.keep_record(fence.partition, changed)
        if not future.done():
            future.set_result(end.replies)

    async def _find_out(
        self, future: asyncio.Future[tuple[StoredReply, ...] | None], end: TurnEnd, fence: Fence
    ) -> None:
        """An end was sent before and its answer never came: was it this one that ended the turn?"""
        try:
            outcome = await self.outcome(end.conversation, end.seq, end.to)
        except BackendError as exc:
            if not future.done():
                future.set_exception(exc)
            return
        if [reply.id for reply in outcome.replies] == [reply.id for reply in end.replies]:
            self._kept(future, end, fence, outcome.replies[0].seq)
        elif not future.done():
            future.set_result(None)

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
            partition.base,
            self.me,
            reply.conversation,
            _encode(reply),
            int(deliver),
            reply.at,
        )

        def posted(sent: asyncio.Future[Any]) -> None:
            if future.done():
                return
            if sent.cancelled():
                future.cancel()
            elif (exc := sent.exception()) is not None:
                future.set_exception(exc)
            elif (seq := sent.result()[0]) == 0:
                future.set_result(None)
            else:
                msgspec.structs.force_setattr(reply, "seq", seq)
                future.set_result(reply)

        sending.add_done_callback(posted)
        return future

    def delivered(self, conversation: str, seq: int) -> asyncio.Future[None]:
        partition = self.partitions.of(conversation)
        future: asyncio.Future[None] = self._loop.create_future()
        sending = self._calls.script(
            "delivered", partition.slot, (partition.own, partition.keys["dlv"]), self.me, partition.epoch or "0",
            f"{seq} {conversation}",
        )  # fmt: skip

        def told(sent: asyncio.Future[Any]) -> None:
            if future.done():
                return
            if sent.cancelled():
                future.cancel()
            elif (exc := sent.exception()) is not None:
                future.set_exception(exc)
            elif sent.result() == -1:
                self._metrics.refused_writes.inc()
                future.set_exception(StaleOwner(self.url, conversation))
            else:
                future.set_result(None)

        sending.add_done_callback(told)
        return future

    # -- dead letters ----------------------------------------------------------------------------------------

    def count_try(self, conversation: str, seq: int, fence: Any) -> asyncio.Future[None]:
        turn: Fence = fence
        turn.tries += 1
        return self._calls.command(
            turn.partition.slot, "HINCRBY", turn.partition.keys["tries"], str(turn.n), 1, aside=False
        )

    async def dead_letters(self) -> list[DeadLetter]:
        pages = [
            self._calls.command(partition.slot, "HVALS", partition.keys["dead"]) for partition in self.partitions.all
        ]
        found = [_dead_letter(row) for page in await asyncio.gather(*pages) for row in page]
        return sorted(found, key=lambda letter: (letter.at, letter.conversation, letter.seq))

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

    # -- reading ---------------------------------------------------------------------------------------------

    async def read(self, conversation: str, after: int, limit: int) -> list[Entry] | None:
        partition = self.partitions.of(conversation)
        rows = self._calls.command(
            partition.slot, "LRANGE", partition.journal_key(conversation), after, min(after + limit, 2**62) - 1
        )
        known = None
        if after:
            known = self._calls.command(partition.slot, "EXISTS", partition.journal_key(conversation))
        entries = self._entries(await rows, after + 1)
        if not entries and not (known is not None and await known):
            return None
        if known is not None:
            await known
        return entries

    def _entries(self, rows: list[bytes], first: int) -> list[Entry]:
        entries = []
        for seq, row in enumerate(rows, first):
            try:
                entry: Entry = decode_entry(row)
            except msgspec.DecodeError as exc:
                raise BackendUnavailable(self.url, f"an entry is damaged ({exc}); restore a backup") from exc
            if entry.seq != seq:
                msgspec.structs.force_setattr(entry, "seq", seq)
            entries.append(entry)
        return entries

    async def history(self, conversation: str, before: int, limit: int) -> list[Entry]:
        partition = self.partitions.of(conversation)
        first, rows = await self._calls.script(
            "tail", partition.slot, (partition.journal_key(conversation),), before, limit, aside=True
        )
        return self._entries(rows, first)

    async def outcome(self, conversation: str, seq: int, message_id: str) -> Outcome:
        partition = self.partitions.of(conversation)
        open_turn = await self._calls.command(
            partition.slot, "HEXISTS", partition.conversation_key(conversation), f"o{seq}"
        )
        if open_turn:
            return Outcome(False, ())
        replies: list[StoredReply] = []
        after = seq
        while not replies:
            page = await self.read(conversation, after, OUTCOME_PAGE) or []
            replies = [entry for entry in page if isinstance(entry, StoredReply) and entry.to == message_id]
            if len(page) < OUTCOME_PAGE:
                break
            after = page[-1].seq
        return Outcome(True, tuple(replies))

    async def record(self, conversation: str) -> ConversationRecord | None:
        partition = self.partitions.of(conversation)
        if partition.mine and (known := partition.records.get(conversation)) is not None:
            return known
        row = await self._calls.command(partition.slot, "HMGET", partition.conversation_key(conversation), *FIELDS)
        return None if row[0] is None else read_record(conversation, row)

    async def unfinished(self) -> list[tuple[Message, ConversationRecord]]:
        found: list[tuple[Message, ConversationRecord]] = []
        pages = [
            self._calls.command(partition.slot, "XRANGE", partition.keys["in"], "-", "+")
            for partition in self.partitions.all
        ]
        for page in await asyncio.gather(*pages):
            for _, flat in page:
                fields = dict(zip(flat[::2], flat[1::2], strict=True))
                message = decode_entry(fields[b"b"])
                assert isinstance(message, Message)
                msgspec.structs.force_setattr(message, "seq", int(fields[b"s"]))
                record = await self.record(message.conversation)
                found.append((message, record or ConversationRecord(message.conversation)))
        return found

    async def undelivered(self) -> list[tuple[StoredReply, ConversationRecord]]:
        found: list[tuple[StoredReply, ConversationRecord]] = []
        pages = [
            self._calls.command(partition.slot, "HGETALL", partition.keys["dlv"]) for partition in self.partitions.all
        ]
        for page in await asyncio.gather(*pages):
            for field, body in zip(page[::2], page[1::2], strict=True):
                reply = decode_entry(body)
                assert isinstance(reply, StoredReply)
                msgspec.structs.force_setattr(reply, "seq", int(field.partition(b" ")[0]))
                record = await self.record(reply.conversation)
                found.append((reply, record or ConversationRecord(reply.conversation)))
        return sorted(found, key=lambda one: (one[0].conversation, one[0].seq))

    async def purge(self, before: float) -> int:
        count = 0
        for partition in self.partitions.all:
            while partition.mine:
                names = await self._calls.command(
                    partition.slot, "ZRANGE", partition.keys["seen"], "-inf", f"({before!r}", "BYSCORE", "LIMIT", 0, 200
                )
                gone = await asyncio.gather(*(self._purge_one(partition, name.decode(), before) for name in names))
                count += sum(gone)
                if len(names) < 200 or not sum(gone):
                    break
        return count

    async def _purge_one(self, partition: Partition, name: str, before: float) -> int:
        keys = (
            partition.own, partition.conversation_key(name), partition.journal_key(name), partition.keys["seen"],
        )  # fmt: skip
        gone: int = await self._calls.script(
            "purge", partition.slot, keys, self.me, partition.epoch or "0", name, before, aside=True
        )
        if gone == 1:
            partition.records.pop(name, None)
        return max(0, gone)

    async def ping(self) -> None:
        key = f"{self._prefix}{{ctl}}:meta"
        await self._calls.command(key_slot(key.encode()), "HSET", key, "ping", time.time_ns(), aside=False)

    # -- plugins' keys ---------------------------------------------------------------------------------------

    def _kv(self, plugin: str) -> tuple[str, int]:
        key = f"{self._prefix}{{kv:{plugin.replace('}', '')}}}:kv:{plugin}"
        return key, key_slot(key.encode())

    async def kv_get(self, plugin: str, key: str) -> bytes | None:
        name, slot = self._kv(plugin)
        value: bytes | None = await self._calls.command(slot, "HGET", name, key)
        return value

    async def kv_set(self, plugin: str, key: str, value: bytes | None) -> None:
        name, slot = self._kv(plugin)
        if value is None:
            await self._calls.command(slot, "HDEL", name, key, aside=False)
        else:
            await self._calls.command(slot, "HSET", name, key, value, aside=False)

    async def kv_keys(self, plugin: str, prefix: str) -> list[str]:
        name, slot = self._kv(plugin)
        keys = [key.decode() for key in await self._calls.command(slot, "HKEYS", name)]
        return sorted(key for key in keys if key.startswith(prefix))

    # -- news ------------------------------------------------------------------------------------------------

    def owns(self, conversation: str) -> bool:
        return self.partitions.of(conversation).mine

    def follow(self, conversation: str, on: bool) -> None:
        count = self._followed.get(conversation, 0) + (1 if on else -1)
        partition = self.partitions.of(conversation)
        channel = partition.channel(conversation)
        if count > 0:
            self._followed[conversation] = count
            if count == 1 and not partition.mine:
                self._channels[channel] = partition, conversation
                self._servers.subscribe(channel)
        else:
            self._followed.pop(conversation, None)
            self._channels.pop(channel, None)
            self._servers.unsubscribe(channel)

    def _owner_changed(self, partition: Partition) -> None:
        """What is listened to of it comes by its channels from now on, or need not any more."""
        for conversation in self._followed:
            if self.partitions.of(conversation) is partition:
                channel = partition.channel(conversation)
                if partition.mine:
                    self._channels.pop(channel, None)
                    self._servers.unsubscribe(channel)
                    if self._listener is not None:
                        self._listener.resync(conversation)
                else:
                    self._channels[channel] = partition, conversation
                    self._servers.subscribe(channel)

    def tell_chunks(self, fence: Any, conversation: str, to: str, index: int, texts: list[str]) -> None:
        turn: Fence = fence
        if turn is None or turn.epoch is None or not turn.heard or len(self.members.alive) < 2:
            return
        if not turn.partition.mine:
            return
        news = b"C " + _encode(_Chunks(conversation, to, index, texts))
        sending = self._calls.script(
            "tell", turn.partition.slot, (turn.partition.own,), turn.partition.base, self.me, turn.epoch, conversation,
            turn.origin if turn.chunks else "", news,
        )  # fmt: skip

        def told(sent: asyncio.Future[Any]) -> None:
            if sent.cancelled() or sent.exception() is not None:
                return
            heard = sent.result()
            turn.heard = heard > 0
            if heard == -1:
                self._metrics.refused_writes.inc()

        sending.add_done_callback(told)

    async def signal(self, conversation: str, signal: str, message: str) -> bool:
        partition = self.partitions.of(conversation)
        self._tokens += 1
        token = str(self._tokens)
        answer: asyncio.Future[bool] = self._loop.create_future()
        self._answers[token] = answer
        news = b"s " + _encode(_Signal(conversation, signal, message, self.me, token))
        try:
            heard = await self._calls.script("signal", partition.slot, (partition.own,), partition.base, news)
            if not heard:
                return False
            async with asyncio.timeout(SIGNAL_S):
                return await answer
        except TimeoutError:
            return False
        finally:
            del self._answers[token]

    def on_news(self, channel: str, data: bytes) -> None:
        if self._listener is None:
            return
        try:
            if (partition := self._inboxes.get(channel)) is not None:
                self._take_inbox(self._listener, partition, data)
            elif (place := self._channels.get(channel)) is not None:
                self._take_channel(self._listener, *place, data)
        except Exception as exc:  # one message that can't be read must not end all listening
            get_log().error("news_unreadable", channel=channel, exc_info=exc)

    def _take_inbox(self, listener: Listener, partition: Partition, data: bytes) -> None:
        kind = data[:1]
        if kind == b"m":
            self._take_message(partition, data)
        elif kind == b"E":
            self._take_end(listener, data, direct=True)
        elif kind == b"C":
            said = _chunks(data[2:])
            listener.hear_chunks(said.conversation, said.to, said.index, said.texts, True)
        elif kind == b"p":
            head, _, body = data.partition(b"\n")
            _, seq, deliver = head.split(b" ")
            if partition.mine:
                listener.hear_entry(self._entries([body], int(seq))[0], owned=True, deliver=deliver == b"1")
        elif kind == b"o":
            _, epoch, by = data.decode().split(" ")
            self.members.given(partition, epoch, by)
        elif kind == b"s":
            self._take_signal(listener, partition, _signal(data[2:]))
        elif kind == b"a":
            _, token, result = data.decode().split(" ")
            answer = self._answers.get(token)
            if answer is not None and not answer.done():
                answer.set_result(result == "1")

    def _take_message(self, partition: Partition, data: bytes) -> None:
        head, _, body = data.partition(b"\n")
        _, n, seq, opened, tag, chunks, origin = head.decode().split(" ")
        message = self._entries([body], int(seq))[0]
        assert isinstance(message, Message)

        def begin(now: bool) -> None:
            if now:
                self.partitions.run(
                    partition, message, n=int(n), tag=tag, origin=origin, chunks=chunks == "1", opened=opened == "1"
                )

        self.partitions.arrive(partition, int(n), begin)

    def _take_end(self, listener: Listener, data: bytes, *, direct: bool) -> None:
        first, head, *bodies = data.split(b"\n")
        said = _head(head)
        replies = tuple(entry for entry in self._entries(bodies, int(first[2:])) if isinstance(entry, StoredReply))
        listener.hear_end(said.conversation, said.to, replies, said.error, direct)

    def _take_signal(self, listener: Listener, partition: Partition, asked: _Signal) -> None:
        if asked.signal == "joined":
            for fence in partition.open.values():
                if fence.conversation == asked.conversation:
                    fence.heard = True
            return
        done = partition.mine and listener.hear_signal(asked.conversation, asked.signal, asked.message)
        telling = self._calls.command(
            partition.slot, "SPUBLISH", partition.inbox(asked.asker), f"a {asked.token} {int(done)}"
        )
        telling.add_done_callback(swallow)

    def _take_channel(self, listener: Listener, partition: Partition, conversation: str, data: bytes) -> None:
        if partition.mine:
            return  # said here, and told here
        kind = data[:1]
        if kind == b"E":
            self._take_end(listener, data, direct=False)
        elif kind == b"C":
            said = _chunks(data[2:])
            listener.hear_chunks(conversation, said.to, said.index, said.texts, False)
        else:
            head, _, body = data.partition(b"\n")
            entry = self._entries([body], int(head[2:]))[0]
            listener.hear_entry(entry, owned=False, deliver=False)

    def on_confirmed(self, channel: str) -> None:
        place = self._channels.get(channel)
        if place is None or self._listener is None:
            return
        partition, conversation = place
        self._listener.resync(conversation)
        news = b"s " + _encode(_Signal(conversation, "joined", "", self.me, ""))
        self._calls.script("signal", partition.slot, (partition.own,), partition.base, news).add_done_callback(swallow)

    def on_open(self) -> None:
        if self._listener is not None and not self._closing and self.members.alive:
            self.partitions.spawn(self.members.resync())
            self._listener.resync_turns()

    def on_close(self) -> None:
        if not self._closing:
            get_log().warning("backend_news_lost", backend=self.url)

    def on_batch(self, commands: int, seconds: float) -> None:
        self._metrics.commits.observe(seconds)
        self._metrics.commit_rows.inc(commands)


def _open_servers(url: RedisUrl, scripts: Scripts, backend: RedisBackend) -> Servers:
    if url.kind == "cluster":
        from .redis_cluster import ManyServers

        return ManyServers(url, scripts, backend)
    return OneServer(url, scripts, backend)


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


def _info(text: bytes) -> dict[str, str]:
    pairs = (line.partition(":") for line in text.decode().splitlines() if ":" in line)
    return {name: value for name, _, value in pairs}


def _judge_append(values: dict[str, str], said: set[str], warnings: list[str]) -> None:
    if values.get("appendonly") != "yes":
        said.add("without append-only file: accepted is in memory only")
        warnings.append("appendonly is no: what was accepted is lost when Redis ends; set appendonly yes")
        return
    fsync = values.get("appendfsync", "?")
    if fsync == "always":
        said.add("appendfsync always: accepted is on disk")
        return
    said.add(f"appendfsync {fsync}: accepted is on disk {'within a second' if fsync == 'everysec' else 'some time'}")
    warnings.append(
        f"appendfsync is {fsync}: a crash of the machine loses what was accepted last; set appendfsync always"
    )


def _judge_eviction(values: dict[str, str], said: set[str], warnings: list[str]) -> None:
    policy = values.get("maxmemory-policy", "noeviction")
    if policy != "noeviction":
        warnings.append(f"maxmemory-policy is {policy}: Redis may drop what was accepted; set it to noeviction")
