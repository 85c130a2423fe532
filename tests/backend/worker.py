"""A worker that runs no plugins: it notes what its backend hands it, in order, and ends turns when it is told to.

As a program (`python -m tests.backend.worker URL`) it is a process of its own, for tests to stop and to kill: it takes
orders as JSON lines and says what happens in the same way.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry

from hotdesk.backend import (
    Appended,
    Backend,
    ConversationRecord,
    Entry,
    StoredReply,
    TurnEnd,
    open_backend,
)
from hotdesk.errors import BackendError, BackendUnavailable, StaleOwner
from hotdesk.metrics import Metrics
from hotdesk_sdk import Message

__all__ = ["Answering", "Begun", "Ended", "Recorder", "Worker", "message", "reply"]

BEGIN_S = 5.0
RETRY_S = 0.02


def message(conversation: str, id: str, text: str = "hi", at: float | None = None) -> Message:
    return Message(id, conversation, 0, text, at=time.time() if at is None else at)


def reply(conversation: str, to: str | None, id: str = "r1", text: str = "answer") -> StoredReply:
    return StoredReply(id, conversation, 0, to, text, "echo", 1, {}, time.time())


@dataclass(frozen=True)
class Begun:
    """A turn that was begun. `here`: by an append at this worker."""

    message: Message
    record: ConversationRecord
    attempt: int
    opened: bool
    fence: Any
    here: bool

    @property
    def key(self) -> tuple[str, int]:
        return self.message.conversation, self.message.seq


@dataclass(frozen=True)
class Ended:
    """A turn's end elsewhere, as it was heard."""

    conversation: str
    to: str
    replies: tuple[StoredReply, ...]
    error: tuple[str, str] | None
    direct: bool


class Recorder:
    """See `backend.Listener`: it notes everything and does nothing."""

    def __init__(self) -> None:
        self.begun: list[Begun] = []
        self.open: dict[tuple[str, int], Begun] = {}
        """Begun, and neither ended nor dropped."""

        self.dropped: list[tuple[str, int]] = []
        self.redelivered: list[StoredReply] = []
        self.entries: list[tuple[Entry, bool, bool]] = []
        self.ends: list[Ended] = []
        self.chunks: list[tuple[str, str, int, list[str], bool]] = []
        self.signals: list[tuple[str, str, str]] = []
        self.answer = True
        """What a signal is answered with."""

        self.resynced: list[str] = []
        self.resyncs_of_turns = 0
        self.on_begun: Callable[[Begun], object] = lambda begun: None

    def begin(self, begun: Begun) -> None:
        self.begun.append(begun)
        self.open[begun.key] = begun
        self.on_begun(begun)

    def run(
        self, message: Message, record: ConversationRecord, *, attempt: int, opened: bool, fence: Any, own: bool = False
    ) -> None:
        self.begin(Begun(message, record, attempt, opened, fence, False))

    def redeliver(self, reply: StoredReply, record: ConversationRecord) -> None:
        self.redelivered.append(reply)

    def drop(self, belongs: Callable[[str], bool]) -> None:
        for key in [key for key in self.open if belongs(key[0])]:
            del self.open[key]
            self.dropped.append(key)

    def hear_entry(self, entry: Entry, *, owned: bool, deliver: bool) -> None:
        self.entries.append((entry, owned, deliver))

    def hear_end(
        self, conversation: str, to: str, replies: tuple[StoredReply, ...], error: tuple[str, str] | None, direct: bool
    ) -> None:
        self.ends.append(Ended(conversation, to, replies, error, direct))

    def hear_chunks(self, conversation: str, to: str, index: int, texts: list[str], direct: bool) -> None:
        self.chunks.append((conversation, to, index, texts, direct))

    def hear_signal(self, conversation: str, signal: str, message: str) -> bool:
        self.signals.append((conversation, signal, message))
        return self.answer

    def resync(self, conversation: str) -> None:
        self.resynced.append(conversation)

    def resync_turns(self) -> None:
        self.resyncs_of_turns += 1

    def seqs(self, conversation: str) -> list[int]:
        """What was begun of a conversation, in the order in which it was."""
        return [begun.message.seq for begun in self.begun if begun.message.conversation == conversation]


class Worker:
    """A backend, what it told, and short words for what tests do with it."""

    def __init__(self, backend: Backend, registry: CollectorRegistry) -> None:
        self.backend = backend
        self.registry = registry
        self.heard = Recorder()

    @classmethod
    async def open(cls, url: str, name: str = "") -> Worker:
        registry = CollectorRegistry()
        return cls(await open_backend(url, Metrics(registry), name=name), registry)

    async def start(self) -> int:
        return await self.backend.start(self.heard)

    def append(
        self,
        conversation: str,
        id: str,
        text: str = "hi",
        *,
        at: float | None = None,
        channel: str = "",
        locale: str | None = None,
        chunks: bool = False,
    ) -> asyncio.Future[Appended]:
        """Append a message, and begin its turn where that is this worker's, as a door does."""
        said = message(conversation, id, text, at)
        appending = self.backend.append(said, channel=channel, locale=locale, chunks=chunks)

        def appended(done: asyncio.Future[Appended]) -> None:
            if done.cancelled() or done.exception() is not None:
                return
            result = done.result()
            if result.here:
                numbered = message(conversation, id, text, said.at)
                numbered = Message(id, conversation, result.seq, text, at=numbered.at)
                self.heard.begin(Begun(numbered, result.conversation, 1, result.opened, result.fence, True))

        appending.add_done_callback(appended)
        return appending

    def end(
        self,
        conversation: str,
        seq: int,
        *replies: StoredReply,
        changed: ConversationRecord | None = None,
        closed: bool = False,
        deliver: bool = False,
        error: tuple[str, str] | None = None,
        begun: Begun | None = None,
    ) -> asyncio.Future[tuple[StoredReply, ...] | None]:
        """End a turn that is begun here, now or in a moment, or *begun*, with the leave that came with it."""
        begun = begun or self._find(conversation, seq)
        if begun is None:  # it came by a detour: `Appended.here`
            options = {"changed": changed, "closed": closed, "deliver": deliver, "error": error}
            return asyncio.ensure_future(self._end_once_begun(conversation, seq, *replies, **options))
        ending = self.backend.finish(
            TurnEnd(
                conversation,
                seq,
                replies,
                changed,
                closed=closed,
                deliver=deliver,
                to=begun.message.id,
                error=error,
                fence=begun.fence,
            )
        )

        def ended(done: asyncio.Future[Any]) -> None:
            if done.cancelled() or done.exception() is not None:
                return
            if self.heard.open.get((conversation, seq)) is begun:  # not of a message that Redis lost, and has anew
                del self.heard.open[conversation, seq]

        ending.add_done_callback(ended)
        return ending

    def _find(self, conversation: str, seq: int) -> Begun | None:
        return next((one for one in reversed(self.heard.begun) if one.key == (conversation, seq)), None)

    async def _end_once_begun(
        self, conversation: str, seq: int, *replies: StoredReply, **options: Any
    ) -> tuple[StoredReply, ...] | None:
        async with asyncio.timeout(BEGIN_S):
            while (begun := self._find(conversation, seq)) is None:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        return await self.end(conversation, seq, *replies, begun=begun, **options)

    def answer(self, begun: Begun) -> asyncio.Future[tuple[StoredReply, ...] | None]:
        """End a turn with one reply, whose id says to what."""
        return self.end(
            *begun.key, reply(begun.message.conversation, begun.message.id, f"r-{begun.message.id}"), begun=begun
        )

    async def say(self, conversation: str, id: str, **options: Any) -> Appended:
        """Append a message and answer it here."""
        appended = await self.append(conversation, id, **options)
        await self.end(conversation, appended.seq, reply(conversation, id, f"r-{id}"))
        return appended

    def metric(self, name: str) -> float:
        return self.registry.get_sample_value(name) or 0.0

    async def aclose(self) -> None:
        await self.backend.aclose()


class Answering:
    """Ends every turn of a worker with one reply: one at a time in each conversation, again until it is kept."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._lanes: dict[str, deque[Begun]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.refused = 0
        """Ends that were another's to make."""

        self._count = itertools.count()
        worker.heard.on_begun = self._add

    def _add(self, begun: Begun) -> None:
        lane = self._lanes.get(begun.message.conversation)
        if lane is not None:
            lane.append(begun)
            return
        lane = self._lanes[begun.message.conversation] = deque([begun])
        task = asyncio.ensure_future(self._run(lane))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, lane: deque[Begun]) -> None:
        while lane:
            await self._answer(lane[0])
            begun = lane.popleft()
        del self._lanes[begun.message.conversation]

    async def _answer(self, begun: Begun) -> None:
        conversation, id = begun.message.conversation, begun.message.id
        answer = reply(conversation, id, f"r-{id}-{next(self._count)}")
        while self._worker.heard.open.get(begun.key) is begun:
            try:
                ended = await self._worker.end(*begun.key, answer, begun=begun)
                assert ended is None or ended[0].id == answer.id
                return
            except StaleOwner:
                self.refused += 1
                return
            except BackendUnavailable:
                await asyncio.sleep(RETRY_S)

    async def aclose(self) -> None:
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class _Program:
    """The worker behind JSON lines: `{"do", "token", …}` in, `{"token", …}` and `{"begun", …}` out."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._doing: set[asyncio.Task[None]] = set()
        worker.heard.on_begun = lambda begun: tell(
            begun=[*begun.key, begun.message.id, begun.attempt], opened=begun.opened
        )

    async def take_orders(self) -> None:
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        while line := await reader.readline():
            order = json.loads(line)
            task = asyncio.ensure_future(self._obey(order.pop("do"), order.pop("token"), order))
            self._doing.add(task)
            task.add_done_callback(self._doing.discard)

    async def _obey(self, do: str, token: int, order: dict[str, Any]) -> None:
        try:
            tell(token=token, answer=await getattr(self, do)(**order))
        except BackendError as exc:
            tell(token=token, failed=type(exc).__name__, problem=str(exc))

    async def append(self, conversation: str, id: str, text: str = "hi") -> dict[str, Any]:
        appended = await self._worker.append(conversation, id, text)
        return {"seq": appended.seq, "here": appended.here, "duplicate": appended.duplicate}

    async def end(self, conversation: str, seq: int, text: str, deliver: bool = False) -> list[int] | None:
        ended = await self._worker.end(conversation, seq, reply(conversation, text, text, text), deliver=deliver)
        return None if ended is None else [one.seq for one in ended]

    async def say_chunk(self, conversation: str, seq: int, text: str) -> None:
        begun = next(one for one in self._worker.heard.begun if one.key == (conversation, seq))
        self._worker.backend.tell_chunks(begun.fence, conversation, begun.message.id, 0, [text])

    async def delivered(self, conversation: str, seq: int) -> None:
        await self._worker.backend.delivered(conversation, seq)

    async def purge(self, before: float) -> int:
        return await self._worker.backend.purge(before)

    async def owns(self, conversation: str) -> bool:
        return self._worker.backend.owns(conversation)

    async def metric(self, name: str) -> float:
        return self._worker.metric(name)


def tell(**what: Any) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


async def main() -> None:
    worker = await Worker.open(sys.argv[1], "process")
    program = _Program(worker)
    await worker.start()
    tell(ready=True)
    await program.take_orders()
    await worker.aclose()


if __name__ == "__main__":
    asyncio.run(main())
