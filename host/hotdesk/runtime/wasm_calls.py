"""One call into a guest, as the loop and the guest's thread both see it."""

from __future__ import annotations

import asyncio
from typing import Any

__all__ = ["DONE", "FAILED", "OPERATION", "STOP", "GuestCall", "GuestError", "GuestFault", "GuestTimeout"]

DONE, FAILED, OPERATION = "done", "failed", "operation"
"""What the guest's thread tells: a result, an exception, or what it wants done on the loop."""

STOP = object()
"""Answered to a guest that waits for the host when nobody waits for it any more."""


class GuestFault(Exception):
    """A guest trapped, or gave what the contract or a limit does not allow. The instance is thrown away."""


class GuestError(Exception):
    """A guest said that it failed: the error of a `result`. The instance is as good as before."""


class GuestTimeout(Exception):
    """A guest was stopped: its time was up, or nobody waited for it any more."""


class GuestCall:
    """A call of the exported function *name* ("interface.function"; empty: instantiate), until the monotonic time
    *deadline*. The guest's thread tells one thing at a time; `arm` before it may tell the next."""

    __slots__ = ("_loop", "arguments", "cancelled", "deadline", "name", "resting", "said", "turn")

    def __init__(
        self, loop: asyncio.AbstractEventLoop, name: str, arguments: tuple[Any, ...], deadline: float, turn: Any
    ) -> None:
        self._loop = loop
        self.name = name
        self.arguments = arguments
        self.deadline = deadline
        self.turn = turn
        self.cancelled = False
        self.resting = False
        """It waits for something that has a deadline of its own."""

        self.said: asyncio.Future[tuple[str, Any]]
        self.arm()

    def arm(self) -> None:
        """Be ready for what is told next, in `said`."""
        self.said = self._loop.create_future()

    def tell(self, message: tuple[str, Any]) -> None:
        """On the loop."""
        if not self.said.done():
            self.said.set_result(message)
