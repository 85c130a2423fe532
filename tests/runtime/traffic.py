"""A steady stream of messages behind a test, and what became of each of them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from conftest import Desk, wait_until

__all__ = ["Traffic", "traffic"]

PAUSE_S = 0.01
"""Between two messages of one sender: busy enough to hit every moment of a swap, and leaves the loop time."""


@dataclass
class Traffic:
    """Replies in the order in which they came, as (text, plugin, generation); and everything that was no reply."""

    replies: list[tuple[str, str, int]] = field(default_factory=list)
    problems: list[Any] = field(default_factory=list)

    @property
    def texts(self) -> list[str]:
        return [text for text, _, _ in self.replies]

    @property
    def generations(self) -> list[int]:
        return [generation for _, _, generation in self.replies]

    async def wait_more(self, count: int = 5) -> None:
        """Wait for *count* further messages to be answered."""
        goal = len(self.replies) + count
        await wait_until(lambda: len(self.replies) >= goal or self.problems, f"{count} more answers")
        assert not self.problems


@contextlib.asynccontextmanager
async def traffic(desk: Desk, senders: int = 3, pause_s: float = PAUSE_S) -> AsyncIterator[Traffic]:
    """Send while the context is open, each sender in a conversation of its own; then every message was answered."""
    seen = Traffic()
    stop = asyncio.Event()

    async def send(number: int) -> None:
        while not stop.is_set():
            try:
                body = await desk.say("hello", f"traffic-{number}")
            except Exception as exc:
                seen.problems.append(exc)
                return
            seen.replies += [(r["text"], r["plugin"], r["generation"]) for r in body["replies"]]
            if not body["replies"] or "error" in body:
                seen.problems.append(body)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await stop.wait()

    tasks = [asyncio.create_task(send(number)) for number in range(senders)]
    try:
        yield seen
    finally:
        stop.set()
        await asyncio.gather(*tasks)
    assert not seen.problems, seen.problems[:3]
