"""The onion: compiled once per snapshot, so that a turn only runs it.

Every plugin call goes through `Calls`. A streamed answer stays a stream on its way out: each layer may wrap it,
and each pull is a call of its own, with the deadline starting anew at each chunk.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator
from typing import Any

from hotdesk_sdk import Reply

from ..errors import CallFailed, TurnAborted
from ..runtime.active import BoundHook, Slot, Snapshot
from ..runtime.call import Calls
from .turn import TurnRun, as_text

__all__ = ["Dispatch"]

Run = Callable[[TurnRun, "CallNext | None"], Coroutine[Any, Any, Reply | None]]
"""A layer of the onion. It tells its result to the `CallNext` that led to it, so that one needs no frame of its own."""

_END = object()


class CallNext:
    """See `hotdesk_sdk.CallNext`."""

    __slots__ = ("_inner", "_turn", "called", "chunks", "result")

    def __init__(self, turn: TurnRun, inner: Run) -> None:
        self._turn = turn
        self._inner = inner
        self.called = False
        self.result: Reply | None = None
        self.chunks: AsyncIterator[str] | None = None

    def __call__(self, turn: Any = None, /) -> Coroutine[Any, Any, Reply | None]:
        if self.called:
            raise RuntimeError("call_next() was called twice; what is further in runs once a turn")
        self.called = True
        return self._inner(self._turn, self)

    def tell(self, result: Reply | None) -> None:
        self.result = result
        if result is not None:
            self.chunks = result.chunks


class _Driver:
    """Runs a `respond` coroutine until it ends or has chunks to show, whichever is first, and goes on from there.

    So an answer that begins with `turn.stream()` becomes a stream for the middleware around it, though the
    coroutine has not returned yet.
    """

    __slots__ = ("_coro", "_held", "_turn", "done", "result")

    def __init__(self, coro: Coroutine[Any, Any, Any], turn: TurnRun) -> None:
        self._coro = coro
        self._turn = turn
        self._held: Any = None
        self.done = False
        self.result: Any = None

    async def run(self) -> None:
        self._turn.streaming = True
        try:
            await self
        finally:
            self._turn.streaming = False

    def __await__(self) -> Generator[Any, Any, None]:
        coro, turn = self._coro, self._turn
        error: BaseException | None = None
        waiting, self._held = self._held, None
        while True:
            if waiting is not None:
                try:
                    yield waiting
                    error = None
                except BaseException as exc:  # whatever comes from outside belongs to the coroutine
                    error = exc
            try:
                waiting = coro.send(None) if error is None else coro.throw(error)
            except StopIteration as stop:
                self.done, self.result = True, stop.value
                return
            error = None
            if turn.pending:
                self._held = waiting
                return
            if waiting is None:
                try:
                    yield
                except BaseException as exc:
                    error = exc

    def close(self) -> None:
        self._coro.close()


class Dispatch:
    """Compiles onions."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def compile(self, snapshot: Snapshot) -> Run:
        """The onion of *snapshot*: its middleware around its bots."""
        run = self._responders(snapshot.implementations("respond"))
        for slot, hook in reversed(snapshot.implementations("middleware")):
            run = self._layer(slot, hook, run)
        return run

    def _layer(self, slot: Slot, hook: BoundHook, inner: Run) -> Run:
        call, function = self._calls.call, hook.call

        async def layer(turn: TurnRun, outer: CallNext | None = None) -> Reply | None:
            call_next = CallNext(turn, inner)
            try:
                given = await call(slot, hook, turn.clock, function, turn, call_next)
                if given is not call_next.result:
                    given = self._reply(slot, hook, given)
                    if given is not None:
                        turn.answered_by = slot
            except CallFailed as failure:
                turn.note_failure(slot, failure)
                given = call_next.result if call_next.called else await inner(turn, call_next)
            if given is not None and given.chunks is not None and given.chunks is not call_next.chunks:
                given.chunks = self._guarded(slot, hook, turn, given.chunks)
            if outer is not None:
                outer.tell(given)
            return given  # type: ignore[no-any-return]

        return layer

    def _responders(self, bots: tuple[tuple[Slot, BoundHook], ...]) -> Run:
        async def respond(turn: TurnRun, outer: CallNext | None = None) -> Reply | None:
            for slot, hook in bots:
                try:
                    reply = await self._ask(slot, hook, turn)
                except CallFailed as failure:
                    turn.note_failure(slot, failure)
                    continue
                if reply is not None:
                    turn.answered_by = slot
                    if outer is not None:
                        outer.tell(reply)
                    return reply
            return None

        return respond

    async def _ask(self, slot: Slot, hook: BoundHook, turn: TurnRun) -> Reply | None:
        if hook.streams:
            return await self._begun(slot, hook, turn, Reply(chunks=hook.call(turn)))
        driver = _Driver(hook.call(turn), turn)
        try:
            await self._calls.call(slot, hook, turn.clock, driver.run)
        except BaseException:
            driver.close()
            turn.pending.clear()
            raise
        if turn.pending:
            streamed = Reply()
            streamed.chunks = self._driven(slot, hook, turn, driver, streamed)
            return streamed
        if driver.result is None:
            return None
        reply = self._reply(slot, hook, driver.result)
        return reply if reply is None or reply.chunks is None else await self._begun(slot, hook, turn, reply)

    async def _begun(self, slot: Slot, hook: BoundHook, turn: TurnRun, reply: Reply) -> Reply | None:
        """A stream whose first chunk is there: until then its failure is like any other. None: it ended empty."""
        assert reply.chunks is not None
        rest = self._guarded(slot, hook, turn, reply.chunks)
        async for first in rest:
            reply.chunks = _with_first(first, rest)
            return reply
        return None

    async def _driven(
        self, slot: Slot, hook: BoundHook, turn: TurnRun, driver: _Driver, reply: Reply
    ) -> AsyncIterator[str]:
        """What `turn.stream()` was given, and then the rest of what was returned, seen by every layer."""
        said: list[str] = []
        try:
            while True:
                while turn.pending:
                    chunk = turn.pending.pop(0)
                    said.append(chunk)
                    yield chunk
                if driver.done:
                    break
                await self._calls.call(slot, hook, turn.clock, driver.run)
        finally:
            driver.close()
        if driver.result is None:
            return
        last = self._reply(slot, hook, driver.result)
        if last is None:
            return
        reply.metadata.update(last.metadata)
        if last.chunks is not None:
            async for chunk in self._guarded(slot, hook, turn, last.chunks):
                yield chunk
        elif rest := last.text.removeprefix("".join(said)):
            yield rest

    async def _guarded(
        self, slot: Slot, hook: BoundHook, turn: TurnRun, chunks: AsyncIterator[str]
    ) -> AsyncIterator[str]:
        """*chunks*, each pulled as a call: deadline, fault wall, metric."""
        if not hasattr(chunks, "__aiter__"):
            raise self._calls.refuse(slot, hook, f"gave chunks of type {type(chunks).__name__}; they must be async")
        iterator: Any = None

        async def pull() -> Any:
            nonlocal iterator
            if iterator is None:
                iterator = aiter(chunks)
            try:
                return await anext(iterator)
            except StopAsyncIteration:
                return _END

        try:
            while (chunk := await self._calls.call(slot, hook, turn.clock, pull)) is not _END:
                if self._text(slot, hook, chunk, "a chunk"):
                    yield chunk
        finally:
            close: Callable[[], Awaitable[None]] | None = getattr(iterator, "aclose", None)
            if close is not None:
                try:
                    await self._calls.call(slot, hook, turn.clock, close)
                except (CallFailed, TurnAborted):
                    pass  # it was put down; what was said stands

    def _reply(self, slot: Slot, hook: BoundHook, given: Any) -> Reply | None:
        if given is None:
            return None
        if isinstance(given, str):
            return Reply(self._text(slot, hook, given, "a reply"))
        if isinstance(given, Reply):
            self._text(slot, hook, given.text, "a reply's text")
            return given
        if hasattr(given, "__aiter__"):
            return Reply(chunks=given)
        raise self._calls.refuse(
            slot,
            hook,
            f"returned a {type(given).__name__}; it may return text, a Reply, chunks of text, or None",
        )

    def _text(self, slot: Slot, hook: BoundHook, given: Any, what: str) -> str:
        try:
            return as_text(given, what)
        except (TypeError, ValueError) as exc:
            raise self._calls.refuse(slot, hook, f"gave what can't be said: {exc}") from None


async def _with_first(first: str, rest: AsyncIterator[str]) -> AsyncIterator[str]:
    try:
        yield first
        async for chunk in rest:
            yield chunk
    finally:
        await rest.aclose()  # type: ignore[attr-defined]
