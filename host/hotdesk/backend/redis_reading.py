"""What is read of the journal in Redis, by any worker, whoever owns the conversation."""

from __future__ import annotations

import asyncio
import time

import msgspec
from redis.crc import key_slot

from hotdesk_sdk import Message

from ..errors import BackendUnavailable, MessageLost
from . import ConversationRecord, DeadLetter, Entry, Outcome, StoredReply
from .redis_partitions import FIELDS, Calls, Partitions, decode_entry, read_record
from .redis_wire import Way

__all__ = ["Reading"]

OUTCOME_PAGE = 200

PAGE_BYTES = 256 * 1024
"""Of a long record not more is asked for at once: a worker's lease is renewed between two answers, not behind one."""

MANY = 2**31
"""More entries than any conversation has, and an exact number in Lua."""

_dead_letter = msgspec.json.Decoder(DeadLetter).decode


class Reading:
    """The reading half of `RedisBackend`, and plugins' keys."""

    url: str
    partitions: Partitions
    _calls: Calls
    _prefix: str

    async def read(self, conversation: str, after: int, limit: int) -> list[Entry] | None:
        partition = self.partitions.of(conversation)
        keys = (partition.journal_key(conversation),)
        entries: list[Entry] = []
        while True:
            wanted = min(limit - len(entries), MANY)
            length, rows = await self._calls.script(
                "read", partition.slot, keys, after, wanted, PAGE_BYTES, way=Way.ASIDE
            )
            entries += self._entries(rows, after + 1)
            after += len(rows)
            if not rows or len(entries) >= limit or after >= length:
                return entries if length else None

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
        keys = (partition.journal_key(conversation),)
        entries: list[Entry] = []
        while True:
            wanted = limit - len(entries)
            first, rows = await self._calls.script(
                "tail", partition.slot, keys, before, wanted, PAGE_BYTES, way=Way.ASIDE
            )
            entries[:0] = self._entries(rows[::-1], first)
            before = first
            if not rows or len(entries) >= limit or before <= 1:
                return entries

    async def outcome(self, conversation: str, seq: int, message_id: str) -> Outcome:
        partition = self.partitions.of(conversation)
        is_open = self._calls.command(partition.slot, "HEXISTS", partition.conversation_key(conversation), f"o{seq}")
        keys = (partition.journal_key(conversation),)  # in the same batch: of the same server, at the same moment
        length, rows = await self._calls.script(
            "read", partition.slot, keys, seq - 1, OUTCOME_PAGE, PAGE_BYTES, way=Way.ASIDE
        )
        if await is_open:
            return Outcome(False, ())
        page: list[Entry] = self._entries(rows, seq)
        if length < seq or page[0].id != message_id:
            raise MessageLost(self.url, f"message {message_id!r} was accepted, and is not in the record")
        while True:
            replies = [entry for entry in page if isinstance(entry, StoredReply) and entry.to == message_id]
            if replies or not page:
                return Outcome(True, tuple(replies))
            page = await self.read(conversation, page[-1].seq, OUTCOME_PAGE) or []

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

    async def ping(self) -> None:
        key = f"{self._prefix}{{ctl}}:meta"
        await self._calls.command(key_slot(key.encode()), "HSET", key, "ping", time.time_ns(), way=Way.TURNS)

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
            await self._calls.command(slot, "HDEL", name, key, way=Way.TURNS)
        else:
            await self._calls.command(slot, "HSET", name, key, value, way=Way.TURNS)

    async def kv_keys(self, plugin: str, prefix: str) -> list[str]:
        name, slot = self._kv(plugin)
        keys = [key.decode() for key in await self._calls.command(slot, "HKEYS", name)]
        return sorted(key for key in keys if key.startswith(prefix))

    async def dead_letters(self) -> list[DeadLetter]:
        pages = [
            self._calls.command(partition.slot, "HVALS", partition.keys["dead"]) for partition in self.partitions.all
        ]
        found = [_dead_letter(row) for page in await asyncio.gather(*pages) for row in page]
        return sorted(found, key=lambda letter: (letter.at, letter.conversation, letter.seq))
