"""A host's part in one plugin set over many hosts: it takes what is pushed, and reports how its plugins stand.

What is pushed is verified, put on disk, and then a plugin like any other: `reload.Plugins` decides when it is loaded,
and how. While the shelf is away, or empty, the host goes on with what it has: only a removal unloads a plugin.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from ..errors import BackendError, LoadFailed
from ..logs import Logger
from .entries import Entry
from .events import Events
from .guards import host_task
from .pushed_files import PushedFiles
from .reload import Plugins
from .shelf import Record, Shelf, folder_of, hash_of, pack, read_records, unpack
from .sources import Bundle
from .stands import Report, Stand, read_reports

__all__ = ["Pushed"]

LOOK_S = 5.0
"""How often the shelf is looked at without any news, which may have been missed."""

REPORT_S = 0.5
"""How often is looked whether the report still holds: not all that changes is an event."""

GATHER_S = 0.01
"""How long a report waits for what happens at the same time."""

REPORTS_WAIT_S = 1.0
"""How long the admin door waits for what other hosts say."""

LOOKS = 10
"""How often in a row the shelf is read, while it has changed each time."""

_encode = msgspec.json.Encoder(enc_hook=str).encode


@dataclass(frozen=True, slots=True)
class _Refusal:
    """A version that did not come onto the disk."""

    record: Record
    problem: dict[str, Any]
    final: bool
    """It is refused until it is pushed again; else it is tried again at the next look."""


class Pushed:
    """One worker's part. *host* and *worker* say which it is."""

    def __init__(
        self,
        shelf: Shelf,
        files: PushedFiles,
        *,
        plugins: Plugins,
        events: Events,
        log: Logger,
        about: Report,
    ) -> None:
        self._shelf = shelf
        self._files = files
        self._plugins = plugins
        self._events = events
        self._log = log
        self._about = about
        self.records: dict[str, Record] = {}
        """What was on the shelf when it was last looked at."""

        self._taken: dict[str, str] = {}
        """The hash that each plugin had when this worker last had it looked at."""

        self._damaged: set[str] = set()
        self._away = False
        self._dealt_with: dict[str, float] = {}
        """When what this worker has dealt with was pushed, by plugin."""

        self._refused: dict[str, _Refusal] = {}
        self._unreadable: dict[str, str] = {}
        self._hashes: dict[str, tuple[Bundle, str]] = {}
        self._said: Report | None = None
        self._news = asyncio.Event()
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._stop_listening: Callable[[], None] = lambda: None

    # -- life ------------------------------------------------------------------------------------------------

    async def catch_up(self) -> None:
        """Before the first load: have on disk what is on the shelf. What is damaged there is fetched anew, or goes."""
        await asyncio.to_thread(self._files.open)
        self._damaged = await asyncio.to_thread(self._files.find_damaged)
        self._taken = {name: hash for name, (hash, _) in (await asyncio.to_thread(self._files.held)).items()}
        damaged = frozenset(self._damaged)
        await self._look_safely(told=False)
        for name in damaged:
            done = "not loaded, for it can't be fetched anew" if name in self._damaged else "fetched anew"
            self._events.tell("push_refused", plugin=name, message=f"its files were changed on this disk; {done}")
        for name in self._damaged:
            await asyncio.to_thread(self._files.remove, name)
        self._damaged.clear()

    async def start(self) -> None:
        """Follow the shelf from now on, and report."""
        self._stop_listening = self._events.listen(lambda event: self._changed.set())
        await self._report_safely()
        self._shelf.follow(self._hear)
        self._tasks = [host_task(self._follow(), "hotdesk-shelf"), host_task(self._keep_reporting(), "hotdesk-report")]

    async def aclose(self) -> None:
        self._stop_listening()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with contextlib.suppress(BackendError, TimeoutError):
            async with asyncio.timeout(REPORTS_WAIT_S):
                await self._shelf.retire()

    async def reports(self) -> list[Report]:
        """What every worker of every host says; none where the shelf can't be asked just now."""
        try:
            async with asyncio.timeout(REPORTS_WAIT_S):
                return read_reports(await self._shelf.reports())
        except (BackendError, TimeoutError):
            return []

    # -- taking ----------------------------------------------------------------------------------------------

    def _hear(self, name: str) -> None:
        self._refused.pop(name, None)
        self._news.set()

    async def _follow(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._news.wait()
            self._news.clear()
            await self._look_safely()

    async def _look_safely(self, *, told: bool = True) -> None:
        try:
            await self._look(told)
            self._away = False
        except BackendError as exc:
            if not self._away:
                remedy = "what is here goes on; it is tried again"
                self._log.warning("shelf_unreachable", problem=str(exc), remedy=remedy)
            self._away = True
        except Exception as exc:  # the fault wall of one look: also our own fault must not end all following
            self._log.error("shelf_look_failed", problem=repr(exc), exc_info=exc)

    async def _look(self, told: bool) -> None:
        """Bring the disk to what the shelf says; again, until it says nothing new: another worker may be behind."""
        tried: list[Record] = []
        for _ in range(LOOKS):
            raws, reported = await self._shelf.read()
            if not reported:
                self._said = None
            self.records, unreadable = read_records(raws)
            self._note_unreadable(unreadable)
            held = await asyncio.to_thread(self._files.held)
            due = [record for record in self.records.values() if self._is_due(record, held) and record not in tried]
            for record in due:
                await self._take(record, told)
            tried += due
            self._dealt_with = {record.name: record.at for record in self.records.values()}
            self._refused = {
                name: refusal for name, refusal in self._refused.items() if self.records.get(name) == refusal.record
            }
            if not due:
                break
        self._changed.set()
        await asyncio.to_thread(self._files.sweep)

    def _is_due(self, record: Record, held: Mapping[str, tuple[str, float]]) -> bool:
        name = record.name
        if record.removed:
            return name in held or name in self._taken
        refusal = self._refused.get(name)
        if refusal is not None and refusal.final and refusal.record == record:
            return False
        if name not in held or name in self._damaged:
            return True
        return held[name][0] != record.hash or self._taken.get(name) != record.hash

    async def _take(self, record: Record, told: bool) -> None:
        name = record.name
        try:
            if record.removed:
                await asyncio.to_thread(self._files.remove, name)
            else:
                await self._fetch(record)
        except LoadFailed as exc:
            self._refuse(record, exc, final=True)
            return
        except OSError as exc:
            problem = f"it can't be put on this disk: {exc.strerror or exc}"
            self._refuse(record, LoadFailed(name, "write", problem, file=exc.filename), final=False)
            return
        self._refused.pop(name, None)
        if record.removed:
            self._taken.pop(name, None)
            self._events.tell("push_removed", plugin=name, by=record.by)
        else:
            self._taken[name] = record.hash
            self._events.tell("push_taken", plugin=name, hash=record.hash[:12], version=record.version, by=record.by)
        if told:
            self._plugins.look(name)

    async def _fetch(self, record: Record) -> None:
        """Have the version on disk. Raises `LoadFailed` when its bytes are not what its record says."""
        name, hash = record.name, record.hash
        files = None
        if not await asyncio.to_thread(self._files.is_whole, hash):
            data = await self._shelf.fetch(name, hash, record.size)
            if data is None:
                raise LoadFailed(name, "verify", "its bytes are not on the shelf; push it again")
            files = await asyncio.to_thread(unpack, name, data, hash)
        await asyncio.to_thread(self._files.place, name, hash, files)
        self._damaged.discard(name)

    def _refuse(self, record: Record, exc: LoadFailed, *, final: bool) -> None:
        before = self._refused.get(record.name)
        if before is not None and before.record == record:
            return
        problem = {"message": str(exc), "step": exc.step, "file": exc.file, "line": None, "at": time.time()}
        self._refused[record.name] = _Refusal(record, problem, final)
        self._tell_refused(exc, by=record.by)

    def _note_unreadable(self, refused: Iterable[LoadFailed]) -> None:
        unreadable = {exc.plugin: str(exc) for exc in refused}
        for exc in refused:
            if self._unreadable.get(exc.plugin) != str(exc):
                self._tell_refused(exc, by="")
        self._unreadable = unreadable

    def _tell_refused(self, exc: LoadFailed, *, by: str) -> None:
        self._events.tell("push_refused", plugin=exc.plugin, message=str(exc), by=by)

    # -- reporting -------------------------------------------------------------------------------------------

    async def _keep_reporting(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REPORT_S):
                    await self._changed.wait()
            await asyncio.sleep(GATHER_S)
            self._changed.clear()
            await self._report_safely()

    async def _report_safely(self) -> None:
        try:
            report = await self._make_report()
            if report != self._said:
                await self._shelf.report(_encode(report))
                self._said = report
        except BackendError:
            self._said = None  # whether it arrived or not: it is said again
        except Exception as exc:  # the fault wall of one report: the next one may go well
            self._log.error("report_failed", problem=repr(exc), exc_info=exc)

    async def _make_report(self) -> Report:
        held = await asyncio.to_thread(self._files.held)
        plugins = {entry.name: await self._stand_of(entry, held) for entry in [*self._plugins.entries]}
        for name, (hash, since) in held.items():
            enabled, pushed_at = self._plugins.is_enabled(name), self._dealt_with.get(name, 0.0)
            plugins.setdefault(name, Stand(newest=hash, since=since, pushed_at=pushed_at, enabled=enabled))
        for name, refusal in self._refused.items():
            before = plugins.get(name, Stand(pushed_at=refusal.record.at))
            plugins[name] = msgspec.structs.replace(before, error=refusal.problem)
        for name in self._hashes.keys() - plugins.keys():
            del self._hashes[name]
        return msgspec.structs.replace(self._about, watch=self._plugins.mode, plugins=plugins)

    async def _stand_of(self, entry: Entry, held: Mapping[str, tuple[str, float]]) -> Stand:
        current = entry.current
        newest, since = held.get(entry.name, ("", 0.0))
        own = entry.source is not None and entry.source.path.parent != self._files.plugins
        return Stand(
            state=entry.state().value,
            generation=current.number if current else None,
            version=current.manifest.version if current else None,
            hash=await self._hash(entry.name, current.bundle) if current else "",
            source=str(entry.source.path) if entry.source else None,
            own=own,
            newest=newest,
            since=since,
            pushed_at=self._dealt_with.get(entry.name, 0.0),
            enabled=not entry.disabled,
            pending=entry.pending,
            refused=entry.refused is not None,
            waiting_for=entry.waiting_for if current is None else None,
            error=entry.problem.public() if entry.problem else None,
            receipt=entry.receipt.public() if entry.receipt else None,
        )

    async def _hash(self, name: str, bundle: Bundle) -> str:
        known = self._hashes.get(name)
        if known is None or known[0] is not bundle:
            known = self._hashes[name] = bundle, await asyncio.to_thread(_hash_of, bundle)
        return known[1]


def _hash_of(bundle: Bundle) -> str:
    """The hash that *bundle* would be pushed with; empty for what nobody can push."""
    try:
        return hash_of(pack(bundle.source.name, folder_of(bundle.source, bundle.files)))
    except LoadFailed:
        return ""
