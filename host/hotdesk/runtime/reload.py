"""Makes plugins come, change and go: beside what serves, then by one assignment. See design section 4, "a swap".

`Plugins` owns the entries and decides; `generations.Maker` builds a generation and `release.Release` ends one.
Each plugin's changes run one at a time under its own lock, taken after those of what it requires.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hotdesk_sdk import HotdeskError

from ..config import Config, PluginSettings, read_plugin_settings
from ..errors import CallFailed, ConfigError, LoadFailed, UnknownPlugin
from ..logs import Logger
from ..metrics import Metrics
from .active import Active, Breaker, Generation, PluginState, Slot, users_of, wait_drained
from .call import Calls
from .entries import Entry, Kept, Problem, Receipt, merged, slot_for
from .events import Events
from .generations import Maker, Prepared
from .guards import host_task
from .release import describe_holders
from .sources import Bundle, Source, find_entry_points, find_sources, name_of, settle, signature
from .watch import Watch

__all__ = ["NothingToRollBackTo", "Plugins"]

SETTINGS_POLL_S = 0.25
"""How often the settings file is looked at. Its folder often holds the data folder, whose events would flood us."""

ROOM_S = 0.1
"""How long a load waits for the generation before last to be gone: at a quick series of saves no more than three live."""


class NothingToRollBackTo(HotdeskError):
    """A rollback of a plugin that has no earlier version, or not the one that was asked for."""

    def __init__(self, name: str, to: int | None = None) -> None:
        which = "earlier version" if to is None else f"generation {to}"
        super().__init__(f"plugin '{name}' has no {which} to go back to")


@dataclass(slots=True)
class Standby:
    """The generations that one swap replaced, ready to serve again until `over` is set."""

    pairs: list[tuple[Entry, Slot | None, Generation]]
    over: asyncio.Event


class Plugins:
    """All plugins of one host."""

    def __init__(
        self,
        config: Config,
        *,
        active: Active,
        calls: Calls,
        maker: Maker,
        metrics: Metrics,
        events: Events,
        log: Logger,
        remember: Callable[[dict[str, bool]], Awaitable[None]],
    ) -> None:
        self._config = config
        self._active = active
        self._calls = calls
        self._maker = maker
        self._metrics = metrics
        self._events = events
        self._log = log
        self._remember = remember
        self._roots = [Path(folder).absolute() for folder in config.plugins]
        self._settings = dict(config.plugin_settings)
        self._overrides: dict[str, bool] = {}
        self._entries: dict[str, Entry] = {}
        self._standbys: dict[str, Standby] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._rollbacks: dict[str, asyncio.Task[Any]] = {}
        self._drain_wakes: dict[Generation, asyncio.Event] = {}
        self._watch: Watch | None = None
        self._closing = False
        active.drained = self._wake_drain
        calls.on_failure = self._on_probation_failure
        calls.on_probation_over = self._on_probation_over

    # -- life ------------------------------------------------------------------------------------------------

    async def start(self, overrides: dict[str, bool]) -> None:
        """Load everything there is, requirements first, then watch."""
        self._overrides = dict(overrides)
        for root in self._roots:
            if not root.is_dir():
                raise ConfigError("plugins", str(root), "start", "there is no such folder; `hotdesk init` makes one")
        self._discover()
        await asyncio.gather(*(self._update(name, time.monotonic()) for name in list(self._entries)))
        self._warn_of_cycles()
        if self._config.watch != "frozen":
            self._watch = Watch(
                self._roots, changed=self._changed, sweep=self._sweep, log=self._log, poll=self._config.watch_poll
            )
            await self._watch.start()
        if self._config.file:
            self._spawn(self._follow_settings(Path(self._config.file)))

    async def aclose(self) -> None:
        """Stop watching, then end every generation: those that require others first."""
        self._closing = True
        if self._watch is not None:
            await self._watch.aclose()
        for standby in list(self._standbys.values()):
            standby.over.set()
        current = [entry for entry in self._entries.values() if entry.current is not None]
        current.sort(key=lambda entry: len(self._requirements(entry.name)), reverse=True)
        for entry in current:
            self._unload(entry)
        while waiting := [task for task in self._tasks if task is not asyncio.current_task()]:
            done, late = await asyncio.wait(waiting, timeout=self._config.stop_timeout_s)
            if not done:
                for task in late:
                    task.cancel()
                await asyncio.gather(*late, return_exceptions=True)

    @property
    def watch_mode(self) -> str:
        """How changes are seen: "events", "polling", "events, untested" or "frozen"."""
        return self._watch.mode if self._watch else "frozen"

    def _spawn(self, coro: Any) -> asyncio.Task[Any]:
        task = host_task(coro)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (exc := task.exception()) is not None:
            self._log.error("reload_step_failed", problem=repr(exc), exc_info=exc)

    # -- seeing a change -------------------------------------------------------------------------------------

    def _discover(self) -> None:
        for source in find_entry_points().values():
            name = source.name if isinstance(source, Source) else source.plugin
            entry = self._entries.setdefault(name, Entry(name))
            if isinstance(source, Source):
                entry.source = source
            else:
                entry.problem = Problem.of(source)
        for root in self._roots:
            for name in find_sources(root):
                self._entries.setdefault(name, Entry(name))
        for entry in self._entries.values():
            entry.disabled = not self._is_enabled(entry.name)

    def _changed(self, paths: set[Path]) -> None:
        since = time.monotonic()
        for path in paths:
            names = {name for root in self._roots if (name := name_of(path, root))}
            if not names:
                self._sweep()
            for name in names:
                self._queue(name, since)

    def _sweep(self) -> None:
        since = time.monotonic()
        names = {name for root in self._roots for name in find_sources(root)}
        for name in names | {entry.name for entry in self._entries.values() if entry.seen is not None}:
            self._queue(name, since)

    def _queue(self, name: str, since: float) -> None:
        entry = self._entries.get(name)
        sources = self._sources_of(name)
        if entry is None:
            if not sources:
                return
            entry = self._entries[name] = Entry(name, disabled=not self._is_enabled(name))
        if entry.queued or self._closing:
            return
        seen = self._signature(sources)
        if seen == entry.seen and not (seen is None and entry.current is not None and self._from_folder(entry)):
            return
        entry.queued = True
        self._spawn(self._update(name, since))

    @staticmethod
    def _signature(sources: list[Source]) -> Any:
        return tuple(part for source in sources for part in signature(source) or ()) or None

    def _from_folder(self, entry: Entry) -> bool:
        return entry.source is not None and any(entry.source.path.is_relative_to(root) for root in self._roots)

    def _sources_of(self, name: str) -> list[Source]:
        found = []
        for root in self._roots:
            for kind, path in (("py", root / f"{name}.py"), ("folder", root / name), ("wasm", root / f"{name}.wasm")):
                source = Source(name, path, kind)
                if signature(source) is not None:
                    found.append(source)
        return found

    async def _update(self, name: str, since: float) -> None:
        """Bring one plugin to what its source says now. Every failure leaves what serves as it is."""
        entry = self._entries[name]
        async with entry.lock:
            entry.queued = False
            if self._closing:
                return
            if self._config.watch == "pending" and entry.current is not None:
                sources = self._sources_of(name)
                entry.seen = self._signature(sources)
                entry.pending = True
                self._events.tell("plugin_pending", plugin=name, remedy=f"hotdesk plugins reload {name}")
                return
            try:
                await self._apply(entry, since)
            except HotdeskError as exc:
                self._fail(entry, exc)

    async def _apply(self, entry: Entry, since: float, *, force: bool = False) -> None:
        entry.pending = False
        if entry.disabled:
            return
        sources = self._sources_of(entry.name)
        source = self._choose(entry, sources)
        entry.seen = self._signature(sources)
        bundle = await settle(source) if source is not None else None
        settled = time.monotonic()
        if bundle is None or source is None:
            entry.seen = None
            if entry.source is None or self._from_folder(entry):
                self._forget(entry)
            return
        entry.seen = self._signature(self._sources_of(entry.name))
        entry.source = source
        if bundle.manifest.name != entry.name:
            raise LoadFailed(
                entry.name,
                "manifest",
                f"its manifest says name = {bundle.manifest.name!r}; a plugin goes by its file's name",
            )
        if len(sources) > 1:
            taken = ", ".join(str(other.path) for other in sources if other != source)
            self._fail(
                entry, LoadFailed(entry.name, "find", f"the name is taken by {source.path}; not loaded: {taken}")
            )
        elif entry.problem is not None and entry.current is not None and bundle.digest == entry.current.bundle.digest:
            entry.problem = None
        if not force and entry.current is not None and bundle.digest == entry.current.bundle.digest:
            await self._reconfigure(entry, bundle)
        elif not force and bundle.digest == entry.refused:
            self._log.info("plugin_unchanged", plugin=entry.name, reason="these bytes were rolled back")
        else:
            await self._load(entry, bundle, since, {"settle_ms": (settled - since) * 1000})

    def _choose(self, entry: Entry, sources: list[Source]) -> Source | None:
        if entry.source is not None and (entry.source in sources or not self._from_folder(entry)):
            return entry.source
        return sources[0] if sources else entry.source

    # -- loading ---------------------------------------------------------------------------------------------

    def _requirements(self, name: str, seen: tuple[str, ...] = ()) -> list[str]:
        """All that *name* requires, directly or not. Raises `LoadFailed` on a cycle."""
        if name in seen:
            raise LoadFailed(name, "requires", f"it requires itself: {' → '.join((*seen, name))}")
        entry = self._entries.get(name)
        if entry is None or entry.current is None:
            return []
        names: list[str] = []
        for other in entry.current.manifest.requires:
            names += [other, *self._requirements(other, (*seen, name))]
        return names

    def _dependants(self, name: str) -> list[Entry]:
        """The plugins that serve and require *name*, nearest first."""
        direct = [
            entry for entry in self._entries.values() if entry.current and name in entry.current.manifest.requires
        ]
        return list(dict.fromkeys([*direct, *(far for entry in direct for far in self._dependants(entry.name))]))

    async def _load(
        self, entry: Entry, bundle: Bundle, since: float, steps: dict[str, float], *, probation: bool = True
    ) -> None:
        """Load *bundle* beside what serves, together with all that requires it, and swap. Raises `HotdeskError`."""
        requires = bundle.manifest.requires
        if entry.name in requires:
            raise LoadFailed(entry.name, "requires", "it requires itself")
        missing = [name for name in requires if (e := self._entries.get(name)) is None or e.current is None]
        if missing:
            entry.waiting_for = missing[0]
            if entry.current is not None or (entry.name in self._waiting_chain(missing[0])):
                raise LoadFailed(entry.name, "requires", f"it requires '{missing[0]}', which does not serve")
            entry.problem = None
            self._events.tell("plugin_waiting", plugin=entry.name, waiting_for=missing[0])
            return
        entry.waiting_for = None
        group = [(entry, bundle)]
        dependants = self._dependants(entry.name)
        if entry in dependants:
            raise LoadFailed(entry.name, "requires", f"it requires '{requires[0]}', which requires it")
        for dependant in dependants:
            await dependant.lock.acquire()
        try:
            group += [(one, one.current.bundle) for one in dependants if one.current is not None]
            await self._make_room(group)
            prepared = await self._prepare(group, steps)
            self._serve(prepared, since, steps, probation)
        finally:
            for dependant in dependants:
                dependant.lock.release()
        self._wake_waiting(entry.name)

    async def _make_room(self, group: list[tuple[Entry, Bundle]]) -> None:
        """See the generations before the ones that serve off, as far as nobody uses them any more."""
        retiring: set[asyncio.Task[None]] = set()
        for entry, _ in group:
            if (standby := self._standbys.pop(entry.name, None)) is not None:
                self._end_standby(standby)
            retiring |= entry.retiring
        if retiring:
            await asyncio.wait(retiring, timeout=ROOM_S)
        if self._maker.release.unproven:
            self._maker.release.verify(must=True)

    async def _prepare(self, group: list[tuple[Entry, Bundle]], steps: dict[str, float]) -> list[Prepared]:
        prepared: list[Prepared] = []
        modules: dict[str, Any] = {}
        try:
            for entry, bundle in group:
                if entry.current is None:
                    entry.loading = True
                needs = {name: modules.get(name) or self._module_of(name) for name in bundle.manifest.requires}
                made = await self._maker.make(
                    bundle,
                    entry.last_number + 1,
                    old=entry.current,
                    settings=self._settings.get(entry.name, PluginSettings()),
                    modules=needs,
                    breaker=self._breaker(entry.name),
                    steps=steps if not prepared else {},
                )
                prepared.append(made)
                modules[entry.name] = made.module
        except BaseException:
            for made in reversed(prepared):
                await self._maker.discard(made)
            raise
        finally:
            for entry, _ in group:
                entry.loading = False
        return prepared

    def _module_of(self, name: str) -> Any:
        current = self._entries[name].current
        return None if current is None else self._maker.module_of(current)

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
                self._maker.pause(entry.current, True)
                pairs.append((entry, entry.slot, entry.current))
            if probation and (entry.current is not None or entry.kept):
                generation.probation_left = self._config.probation_calls
        self._active.swap(snapshot)
        now = time.monotonic()
        steps["swap_ms"] = (now - start) * 1000
        steps["total_ms"] = (now - since) * 1000
        for made in prepared:
            self._book(self._entries[made.generation.plugin], made, since, steps)
        if pairs:
            self._stand_by(pairs)

    def _book(self, entry: Entry, made: Prepared, since: float, steps: dict[str, float]) -> None:
        generation = made.generation
        before = entry.current.number if entry.current else None
        entry.current, entry.slot, entry.last_number = generation, made.slot, generation.number
        if entry.problem is not None and entry.problem.step != "find":
            entry.problem = None
        entry.refused = None
        entry.kept = type(entry.kept)(
            [*entry.kept, Kept(generation.number, generation.bundle, time.time())][-self._config.keep_generations :]
        )
        receipt = Receipt(entry.name, str(generation.bundle.source.path), before, generation.number, dict(steps), since)
        entry.receipt = receipt

        def first_answer() -> None:
            generation.first_answer = None
            receipt.first_answer_ms = (time.monotonic() - since) * 1000
            self._events.tell("plugin_receipt", plugin=entry.name, receipt=receipt.public())

        generation.first_answer = first_answer
        self._metrics.generation.labels(entry.name).set(generation.number)
        self._metrics.breaker_open.labels(entry.name).set(0)
        self._metrics.swaps.labels(entry.name, "swapped" if before else "loaded").inc()
        for step, value in steps.items():
            self._metrics.swap_steps.labels(step.removesuffix("_ms")).observe(value / 1000)
        self._events.tell(
            "plugin_swapped" if before else "plugin_loaded",
            plugin=entry.name,
            generation=generation.number,
            receipt=receipt.public(),
        )

    def _breaker(self, name: str) -> Breaker:
        def on_change(state: str) -> None:
            self._metrics.breaker_open.labels(name).set(state == "open")
            self._events.tell("breaker_opened" if state == "open" else "breaker_closed", plugin=name)

        return Breaker(self._config.breaker_failures, self._config.breaker_cooldown_s, on_change)

    def _fail(self, entry: Entry, exc: HotdeskError) -> None:
        problem = Problem.of(exc)
        if entry.problem is not None and entry.problem.message == problem.message and problem.step == "find":
            return
        entry.problem = problem
        serving = entry.current.number if entry.current else None
        self._metrics.swaps.labels(entry.name, "failed").inc()
        self._events.tell(
            "plugin_failed",
            plugin=entry.name,
            step=problem.step,
            message=problem.message,
            file=problem.file,
            line=problem.line,
            serving=serving,
        )

    def _waiting_chain(self, name: str) -> set[str]:
        chain: set[str] = set()
        while name not in chain and (entry := self._entries.get(name)) is not None and entry.waiting_for:
            chain.add(name)
            name = entry.waiting_for
        return chain | {name}

    def _warn_of_cycles(self) -> None:
        for entry in self._entries.values():
            if entry.waiting_for and entry.current is None and entry.name in self._waiting_chain(entry.waiting_for):
                self._fail(
                    entry, LoadFailed(entry.name, "requires", f"it and '{entry.waiting_for}' require each other")
                )

    def _wake_waiting(self, name: str) -> None:
        for entry in list(self._entries.values()):
            if entry.waiting_for == name and entry.current is None:
                entry.queued = True
                self._spawn(self._update(entry.name, time.monotonic()))

    # -- ending ----------------------------------------------------------------------------------------------

    def _stand_by(self, pairs: list[tuple[Entry, Slot | None, Generation]]) -> None:
        """Keep what was replaced ready for a moment; what stood by before it is let go."""
        standby = Standby(pairs, asyncio.Event())
        for entry, _, old in pairs:
            before = self._standbys.get(entry.name)
            if before is not None:
                before.over.set()
            self._standbys[entry.name] = standby
            entry.standby = old
        self._spawn(self._retire_after(standby))

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
        for entry, _, old in pairs:
            if self._standbys.get(entry.name) is standby:
                del self._standbys[entry.name]
            entry.standby = None
            self._start_retiring(entry, old)

    def _start_retiring(self, entry: Entry, generation: Generation) -> None:
        task = self._spawn(self._retire(entry, generation))
        entry.retiring.add(task)
        task.add_done_callback(entry.retiring.discard)

    def _wake_drain(self, generation: Generation) -> None:
        if (wake := self._drain_wakes.get(generation)) is not None:
            wake.set()

    async def _retire(self, entry: Entry, generation: Generation) -> None:
        """Drain, tear down, undo, sweep, and prove that it is gone."""
        wake = self._drain_wakes[generation] = asyncio.Event()
        under_way = users_of(generation)
        drained = await wait_drained(generation, self._config.drain_timeout_s, wake)
        del self._drain_wakes[generation]
        if entry.receipt is not None and entry.receipt.before == generation.number:
            entry.receipt.drained = under_way
        leftovers = [] if drained else [f"{users_of(generation)} turns were still under way"]
        leftovers += await self._maker.end(generation, drained=drained)
        generation.move(PluginState.CLOSED)
        if leftovers:
            entry.leftovers = leftovers
            for what in leftovers:
                self._metrics.leftovers.labels(entry.name, what.split(" ", 1)[0]).inc()
            self._events.tell("plugin_leftover", plugin=entry.name, generation=generation.number, leftovers=leftovers)
        self._spawn(self._prove(entry, generation.number))

    async def _prove(self, entry: Entry, number: int) -> None:
        for _ in range(3):
            await asyncio.sleep(0.05)
            held = {k: v for k, v in self._maker.release.verify().items() if k[:2] == (entry.name, number)}
            if not held:
                return
            held.clear()
            await asyncio.sleep(1.0)
        held = {k: v for k, v in self._maker.release.verify(must=True).items() if k[:2] == (entry.name, number)}
        for targets in held.values():
            words = [f"{t.__qualname__} is still held by {describe_holders(t)}" for t in targets[:3]]
            entry.leftovers = [*entry.leftovers, *words]
            self._events.tell("plugin_leftover", plugin=entry.name, generation=number, leftovers=words)

    def _unload(self, entry: Entry) -> None:
        """Take a plugin out, with all that require it, and retire it."""
        gone = [one for one in [entry, *self._dependants(entry.name)] if one.current is not None]
        names = {one.name for one in gone}
        self._active.swap(
            self._active.build(slot for slot in self._active.current.slots if slot.generation.plugin not in names)
        )
        for one in gone:
            if (standby := self._standbys.get(one.name)) is not None:
                standby.over.set()
            current, one.current, one.slot = one.current, None, None
            if current is None:
                continue
            if one is not entry:
                one.waiting_for = entry.name
            current.move(PluginState.DRAINING)
            self._metrics.generation.labels(one.name).set(0)
            self._events.tell("plugin_unloaded", plugin=one.name, generation=current.number)
            self._start_retiring(one, current)

    def _forget(self, entry: Entry) -> None:
        entry.problem = entry.source = entry.waiting_for = entry.refused = None
        if entry.current is not None:
            self._unload(entry)
        self._entries.pop(entry.name, None)
        if entry.lock.locked():
            entry.seen = None

    # -- rolling back ----------------------------------------------------------------------------------------

    def _on_probation_over(self, generation: Generation) -> None:
        standby = self._standbys.get(generation.plugin)
        if standby is not None and all(
            entry.current is None or not entry.current.probation_left for entry, _, _ in standby.pairs
        ):
            standby.over.set()

    def _on_probation_failure(self, generation: Generation, exc: CallFailed) -> Any:
        """Roll *generation* back; say whether (True, or an awaitable that tells) its turns should be run again."""
        entry = self._entries.get(generation.plugin)
        if entry is None or self._closing:
            return None
        if entry.current is not generation:
            return True
        if (standby := self._standbys.get(entry.name)) is not None:
            self._swap_back(entry, standby, exc)
            return True
        if (running := self._rollbacks.get(entry.name)) is None:
            target = self._rollback_target(entry)
            if target is None:
                return None
            running = self._spawn(self._roll_back(entry, target, str(exc), self._note_rolled_back))
            self._rollbacks[entry.name] = running
            running.add_done_callback(lambda _: self._rollbacks.pop(entry.name, None))
        return running

    def _swap_back(self, entry: Entry, standby: Standby, exc: CallFailed) -> None:
        names = {one.name for one, _, _ in standby.pairs}
        slots = [slot for slot in self._active.current.slots if slot.generation.plugin not in names]
        slots += [slot for _, slot, _ in standby.pairs if slot is not None]
        self._active.swap(self._active.build(slots))
        for one, slot, old in standby.pairs:
            failed, one.current, one.slot = one.current, old, slot
            one.standby = None
            self._standbys.pop(one.name, None)
            old.move(PluginState.ACTIVE)
            old.probation_left = 0
            self._maker.pause(old, False)
            if failed is not None:
                self._note_rolled_back(one, failed, old.number, str(exc))
                failed.move(PluginState.DRAINING)
                self._start_retiring(one, failed)
        standby.pairs = []
        standby.over.set()

    def _note_rolled_back(self, entry: Entry, failed: Generation, to: int, why: str) -> None:
        """The books of a rollback by probation; *failed* is not kept, for it is no version to go back to."""
        entry.kept = type(entry.kept)(kept for kept in entry.kept if kept.generation != failed.number)
        entry.problem = Problem(f"generation {failed.number} was rolled back: {why}", "probation")
        self._tell_rolled_back(entry, failed, to, why)

    def _tell_rolled_back(self, entry: Entry, failed: Generation, to: int, why: str) -> None:
        entry.refused = failed.bundle.digest
        self._metrics.generation.labels(entry.name).set(to)
        self._metrics.swaps.labels(entry.name, "rolled_back").inc()
        self._events.tell("plugin_rolled_back", plugin=entry.name, **{"from": failed.number, "to": to}, message=why)

    def _rollback_target(self, entry: Entry, to: int | None = None) -> Kept | None:
        serving = entry.current.bundle.digest if entry.current else None
        return next(
            (
                kept
                for kept in reversed(entry.kept)
                if (kept.bundle.digest != serving if to is None else kept.generation == to)
            ),
            None,
        )

    async def _roll_back(
        self, entry: Entry, target: Kept, why: str, note: Callable[[Entry, Generation, int, str], None]
    ) -> bool:
        """Load an earlier version anew and swap to it; True when it serves."""
        async with entry.lock:
            failed = entry.current
            try:
                await self._load(entry, target.bundle, time.monotonic(), {"settle_ms": 0.0}, probation=False)
            except HotdeskError as exc:
                self._fail(entry, exc)
                return False
            if failed is not None and entry.current is not None:
                note(entry, failed, entry.current.number, why)
            return True

    # -- commands --------------------------------------------------------------------------------------------

    def entry(self, name: str) -> Entry:
        """Raises `UnknownPlugin`."""
        if name not in self._entries:
            raise UnknownPlugin(name, list(self._entries))
        return self._entries[name]

    @property
    def entries(self) -> Iterable[Entry]:
        return self._entries.values()

    async def reload(self, name: str) -> None:
        """Load the source anew, even if its bytes are the same. Raises `HotdeskError`; what serves stays."""
        entry = self.entry(name)
        async with entry.lock:
            try:
                await self._apply(entry, time.monotonic(), force=True)
            except HotdeskError as exc:
                self._fail(entry, exc)
                raise

    async def rollback(self, name: str, to: int | None = None) -> None:
        """Serve the version before this one, or the one that was generation *to*, as a new generation.

        The version that it leaves is kept, so that one can go forward again. Raises `NothingToRollBackTo`, or
        `LoadFailed` when it won't load.
        """
        entry = self.entry(name)
        target = self._rollback_target(entry, to)
        if target is None:
            raise NothingToRollBackTo(name, to)
        if not await self._roll_back(entry, target, "by command", self._tell_rolled_back):
            problem = entry.problem
            raise LoadFailed(name, "rollback", problem.message if problem else "it did not load")

    async def enable(self, name: str) -> None:
        """Load it if it was disabled. Remembered over restarts."""
        entry = self.entry(name)
        self._overrides[name] = True
        await self._remember(self._overrides)
        await self._set_enabled(entry, True)

    async def disable(self, name: str) -> None:
        """Drain and unload it; its file is left alone from now on. Remembered over restarts."""
        entry = self.entry(name)
        self._overrides[name] = False
        await self._remember(self._overrides)
        await self._set_enabled(entry, False)

    async def _set_enabled(self, entry: Entry, enabled: bool) -> None:
        async with entry.lock:
            if entry.disabled == (not enabled):
                return
            entry.disabled = not enabled
            if enabled:
                try:
                    await self._apply(entry, time.monotonic(), force=True)
                except HotdeskError as exc:
                    self._fail(entry, exc)
                    raise
            else:
                entry.problem = None
                if entry.current is not None:
                    self._unload(entry)
                self._events.tell("plugin_disabled", plugin=entry.name)

    def _is_enabled(self, name: str) -> bool:
        return self._overrides.get(name, self._settings.get(name, PluginSettings()).enabled)

    # -- settings --------------------------------------------------------------------------------------------

    async def _follow_settings(self, file: Path) -> None:
        seen = _stat(file)
        while not self._closing:
            await asyncio.sleep(SETTINGS_POLL_S)
            now = _stat(file)
            if now == seen or now is None:
                continue
            seen = now
            try:
                settings = read_plugin_settings(str(file))
            except ConfigError as exc:
                self._events.tell("settings_failed", file=str(file), message=str(exc))
                continue
            await self._take_settings(settings)

    async def _take_settings(self, settings: dict[str, PluginSettings]) -> None:
        before, self._settings = self._settings, settings
        blank = PluginSettings()
        for name in [*self._entries]:
            old, new = before.get(name, blank), settings.get(name, blank)
            if old == new or (entry := self._entries.get(name)) is None:
                continue
            if old.enabled != new.enabled:
                self._overrides.pop(name, None)
                await self._remember(self._overrides)
            try:
                await self._set_enabled(entry, self._is_enabled(name))
                async with entry.lock:
                    if entry.current is not None:
                        self._reslot(entry, new)
                        await self._reconfigure(entry, entry.current.bundle)
            except HotdeskError as exc:
                self._fail(entry, exc)

    def _reslot(self, entry: Entry, settings: PluginSettings) -> None:
        """Order, deadline and grants: a new snapshot around the same generation."""
        if entry.current is None or entry.slot is None:
            return
        self._maker.grant(entry.current, settings)
        slot = slot_for(entry.current, settings, entry.slot.breaker)
        others = [one for one in self._active.current.slots if one.generation is not entry.current]
        entry.slot = slot
        self._active.swap(self._active.build([*others, slot]))

    async def _reconfigure(self, entry: Entry, bundle: Bundle) -> None:
        """Give a generation its new config: through `configure` where that takes it, by a swap where not."""
        current = entry.current
        if current is None:
            return
        config = merged(bundle.manifest.config, self._settings.get(entry.name, PluginSettings()).config)
        if config == self._maker.config_of(current):
            return
        if await self._maker.configure(current, config):
            current.bundle, current.manifest = bundle, bundle.manifest
            self._events.tell("plugin_configured", plugin=entry.name, generation=current.number)
        else:
            now = time.monotonic()
            await self._load(entry, bundle, now, {"settle_ms": 0.0})


def _stat(file: Path) -> tuple[int, int, int] | None:
    try:
        stat = file.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino
