"""Going back: at once to what stands by, else by loading an earlier version's kept bytes anew."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any

from hotdesk_sdk import HotdeskError

from ..errors import CallFailed
from .active import Active, Generation, PluginState, Slot
from .entries import Entry, Kept
from .generations import Maker
from .ledger import Ledger
from .retirement import Retirement, Standby

__all__ = ["NothingToRollBackTo", "Rollback"]

NOT_ON_TRIAL = ("configure", "export_state", "routes", "teardown")
"""Hooks whose failure says nothing against the turns that a new generation answers; a page is anybody's to call."""


class NothingToRollBackTo(HotdeskError):
    """A rollback of a plugin that has no earlier version, or not the one that was asked for."""

    def __init__(self, name: str, to: int | None = None) -> None:
        which = "earlier version" if to is None else f"generation {to}"
        super().__init__(f"plugin '{name}' has no {which} to go back to")


class Rollback:
    """Judges generations in probation. *load* serves a kept version anew; *reslot* gives a slot the newest settings."""

    def __init__(
        self,
        entries: Mapping[str, Entry],
        *,
        active: Active,
        maker: Maker,
        ledger: Ledger,
        retirement: Retirement,
        load: Callable[[Entry, Kept], Awaitable[None]],
        reslot: Callable[[Slot], Slot],
        spawn: Callable[[Coroutine[Any, Any, bool]], asyncio.Task[bool]],
    ) -> None:
        self._entries = entries
        self._active = active
        self._maker = maker
        self._ledger = ledger
        self._retirement = retirement
        self._load = load
        self._reslot = reslot
        self._spawn = spawn
        self._running: dict[str, asyncio.Task[bool]] = {}

    def on_probation_over(self, generation: Generation) -> None:
        """*generation* has proven itself: once all that came with it have, what stands by is let go."""
        standby = self._retirement.standby_of(generation.plugin)
        if standby is not None and all(
            entry.current is None or not entry.current.probation_left for entry, _, _ in standby.pairs
        ):
            standby.over.set()

    def on_failure(self, generation: Generation, exc: CallFailed) -> Any:
        """Roll *generation* back; say whether (True, or an awaitable that tells) its turns should be run again."""
        entry = self._entries.get(generation.plugin)
        if entry is None or exc.hook in NOT_ON_TRIAL:
            return None
        if entry.current is not generation:
            return True
        if (standby := self._retirement.take_standby(entry.name)) is not None:
            self._swap_back(standby, str(exc))
            return True
        if (running := self._running.get(entry.name)) is None:
            target = self.target(entry)
            if target is None:
                return None
            running = self._spawn(self._go_back(entry, generation, target, str(exc)))
            self._running[entry.name] = running
            running.add_done_callback(lambda _: self._running.pop(entry.name, None))
        return running

    def _swap_back(self, standby: Standby, why: str) -> None:
        """One assignment, and the books. Plain `def`: nobody can see half of it."""
        pairs = [(entry, self._reslot(slot), old) for entry, slot, old in standby.pairs if slot is not None]
        names = {entry.name for entry, _, _ in pairs}
        kept = [slot for slot in self._active.current.slots if slot.generation.plugin not in names]
        self._active.swap(self._active.build([*kept, *(slot for _, slot, _ in pairs)]))
        gone: list[tuple[Entry, Generation]] = []
        for entry, slot, old in pairs:
            failed, entry.current, entry.slot = entry.current, old, slot
            old.move(PluginState.ACTIVE)
            old.probation_left = 0
            self._maker.hand_over(failed, old)
            if failed is not None:
                failed.move(PluginState.DRAINING)
                gone.append((entry, failed))
                self._ledger.note_failed_probation(entry, failed, old.number, why)
        self._retirement.retire(gone)

    async def _go_back(self, entry: Entry, failed: Generation, target: Kept, why: str) -> bool:
        """Load *target* in place of *failed*, unless something else serves by then; True when the turns can go on."""
        async with entry.lock:
            if entry.current is not failed:
                return entry.current is not None
            try:
                await self._load(entry, target)
            except HotdeskError as exc:
                self._ledger.note_failed(entry, exc)
                return False
            if entry.current is not None:
                self._ledger.note_failed_probation(entry, failed, entry.current.number, why)
            return True

    def target(self, entry: Entry, to: int | None = None) -> Kept | None:
        """The newest kept version that is another than the one that serves; with *to* that of this generation."""
        serving = entry.current.bundle.digest if entry.current else None
        for kept in reversed(entry.kept):
            if kept.bundle.digest != serving if to is None else kept.generation == to:
                return kept
        return None
