"""Each message is sent one to five times at once, over doors of different hosts, and connections are cut: one effect.

Conversations of some hundred messages, one after the other: a message is sent again until a host has answered it. Then
the record is read back and judged: one seq and one reply a message, whoever asked, and a bot's count in the
conversation's state that is the number of its messages.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import sys
from array import array
from collections import Counter
from dataclasses import dataclass, field
from time import perf_counter

import msgspec
from tests.chaos.fleet import Fleet, open_fleet
from tests.chaos.owners import Owners
from tests.load.checker import KINDS, judge
from tests.load.client import ConnectionLost, HttpClient, percentile
from tests.load.desk import Desk, message_body, message_target, note_taken, read_entry, read_taken, shown
from tests.load.history import Accepted, History, Recorded, Sent
from tests.load.report import Figure, run_main
from tests.load.sockets import WebSocket, open_socket
from tests.redis_servers import Link

__all__ = ["measure"]

COPIES = 5
CUT = 0.03
"""How likely a connection is cut right behind a message, or a few milliseconds later."""

ANSWER_S = 5.0
GIVE_UP_S = 20.0
"""A message that has no answer then never gets one: the judge will say so."""

LINK_CUT_S = (2.0, 8.0)
"""So often the way of a host to Redis is cut, too, for a moment."""


class _Frame(msgspec.Struct, frozen=True):
    type: str = ""
    id: str = ""
    to: str | None = None
    seq: int = 0
    code: str = ""


_read_frame = msgspec.json.Decoder(_Frame).decode


@dataclass(slots=True)
class Tally:
    """What came of all conversations together; a history of a million messages is too much to keep."""

    messages: int = 0
    sends: int = 0
    accepts: int = 0
    answers: int = 0
    cuts: int = 0
    again: int = 0
    counted: int = 0
    replies: int = 0
    waits: array[float] = field(default_factory=lambda: array("f"))
    faults: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)


class _Door:
    """One way in of one host, for one conversation: HTTP, or a WebSocket that is opened when it is first used."""

    def __init__(self, port: int, conversation: str, history: History, tally: Tally) -> None:
        self.port = port
        self._conversation = conversation
        self._history = history
        self._tally = tally

    async def send(self, id: str) -> bool:
        """Send it once; whether its reply came."""
        self._history.add(Sent(conversation=self._conversation, id=id, time=perf_counter()))
        self._tally.sends += 1
        cut = (
            asyncio.get_running_loop().call_later(random.choice((0.0, 0.01)), self.cut)
            if random.random() < CUT
            else None
        )
        began = perf_counter()
        try:
            answered = await self._send(id)
            if answered:
                self._tally.waits.append(perf_counter() - began)
            return answered
        except (OSError, TimeoutError, ConnectionLost) as exc:
            self._tally.refusals[type(exc).__name__] += 1
            self.close()
            return False
        finally:
            if cut is not None:
                cut.cancel()

    def cut(self) -> None:
        self._tally.cuts += 1
        self.close()

    async def _send(self, id: str) -> bool:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


class _Http(_Door):
    def __init__(self, port: int, conversation: str, history: History, tally: Tally) -> None:
        super().__init__(port, conversation, history, tally)
        self._client = HttpClient(port)

    async def _send(self, id: str) -> bool:
        target = message_target(self._conversation, wait=True)
        answer = await self._client.request("POST", target, message_body(id, "count"), timeout=ANSWER_S)
        if answer.status not in (200, 202):
            self._tally.refusals[f"{answer.status}"] += 1
            return False
        taken = read_taken(answer.body)
        note_taken(self._history, taken, perf_counter())
        return bool(taken.replies)

    def close(self) -> None:
        self._client.close()


class _Socket(_Door):
    def __init__(self, port: int, conversation: str, history: History, tally: Tally) -> None:
        super().__init__(port, conversation, history, tally)
        self._socket: WebSocket | None = None
        self._waiting: dict[str, asyncio.Future[bool]] = {}

    async def _send(self, id: str) -> bool:
        async with asyncio.timeout(ANSWER_S):
            if self._socket is None or self._socket.closed:
                target = f"/v1/ws?conversation={self._conversation}"
                self._socket = await open_socket(self.port, target, lambda _, text: self._take(text))
            waiting = self._waiting[id] = asyncio.get_running_loop().create_future()
            self._socket.send(msgspec.json.encode({"type": "message", "id": id, "text": "count"}))
            try:
                while not waiting.done() and self._socket is not None and not self._socket.closed:
                    await asyncio.wait([waiting], timeout=0.1)
                return waiting.done() and waiting.result()
            finally:
                del self._waiting[id]

    def _take(self, data: bytes) -> None:
        said, now = _read_frame(data), perf_counter()
        waiting = None
        if said.type == "accepted":
            self._history.add(Accepted(conversation=self._conversation, id=said.id, time=now, seq=said.seq))
        elif said.type == "reply":
            self._history.add(shown(read_entry(data), now))
            waiting = self._waiting.get(said.to or "")
        elif said.type == "error":
            self._tally.refusals[said.code] += 1
            waiting = self._waiting.get(said.to or "")
        if waiting is not None and not waiting.done():
            waiting.set_result(said.type == "reply")

    def close(self) -> None:
        if self._socket is not None:
            self._socket.transport.abort()
            self._socket = None


class Sender:
    """One conversation after the other, each with doors of all hosts."""

    def __init__(self, fleet: Fleet, tally: Tally) -> None:
        self._fleet = fleet
        self._tally = tally

    async def speak(self, conversation: str, messages: int) -> None:
        """Send *messages* messages, read the record back, and judge."""
        history = History()
        ports = [host.port for host in self._fleet.hosts]
        doors = [kind(port, conversation, history, self._tally) for port in ports for kind in (_Http, _Socket)]
        for number in range(messages):
            await self._say(doors, f"{conversation}-{number}")
        for door in doors:
            door.close()
        record = await self._read(conversation)
        for entry in record:
            history.add(entry)
        counts = [entry.count for entry in record if entry.type == "reply"]
        self._tally.counted += max(counts, default=0)
        self._tally.replies += len(counts)
        self._tally.messages += messages
        self._tally.accepts += sum(isinstance(event, Accepted) for event in history.events)
        for fault in judge(history.events).faults:
            self._tally.faults[fault.kind] += 1
            print(fault, file=sys.stderr)

    async def _read(self, conversation: str) -> list[Recorded]:
        """The record, by a host that is not cut off from Redis just now."""
        while True:
            with contextlib.closing(Desk(random.choice(self._fleet.hosts))) as desk:
                try:
                    return await desk.read_record(conversation, perf_counter())
                except (ConnectionLost, RuntimeError) as exc:
                    self._tally.refusals[f"record: {str(exc).rpartition(': ')[2][:60]}"] += 1
            await asyncio.sleep(0.1)

    async def _say(self, doors: list[_Door], id: str) -> None:
        """All copies at once, over as many doors; again until one was answered."""
        copies, give_up = random.randint(1, COPIES), perf_counter() + GIVE_UP_S
        while perf_counter() < give_up:
            answered = await asyncio.gather(*(door.send(id) for door in random.sample(doors, copies)))
            self._tally.answers += sum(answered)
            if any(answered):
                return
            self._tally.again += 1
            copies = 1
            await asyncio.sleep(0.05)


async def measure(short: bool, *, messages: int | None = None) -> list[Figure]:
    """Many conversations at once, links cut now and then; then the ids' memory is asked for."""
    total = messages if messages is not None else 600 if short else 1_000_000
    at_once, each = (20, 15) if short else (50, 200)
    tally = Tally()
    async with open_fleet("chaos-once") as fleet:
        history = History()
        owners = Owners(fleet.redis, history)
        await owners.wait_shared_out(len(fleet.hosts))
        conversations = iter(range(total // each))
        sender = Sender(fleet, tally)
        began = perf_counter()
        cutting = asyncio.create_task(cut_links(fleet))

        async def speak() -> None:
            for number in conversations:
                await sender.speak(f"o{number}", each)

        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(speak())
        seconds = perf_counter() - began
        cutting.cancel()
        await asyncio.wait([cutting])
        ids, size = await owners.id_memory()
    for what, times in tally.refusals.most_common():
        print(f"{times} times {what}", file=sys.stderr)
    return [
        Figure("messages", tally.messages),
        Figure("sends", tally.sends),
        Figure("accepted", tally.accepts),
        Figure("answers", tally.answers),
        Figure("connections cut", tally.cuts),
        Figure("sent again, for no copy was answered", tally.again),
        Figure("effects too many or too few", abs(tally.counted - tally.messages), at_most=0),
        Figure("replies too many or too few", abs(tally.replies - tally.messages), at_most=0),
        *(Figure(kind, tally.faults[kind], at_most=0) for kind in KINDS),
        Figure("an answer, p50", percentile(list(tally.waits), 50) * 1000, "ms"),
        Figure("an answer, p99", percentile(list(tally.waits), 99) * 1000, "ms"),
        Figure("an answer, max", percentile(list(tally.waits), 100) * 1000, "ms"),
        Figure("messages a second", tally.messages / seconds, "messages/s"),
        Figure("sends a second", tally.sends / seconds, "messages/s"),
        Figure("ids kept", ids),
        # a bucket of few ids is mostly the bucket
        Figure("memory of an id", size / max(1, ids), "bytes", at_most=None if ids < 100_000 else 150),
    ]


async def cut_links(fleet: Fleet) -> None:
    """Now and then a host loses its connections to Redis."""
    links = [host.way for host in fleet.hosts if isinstance(host.way, Link)]
    while True:
        await asyncio.sleep(random.uniform(*LINK_CUT_S))
        link = random.choice(links)
        link.cut()
        await link.heal()


def own_options() -> argparse.ArgumentParser:
    """What can be said beside --short and --json."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--messages", type=int, metavar="N", help="1,000,000, or 600 in the short form")
    return parser


if __name__ == "__main__":
    run_main(measure, own_options())
