"""The pace of visitors: who is slower than the stream it reads, and who has hung up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from ..chat.outbox import Chunk, Event

__all__ = ["HangUps", "Held", "soft_bound"]

SOFT_BYTES = 16 * 1024
"""Unsent bytes beyond which a visitor gets fewer, larger chunks: more than an answer's text, less than a page's."""

LOOK_S = 0.025
"""How often it is looked whether visitors who wait have hung up: theirs is the model's connection, gone in 100 ms."""

PIECE_BYTES = 64
"""What holding one more piece costs, however short it is."""


def soft_bound(max_buffer_bytes: int) -> int:
    return min(SOFT_BYTES, max_buffer_bytes // 4)


class Held:
    """Chunks of one turn that a slow visitor has yet to get, as one. Its index is that of its first piece."""

    __slots__ = ("_index", "_texts", "size", "to")

    def __init__(self, chunk: Chunk) -> None:
        self.to = chunk.to
        self._index = chunk.index
        self._texts: list[str] = []
        self.size = 0
        self.add(chunk)

    def add(self, chunk: Chunk) -> None:
        self._texts.append(chunk.text)
        self.size += PIECE_BYTES + len(chunk.text) * (1 if chunk.text.isascii() else 3)

    def overtaken_by(self, event: Event) -> bool:
        """Whether *event* ends the turn: its reply says all that is held."""
        return event.kind in ("reply", "error") and event.to == self.to

    def event(self) -> Event:
        return Event.chunk(self.to, self._index, "".join(self._texts))


class HangUps:
    """Tells of requests whose visitor hung up while they wait: their handlers are not told by anyone else."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._watched: dict[object, tuple[asyncio.Transport | None, Callable[[], None]]] = {}
        self._looking = False

    def watch(self, transport: asyncio.Transport | None, gone: Callable[[], None]) -> Callable[[], Any]:
        """Have *gone* called, once, if the connection closes; returns how to stop watching."""
        key = object()
        self._watched[key] = (transport, gone)
        if not self._looking:
            self._looking = True
            self._loop.call_later(LOOK_S, self._look)
        return lambda: self._watched.pop(key, None)

    def _look(self) -> None:
        for key, (transport, gone) in list(self._watched.items()):
            if transport is None or transport.is_closing():
                del self._watched[key]
                gone()
        self._looking = bool(self._watched)
        if self._looking:
            self._loop.call_later(LOOK_S, self._look)
