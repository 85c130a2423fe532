"""The event loop of a process that serves, what it may have open, and how such a process ends."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

__all__ = ["leave_the_deaf", "loop_factory", "raise_file_limit"]

DEAF_S = 1.0
"""How long a task may take to hear that the host has stopped."""


def loop_factory() -> Any:
    """For `asyncio.Runner`: uvloop, where it is to be had."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def raise_file_limit() -> None:
    """Let this process, and those that it starts, have as many files open as its user may: each visitor is one.

    The usual soft limit of 1,024 is there for programs that call select(2).
    """
    try:
        import resource
    except ImportError:  # no Unix
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):
        pass  # a kernel that allows less than it says: what there is has to do


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
