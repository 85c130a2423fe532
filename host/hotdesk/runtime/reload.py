"""Makes plugins come, change and go: beside what serves, then by one assignment. See design section 4, "a swap".

`Plugins` owns the entries and decides. `swapper.Swapper` loads and swaps, `generations.Maker` builds a generation,
`retirement.Retirement` sees one off, `rollback.Rollback` goes back. Each plugin's changes run one at a time under its
own lock, taken after those of what it requires.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import msgspec

from hotdesk_sdk import HotdeskError

from ..config import Config, PluginSettings, read_plugin_settings
from ..errors import LoadFailed, UnknownPlugin, describe
from ..logs import Logger
from ..metrics import Metrics
from .active import Active, Generation, PluginState, Slot
from .archive import Archive
from .call import Calls
from .entries import Entry, Kept, merged, slot_for
from .events import Events
from .generations import Maker
from .guards import host_task
from .ledger import Ledger
from .places import Places, joined
from .requirements import dependants_of
from .retirement import Retirement
from .rollback import NothingToRollBackTo, Rollback
from .settings_file import follow_settings
from .sources import Bundle, Signature, Source, find_entry_points, settle
from .swapper import Swapper
from .watch import Changes, Watch

__all__ = ["NothingToRollBackTo", "PluginDisabled", "Plugins"]


class PluginDisabled(HotdeskError):
    """A command that would load a plugin which the operator disabled."""

    def __init__(self, name: str) -> None:
        super().__init__(f"plugin '{name}' is disabled; enable it first")


class Plugins:
    """All plugins of one process.

    Where it is one of several workers, *number* agrees with the others on the number of each generation, and *joining*
    says why it begins after them: it took the place of one that `died`, or of one that it replaces (`rolled`). *pushed*
    is a folder beside the operator's, after them; who changes something there says so to `look`.
    """

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
        archive: Archive,
        remember: Callable[[dict[str, bool]], Awaitable[None]],
        number: Callable[[str, str, int, int], Awaitable[int]] | None = None,
        joining: Literal["", "died", "rolled"] = "",
        pushed: Path | None = None,
    ) -> None:
        self._config = config
        self._agree = number
        self._joining = joining
        self._active = active
        self._maker = maker
        self._log = log
        self._archive = archive
        self._remember = remember
        self._events = events
        self._places = Places((*config.plugins, *([str(pushed)] if pushed is not None else ())))
        self._settings = dict(config.plugin_settings)
        self._llm_grant = frozenset(config.llm.grant)
        self._overrides: dict[str, bool] = {}
        self._entries: dict[str, Entry] = {}
        self._numbers: dict[str, int] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._updates: set[asyncio.Task[Any]] = set()
        self._watch: Watch | None = None
        self._following: asyncio.Task[Any] | None = None
        self._started = False
        self._closing = False
        self._ledger = Ledger(config, metrics, events, self._keep_versions)
        self._retirement = Retirement(config, maker=maker, ledger=self._ledger, spawn=self._spawn)
        self._swapper = Swapper(
            config,
            self._entries,
            active=active,
            maker=maker,
            ledger=self._ledger,
            retirement=self._retirement,
            settings=self._settings_of,
            number=self._number,
            served=self._on_served,
        )
        self._rollback = Rollback(
            self._entries,
            active=active,
            maker=maker,
            ledger=self._ledger,
            retirement=self._retirement,
            load=self._load_kept,
            reslot=self._newest_slot,
            spawn=self._spawn,
        )
        active.drained = self._retirement.wake_drain
        calls.on_failure = self._rollback.on_failure
        calls.on_probation_over = self._rollback.on_probation_over

    # -- life ------------------------------------------------------------------------------------------------

    async def start(self, overrides: dict[str, bool]) -> None:
        """Load everything there is, requirements first, then watch."""
        self._overrides = dict(overrides)
        self._places.check()
        for source in find_entry_points().values():
            entry = self._entry_for(source.name if isinstance(source, Source) else source.plugin)
            if isinstance(source, Source):
                entry.source = source
            elif not entry.disabled:
                self._ledger.note_failed(entry, source)
        for name in self._places.names():
            self._entry_for(name)
        for entry in list(self._entries.values()):
            if entry.problem is None:
                self._begin_update(entry)
        while self._updates:  # what waits for another is begun by that one
            await asyncio.wait(self._updates)
        self._started = True
        if self._config.watch != "frozen":
            self._watch = Watch(
                self._places.roots,
                changed=self._changed,
                sweep=self._sweep,
                log=self._log,
                poll=self._config.watch_poll,
            )
            await self._watch.start()
        if self._config.file:
            file = Path(self._config.file)
            self._following = self._spawn(
                follow_settings(file, read_plugin_settings, self._take_settings, self._events)
            )

    async def aclose(self) -> None:
        """Stop watching, give up what is being loaded, then end every generation: those that require others first."""
        self._closing = True
        self._swapper.close()
        if self._watch is not None:
            await self._watch.aclose()
        loading = {*self._updates, *([self._following] if self._following else ())}
        for task in loading:
            task.cancel()
        await asyncio.gather(*loading, return_exceptions=True)
        self._retirement.close()
        for entry in sorted(self._entries.values(), key=lambda entry: bool(entry.wants)):
            if entry.current is not None:
                self._unload(entry)
        while waiting := [task for task in self._tasks if task is not asyncio.current_task()]:
            done, late = await asyncio.wait(waiting, timeout=self._config.stop_timeout_s)
            if not done:
                for task in late:
                    task.cancel()
                await asyncio.gather(*late, return_exceptions=True)

    @property
    def mode(self) -> str:
        """What becomes of a change: "auto", "pending" or "frozen"."""
        return self._config.watch

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

    def _entry_for(self, name: str) -> Entry:
        """The entry of *name*, a new one if need be, which counts on where an earlier one ended."""
        entry = self._entries.get(name)
        if entry is None:
            entry = Entry(name, last_number=self._numbers.get(name, 0), disabled=not self.is_enabled(name))
            self._entries[name] = entry
        return entry

    def _changed(self, changes: Changes) -> None:
        since = time.monotonic()
        for path in changes.paths:
            names = self._places.names_of(path)
            if not names and (path.name.startswith("..") or not path.name.startswith((".", "_"))):
                self._sweep()  # the link that a ConfigMap swaps, or a folder of ours: any plugin may have changed
            for name in names:
                entry = self._entries.get(name)
                if entry is not None and path in changes.gone:
                    entry.read.pop(str(path), None)
                self._queue(name, since, path if path in changes.moved else None)

    def look(self, name: str) -> None:
        """Look at one plugin now, before the watch sees that it has changed. Not where the watch is frozen."""
        if self._config.watch != "frozen":
            self._queue(name, time.monotonic())

    def _sweep(self) -> None:
        since = time.monotonic()
        known = {entry.name for entry in self._entries.values() if entry.seen is not None}
        for name in self._places.names() | known:
            self._queue(name, since)

    def _queue(self, name: str, since: float, moved: Path | None = None) -> None:
        """Have *name* looked at, unless it is as it was. *moved* came by rename, so its bytes are all there."""
        found = self._places.sources_of(name)
        if not found and name not in self._entries:
            return
        entry = self._entry_for(name)
        seen = joined(found)
        if moved is not None:
            entry.whole |= {row for row in seen or () if row[0] == str(moved)}
        if entry.queued or self._closing:
            return
        if seen == entry.seen and not (seen is None and entry.current is not None and self._places.owns(entry.source)):
            return
        self._begin_update(entry, since)

    def _begin_update(self, entry: Entry, since: float | None = None, *, told: bool = False) -> None:
        entry.queued = True
        task = self._spawn(self._update(entry.name, time.monotonic() if since is None else since, told))
        self._updates.add(task)
        task.add_done_callback(self._updates.discard)

    async def _update(self, name: str, since: float, told: bool) -> None:
        """Bring one plugin to what its source says now. Every failure leaves what serves as it is."""
        entry = self._entries.get(name)
        if entry is None:
            return
        async with entry.lock:
            entry.queued = False
            if self._entries.get(name) is not entry:  # it was forgotten meanwhile, and may be back
                self._queue(name, since)
                return
            with contextlib.suppress(HotdeskError):
                if self._config.watch == "pending" and self._started and not told:
                    await self._attempt(entry, self._hold_back(entry))
                elif self._joining and not self._started:
                    await self._join(entry, since)
                else:
                    await self._attempt(entry, self._apply(entry, since, patient=self._started))

    async def _join(self, entry: Entry, since: float) -> None:
        """Bring one plugin to what it is in the other workers, as far as its file and what was kept of it tell.

        A change that waits for a command goes on waiting, and of what can't be loaded the version before serves: a
        worker that died must not make any difference.
        """
        try:
            if self._joining == "died" and self._config.watch != "auto" and not entry.disabled:
                await self._attempt(entry, self._apply_kept(entry, since))
            else:
                await self._attempt(entry, self._apply(entry, since, patient=False))
        except HotdeskError:
            problem = entry.problem
            if entry.source is not None and not entry.recalled:
                await self._recall(entry, entry.source)
            if entry.current is not None or not entry.kept:
                raise
            await self._attempt(entry, self._load_kept(entry, entry.kept[-1]))
            entry.problem = problem

    async def _apply_kept(self, entry: Entry, since: float) -> None:
        bundle, _ = await self._settle(entry, patient=False)
        if bundle is not None and not entry.recalled:
            await self._recall(entry, bundle.source)
        if bundle is None or not entry.kept or entry.kept[-1].bundle.same_as(bundle):
            await self._apply(entry, since, patient=False)
            return
        await self._load_kept(entry, entry.kept[-1])
        entry.pending = self._config.watch == "pending"

    async def _attempt(self, entry: Entry, step: Awaitable[None]) -> None:
        """Await *step*; put down any failure of it, and raise it as a `HotdeskError`."""
        try:
            await step
        except HotdeskError as exc:
            self._ledger.note_failed(entry, exc)
            raise
        except Exception as exc:  # the fault wall of one reload step: also our own fault is a failed update, not more
            self._log.error("reload_step_failed", plugin=entry.name, problem=describe(exc))
            failed = LoadFailed(entry.name, "load", describe(exc))
            self._ledger.note_failed(entry, failed)
            raise failed from None

    async def _settle(self, entry: Entry, patient: bool) -> tuple[Bundle | None, list[Source]]:
        """The newest version of *entry*, None where it is gone; and the sources that its name is taken from."""
        found: dict[Source, Signature] = self._places.sources_of(entry.name)
        source = entry.source
        if source is None or (source not in found and self._places.owns(source)):
            source = next(iter(found), source)
        entry.seen = joined(found)
        if source is None:
            return None, []
        entry.source = source
        try:
            bundle = await settle(source, entry.read, entry.whole, patient=patient)
        finally:
            entry.whole.clear()
            if source in found:
                entry.seen = joined(found | {source: tuple(entry.read.values())})
        return bundle, [other for other in found if other != source]

    async def _hold_back(self, entry: Entry) -> None:
        """Show a change that waits for a command (`watch = "pending"`)."""
        if entry.disabled:
            return
        try:
            bundle, _ = await self._settle(entry, patient=True)
        except HotdeskError:
            entry.pending = True
            raise
        current = entry.current
        if bundle is None and current is None:
            self._forget(entry)
            return
        entry.pending = bundle is None or current is None or not bundle.same_as(current.bundle)
        if bundle is not None and current is not None and not entry.pending:
            current.bundle = bundle
        if entry.pending:
            self._events.tell("plugin_pending", plugin=entry.name, remedy=f"hotdesk plugins reload {entry.name}")

    async def _apply(self, entry: Entry, since: float, *, patient: bool = True, force: bool = False) -> None:
        if entry.disabled:
            entry.seen = joined(self._places.sources_of(entry.name))
            if entry.seen is None and (entry.source is None or self._places.owns(entry.source)):
                self._forget(entry)
            return
        bundle, rivals = await self._settle(entry, patient)
        settled = time.monotonic()
        entry.pending = False
        if bundle is None:
            if entry.source is None or self._places.owns(entry.source):
                self._forget(entry)
            return
        source, current = bundle.source, entry.current
        if bundle.manifest.name != entry.name:
            problem = f"its manifest says name = {bundle.manifest.name!r}; a plugin goes by its file's name"
            raise LoadFailed(entry.name, "manifest", problem, file=str(source.manifest_path))
        if not entry.recalled:
            await self._recall(entry, source)
        unchanged = current is not None and bundle.digest == current.bundle.digest
        if rivals:
            others = ", ".join(str(rival.path) for rival in rivals[1:])
            also = f", nor is {others}" if others else ""
            taken = f"the name is taken by {source.path}, so this is not loaded{also}; rename one, or remove one"
            self._ledger.note_failed(entry, LoadFailed(entry.name, "find", taken, file=str(rivals[0].path)))
        elif entry.problem is not None and (unchanged or entry.problem.step == "find"):
            entry.problem = None
        if unchanged and not force:
            await self._reconfigure(entry, bundle)
        elif bundle.digest == entry.refused and not force and current is None and entry.kept:
            await self._load_kept(entry, entry.kept[-1])
            self._ledger.note_still_refused(entry, bundle.digest)
        elif bundle.digest == entry.refused and not force:
            self._log.info("plugin_unchanged", plugin=entry.name, reason="these bytes were rolled back")
        else:
            await self._swapper.load(entry, bundle, since, {"settle_ms": (settled - since) * 1000})

    async def _recall(self, entry: Entry, source: Source) -> None:
        """What was kept and refused before the start; the numbers go on from there."""
        entry.recalled = True
        past = await asyncio.to_thread(self._archive.read, source)
        if not entry.kept:
            entry.kept.extend(past.kept)
            entry.refused = entry.refused or past.refused
        entry.last_number = max(entry.last_number, past.last_number)

    def _keep_versions(self, entry: Entry) -> None:
        self._spawn(self._archive.write(entry.name, tuple(entry.kept), entry.refused, entry.last_number))

    # -- loading ---------------------------------------------------------------------------------------------

    async def _number(self, entry: Entry, bundle: Bundle) -> int:
        """The number of the generation that *bundle* becomes next."""
        if self._agree is None:
            return entry.last_number + 1
        return await self._agree(entry.name, bundle.digest, self._numbers.get(entry.name, 0), entry.last_number)

    def _on_served(self, entry: Entry) -> None:
        self._numbers[entry.name] = entry.last_number
        self._wake_waiting(entry.name)

    def _wake_waiting(self, name: str) -> None:
        for entry in list(self._entries.values()):
            if entry.waiting_for == name and entry.current is None and not entry.queued:
                self._begin_update(entry, told=True)

    async def _load_kept(self, entry: Entry, kept: Kept) -> None:
        await self._swapper.load(entry, kept.bundle, time.monotonic(), {"settle_ms": 0.0}, probation=False)

    # -- unloading -------------------------------------------------------------------------------------------

    def _unload(self, entry: Entry) -> None:
        """Take a plugin out, with all that require it, and retire them."""
        gone = [one for one in (entry, *dependants_of(self._entries, entry.name)) if one.current is not None]
        names = {one.name for one in gone}
        self._active.swap(
            self._active.build(slot for slot in self._active.current.slots if slot.generation.plugin not in names)
        )
        pairs: list[tuple[Entry, Generation]] = []
        for one in gone:
            self._retirement.end_standby(one.name)
            current, one.current, one.slot = one.current, None, None
            if current is None:
                continue
            if one is not entry:
                one.waiting_for = entry.name
            current.move(PluginState.DRAINING)
            self._maker.pause(current)
            self._ledger.note_unloaded(one, current)
            pairs.append((one, current))
        self._retirement.retire(pairs)

    def _forget(self, entry: Entry) -> None:
        """Its source is gone: unload it, and take it off the list."""
        entry.problem = entry.source = entry.waiting_for = entry.refused = entry.seen = None
        if entry.current is not None:
            self._unload(entry)
        self._entries.pop(entry.name, None)

    # -- commands --------------------------------------------------------------------------------------------

    def entry(self, name: str) -> Entry:
        """Raises `UnknownPlugin`."""
        if name not in self._entries:
            raise UnknownPlugin(name, list(self._entries))
        return self._entries[name]

    @property
    def entries(self) -> Iterable[Entry]:
        return self._entries.values()

    @contextlib.asynccontextmanager
    async def _held(self, name: str) -> AsyncIterator[Entry]:
        """The entry of *name*, locked. Raises `UnknownPlugin`, also when it was forgotten meanwhile."""
        while True:
            entry = self.entry(name)
            async with entry.lock:
                if self._entries.get(name) is entry:
                    yield entry
                    return

    async def reload(self, name: str) -> None:
        """Load the source anew, even if its bytes are the same. Raises `HotdeskError`; what serves stays."""
        async with self._held(name) as entry:
            if entry.disabled:
                raise PluginDisabled(name)
            await self._attempt(entry, self._apply(entry, time.monotonic(), patient=False, force=True))

    async def rollback(self, name: str, to: int | None = None) -> None:
        """Serve the version before this one, or the one that was generation *to*, as a new generation.

        The version that it leaves is kept, so that one can go forward again. Raises `NothingToRollBackTo`, or
        `LoadFailed` when it won't load.
        """
        async with self._held(name) as entry:
            target = self._rollback.target(entry, to)
            if target is None:
                raise NothingToRollBackTo(name, to)
            if entry.disabled:
                raise PluginDisabled(name)
            left = entry.current
            await self._attempt(entry, self._load_kept(entry, target))
            if left is not None and entry.current is not None:
                self._ledger.note_rolled_back(entry, left, entry.current.number, "by command")

    async def enable(self, name: str) -> None:
        """Load it if it was disabled. Remembered over restarts."""
        await self._override(name, True)

    async def disable(self, name: str) -> None:
        """Drain and unload it; its file is left alone from now on. Remembered over restarts."""
        await self._override(name, False)

    async def _override(self, name: str, enabled: bool) -> None:
        self.entry(name)
        self._overrides[name] = enabled
        await self._remember(self._overrides)
        async with self._held(name) as entry:
            await self._set_enabled(entry, enabled)

    async def _set_enabled(self, entry: Entry, enabled: bool) -> None:
        if entry.disabled == (not enabled):
            return
        entry.disabled = not enabled
        if enabled:
            await self._attempt(entry, self._apply(entry, time.monotonic(), patient=False, force=True))
            return
        entry.problem = entry.waiting_for = None
        entry.pending = False
        if entry.current is not None:
            self._unload(entry)
        self._events.tell("plugin_disabled", plugin=entry.name)

    async def take_overrides(self, overrides: dict[str, bool]) -> None:
        """Enable and disable what a command did in another worker while this one was starting."""
        for name, enabled in overrides.items():
            if self._overrides.get(name) == enabled:
                continue
            self._overrides[name] = enabled
            if name in self._entries:
                with contextlib.suppress(HotdeskError):  # it was put down where it happened
                    async with self._held(name) as entry:
                        await self._set_enabled(entry, enabled)

    def is_enabled(self, name: str) -> bool:
        """What commands and settings say of a plugin, also of one that is not known yet."""
        return self._overrides.get(name, self._settings_of(name).enabled)

    # -- settings --------------------------------------------------------------------------------------------

    async def _take_settings(self, settings: dict[str, PluginSettings]) -> None:
        before, self._settings = self._settings, settings
        blank = PluginSettings()
        for name in [*self._entries]:
            old, new = before.get(name, blank), settings.get(name, blank)
            if old == new:
                continue
            with contextlib.suppress(HotdeskError):  # it was put down where it happened
                if old.enabled != new.enabled and self._overrides.pop(name, None) is not None:
                    await self._remember(self._overrides)
                async with self._held(name) as entry:
                    await self._set_enabled(entry, self.is_enabled(name))
                    if entry.current is not None:
                        await self._attempt(entry, self._take_own_settings(entry, entry.current))
                    if entry.problem is not None:  # the settings may be just what it wanted
                        await self._attempt(entry, self._apply(entry, time.monotonic(), force=True))

    async def _take_own_settings(self, entry: Entry, current: Generation) -> None:
        """Order, deadline and grants: a new snapshot around the same generation. Then the config."""
        self._maker.grant(current, self._settings_of(entry.name))
        if entry.slot is not None:
            slot = entry.slot = self._newest_slot(entry.slot)
            others = [one for one in self._active.current.slots if one.generation is not current]
            self._active.swap(self._active.build([*others, slot]))
        await self._reconfigure(entry, current.bundle)

    def grant_llm(self, names: Iterable[str]) -> None:
        """From now on the plugins called so are granted `llm` by `[llm]`."""
        self._llm_grant = frozenset(names)
        for entry in self._entries.values():
            if entry.current is not None:
                self._maker.grant(entry.current, self._settings_of(entry.name))

    def _settings_of(self, name: str) -> PluginSettings:
        settings = self._settings.get(name, PluginSettings())
        if name in self._llm_grant and "llm" not in settings.grant:
            settings = msgspec.structs.replace(settings, grant=(*settings.grant, "llm"))
        return settings

    def _newest_slot(self, slot: Slot) -> Slot:
        return slot_for(slot.generation, self._settings_of(slot.generation.plugin), slot.breaker)

    async def _reconfigure(self, entry: Entry, bundle: Bundle) -> None:
        """Give a generation its new config: through `configure` where that takes it, by a swap where not."""
        current = entry.current
        if current is None:
            return
        config = merged(bundle.manifest.config, self._settings_of(entry.name).config)
        if config == self._maker.config_of(current):
            current.bundle, current.manifest = bundle, bundle.manifest  # they may differ in what nobody can tell
            return
        if await self._maker.configure(current, config):
            current.bundle, current.manifest = bundle, bundle.manifest
            self._events.tell("plugin_configured", plugin=entry.name, generation=current.number)
        else:
            await self._swapper.load(entry, bundle, time.monotonic(), {"settle_ms": 0.0})
