"""Messages that the journal does not take now: kept on this machine's disk, and put into the journal once it does.

Owns the order: of one conversation at most one message is on its way to the journal, and whatever comes goes behind
those that wait. A message leaves the disk only after the journal has it. Sent again it is the same message, by its id,
so a kill at any moment loses none and doubles none.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec

from hotdesk_sdk import Message

from ..backend import Appended, Backend
from ..backend.sqlite_spool import SpoolFile, SpoolTaken, find_spools
from ..errors import BackendError, BackendUnavailable
from ..logs import Logger
from ..metrics import Metrics
from ..runtime.guards import host_task
from .spool_lanes import Kept, Lane, New, Spooled, Told

__all__ = ["Spool", "Spooled"]

AT_ONCE = 256
"""Conversations of which a message is put into the journal side by side."""

IN_A_ROW = 32
"""How many of one conversation go one after the other, before it is another's turn; they are read together."""

AGAIN_S = 0.1
"""A journal that takes nothing is tried again so soon, with one message."""

ROOM_S = 0.02
"""How soon it is looked again whether there is room for more turns."""

HOLD_S = 1.0
"""How long a message waits for those of its conversation that are being drained, before it goes onto the disk too.
Were it not for that, visitors who never pause would fill the spool as fast as it is emptied."""

REFUSED_S = 5.0
"""A message that the journal refused for a reason of its own keeps its conversation waiting for so long."""

LOOK_S = 2.0
"""How often spools are looked for whose workers are gone."""


class Spool:
    """The spool of this worker, and those that dead workers left.

    *taking* False takes nothing that the journal does not: what was left there before is put into the journal.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        *,
        taking: bool,
        max_bytes: int,
        backend: Backend,
        metrics: Metrics,
        log: Logger,
    ) -> None:
        self._folder = folder
        self._path = folder / f"{name}.db"
        self._taking = taking
        self._max_bytes = max_bytes
        self._backend = backend
        self._metrics = metrics
        self._log = log
        self._loop = asyncio.get_running_loop()
        self._own: SpoolFile | None = None
        self._left: list[SpoolFile] = []
        """Spools of others that this worker has taken on."""

        self._lanes: dict[str, Lane] = {}
        self._ids: dict[tuple[str, str], Kept] = {}
        self._ready: deque[Lane] = deque()
        self._some = asyncio.Event()
        self._look_now = asyncio.Event()
        self._stopping = False
        self._away = False
        self._announced = False
        self._unreadable: set[Path] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._sending: set[asyncio.Task[None]] = set()
        self._problem: str | None = None
        self.begin: Callable[[Message, Appended, str], object] = lambda message, appended, door: None
        """Called with a message that is in the journal now and that nobody waits for, and the door it came by."""

        self.count_room: Callable[[], int] = lambda: AT_ONCE
        """How many turns may be begun now."""

    @classmethod
    def is_left(cls, folder: Path) -> bool:
        """Whether there is a spool of an earlier start, or of another worker."""
        return bool(find_spools(folder))

    @property
    def count(self) -> int:
        """How many messages are in it."""
        return len(self._ids)

    @property
    def problem(self) -> str | None:
        """Why it would take no message now."""
        if not self._taking:
            return "the setting spool is false"
        if self._own is not None and self._own.bytes >= self._max_bytes:
            return self._full()
        return self._problem

    async def open(self) -> None:
        """Take on what is there, and begin to put it into the journal. Raises `BackendError`."""
        if self._taking:
            self._own = await SpoolFile.open(self._path, new=True)
            self._index(self._own)
        await self._take_on_others()
        self._tasks = [host_task(self._drain()), host_task(self._keep_looking())]

    def look(self) -> None:
        """A worker has ended: its spool may be there to be taken on."""
        self._look_now.set()

    def stop(self) -> None:
        """From now on nothing more of it is put into the journal: it waits for the next start, or another worker."""
        self._stopping = True
        self._some.set()
        self._look_now.set()
        self._keep_all_waiting()

    async def aclose(self, timeout_s: float) -> None:
        """Let what is under way end within *timeout_s*, and close the files."""
        self.stop()
        tasks = [*self._tasks, *self._sending]
        if tasks:
            await asyncio.wait(tasks, timeout=timeout_s)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._taking = False
        for file in (self._own, *self._left):
            if file is not None:
                await file.aclose()

    # -- what comes in ---------------------------------------------------------------------------------------

    def take(
        self,
        message: Message,
        *,
        channel: str,
        locale: str | None,
        door: str,
        told: Told,
        spooled: Callable[[Spooled], bool],
    ) -> None:
        """Put *message* into the journal, behind those of its conversation that are not in it yet.

        *told* is called with the outcome. Where that is far off, *spooled* is called first, once the message is on
        disk, and says whether *told* is still to be called.
        """
        new = New(message, channel, locale, door, told, spooled)
        lane = self._lanes.get(message.conversation)
        if lane is None:
            lane = self._lanes[message.conversation] = Lane(message.conversation)
            self._append(lane, new)
        elif lane.kept and self._away:
            self._keep(lane, new)
        else:
            lane.waiting.append(new)
            if lane.kept and lane.holding is None:
                lane.holding = self._loop.call_later(HOLD_S, self._keep_waiting, lane)

    def _append(self, lane: Lane, new: New) -> None:
        lane.busy = True
        appending = self._backend.append(
            new.message, channel=new.channel, locale=new.locale, given=True, chunks=new.door == "sse"
        )
        appending.add_done_callback(partial(self._appended, lane, new))

    def _appended(self, lane: Lane, new: New, appending: asyncio.Future[Appended]) -> None:
        lane.busy = False
        if appending.cancelled():
            outcome: Appended | BaseException = BackendUnavailable("the journal", "the host is stopping")
        else:
            outcome = appending.exception() or appending.result()
        try:
            if isinstance(outcome, BackendUnavailable) and self._taking:
                self._note_away(outcome)
                self._keep(lane, new)
                self._keep_waiting(lane)
            else:
                new.told(outcome)
        finally:
            self._go_on(lane)

    def _note_away(self, why: BackendUnavailable) -> None:
        if not self._announced and self._taking:
            self._announced = True
            self._log.warning("spooling", problem=str(why), folder=str(self._folder))
        if not self._away:
            self._away = True
            self._keep_all_waiting()

    # -- to the disk -----------------------------------------------------------------------------------------

    def _keep_waiting(self, lane: Lane) -> None:
        """Those that wait behind others on the disk go there too."""
        if lane.holding is not None:
            lane.holding.cancel()
            lane.holding = None
        while lane.kept and lane.waiting:
            self._keep(lane, lane.waiting.popleft())

    def _keep_all_waiting(self) -> None:
        for lane in [lane for lane in self._lanes.values() if lane.waiting]:
            self._keep_waiting(lane)

    def _keep(self, lane: Lane, new: New) -> None:
        key = lane.conversation, new.message.id
        kept = self._ids.get(key)
        if kept is not None:
            self._metrics.duplicates.inc()
            kept.coming.append(new)
            if kept.on_disk:
                self._loop.call_soon(self._tell_spooled, kept)
            return
        file = self._own
        if file is None or file.bytes >= self._max_bytes:
            reason = "the journal is away" if file is None else self._full()
            self._loop.call_soon(new.told, BackendUnavailable("the spool", reason))
            return
        try:
            row, putting = file.put(new.message, channel=new.channel, locale=new.locale, door=new.door)
        except Exception as exc:  # what is no JSON: the journal would have said the same
            self._loop.call_soon(new.told, exc)
            return
        kept = self._ids[key] = Kept(file, row, on_disk=False)
        kept.coming.append(new)
        lane.kept.append(kept)
        putting.add_done_callback(partial(self._put, lane, kept))

    def _full(self) -> str:
        return f"the journal is away and the spool is full ({self._max_bytes // 2**20} MiB; the setting is spool_mb)"

    def _put(self, lane: Lane, kept: Kept, putting: asyncio.Future[None]) -> None:
        exc = putting.exception()
        if exc is None:
            self._problem = None
            kept.on_disk = True
            self._metrics.spooled.inc()
            self._loop.call_soon(self._tell_spooled, kept)
        else:
            self._problem = exc.reason if isinstance(exc, BackendUnavailable) else str(exc)
            self._log.error("not_spooled", conversation=lane.conversation, message=kept.row.id, problem=str(exc))
            lane.kept.remove(kept)
            del self._ids[lane.conversation, kept.row.id]
            for new in kept.coming:
                self._loop.call_soon(new.told, exc)
        self._go_on(lane)

    def _tell_spooled(self, kept: Kept) -> None:
        coming, kept.coming = kept.coming, []
        for new in coming:
            if new.spooled(Spooled(kept.row.id, kept.row.conversation)):
                kept.told.append(new.told)

    # -- from the disk to the journal ------------------------------------------------------------------------

    def _go_on(self, lane: Lane) -> None:
        """Have the next of *lane* put into the journal, or be done with it."""
        if lane.busy or lane.queued:
            return
        if not lane.kept:
            if lane.waiting:
                self._append(lane, lane.waiting.popleft())
            else:
                self._lanes.pop(lane.conversation, None)
            if self._announced and not self._ids:
                self._announced = False
                self._log.info("spool_emptied")
        elif lane.kept[0].on_disk:
            lane.queued = True
            self._ready.append(lane)
            self._some.set()

    async def _drain(self) -> None:
        while not self._stopping:
            self._some.clear()
            room = min(1 if self._away else AT_ONCE, self.count_room()) - len(self._sending)
            if not self._ready:
                await self._some.wait()
            elif room <= 0:
                await _wait_at_most(self._some, ROOM_S)
            else:
                lane = self._ready.popleft()
                lane.queued, lane.busy = False, True
                sending = host_task(self._send_some(lane))
                self._sending.add(sending)
                sending.add_done_callback(self._sent_some)
                if self._away:
                    await asyncio.wait([sending])
                    if self._away:
                        await asyncio.sleep(AGAIN_S)

    def _sent_some(self, sending: asyncio.Task[None]) -> None:
        self._sending.discard(sending)
        self._some.set()

    async def _send_some(self, lane: Lane) -> None:
        """Put messages of *lane* into the journal, one after the other, while it takes them."""
        try:
            for _ in range(IN_A_ROW):
                await self._send_head(lane)
                if self._stopping or not lane.kept or not lane.kept[0].on_disk or self.count_room() <= 0:
                    break
        except BackendUnavailable as exc:
            self._note_away(exc)
        except Exception as exc:  # of one message: it was promised, so it is tried again, and other lanes go on
            row = lane.kept[0].row
            self._log.error("spooled_not_taken", conversation=row.conversation, message=row.id, problem=str(exc))
            self._loop.call_later(REFUSED_S, self._release, lane)
            return
        self._release(lane)

    async def _send_head(self, lane: Lane) -> None:
        kept = lane.kept[0]
        row = kept.row
        if kept.message is None:
            await self._read_some(lane)
        message = kept.message
        assert message is not None
        appended = await self._backend.append(
            message, channel=row.channel, locale=row.locale, given=True, chunks=row.door == "sse"
        )
        self._away = False
        lane.kept.popleft()
        if self._ids.get((row.conversation, row.id)) is kept:
            del self._ids[row.conversation, row.id]
        self._delete(kept)
        self._tell_appended(kept, message, appended)

    async def _read_some(self, lane: Lane) -> None:
        """Read the first message of *lane*, and some of those behind it."""
        file = lane.kept[0].file
        some = [kept for kept in itertools.islice(lane.kept, IN_A_ROW) if kept.file is file and kept.on_disk]
        messages = await file.read([kept.row for kept in some])
        for kept, message in zip(some, messages, strict=True):
            kept.message = message

    def _release(self, lane: Lane) -> None:
        lane.busy = False
        self._go_on(lane)

    def _tell_appended(self, kept: Kept, message: Message, appended: Appended) -> None:
        """Begin the turn, and tell who waits: the first of them as it is, the others as those who sent it again."""
        waiting: list[Told | None] = [*kept.told, *(new.told for new in kept.coming)]
        kept.coming = []
        for told in waiting or [None]:
            try:
                if told is None:
                    self.begin(message, appended, kept.row.door)
                else:
                    told(appended)
            except Exception as exc:  # as in the outbox: a door's fault is not the message's
                self._log.error("watcher_failed", conversation=message.conversation, exc_info=exc)
            appended = msgspec.structs.replace(appended, duplicate=True, open=True)

    def _delete(self, kept: Kept) -> None:
        """Forget it on disk; until that is done it would only be sent once more, and known by its id."""
        kept.file.delete(kept.row).add_done_callback(partial(self._deleted, kept))

    def _deleted(self, kept: Kept, deleting: asyncio.Future[None]) -> None:
        if deleting.exception() is not None:
            if not self._stopping:
                self._loop.call_later(REFUSED_S, self._delete, kept)
        elif not kept.file.rows and kept.file in self._left:
            self._look_now.set()

    # -- spools of workers that are gone ---------------------------------------------------------------------

    async def _keep_looking(self) -> None:
        while not self._stopping:
            await _wait_at_most(self._look_now, LOOK_S)
            self._look_now.clear()
            for file in [file for file in self._left if not file.rows]:
                self._left.remove(file)
                await file.aclose()
            if not self._stopping:
                await self._take_on_others()

    async def _take_on_others(self) -> None:
        held = {file.path for file in (self._own, *self._left) if file is not None}
        for path in find_spools(self._folder):
            if path in held or path in self._unreadable:
                continue
            try:
                file = await SpoolFile.open(path, new=False)
            except SpoolTaken:
                continue
            except BackendError as exc:
                self._unreadable.add(path)
                self._log.error("spool_unreadable", spool=str(path), problem=str(exc))
                continue
            self._left.append(file)
            if file.found:
                self._log.info("spool_taken_on", spool=str(path), messages=len(file.found))
            self._index(file)

    def _index(self, file: SpoolFile) -> None:
        """Have what was found in *file* put into the journal, before what came here later."""
        found: dict[str, list[Kept]] = {}
        for row in file.found:
            kept = Kept(file, row, on_disk=True)
            self._ids.setdefault((row.conversation, row.id), kept)
            found.setdefault(row.conversation, []).append(kept)
        file.found = ()
        for conversation, first in found.items():
            lane = self._lanes.setdefault(conversation, Lane(conversation))
            if lane.busy:
                lane.kept.extend(first)
            else:
                lane.kept.extendleft(reversed(first))
            self._go_on(lane)
        if not file.rows:
            self._look_now.set()


async def _wait_at_most(event: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        pass
