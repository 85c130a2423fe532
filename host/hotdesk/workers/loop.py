"""The event loop of a process that serves, and how such a process ends."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

__all__ = ["leave_the_deaf", "loop_factory"]

DEAF_S = 1.0
"""How long a task may take to hear that the host has stopped."""


def loop_factory() -> Any:
    """For `asyncio.Runner`: uvloop, where it is to be had."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


async def leave_the_deaf() -> None:
    """End the process if a plugin's task ignores its cancellation: the loop would wait for it for ever.

    Everything is closed and on disk by now.
    """
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    if others and (await asyncio.wait(others, timeout=DEAF_S))[1]:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
