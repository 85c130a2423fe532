"""The onion: compiled once per snapshot, so that a turn only runs it.

Every plugin call goes through `Calls`. A streamed answer stays a stream on its way out: each layer may wrap it,
and each pull is a call of its own, with the deadline starting anew at each chunk.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator
from typing import Any, Self

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
        if self._turn.clock.cancelled:
            raise TurnAborted
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

    __slots__ = ("_coro", "_held", "_leaving", "_turn", "done", "result")

    def __init__(self, coro: Coroutine[Any, Any, Any], turn: TurnRun) -> None:
        self._coro = coro
        self._turn = turn
        self._held: Any = None
        self._leaving = False
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
        error: BaseException | None = asyncio.CancelledError() if self._leaving else None
        waiting, self._held = self._held, None
        while True:
            if waiting is not None and error is None:
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
            except BaseException as exc:
                self.done = True
                if self._leaving and isinstance(exc, asyncio.CancelledError):
                    return
                raise
            error = None
            if turn.pending:
                self._held = waiting
                return
            if waiting is None:
                try:
                    yield
                except BaseException as exc:
                    error = exc

    async def leave(self) -> None:
        """Have the coroutine cancelled where it waits, and let it clean up; there is nobody to stream to any more."""
        self._leaving = True
        self._turn.pending.clear()
        try:
            await self
        finally:
            self._coro.close()

    def close(self) -> None:
        self._coro.close()


class Dispatch:
    """Compiles onions."""

    def __init__(self, calls: Calls) -> None:
        self.calls = calls

    def compile(self, snapshot: Snapshot) -> Run:
        """The onion of *snapshot*: its middleware around its bots."""
        run = self._responders(snapshot.implementations("respond"))
        for slot, hook in reversed(snapshot.implementations("middleware")):
            run = self._layer(slot, hook, run)
        return run

    def _layer(self, slot: Slot, hook: BoundHook, inner: Run) -> Run:
        call, function = self.calls.call, hook.call

        async def layer(turn: TurnRun, outer: CallNext | None = None) -> Reply | None:
            call_next = CallNext(turn, inner)
            try:
                given = await call(slot, hook, turn.clock, function, turn, call_next)
                if given is not call_next.result:
                    given = self.reply(slot, hook, given)
                    if given is not None:
                        turn.answered_by = slot
            except CallFailed as failure:
                turn.note_failure(slot, failure)
                given = call_next.result if call_next.called else await inner(turn, call_next)
            if given is not None and given.chunks is not None and given.chunks is not call_next.chunks:
                given.chunks = self.pulled(slot, hook, turn, given.chunks)
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
                    turn.note_unanswered(failure)
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
            await self.calls.call(slot, hook, turn.clock, driver.run)
        except BaseException:
            driver.close()
            turn.pending.clear()
            raise
        if turn.pending:
            streamed = Reply()
            streamed.chunks = chunks = _Driven(self, slot, hook, turn, driver, streamed)
            turn.keep_open(chunks)
            return streamed
        if driver.result is None:
            return None
        reply = self.reply(slot, hook, driver.result)
        return reply if reply is None or reply.chunks is None else await self._begun(slot, hook, turn, reply)

    async def _begun(self, slot: Slot, hook: BoundHook, turn: TurnRun, reply: Reply) -> Reply | None:
        """A stream whose first chunk is there: until then its failure is like any other. None: it ended empty."""
        chunks = self.pulled(slot, hook, turn, reply.chunks)
        if not await chunks.begin():
            return None
        reply.chunks = chunks
        return reply

    def pulled(self, slot: Slot, hook: BoundHook, turn: TurnRun, chunks: Any) -> _Pulled:
        if not hasattr(chunks, "__aiter__"):
            raise self.calls.refuse(slot, hook, f"gave chunks of type {type(chunks).__name__}; they must be async")
        kind = _PulledOfHost if getattr(chunks, "of_host", False) else _Pulled
        pulled = kind(self, slot, hook, turn, chunks)
        turn.keep_open(pulled)
        return pulled

    def reply(self, slot: Slot, hook: BoundHook, given: Any) -> Reply | None:
        if given is None:
            return None
        if isinstance(given, str):
            return Reply(self.text(slot, hook, given, "a reply"))
        if isinstance(given, Reply):
            self.text(slot, hook, given.text, "a reply's text")
            return given
        if hasattr(given, "__aiter__"):
            return Reply(chunks=given)
        raise self.calls.refuse(
            slot,
            hook,
            f"returned a {type(given).__name__}; it may return text, a Reply, chunks of text, or None",
        )

    def text(self, slot: Slot, hook: BoundHook, given: Any, what: str) -> str:
        try:
            return as_text(given, what)
        except (TypeError, ValueError) as exc:
            raise self.calls.refuse(slot, hook, f"gave what can't be said: {exc}") from None


class _Pulled:
    """The chunks that a plugin gave, each pulled as a call: deadline, fault wall, metric."""

    __slots__ = ("_ahead", "_chunks", "_dispatch", "_ended", "_hook", "_iterator", "_slot", "_turn")

    def __init__(self, dispatch: Dispatch, slot: Slot, hook: BoundHook, turn: TurnRun, chunks: Any) -> None:
        self._dispatch = dispatch
        self._slot = slot
        self._hook = hook
        self._turn = turn
        self._chunks = chunks
        self._iterator: Any = None
        self._ended = False
        self._ahead: list[str] = []

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        if not self._ahead:
            self._ahead = (await self.next_batch())[::-1]
            if not self._ahead:
                raise StopAsyncIteration
        return self._ahead.pop()

    async def begin(self) -> bool:
        """Pull what comes first; it is kept, and comes again. False: there is nothing."""
        self._ahead = (await self.next_batch())[::-1]
        return bool(self._ahead)

    async def next_batch(self) -> list[str]:
        """The next chunks, as many as have come; none at the end. Raises `CallFailed` and `TurnAborted`."""
        if self._ahead:
            batch, self._ahead = self._ahead[::-1], []
            return batch
        if self._ended:
            return []
        try:
            batch = await self._pull_batch()
        except BaseException:
            await self.aclose()
            raise
        if not batch:
            await self.aclose()
        return batch

    async def _pull_batch(self) -> list[str]:
        dispatch, slot, hook = self._dispatch, self._slot, self._hook
        while (chunk := await dispatch.calls.call(slot, hook, self._turn.clock, self._pull)) is not _END:
            if dispatch.text(slot, hook, chunk, "a chunk"):
                return [chunk]
        return []

    async def _pull(self) -> Any:
        iterator = self._iterator
        if iterator is None:
            iterator = self._iterator = aiter(self._chunks)
        try:
            return await iterator.__anext__()
        except StopAsyncIteration:
            return _END

    async def aclose(self) -> None:
        """Put it down, however far it came. What was said stands, so a failure here is only counted."""
        if self._ended:
            return
        self._ended = True
        close: Callable[[], Awaitable[None]] | None = getattr(self._iterator, "aclose", None)
        if close is not None:
            try:
                await self._dispatch.calls.call(self._slot, self._hook, self._turn.clock, close)
            except (CallFailed, TurnAborted):
                pass


class _PulledOfHost(_Pulled):
    """A stream of the host's own that a plugin gave on: it has clocks of its own, and gives what came at one time.

    So no call is made around each pull, and the clock of whoever waits stands still. If it fails, that is a failed
    call of the plugin all the same.
    """

    __slots__ = ()

    async def push(self, tell: Callable[[list[str]], bool]) -> bool:
        """Give each batch to *tell* as it comes; true at the end, false when *tell* said that nobody can take more."""
        if self._ahead:
            batch, self._ahead = self._ahead[::-1], []
            if tell(batch):
                return False
        if self._ended:
            return True
        try:
            ended: bool = await self._walled(getattr(self._chunks, "push", self._push_batches), tell)
        except BaseException:
            await self.aclose()
            raise
        if ended:
            await self.aclose()
        return ended

    async def _pull_batch(self) -> list[str]:
        return await self._walled(self._chunks.next_batch)  # type: ignore[no-any-return]

    async def _push_batches(self, tell: Callable[[list[str]], bool]) -> bool:
        while batch := await self._chunks.next_batch():
            if tell(batch):
                return False
        return True

    async def _walled(self, function: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        clock = self._turn.clock
        resting = clock.rest()
        try:
            return await function(*args)
        except (TurnAborted, CallFailed):
            raise
        except Exception as exc:
            failure = exc
        finally:
            clock.go_on(resting)

        async def fail() -> None:
            raise failure

        return await self._dispatch.calls.call(self._slot, self._hook, clock, fail)

    async def aclose(self) -> None:
        self._iterator = self._chunks
        await super().aclose()


class _Driven(_Pulled):
    """What `turn.stream()` was given, and then the rest of what was returned, seen by every layer."""

    __slots__ = ("_driver", "_reply", "_rest", "_said")

    def __init__(
        self, dispatch: Dispatch, slot: Slot, hook: BoundHook, turn: TurnRun, driver: _Driver, reply: Reply
    ) -> None:
        super().__init__(dispatch, slot, hook, turn, None)
        self._driver = driver
        self._reply = reply
        self._said: list[str] = []
        self._rest: _Pulled | None = None

    async def _pull_batch(self) -> list[str]:
        if self._rest is not None:
            return await self._rest.next_batch()
        turn, driver = self._turn, self._driver
        if not turn.pending and not driver.done:
            await self._dispatch.calls.call(self._slot, self._hook, turn.clock, driver.run)
        if turn.pending:
            batch, turn.pending = turn.pending, []
            self._said += batch
            return batch
        return await self._pull_rest()

    async def _pull_rest(self) -> list[str]:
        """What the coroutine returned at its end, without what it had said."""
        given, self._driver.result = self._driver.result, None
        last = self._dispatch.reply(self._slot, self._hook, given)
        if last is None:
            return []
        last.metadata = self._reply.metadata = self._reply.metadata | last.metadata  # one: a stream adds to it later
        if last.chunks is not None:
            self._rest = self._dispatch.pulled(self._slot, self._hook, self._turn, last.chunks)
            return await self._rest.next_batch()
        rest = last.text.removeprefix("".join(self._said))
        return [rest] if rest else []

    async def aclose(self) -> None:
        if self._ended:
            return
        self._ended = True
        if not self._driver.done:
            try:
                await self._dispatch.calls.call(self._slot, self._hook, self._turn.clock, self._driver.leave)
            except (CallFailed, TurnAborted):
                pass
        self._driver.close()
