"""One call into a guest, as the loop and the guest's thread both see it."""

from __future__ import annotations

import asyncio
from _thread import allocate_lock
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import Any

__all__ = ["DONE", "FAILED", "OPERATION", "STOP", "GuestCall", "GuestError", "GuestFault", "GuestTimeout", "Stopped"]

DONE, FAILED, OPERATION = "done", "failed", "operation"
"""What the guest's thread tells: a result, an exception, or what it wants done on the loop."""

STOP = object()
"""Answered to a guest that waits for the host when nobody waits for it any more."""


class Stopped(Exception):
    """The host ended a guest's call, from inside a host function."""


class GuestFault(Exception):
    """A guest trapped, or gave what the contract or a limit does not allow. The instance is thrown away."""


class GuestError(Exception):
    """A guest said that it failed: the error of a `result`. The instance is as good as before."""


class GuestTimeout(Exception):
    """A guest was stopped: its time was up, or nobody waited for it any more."""


class GuestCall:
    """A call of the exported function *name* ("interface.function"; empty: instantiate), until the monotonic time
    *deadline*.

    The guest's thread says one thing at a time, and the loop takes it: with `take_quickly`, which blocks for a moment
    and saves the way through the loop's own queue (half of what a short call costs), or, failing that, with `take`.
    """

    __slots__ = (
        "_loop",
        "_message",
        "_said",
        "_waiter",
        "allowance",
        "arguments",
        "cancelled",
        "deadline",
        "denied",
        "emit",
        "name",
        "resting",
        "turn",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        name: str,
        arguments: tuple[Any, ...],
        deadline: float,
        turn: Any,
        emit: Callable[[str], Awaitable[None]] | None = None,
    ) -> None:
        self._loop = loop
        self._said = allocate_lock()
        self._said.acquire()
        self._message: tuple[str, Any] = (FAILED, None)
        self._waiter: asyncio.Future[None] | None = None
        self.name = name
        self.arguments = arguments
        self.deadline = deadline
        self.turn = turn
        self.cancelled = False
        self.emit = emit
        """Takes the chunks of a bot that streams, and may have it wait; None where nothing can be shown."""

        self.denied: Exception | None = None
        """The capability that it was refused, if any: for its failure is then the operator's to mend."""

        self.allowance = deadline - monotonic()
        self.resting = False
        """It waits for something that has a deadline of its own."""

    def say(self, message: tuple[str, Any]) -> bool:
        """On the guest's thread. False when the loop has closed."""
        self._message = message
        if self._said.locked():  # else what was said before was not taken yet, and this is said instead
            self._said.release()
        waiter = self._waiter
        if waiter is not None:  # it was set before the loop looked for the last time, or the loop has it already
            try:
                self._loop.call_soon_threadsafe(_wake, waiter)
            except RuntimeError:
                return False
        return True

    def forget(self) -> None:
        """Let go of what was said last."""
        self._message = (FAILED, None)

    def take_quickly(self, seconds: float) -> tuple[str, Any] | None:
        """What was said within *seconds*, for which this blocks; None when nothing was."""
        return self._message if self._said.acquire(timeout=seconds) else None

    async def take(self) -> tuple[str, Any]:
        """What is said next."""
        waiter = self._waiter = self._loop.create_future()
        try:
            while not self._said.acquire(blocking=False):
                await waiter
                waiter = self._waiter = self._loop.create_future()  # it may have been woken for what was taken before
        finally:
            self._waiter = None
        return self._message


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
