"""Visitors who do what a client of the doors must: send again with the same id, to another host, and read on.

Each has a conversation of its own and one of four ways in: a POST that waits, a POST that reads the answer later, a
POST that streams, a WebSocket that comes back elsewhere with `after=`. All they saw goes into the history.
"""

from __future__ import annotations

import asyncio
import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, repeat
from time import perf_counter
from typing import Any

import msgspec
from tests.chaos.bot import CHUNKS, STREAM
from tests.load.client import Answer, ConnectionLost, HttpClient
from tests.load.desk import Entry, message_body, note_taken, read_entry, read_page, read_taken, shown
from tests.load.history import Accepted, Heard, History, Joined, Sent, Streamed
from tests.load.hosts import Server
from tests.load.sockets import WebSocket, open_socket
from tests.load.streams import read_events

__all__ = ["Crowd", "Visitor", "Watcher", "make_visitors"]

PATIENCE_S = 1.0
"""A visitor who has heard nothing for so long goes to another host."""

WAITS_S = (0.0, 0.1, 0.2, 0.4, 0.8, 1.6)
"""Between tries; the last is repeated. A thousand who do not hold back are an outage of their own."""

GIVE_UP = 0.02
"""How likely a visitor is to say no more of a message whose try failed: nobody then asks what became of it."""

STREAMED = 0.3
SEVERAL = (1, 1, 1, 3)
"""How many messages one with a WebSocket sends in one go, and how likely one of them is answered in chunks."""

HOP = 0.15
"""How likely one with a WebSocket is to go to another host while its answer is under way."""

MAY_BE = frozenset({0, 200, 202, 429, 503})
"""Statuses that a client has to expect; 0 is no answer at all."""


class _Said(msgspec.Struct, frozen=True):
    """A frame or an event, as far as it is no reply."""

    type: str = ""
    id: str = ""
    to: str | None = None
    seq: int = 0
    index: int = 0
    text: str = ""
    code: str = ""


class _Refusal(msgspec.Struct, frozen=True):
    error: dict[str, Any] = {}


_read_said = msgspec.json.Decoder(_Said).decode
_read_refusal = msgspec.json.Decoder(_Refusal).decode


@dataclass(slots=True)
class Crowd:
    """What all visitors of a run share."""

    hosts: Sequence[Server]
    think_s: float
    history: History = field(default_factory=History)
    accepts: list[tuple[float, int]] = field(default_factory=list)
    """When, and by which host, each `accepted` was said."""

    said: Counter[str] = field(default_factory=Counter)
    """What hosts said in place of an answer, and how often."""

    strange: Counter[str] = field(default_factory=Counter)
    """What no host may ever say."""

    given_up: set[tuple[str, str]] = field(default_factory=set)
    """Conversation and id of messages that nobody asked about any more."""

    doors: dict[str, list[tuple[float, int]]] = field(default_factory=dict)
    """By conversation: when its visitor turned to which host."""

    overtaken: int = 0
    """Streams whose reply is of a later try than all their chunks."""

    over: bool = False

    def another(self, host: int) -> int:
        """A host that is not *host*."""
        return random.choice([number for number in range(len(self.hosts)) if number != host])

    def refused(self, door: str, answer: Answer) -> None:
        """Note an answer that is no promise."""
        try:
            code = _read_refusal(answer.body).error.get("code", "?")
        except msgspec.DecodeError:
            code = repr(answer.body[:60])
        (self.said if answer.status in MAY_BE else self.strange)[f"{door}: {answer.status} {code}"] += 1


class Visitor(ABC):
    """One conversation, and whoever speaks in it."""

    def __init__(self, crowd: Crowd, conversation: str) -> None:
        self.crowd = crowd
        self.conversation = conversation
        self.doors = crowd.doors[conversation] = []
        self.host = random.randrange(len(crowd.hosts))

    @property
    def host(self) -> int:
        """The number of the host that is spoken to."""
        return self.doors[-1][1]

    @host.setter
    def host(self, number: int) -> None:
        self.doors.append((perf_counter(), number))

    async def run(self) -> None:
        """Say something now and then until the run is over."""
        n = 0
        await asyncio.sleep(random.random() * self.crowd.think_s)
        while not self.crowd.over:
            n += 1
            await self.say(f"{self.conversation}-{n}", f"message {n}")
            await asyncio.sleep(random.uniform(0.5, 1.5) * self.crowd.think_s)
        self.leave()

    @abstractmethod
    async def say(self, id: str, text: str) -> None:
        """Send a message until it is answered, or given up."""

    @abstractmethod
    def leave(self) -> None:
        """Close what is open."""

    @property
    def port(self) -> int:
        return self.crowd.hosts[self.host].port

    def sent(self, id: str) -> None:
        self.crowd.history.add(Sent(conversation=self.conversation, id=id, time=perf_counter()))

    def accepted(self, id: str, seq: int, host: int) -> None:
        now = perf_counter()
        self.crowd.accepts.append((now, host))
        self.crowd.history.add(Accepted(conversation=self.conversation, id=id, time=now, seq=seq))


class _OneByOne(Visitor):
    """Sends one message, over whichever door, until it is answered."""

    async def say(self, id: str, text: str) -> None:
        for wait_s in chain(WAITS_S, repeat(WAITS_S[-1])):
            if await self.attempt(id, text) or self.crowd.over:
                return
            if random.random() < GIVE_UP:
                self.crowd.given_up.add((self.conversation, id))
                return
            self.host = self.crowd.another(self.host)
            await asyncio.sleep(wait_s * random.uniform(0.5, 1.0))

    @abstractmethod
    async def attempt(self, id: str, text: str) -> bool:
        """Send it once, to `host`; whether it is answered."""

    def leave(self) -> None:
        pass  # a connection a message


class _Caller(_OneByOne):
    """Has a connection to the host that it speaks to."""

    def __init__(self, crowd: Crowd, conversation: str) -> None:
        super().__init__(crowd, conversation)
        self._client: HttpClient | None = None
        self._to = -1

    def leave(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    async def request(self, method: str, query: str, body: bytes = b"") -> Answer:
        """An answer; its status is 0 where none came."""
        if self._client is None or self._to != self.host:
            self.leave()
            self._client, self._to = HttpClient(self.port), self.host
        target = f"/v1/conversations/{self.conversation}/messages{query}"
        try:
            return await self._client.request(method, target, body, timeout=PATIENCE_S + 0.3)
        except ConnectionLost:
            return Answer(0, b"{}")

    async def post(self, id: str, text: str, query: str = "") -> Answer:
        """Send the message, and note what was promised and shown."""
        self.sent(id)
        answer = await self.request("POST", query, message_body(id, text))
        if answer.status in (200, 202):
            taken = read_taken(answer.body)
            now = perf_counter()
            self.crowd.accepts.append((now, self.host))
            note_taken(self.crowd.history, taken, now)
        else:
            self.crowd.refused("post", answer)
        return answer


class _Waiter(_Caller):
    """`?wait`: the answer comes with the answer; where the time is up first, it asks once more."""

    async def attempt(self, id: str, text: str) -> bool:
        answer = await self.post(id, text, f"?wait={PATIENCE_S:g}")
        if answer.status != 200:
            return False
        if read_taken(answer.body).replies:
            return True
        # A turn that ended without a reply: only when it says why
        self.crowd.refused("post without a reply", answer)
        if not _read_refusal(answer.body).error:
            self.crowd.strange["a turn that ended has no reply, and no reason"] += 1
        return True


class _Returner(_Caller):
    """Takes `202` for an answer, and reads the record later, over any host."""

    async def attempt(self, id: str, text: str) -> bool:
        answer = await self.post(id, text)
        if answer.status != 202:
            return False
        seq, pauses = read_taken(answer.body).seq, chain((0.05, 0.1, 0.2), repeat(0.4))
        while not self.crowd.over:
            await asyncio.sleep(next(pauses))
            page = await self.request("GET", f"?after={seq}&limit=50")
            if page.status == 200:
                for entry in read_page(page.body).messages:
                    if entry.type == "reply" and entry.to == id:
                        self.crowd.history.add(shown(entry, perf_counter()))
                        return True
                continue
            self.crowd.refused("record", page)
            self.host = self.crowd.another(self.host)
        return True


class _Chunks:
    """The chunks that came for one message."""

    def __init__(self) -> None:
        self.text = ""
        self.restarts = 0
        self._next = 0
        self._holes = 0

    def add(self, index: int, text: str) -> None:
        if index < self._next:
            self.restarts += 1
            self.text, self._next, self._holes = "", 0, 0
        self._holes += index - self._next
        self._next = index + 1
        self.text += text

    def ended(self, crowd: Crowd, reply: Entry) -> None:
        """Put it into the history, unless all of it is of a try before the one whose reply was kept.

        A host that is robbed of a turn may have said it all by then, and chunks of the next may be lost on their way:
        they are not kept. The reply says what holds.
        """
        if not self.text:
            return  # a repeat of a turn that had ended
        if self.text[: self.text.find("]")] != reply.text[: reply.text.find("]")]:
            crowd.overtaken += 1
            return
        stream = Streamed(
            conversation=reply.conversation,
            id=reply.to or "",
            time=perf_counter(),
            text=self.text,
            ended=True,
            restarts=self.restarts,
            holes=self._holes + CHUNKS - self._next,
        )
        crowd.history.add(stream)


class _Streamer(_OneByOne):
    """`Accept: text/event-stream`: every answer in chunks."""

    async def attempt(self, id: str, text: str) -> bool:
        host, chunks, reply = self.host, _Chunks(), None
        self.sent(id)
        try:
            target = f"/v1/conversations/{self.conversation}/messages"
            body = message_body(id, STREAM)
            async for event, data in read_events(self.port, target, body, gap_s=PATIENCE_S + 0.3):
                if event == "accepted":
                    self.accepted(id, _read_said(data).seq, host)
                elif event == "chunk":
                    said = _read_said(data)
                    chunks.add(said.index, said.text)
                elif event == "reply":
                    reply = read_entry(data)
                    self.crowd.history.add(shown(reply, perf_counter()))
                elif event == "error":
                    self.crowd.said[f"stream: {_read_said(data).code}"] += 1
                    return False
                elif event == "done":
                    if reply is None:
                        self.crowd.strange["a stream is done without a reply"] += 1
                    else:
                        chunks.ended(self.crowd, reply)
                    return True
        except ConnectionLost as exc:
            self.crowd.said[f"stream: {_short(exc)}"] += 1
        return False


class Watcher:
    """Reads what others say, over `GET …/events`, and goes to another host now and then, with `Last-Event-ID`."""

    def __init__(self, crowd: Crowd, conversation: str) -> None:
        self.crowd = crowd
        self.conversation = conversation
        self._last = 0

    async def run(self) -> None:
        """Read until the run is over."""
        host, stays = random.randrange(len(self.crowd.hosts)), 0
        while not self.crowd.over:
            host, stays = self.crowd.another(host), stays + 1
            try:
                async with asyncio.timeout(random.uniform(1.0, 10.0)):
                    await self._read(host, f"{self.conversation}/watch-{stays}")
            except ConnectionLost as exc:
                self.crowd.said[f"events: {_short(exc)}"] += 1
            except TimeoutError:
                pass
            await asyncio.sleep(0.1)

    async def _read(self, host: int, stay: str) -> None:
        joined = Joined(conversation=self.conversation, id=stay, time=perf_counter(), after=self._last)
        self.crowd.history.add(joined)
        target, last = f"/v1/conversations/{self.conversation}/events", f"Last-Event-ID: {self._last}\r\n"
        events = read_events(self.crowd.hosts[host].port, target, b"", method="GET", headers=last)
        async for event, data in events:
            if event in ("message", "reply"):
                self._last = _read_said(data).seq
            if event == "reply" and not self.crowd.over:
                heard = Heard(conversation=self.conversation, id=stay, time=perf_counter(), seq=self._last)
                self.crowd.history.add(heard)


class _Stay:
    """One connection of one who has a WebSocket: what it is shown, and what it waits for."""

    def __init__(self, visitor: _Talker, number: int) -> None:
        self.id = f"{visitor.conversation}/{number}"
        self.host = visitor.host
        self.after = visitor.last
        self.socket: WebSocket | None = None
        self._visitor = visitor
        self._sent: set[str] = set()
        self._chunks: dict[str, _Chunks] = {}

    @property
    def alive(self) -> bool:
        return self.socket is not None and self.socket.closed is None

    async def open(self) -> bool:
        """Connect, with `after=`."""
        history = self._visitor.crowd.history
        target = f"/v1/ws?conversation={self._visitor.conversation}&after={self.after}"
        try:
            async with asyncio.timeout(PATIENCE_S):
                history.add(
                    Joined(conversation=self._visitor.conversation, id=self.id, time=perf_counter(), after=self.after)
                )
                self.socket = await open_socket(self._visitor.port, target, lambda _, text: self._take(text))
        except (OSError, TimeoutError, ConnectionLost) as exc:
            self._visitor.crowd.said[f"websocket: {_short(exc)}"] += 1
            return False
        return True

    def send(self, id: str, text: str) -> None:
        assert self.socket is not None
        self._visitor.sent(id)
        if not (self._visitor.tried(id) or id in self._sent):
            self._chunks[id] = _Chunks()
        self._sent.add(id)
        self.socket.send(msgspec.json.encode({"type": "message", "id": id, "text": text}))

    def close(self) -> None:
        if self.socket is not None:
            self.socket.closed = self.socket.closed or "left"
            self.socket.transport.abort()

    def _take(self, data: bytes) -> None:
        if self.socket is not None and self.socket.closed == "left":
            return
        visitor, said = self._visitor, _read_said(data)
        if said.type == "accepted":
            visitor.accepted(said.id, said.seq, self.host)
        elif said.type == "chunk" and said.to in self._chunks:
            self._chunks[said.to].add(said.index, said.text)
        elif said.type == "reply":
            reply, now = read_entry(data), perf_counter()
            visitor.crowd.history.add(shown(reply, now))
            again = reply.to is not None and visitor.tried(reply.to) and reply.to in self._sent
            visitor.crowd.history.add(
                Heard(conversation=visitor.conversation, id=self.id, time=now, seq=reply.seq, again=again)
            )
            if (chunks := self._chunks.pop(reply.to or "", None)) is not None:
                chunks.ended(visitor.crowd, reply)
            visitor.heard(reply.seq, reply.to, again)
        elif said.type == "error":
            visitor.crowd.said[f"websocket: {said.code}"] += 1
            visitor.failed(said.to)


class _Talker(Visitor):
    """A WebSocket: sometimes several messages at once, sometimes elsewhere before the answer has come."""

    def __init__(self, crowd: Crowd, conversation: str) -> None:
        super().__init__(crowd, conversation)
        self.last = 0
        self._highest = 0
        self._stay: _Stay | None = None
        self._stays = 0
        self._waiting: dict[str, asyncio.Future[None]] = {}
        self._tries: Counter[str] = Counter()

    def tried(self, id: str) -> bool:
        """Whether *id* was sent more than once."""
        return self._tries[id] > 1

    def heard(self, seq: int, to: str | None, again: bool) -> None:
        """A reply came. That of a repeat may have overtaken others, and moves `last` only when none is awaited."""
        self._highest = max(self._highest, seq)
        if not again:
            self.last = max(self.last, seq)
        answered = self._waiting.pop(to or "", None)
        if answered is not None and not answered.done():
            answered.set_result(None)
        if not self._waiting:
            self.last = self._highest

    def failed(self, id: str | None) -> None:
        """A try was refused, or with None all that were under way."""
        for one in [id] if id is not None else list(self._waiting):
            waiting = self._waiting.get(one)
            if waiting is not None and not waiting.done():
                waiting.set_result(None)

    async def say(self, id: str, text: str) -> None:
        left = {f"{id}.{n}": STREAM if random.random() < STREAMED else text for n in range(random.choice(SEVERAL))}
        for wait_s in chain(WAITS_S, repeat(WAITS_S[-1])):
            left = await self._say_all(left)
            if not left or self.crowd.over:
                break
            if random.random() < GIVE_UP:
                self.crowd.given_up.update((self.conversation, one) for one in left)
                break
            self.leave()
            self.host = self.crowd.another(self.host)
            await asyncio.sleep(wait_s * random.uniform(0.5, 1.0))
        self._waiting.clear()

    async def _say_all(self, texts: dict[str, str]) -> dict[str, str]:
        """Send them in order, and wait; those that have no answer then come back."""
        stay = await self._be_there()
        if stay is None:
            return texts
        for id, text in texts.items():
            self._waiting[id] = asyncio.get_running_loop().create_future()
            self._tries[id] += 1
            stay.send(id, text)
        if random.random() < HOP:
            await asyncio.sleep(random.random() * 0.05)
            if self._waiting:
                self.leave()
                self.host = self.crowd.another(self.host)
                stay = await self._be_there()
        until = perf_counter() + PATIENCE_S + 0.3
        while stay is not None and stay.alive and perf_counter() < until:
            under_way = [future for id, future in self._waiting.items() if id in texts and not future.done()]
            if not under_way:
                break
            await asyncio.wait(under_way, timeout=0.1)
        return {id: text for id, text in texts.items() if id in self._waiting}

    async def _be_there(self) -> _Stay | None:
        """The stay that is, or a new one; None where the host does not let anybody in."""
        if self._stay is not None and self._stay.alive and self._stay.host == self.host:
            return self._stay
        self.leave()
        self._stays += 1
        stay = self._stay = _Stay(self, self._stays)
        if await stay.open() and stay is self._stay:
            return stay
        stay.close()
        return None

    def leave(self) -> None:
        if self._stay is not None:
            self._stay.close()
            self._stay = None


def _short(exc: BaseException) -> str:
    return str(exc).partition("\r\n")[0][:60] or type(exc).__name__


def make_visitors(crowd: Crowd, count: int) -> list[Visitor | Watcher]:
    """*count* conversations, whose ways in take turns, and somebody who watches one in ten of them."""
    ways = (_Waiter, _Returner, _Streamer, _Talker)
    speaking = [ways[number % len(ways)](crowd, f"k{number}") for number in range(count)]
    return [*speaking, *(Watcher(crowd, f"k{number}") for number in range(0, count, 11))]
