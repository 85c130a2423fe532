"""The way out of a generation: standby, drain, teardown, release, and the proof that it is gone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any

from ..config import Config
from .active import Generation, PluginState, Slot, users_of, wait_drained
from .entries import Entry
from .generations import Maker
from .ledger import Ledger
from .release import describe_holders

__all__ = ["Retirement", "Standby"]

MOST_BESIDE = 2
"""How many generations of a plugin may live beside the one that serves: one on its way out, one on its way in."""

ROOM_S = 0.1
"""How long a load waits for the generation before last to be gone when there are more."""

PROOF_WAITS_S = (0.05, 0.25, 1.0)
"""When a released generation is looked for; after the last with a full collection, and what holds it is named."""


@dataclass(slots=True)
class Standby:
    """The generations that one swap replaced, requirements first, ready to serve again until `over` is set."""

    pairs: list[tuple[Entry, Slot | None, Generation]]
    over: asyncio.Event


class Retirement:
    """Sees generations off. *spawn* runs what takes time."""

    def __init__(
        self,
        config: Config,
        *,
        maker: Maker,
        ledger: Ledger,
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
    ) -> None:
        self._config = config
        self._maker = maker
        self._ledger = ledger
        self._spawn = spawn
        self._standbys: dict[str, Standby] = {}
        self._drain_wakes: dict[Generation, asyncio.Event] = {}
        self._closing = False

    def close(self) -> None:
        """No standby from now on, and no waiting for proofs."""
        self._closing = True
        for standby in list(self._standbys.values()):
            self._end_standby(standby)

    # -- standby ---------------------------------------------------------------------------------------------

    def standby_of(self, name: str) -> Standby | None:
        """What stands by for plugin *name*, and for all that were swapped with it."""
        return self._standbys.get(name)

    def stand_by(self, pairs: list[tuple[Entry, Slot | None, Generation]]) -> None:
        """Keep what was replaced ready for a moment; what stood by before it is let go."""
        standby = Standby(pairs, asyncio.Event())
        for entry, _, old in pairs:
            self.end_standby(entry.name)
            self._standbys[entry.name] = standby
            entry.standby = old
        self._spawn(self._retire_after(standby))

    def take_standby(self, name: str) -> Standby | None:
        """What stands by for *name*, to serve again: it is nobody's standby any more."""
        standby = self._standbys.get(name)
        if standby is None:
            return None
        for entry, _, _ in standby.pairs:
            self._standbys.pop(entry.name, None)
            entry.standby = None
        taken = Standby(standby.pairs, standby.over)
        standby.pairs = []
        standby.over.set()
        return taken

    def end_standby(self, name: str) -> None:
        """Retire what stands by for *name*, if anything does."""
        if (standby := self._standbys.get(name)) is not None:
            self._end_standby(standby)

    async def _retire_after(self, standby: Standby) -> None:
        try:
            async with asyncio.timeout(self._config.standby_s):
                await standby.over.wait()
        except TimeoutError:
            pass
        self._end_standby(standby)

    def _end_standby(self, standby: Standby) -> None:
        pairs, standby.pairs = standby.pairs, []
        standby.over.set()
        for entry, _, _ in pairs:
            if self._standbys.get(entry.name) is standby:
                del self._standbys[entry.name]
                entry.standby = None
        self.retire([(entry, old) for entry, _, old in pairs])

    # -- retiring --------------------------------------------------------------------------------------------

    async def make_room(self, entries: Iterable[Entry]) -> None:
        """Before another generation comes: see to it that, with the one that serves, there are at most three of each.

        That costs nothing but at a quick series of saves; a generation which turns still use is not waited for long.
        """
        crowded = [entry for entry in entries if self._alive_beside(entry) >= MOST_BESIDE]
        if not crowded:
            return
        self._maker.release.verify(must=True)
        retiring: set[asyncio.Task[None]] = set()
        for entry in crowded:
            if self._alive_beside(entry) >= MOST_BESIDE:
                self.end_standby(entry.name)
                retiring |= entry.retiring
        if retiring:
            await asyncio.wait(retiring, timeout=ROOM_S)
            self._maker.release.verify(must=True)

    def _alive_beside(self, entry: Entry) -> int:
        """How many generations of a plugin there are beside the one that serves."""
        standing_by = int(entry.name in self._standbys)
        return standing_by + len(entry.retiring) + self._maker.release.unproven_of(entry.name)

    def retire(self, pairs: list[tuple[Entry, Generation]]) -> None:
        """Drain and end *pairs*, which are DRAINING: those that require others, which come last, first."""
        if not pairs:
            return
        task = self._spawn(self._retire(pairs))
        for entry, _ in pairs:
            entry.retiring.add(task)
            task.add_done_callback(entry.retiring.discard)

    async def _retire(self, pairs: list[tuple[Entry, Generation]]) -> None:
        while pairs:
            await self._end(*pairs.pop())

    def wake_drain(self, generation: Generation) -> None:
        """*generation* is used by nobody any more."""
        if (wake := self._drain_wakes.get(generation)) is not None:
            wake.set()

    async def _end(self, entry: Entry, generation: Generation) -> None:
        """Drain, tear down, undo; then sweep. What still runs after the drain keeps its code until it has ended."""
        wake = self._drain_wakes[generation] = asyncio.Event()
        under_way = users_of(generation)
        try:
            drained = await wait_drained(generation, self._config.drain_timeout_s, wake)
            if entry.receipt is not None and entry.receipt.before == generation.number:
                entry.receipt.drained = under_way
            if not drained:
                self._note(entry, generation, [f"turns still under way: {users_of(generation)}"])
            left = await self._maker.tear_down(generation)
            await wait_drained(generation, None, wake)
        finally:
            del self._drain_wakes[generation]
            left_behind = await self._maker.release_all(generation)
        generation.move(PluginState.CLOSED)
        self._note(entry, generation, [*left, *left_behind])
        if not self._closing:
            self._spawn(self._prove(entry, generation.number))

    def _note(self, entry: Entry, generation: Generation, leftovers: list[str]) -> None:
        if leftovers:
            entry.leftovers = leftovers
            self._ledger.note_leftovers(entry, generation.number, leftovers)

    async def _prove(self, entry: Entry, number: int) -> None:
        """See that nothing of a generation is left; name what is, and what holds it."""
        release, mine = self._maker.release, (entry.name, number)
        for wait_s in PROOF_WAITS_S:
            await asyncio.sleep(wait_s)
            if self._closing or not any(key[:2] == mine for key in release.verify()):
                return
        held = [targets for key, targets in release.verify(must=True).items() if key[:2] == mine]
        for targets in held:
            words = [f"module: {_name_of(t)} is still held by {describe_holders(t)}" for t in targets[:3]]
            entry.leftovers = [*entry.leftovers, *words]
            self._ledger.note_leftovers(entry, number, words)


def _name_of(target: object) -> str:
    return getattr(target, "__qualname__", type(target).__qualname__)
