"""A worker's place in a desk of several: what its supervisor gives it, and what it says to it."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Literal

from .access import Keys
from .departure import Departure
from .siblings import Siblings, entrance_of

__all__ = ["Joining", "Seat"]

Joining = Literal["", "died", "rolled"]
"""Why a worker comes to others that serve: in the place of one that died, or of one that it replaces. Empty when all
begin together."""


@dataclass(slots=True)
class Seat:
    """Given to `open_host` in a worker process."""

    worker: int
    """Its place, from 0. The processes in one place come one after the other, and for a moment together."""
    name: str
    """Of this process alone: no other, before or after, has it."""
    sock: socket.socket
    path: str
    """Where its siblings reach it."""
    keys: Keys
    siblings: Siblings
    number: Callable[[str, str, int, int], Awaitable[int]]
    """The number of a generation that is to be loaded, the same in all workers; see `Numbers`."""
    joining: Joining = ""
    departure: Departure = field(default_factory=Departure)
    on_buried: list[Callable[[str], None]] = field(default_factory=list)
    """Called with the name of a worker process that is dead: nothing of what it held is in use any more."""

    @property
    def entrance(self) -> str:
        """Where its siblings pass connections in."""
        return entrance_of(self.path)
