"""Sees changes below folders: native events where they work, which is tried out at the start, and polling where not.

Says *that* something changed and roughly where; whether it is a change is judged by content elsewhere.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from watchfiles import Change, awatch

from ..logs import Logger

__all__ = ["Changes", "Watch"]

STEP_MS = 5
DEBOUNCE_MS = 20
"""watchfiles' defaults (50, 1600) take 101 ms from rename to event; these take 11."""

POLL_S = 0.1
"""How often a folder without working events is looked through."""

SWEEP_S = 2.0
"""How often a folder with working events is looked through all the same: some mounts lose single events."""

SELF_TEST_S = 1.0

OWN = ".hotdesk-watch-"
"""How the names of the files begin that try the watch out."""


@dataclass(frozen=True, slots=True)
class Changes:
    """What changed in one go: all *paths*; of these, those that were *gone* at some moment, and those *moved* in."""

    paths: frozenset[Path]
    gone: frozenset[Path]
    moved: frozenset[Path]
    """Paths that appeared while a temporary name in the same folder went: the end of a careful writer's rename. Not
    while any other went: a plugin that is deleted just then says nothing of one that is being written."""

    @classmethod
    def of(cls, changes: Iterable[tuple[Change, str]]) -> Changes:
        found = [(change, Path(path)) for change, path in changes if not _is_own(path)]
        added = {path for change, path in found if change == Change.added}
        gone = {path for change, path in found if change == Change.deleted}
        left = {path.parent for path in gone if path in added or _is_temporary(path)}
        moved = {path for path in added - gone if path.parent in left}
        return cls(frozenset(path for _, path in found), frozenset(gone), frozenset(moved))


class Watch:
    """Calls `changed(changes)` after a change, and `sweep()` at the pace that the folders need, until `aclose`.

    `mode` is "events", "polling" or "events, untested" (a read-only folder).
    """

    def __init__(
        self,
        folders: list[Path],
        *,
        changed: Callable[[Changes], None],
        sweep: Callable[[], None],
        log: Logger,
        poll: bool = False,
    ) -> None:
        self._folders = folders
        self._changed = changed
        self._sweep = sweep
        self._log = log
        self._force_poll = poll
        self._tasks: list[asyncio.Task[None]] = []
        self._stop = asyncio.Event()
        self._probe: Path | None = None
        self._seen = asyncio.Event()
        self.mode = "polling" if poll else "events"

    async def start(self) -> None:
        """Begin, and find out whether events arrive at all."""
        if not self._force_poll:
            self._tasks.append(asyncio.create_task(self._events(), name="hotdesk-watch"))
            for folder in self._folders:
                self.mode = await self._self_test(folder)
                if self.mode != "events":
                    break
        interval = SWEEP_S if self.mode == "events" else POLL_S
        if self.mode == "polling":
            self._log.warning(
                "watch_polling",
                folders=[str(f) for f in self._folders],
                every_s=POLL_S,
                reason="watch_poll is set" if self._force_poll else "no events arrive here",
            )
        self._tasks.append(asyncio.create_task(self._sweeps(interval), name="hotdesk-sweep"))

    async def aclose(self) -> None:
        self._stop.set()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _events(self) -> None:
        while not self._stop.is_set():
            try:
                async for changes in awatch(
                    *self._folders,
                    step=STEP_MS,
                    debounce=DEBOUNCE_MS,
                    watch_filter=_not_noise,
                    stop_event=self._stop,
                ):
                    self._tell(changes)
            except (OSError, RuntimeError) as exc:
                self._log.warning("watch_failed", problem=str(exc), remedy="the sweep goes on; events are tried again")
                await asyncio.sleep(1.0)

    def _tell(self, changes: Iterable[tuple[Change, str]]) -> None:
        if self._probe is not None and any(Path(path).name == self._probe.name for _, path in changes):
            self._seen.set()
        told = Changes.of(changes)
        if told.paths:
            self._changed(told)

    async def _self_test(self, folder: Path) -> str:
        self._probe = folder / f"{OWN}{uuid.uuid4().hex[:8]}"
        self._seen.clear()
        try:
            deadline = asyncio.get_running_loop().time() + SELF_TEST_S
            while asyncio.get_running_loop().time() < deadline:
                self._probe.write_bytes(b"")
                os.utime(self._probe)
                try:
                    async with asyncio.timeout(0.1):
                        await self._seen.wait()
                    return "events"
                except TimeoutError:
                    continue
            return "polling"
        except OSError as exc:
            self._log.info("watch_untested", folder=str(folder), reason=str(exc))
            return "events, untested"
        finally:
            try:
                self._probe.unlink(missing_ok=True)
            except OSError:
                pass

    async def _sweeps(self, interval: float) -> None:
        while True:
            await asyncio.sleep(interval)
            try:
                self._sweep()
            except OSError as exc:
                self._log.warning("watch_failed", problem=str(exc), remedy="the folders are looked through again")


def _is_temporary(path: Path) -> bool:
    """Whether it is a name that no plugin has."""
    return path.name.startswith((".", "_")) or path.suffix not in (".py", ".wasm", ".toml", "")


def _is_own(path: str) -> bool:
    return Path(path).name.startswith(OWN)


def _not_noise(change: Change, path: str) -> bool:
    return not path.endswith((".pyc", "__pycache__", "~", ".swp"))
