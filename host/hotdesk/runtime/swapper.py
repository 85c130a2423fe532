"""Loads a new version beside what serves, together with all that requires it, and swaps by one assignment."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from ..config import Config, PluginSettings
from ..errors import LoadFailed
from .active import Active, Generation, PluginState, Slot
from .entries import Entry
from .generations import Maker, Prepared
from .ledger import Ledger
from .requirements import dependants_of, find_circle, missing_of
from .retirement import Retirement
from .sources import Bundle

__all__ = ["Swapper"]

MAX_TRIES = 5
"""How often a load begins anew because what it requires, or what requires it, changed meanwhile."""


class Swapper:
    """Decides everything before it touches anything. *served* hears of each entry that has a new generation; *number*
    gives the number of one that is to be made."""

    def __init__(
        self,
        config: Config,
        entries: Mapping[str, Entry],
        *,
        active: Active,
        maker: Maker,
        ledger: Ledger,
        retirement: Retirement,
        settings: Callable[[str], PluginSettings],
        number: Callable[[Entry, Bundle], Awaitable[int]],
        served: Callable[[Entry], None],
    ) -> None:
        self._config = config
        self._entries = entries
        self._active = active
        self._maker = maker
        self._ledger = ledger
        self._retirement = retirement
        self._settings = settings
        self._number = number
        self._served = served
        self._closing = False

    def close(self) -> None:
        """Let nothing come to serve from now on."""
        self._closing = True

    def _is_ready(self, entry: Entry, bundle: Bundle) -> bool:
        """Whether all that *bundle* requires serves; False: it waits. Raises `LoadFailed` when it never can."""
        requires = entry.wants = bundle.manifest.requires
        circle = find_circle(self._entries, entry.name, requires)
        if circle is not None:
            failed = LoadFailed(entry.name, "requires", f"it requires itself: {' → '.join(circle)}")
            for other in (self._entries[name] for name in circle[1:-1]):
                if other.current is None:
                    problem = f"it requires itself, by way of '{entry.name}': {' → '.join(circle)}"
                    self._ledger.note_failed(other, LoadFailed(other.name, "requires", problem))
            entry.waiting_for = circle[1]
            raise failed
        missing = missing_of(self._entries, requires)
        entry.waiting_for = missing[0] if missing else None
        if missing and entry.current is not None:
            raise LoadFailed(entry.name, "requires", f"it requires '{missing[0]}', which does not serve")
        if missing:
            entry.problem = None
            self._ledger.events.tell("plugin_waiting", plugin=entry.name, waiting_for=missing[0])
        return not missing

    async def load(
        self, entry: Entry, bundle: Bundle, since: float, steps: dict[str, float], *, probation: bool = True
    ) -> None:
        """Load *bundle* beside what serves, together with all that requires it, and swap. Raises `HotdeskError`."""
        for _ in range(MAX_TRIES):
            if self._closing or not self._is_ready(entry, bundle):
                return
            dependants = dependants_of(self._entries, entry.name)
            async with contextlib.AsyncExitStack() as stack:
                for dependant in dependants:
                    await stack.enter_async_context(dependant.lock)
                around = self._around(entry, bundle)
                if around[0] != dependants:
                    continue
                group = [(entry, bundle), *((one, one.current.bundle) for one in dependants if one.current is not None)]
                await self._retirement.make_room(one for one, _ in group)
                prepared = await self._prepare(group, steps)
                if self._closing or self._around(entry, bundle) != around:
                    await self._discard(prepared)
                    continue
                self._serve(prepared, since, steps, probation)
            return
        raise LoadFailed(entry.name, "requires", "the plugins around it kept changing; save it again")

    def _around(self, entry: Entry, bundle: Bundle) -> tuple[list[Entry], list[Generation | None]]:
        """What a load of *bundle* rests on: its dependants, and the generations that it and they require."""
        dependants = dependants_of(self._entries, entry.name)
        requires = {name for one in dependants if one.current for name in one.current.manifest.requires}
        names = sorted({*bundle.manifest.requires, *requires} - {entry.name, *(one.name for one in dependants)})
        return dependants, [one.current if (one := self._entries.get(name)) else None for name in names]

    async def _prepare(self, group: list[tuple[Entry, Bundle]], steps: dict[str, float]) -> list[Prepared]:
        prepared: list[Prepared] = []
        modules: dict[str, Any] = {}
        try:
            for entry, bundle in group:
                entry.loading = entry.current is None
                needs = {name: modules.get(name) or self._module_of(name) for name in bundle.manifest.requires}
                made = await self._maker.make(
                    bundle,
                    await self._number(entry, bundle),
                    old=entry.current,
                    settings=self._settings(entry.name),
                    modules=needs,
                    breaker=self._ledger.breaker(entry.name),
                    steps=steps if not prepared else {},
                )
                prepared.append(made)
                modules[entry.name] = made.module
        except BaseException:
            await self._discard(prepared)
            raise
        finally:
            for entry, _ in group:
                entry.loading = False
        return prepared

    async def _discard(self, prepared: list[Prepared]) -> None:
        while prepared:
            await self._maker.discard(prepared.pop())

    def _module_of(self, name: str) -> Any:
        entry = self._entries.get(name)
        return None if entry is None or entry.current is None else self._maker.module_of(entry.current)

    def _serve(self, prepared: list[Prepared], since: float, steps: dict[str, float], probation: bool) -> None:
        """One assignment; then the books. Plain `def`: nobody can see half of it."""
        start = time.monotonic()
        names = {made.generation.plugin for made in prepared}
        kept = [slot for slot in self._active.current.slots if slot.generation.plugin not in names]
        snapshot = self._active.build([*kept, *(made.slot for made in prepared)])
        pairs: list[tuple[Entry, Slot | None, Generation]] = []
        for made in prepared:
            generation, entry = made.generation, self._entries[made.generation.plugin]
            generation.move(PluginState.ACTIVE)
            if entry.current is not None and entry.slot is not None:
                entry.current.move(PluginState.DRAINING)
                pairs.append((entry, entry.slot, entry.current))
            if probation and (entry.current is not None or entry.kept):
                generation.probation_left = self._config.probation_calls
        self._active.swap(snapshot)
        now = time.monotonic()
        steps["swap_ms"] = (now - start) * 1000
        steps["total_ms"] = (now - since) * 1000
        for made in prepared:
            entry = self._entries[made.generation.plugin]
            self._maker.hand_over(entry.current, made.generation)
            self._ledger.note_swapped(entry, made, since, steps)
        if pairs:
            self._retirement.stand_by(pairs)
        for made in prepared:
            self._served(self._entries[made.generation.plugin])
