"""A steady stream of messages behind a test, and what became of each of them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from conftest import Desk, wait_until

__all__ = ["Traffic", "traffic"]

PAUSE_S = 0.01
"""Between two messages of one sender: busy enough to hit every moment of a swap, and leaves the loop time."""


@dataclass
class Traffic:
    """Replies in the order in which they came, as (text, generation, when sent); and everything that was no reply."""

    replies: list[tuple[str, int, float]] = field(default_factory=list)
    problems: list[Any] = field(default_factory=list)

    @property
    def texts(self) -> list[str]:
        return [text for text, *_ in self.replies]

    @property
    def generations(self) -> list[int]:
        return [generation for _, generation, _ in self.replies]

    def generations_since(self, moment: float) -> set[int]:
        """Who answered what was sent after *moment*."""
        return {generation for _, generation, sent in self.replies if sent > moment}

    async def wait_more(self, count: int = 5) -> None:
        """Wait for *count* messages that are sent from now on to be answered."""
        now = time.monotonic()

        def answered() -> bool:
            return bool(self.problems) or sum(sent > now for *_, sent in self.replies[-100:]) >= count

        await wait_until(answered, f"{count} more answers")
        assert not self.problems


@contextlib.asynccontextmanager
async def traffic(desk: Desk, senders: int = 3, pause_s: float = PAUSE_S) -> AsyncIterator[Traffic]:
    """Send while the context is open, each sender in a conversation of its own; then every message was answered."""
    seen = Traffic()
    stop = asyncio.Event()

    async def send(number: int) -> None:
        while not stop.is_set():
            sent = time.monotonic()
            try:
                body = await desk.say("hello", f"traffic-{number}")
            except Exception as exc:
                seen.problems.append(exc)
                return
            seen.replies += [(r["text"], r["generation"], sent) for r in body["replies"]]
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
