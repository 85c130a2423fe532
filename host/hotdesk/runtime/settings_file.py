"""Follows the tables of the settings file that are taken while the host runs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from ..errors import ConfigError, describe
from .events import Events

__all__ = ["follow_settings"]

T = TypeVar("T")

SETTINGS_POLL_S = 0.25
"""How often the settings file is looked at. Its folder often holds the data folder, whose events would flood us."""


async def follow_settings(
    file: Path, read: Callable[[str], T], take: Callable[[T], Awaitable[None]], events: Events
) -> None:
    """Call *take* with what *read* gives after each change of *file*, until cancelled.

    A file that can't be read is told; one that is not there may come.
    """
    seen = _stat(file)
    while True:
        await asyncio.sleep(SETTINGS_POLL_S)
        now = _stat(file)
        if now == seen or now is None:
            continue
        seen = now
        try:
            settings = read(str(file))
        except ConfigError as exc:
            events.tell("settings_failed", file=str(file), message=str(exc))
            continue
        try:
            await take(settings)
        except Exception as exc:  # one settings file that could not be taken must not be the last that is looked at
            events.tell("settings_failed", file=str(file), message=describe(exc))


def _stat(file: Path) -> tuple[int, int, int] | None:
    try:
        stat = file.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino
