"""What a spool keeps of each message and of each conversation, while they are on their way.

Owns no order and no step; those are the spool's.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

import msgspec

from hotdesk_sdk import Message

from ..backend import Appended
from ..backend.sqlite_spool import SpoolFile, SpoolRow

__all__ = ["Kept", "Lane", "New", "Spooled", "Told"]

Told = Callable[[Appended | BaseException], None]


class Spooled(msgspec.Struct, frozen=True):
    """A message that is on this machine's disk, and will be in the journal. It has no seq yet."""

    id: str
    conversation: str


class New:
    """A message that came in, and who waits to hear of it."""

    __slots__ = ("channel", "door", "locale", "message", "spooled", "told")

    def __init__(
        self, message: Message, channel: str, locale: str | None, door: str, told: Told,
        spooled: Callable[[Spooled], bool],
    ) -> None:  # fmt: skip
        self.message = message
        self.channel = channel
        self.locale = locale
        self.door = door
        self.told = told
        self.spooled = spooled


class Kept:
    """A message in a spool."""

    __slots__ = ("coming", "file", "message", "on_disk", "row", "told")

    def __init__(self, file: SpoolFile, row: SpoolRow, *, on_disk: bool) -> None:
        self.file = file
        self.row = row
        self.on_disk = on_disk
        self.message: Message | None = None
        """Once it was read; before, it is on the disk alone."""

        self.coming: list[New] = []
        """Who waits for it to be on disk."""

        self.told: list[Told] = []
        """Who waits for it to be in the journal."""


class Lane:
    """A conversation of which something is on its way: to the journal, or to the disk and then to the journal."""

    __slots__ = ("busy", "conversation", "holding", "kept", "queued", "waiting")

    def __init__(self, conversation: str) -> None:
        self.conversation = conversation
        self.busy = False
        """A message of it is on its way to the journal."""

        self.kept: deque[Kept] = deque()
        self.waiting: deque[New] = deque()
        """Those behind one that goes to the journal without having been spooled, or behind `kept`."""

        self.queued = False
        self.holding: asyncio.TimerHandle | None = None
        """Until when those behind `kept` wait in memory."""
