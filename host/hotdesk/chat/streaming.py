"""A reply on its way out: pulled as fast as somebody takes it, told as it comes, and put down whole or not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from hotdesk_sdk import Reply

from ..backend import Backend
from ..errors import CallFailed, TurnAborted
from ..logs import Logger
from .outbox import Event, Outbox
from .turn import TurnRun

__all__ = ["Outcome", "Streams", "close_all", "settle"]

Outcome = tuple[str | None, dict[str, Any], tuple[str, str] | None]
"""How a turn's onion ended: the reply's text, its metadata, the error."""


class Streams:
    """Runs streamed replies."""

    def __init__(self, outbox: Outbox, log: Logger, limit: int, backend: Backend) -> None:
        self._outbox = outbox
        self._backend = backend
        self._log = log
        self._limit = limit

    async def run(self, turn: TurnRun, reply: Reply) -> Outcome:
        """Pull the reply's chunks, as many at a time as there are, and tell them to whoever listens."""
        turn.streamed, turn.said = reply, []
        chunks: Any = reply.chunks
        pushed = hasattr(chunks, "push")
        next_batch = chunks.next_batch if hasattr(chunks, "next_batch") else _Singly(chunks).next_batch
        said, limit = turn.said, self._limit
        size = 0
        error: tuple[str, str] | None = None

        def take(texts: list[str]) -> bool:
            """Tell *texts*; true when no more is to be told just now: nobody can take it, or it is too much."""
            nonlocal size, error
            if turn.abandoned or error is not None:
                return True
            for number, text in enumerate(texts):
                if (size := size + len(text)) > limit:
                    error = ("stream_cut", f"the reply is over {limit} characters")
                    self._log.error("reply_too_long", conversation=turn.message.conversation, message=turn.id)
                    texts = texts[:number]
                    break
            said.extend(texts)
            turn.roomy = False
            full = bool(texts) and self._tell_chunks(turn, texts)
            return full or error is not None

        try:
            while True:
                if pushed:
                    if await chunks.push(take):
                        break
                else:
                    texts = await next_batch()
                    if not texts:
                        break
                    if not take(texts):
                        continue
                if turn.abandoned or error is not None:
                    break
                await self._wait_room(turn)
        except (CallFailed, TurnAborted) as exc:
            error = ("stream_cut", exc.public if isinstance(exc, CallFailed) else "the stream was aborted")
        metadata = reply.metadata
        if error is not None:
            metadata = {**metadata, "cut": True}
        return ("".join(said) if said else None), metadata, error

    def _tell_chunks(self, turn: TurnRun, texts: list[str]) -> bool:
        """Tell everyone who listens; true when there are such, and none of them can take more."""
        conversation, shown = turn.message.conversation, turn.shown
        turn.shown = shown + len(texts)
        if turn.fence is not None:
            self._backend.tell_chunks(turn.fence, conversation, turn.id, shown, texts)
        watchers, listened = turn.watchers, self._outbox.listened(conversation)
        if not watchers and not listened:
            return False
        to = turn.message.id
        events = [Event.chunk(to, index, text) for index, text in enumerate(texts, shown)]
        full = True
        for watcher in tuple(watchers) if watchers else ():
            for event in events:
                try:
                    taken = watcher(event)
                except Exception as exc:  # as in the outbox: a door's fault is not the turn's
                    taken = None
                    self._log.error("watcher_failed", conversation=conversation, exc_info=exc)
            full = full and bool(taken)
        if listened:
            full = self._outbox.tell_chunks(conversation, events) and full
        return full

    async def _wait_room(self, turn: TurnRun) -> None:
        """Stand still until somebody who listens can take more, or nobody does any longer.

        Nothing is pulled meanwhile, so what the stream comes from fills up and stands still too.
        """
        if turn.roomy:
            return
        turn.room = asyncio.get_running_loop().create_future()
        try:
            await turn.room
        finally:
            turn.room = None

    def tell(self, turn: TurnRun, event: Event) -> None:
        if turn.watchers is not None:
            for watcher in tuple(turn.watchers):
                try:
                    watcher(event)
                except Exception as exc:  # as in the outbox: a door's fault is not the turn's
                    self._log.error("watcher_failed", conversation=turn.message.conversation, exc_info=exc)
        self._outbox.tell(turn.message.conversation, event)


class _Singly:
    """Chunks one at a time, in the shape of batches."""

    __slots__ = ("_next",)

    def __init__(self, chunks: AsyncIterator[str]) -> None:
        self._next = aiter(chunks).__anext__

    async def next_batch(self) -> list[str]:
        try:
            return [await self._next()]
        except StopAsyncIteration:
            return []


async def close_all(turn: TurnRun) -> None:
    """Close the streams that the onion began, outermost first, whatever became of them."""
    while turn.opened:
        try:
            await turn.opened.pop().aclose()
        except asyncio.CancelledError:
            if not turn.clock.cancelled:
                raise
        except RuntimeError:
            pass  # a plugin pulls it still, in a task of its own; it ends with that


async def settle() -> None:
    """What is left of a cancellation must not hit what comes after the plugins: the end of the turn."""
    task = asyncio.current_task()
    assert task is not None
    try:
        await asyncio.sleep(0)  # one that was asked for from within this task arrives here
    except asyncio.CancelledError:
        pass
    while task.cancelling():
        task.uncancel()
