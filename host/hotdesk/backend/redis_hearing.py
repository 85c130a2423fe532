"""What workers tell one another through Redis: to the owner of a conversation, to who waits for a turn, to readers.

Each worker has an inbox in every partition, `h:WORKER`, and each conversation a channel, `e:NAME`, which those workers
follow that do not own it and have readers of it. All of it is published by the scripts that write what it tells of.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from typing import Any

import msgspec

from hotdesk_sdk import Message

from ..logs import get_log
from ..metrics import Metrics
from . import Listener, StoredReply
from .redis_members import LOOK, Members
from .redis_partitions import Fence, Partition, swallow
from .redis_reading import Reading
from .redis_servers import Servers
from .redis_shelf import RedisShelf

__all__ = ["Head", "Hearing"]

HEAR_S = 0.5
"""How long a message waits for its sender's host to hear of its conversation."""

SIGNAL_S = 2.0
"""How long the owner of a conversation has to answer another worker."""

_encode = msgspec.json.Encoder().encode


class Head(msgspec.Struct, frozen=True, array_like=True):
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


_head = msgspec.json.Decoder(Head).decode
_chunks = msgspec.json.Decoder(_Chunks).decode
_signal = msgspec.json.Decoder(_Signal).decode


class Hearing(Reading):
    """The hearing half of `RedisBackend`."""

    me: str
    members: Members
    shelf: RedisShelf
    _servers: Servers
    _metrics: Metrics
    _loop: asyncio.AbstractEventLoop
    _listener: Listener | None
    _closing: bool
    _inboxes: dict[str, Partition]
    _channels: dict[str, tuple[Partition, str]]
    _answers: dict[str, asyncio.Future[bool]]
    _tokens: int
    _unheard: dict[str, list[Callable[[], None]]]
    """What is to be sent once a channel is heard, by the channels that are not yet."""

    def owns(self, conversation: str) -> bool:
        return self.partitions.of(conversation).mine

    def home(self, conversation: str) -> int | None:
        return self.members.home_of(self.partitions.of(conversation).number)

    @property
    def alone(self) -> bool:
        return len(self.members.alive) < 2

    def follow(self, conversation: str, on: bool) -> None:
        partition = self.partitions.of(conversation)
        followed = partition.followed
        count = followed.get(conversation, 0) + (1 if on else -1)
        if count > 0:
            followed[conversation] = count
            if count == 1 and not partition.mine:
                self._subscribe(partition, conversation)
        else:
            followed.pop(conversation, None)
            self._unsubscribe(partition, conversation)

    def _subscribe(self, partition: Partition, conversation: str) -> None:
        channel = partition.channel(conversation)
        self._channels[channel] = partition, conversation
        self._unheard[channel] = []
        self._loop.call_later(HEAR_S, self._let_speak, channel, context=contextvars.Context())
        self._servers.subscribe(channel)

    def _let_speak(self, channel: str) -> None:
        """What was said by those who listen waited until they hear."""
        for send in self._unheard.pop(channel, ()):
            send()

    def _once_heard(self, partition: Partition, conversation: str, send: Callable[[], None]) -> None:
        """Call *send* once this worker hears of *conversation*: who listens here must not miss what comes of it."""
        waiting = None
        if self._unheard and not partition.mine and conversation in partition.followed:
            waiting = self._unheard.get(partition.channel(conversation))
        if waiting is None:
            send()
        else:
            waiting.append(send)

    def _unsubscribe(self, partition: Partition, conversation: str) -> None:
        channel = partition.channel(conversation)
        self._let_speak(channel)
        if self._channels.pop(channel, None) is not None:
            self._servers.unsubscribe(channel)

    def _owner_changed(self, partition: Partition) -> None:
        """What is listened to of it comes by its channels from now on, or need not any more."""
        for conversation in partition.followed:
            if not partition.mine:
                self._subscribe(partition, conversation)
                continue
            self._unsubscribe(partition, conversation)
            if self._listener is not None:
                self._listener.resync(conversation)

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

        joined = turn.joined

        def told(sent: asyncio.Future[Any]) -> None:
            if sent.cancelled() or sent.exception() is not None:
                return
            heard = sent.result()
            if heard <= 0 and turn.joined == joined:  # who came meanwhile is not among those who were counted
                turn.heard = False
            if heard == -1:
                self._metrics.refused_writes.inc()

        sending.add_done_callback(told)

    async def listened_elsewhere(self, conversation: str) -> bool:
        if len(self.members.alive) < 2:
            return False
        partition = self.partitions.of(conversation)
        _, count = await self._calls.command(partition.slot, "PUBSUB", "SHARDNUMSUB", partition.channel(conversation))
        return bool(count)

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
        if channel == self.shelf.channel:
            self.shelf.on_news(data)
            return
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
        elif kind == LOOK:
            self.partitions.spawn(self.partitions.resync(partition))
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
                    fence.joined += 1
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
        elif kind == b"R":
            listener.resync(conversation)
        else:
            head, _, body = data.partition(b"\n")
            entry = self._entries([body], int(head[2:]))[0]
            listener.hear_entry(entry, owned=False, deliver=False)

    def on_confirmed(self, channel: str) -> None:
        if channel == self.shelf.channel:
            self.shelf.on_confirmed()
            return
        place = self._channels.get(channel)
        if place is None or self._listener is None:
            return
        partition, conversation = place
        self._let_speak(channel)
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
