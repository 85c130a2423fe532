"""The parent of the workers: it holds the folder and the port, and sees to it that every place has a process.

It serves nobody, runs no plugin and knows nothing of the backend. A place has one socket for as long as the desk runs,
which its processes inherit one after the other: what connects while none is there waits, and is served by the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from hotdesk_sdk import HotdeskError

from ..backend.lock import FolderLock
from ..config import Config, read_llm_settings, read_plugin_settings
from ..errors import BackendError, ConfigError
from ..runtime.events import Events
from ..web.access import Keys, keep_admin_token, prepare_keys
from ..web.port import bind_shared_port
from ..web.seat import Joining
from ..web.siblings import DeskState, Roll, WorkerRow
from .child import Child
from .numbers import Numbers
from .orders import Greeting, Line, Orders

__all__ = ["Supervisor", "WorkerFailed", "open_workers"]

READY_S = 120.0
"""How long a worker may take to serve. The first load of a large component is a minute's work."""

SHORT_LIFE_S = 5.0
"""A worker that dies sooner than this after it began to serve is started again after a wait, unless it is the first."""

WAITS_S = (0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0)

LEAVE_S = 15.0
"""How long a worker that was replaced may take beyond three times `stop_timeout_s`; then it is killed."""

START_STOP_S = 10.0
"""How long the others have to end when the start of one of them failed."""

KEPT_BY_RESTART = ("host", "port", "data", "backend", "workers")
"""What workers have in common with each other, or with their supervisor: it can't change in one after the other."""

FLEETING = ("plugin_loaded", "plugin_unloaded", "plugin_receipt")
"""Events that say nothing of the desk where they come from a process that does not serve yet, or no longer."""

MAX_SOCKET_PATH = 100


class WorkerFailed(HotdeskError):
    """A worker that does not come to serve."""

    def __init__(self, worker: int, problem: str) -> None:
        self.worker = worker
        super().__init__(f"worker {worker} does not serve: {problem}; the log says more")


@dataclass(slots=True)
class _Place:
    """One of the desk's places: its socket, and the process that serves it."""

    worker: int
    sock: socket.socket
    config: Config
    current: Child
    restarts: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while a process is being put into this place."""


class Supervisor:
    """The workers of a desk. Opened by `open_workers`."""

    def __init__(self, config: Config, *, read_config: Callable[[], Config], events: Events, ready_s: float) -> None:
        self.config = config
        self._read_config = read_config
        self._events = events
        self._ready_s = ready_s
        self._log_events = True
        self._keys: Keys
        self._folder: Path
        self._places: list[_Place] = []
        self._leaving: list[Child] = []
        self._numbers = Numbers()
        self._roll = Roll()
        self._rolling: asyncio.Task[None] | None = None
        self._keeping: list[asyncio.Task[None]] = []
        self._stopping = False
        self._started = False
        self._last_tables: dict[str, Any] = {}
        self.heard: Callable[[dict[str, Any]], None] = lambda event: None
        """Called with each event of a worker, which has the field `worker`."""

    # -- life ------------------------------------------------------------------------------------------------

    async def _start(self, stack: contextlib.AsyncExitStack) -> None:
        """Take what there is one of, then start all workers at once.

        Raises what the first of them that fails does, when a setting is wrong or none of them serves. Where others do,
        whoever failed is started again, as one that died later is.
        """
        lock = FolderLock(Path(self.config.data))
        lock.acquire()
        stack.callback(lock.release)
        socks = bind_shared_port(self.config, self.config.workers)
        stack.callback(_close_all, socks)
        self._keys = prepare_keys(self.config)
        self._folder = stack.enter_context(_socket_folder(Path(self.config.data)))
        stack.push_async_callback(self._end)
        for worker, sock in enumerate(socks):
            child = self._spawn(worker, sock, self.config, "")
            self._places.append(_Place(worker, sock, self.config, child))
        self._tell_state()
        waiting = [asyncio.create_task(self._first_ready(place)) for place in self._places]
        try:
            problems = [await ready for ready in asyncio.as_completed(waiting)]
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
        for problem in problems:
            if problem is not None and not self.serving:
                raise problem
        keep_admin_token(self.config, self._keys)
        self._started = True
        self._keeping = [asyncio.create_task(self._keep(place)) for place in self._places]

    async def _first_ready(self, place: _Place) -> HotdeskError | None:
        """Wait until it serves; what is wrong where it does not. Raises `ConfigError` for a setting that is wrong."""
        problem = await place.current.wait_ready(self._ready_s)
        if problem is None:
            return None
        kind, text = place.current.failed or ("", "")
        if kind == "config":
            raise _Refused(text)
        return HotdeskError(text) if kind else WorkerFailed(place.worker, problem)

    @property
    def greeting(self) -> Greeting:
        """What the desk says of itself: what its first worker says, and what all of them resumed."""
        greetings = [place.current.greeting for place in self._places if place.current.greeting is not None]
        return msgspec.structs.replace(
            greetings[0],
            resumed=sum(one.resumed for one in greetings),
            admin_token=self._keys.new_admin_token,
            workers=len(self._places),
        )

    @property
    def serving(self) -> int:
        """How many places have a worker that serves."""
        return sum(place.current.state == "ready" for place in self._places)

    @property
    def _children(self) -> Iterable[Child]:
        return [*(place.current for place in self._places), *self._leaving]

    async def stop(self) -> int:
        """Let all workers finish, side by side; how many turns they leave to the next start."""
        self._stopping = True
        for task in (*self._keeping, self._rolling):
            if task is not None:
                task.cancel()
        await asyncio.gather(*self._keeping, *([self._rolling] if self._rolling else []), return_exceptions=True)
        for place in self._places:
            place.sock.close()  # from the moment that the workers close theirs, who comes is refused, and not queued
        children = list(self._children)
        for child in children:
            if child.state == "starting":
                child.kill()
            else:
                child.move("leaving")
                child.send(Line(stop=True))
        for child in children:
            await child.ended.wait()
        return sum(child.left or 0 for child in children)

    def kill(self) -> None:
        """End all workers at once."""
        for child in self._children:
            child.kill()

    async def _end(self) -> None:
        """Whatever happened: no worker outlives its supervisor."""
        if not self._stopping:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(START_STOP_S):
                    await self.stop()
        for child in self._children:
            await child.aclose()

    # -- processes -------------------------------------------------------------------------------------------

    def _spawn(self, worker: int, sock: socket.socket, config: Config, joining: Joining) -> Child:
        name = f"{worker}-{secrets.token_hex(4)}"
        orders = Orders(
            config=config,
            worker=worker,
            name=name,
            listen_fd=sock.fileno(),
            path=str(self._folder / f"worker-{name}.sock"),
            keys=self._keys,
            joining=joining,
            log_events=self._log_events,
            state=self._state(),
            python_path=tuple(sys.path),
            environ_python_path=os.environ.get("PYTHONPATH"),
        )
        return Child(orders, self._heard)

    async def _keep(self, place: _Place) -> None:
        """Have a process in *place*, whatever becomes of it."""
        tries = 0
        while True:
            child = place.current
            await child.ended.wait()
            if place.current is not child:  # it was replaced, and has ended as it should
                tries = 0
                continue
            tries = tries + 1 if child.served_s < SHORT_LIFE_S else 0
            wait_s = WAITS_S[min(max(tries - 1, 0), len(WAITS_S) - 1)]
            self._bury(child)
            self._events.tell(
                "worker_died",
                worker=place.worker,
                pid=child.pid,
                code=child.code,
                message=child.describe_end(),
                again_in_s=wait_s,
            )
            self._tell_state()
            await asyncio.sleep(wait_s)
            async with place.lock:
                if place.current is not child:
                    continue
                place.restarts += 1
                config = self._with_newest_tables(place.config)
                place.current = self._spawn(place.worker, place.sock, config, "died")
                self._tell_state()
                await place.current.wait_ready(self._ready_s)  # if not, the next round sees how it ended

    def _with_newest_tables(self, config: Config) -> Config:
        """The settings with the tables that the other workers have taken from the file meanwhile."""
        if config.file is None or not Path(config.file).exists():
            return config
        with contextlib.suppress(ConfigError):  # the others too go on with what they had
            self._last_tables = {
                "plugin_settings": read_plugin_settings(config.file),
                "llm": read_llm_settings(config.file, config.llm.environ),
            }
        return msgspec.structs.replace(config, **self._last_tables)

    def _bury(self, child: Child) -> None:
        """Tell every other worker that this process is dead, so that nothing of what it held is in use."""
        self._tell_all(Line(buried=child.name), but=child)

    # -- replacing all ---------------------------------------------------------------------------------------

    def restart(self) -> dict[str, Any]:
        """Begin to replace all workers, one by one, unless that is under way."""
        if self._rolling is not None and not self._rolling.done():
            return {"restart": self._roll.number, "status": "under way"}
        self._set_roll(number=self._roll.number + 1, state="running", replaced=0, message="")
        self._rolling = asyncio.create_task(self._replace_all())
        return {"restart": self._roll.number, "status": "begun"}

    async def _replace_all(self) -> None:
        """A failure at any step leaves the workers that are there serving, and ends the restart."""
        try:
            config, stays = self._read_again()
        except (ConfigError, BackendError) as exc:
            self._fail_roll(None, str(exc))
            return
        self._events.tell("restart_begun", workers=len(self._places), **({"stays": stays} if stays else {}))
        for place in self._places:
            async with place.lock:
                fresh = self._spawn(place.worker, place.sock, config, "rolled")
                self._leaving.append(fresh)  # so that it is not forgotten if all of this is cut short
                problem = await fresh.wait_ready(self._ready_s)
                self._leaving.remove(fresh)
                if problem is not None:
                    self._bury(fresh)
                    self._fail_roll(place.worker, problem)
                    return
                old, place.current, place.config = place.current, fresh, config
                old.move("leaving")
                self._leaving.append(old)
                self._set_roll(replaced=self._roll.replaced + 1)
            self._events.tell("worker_replaced", worker=place.worker, pid=fresh.pid, before=old.pid)
            await self._see_off(old)
        self.config, self._last_tables = config, {}
        message = f"unchanged until a stop and start: {', '.join(stays)}" if stays else ""
        self._set_roll(state="done", message=message)
        self._events.tell("restart_done", workers=len(self._places), **({"message": message} if message else {}))

    def _read_again(self) -> tuple[Config, list[str]]:
        """The settings as they are now, and those whose change has to wait for a stop and start."""
        fresh = self._read_config()
        stays = [name for name in KEPT_BY_RESTART if getattr(fresh, name) != getattr(self.config, name)]
        config = msgspec.structs.replace(fresh, **{name: getattr(self.config, name) for name in KEPT_BY_RESTART})
        self._keys = prepare_keys(config, self._keys)
        return config, stays

    def _fail_roll(self, worker: int | None, problem: str) -> None:
        self._set_roll(state="failed", message=problem if worker is None else f"worker {worker}: {problem}")
        self._events.tell("restart_failed", **({} if worker is None else {"worker": worker}), message=problem)

    async def _see_off(self, old: Child) -> None:
        """Let a worker that was replaced finish; kill it when it takes too long."""
        old.send(Line(leave=True))
        try:
            async with asyncio.timeout(3 * self.config.stop_timeout_s + LEAVE_S):
                await old.ended.wait()
        except TimeoutError:
            old.kill()
            await old.ended.wait()
        if old.left is None:
            self._bury(old)
        self._leaving.remove(old)
        self._tell_state()

    # -- what is said ----------------------------------------------------------------------------------------

    def _heard(self, child: Child, line: Line) -> None:
        if line.ready is not None:
            child.passed = {name: last for name, last in self._numbers.last().items() if name not in child.asked}
            if self._started and any(place.current is child for place in self._places):
                self._events.tell("worker_ready", worker=child.worker, pid=child.pid)
            self._tell_state()
        elif line.event is not None:
            self._pass_on(child, line.event)
        elif line.number is not None:
            asked = line.number
            child.asked.add(asked.plugin)
            after = max(asked.after, child.passed.get(asked.plugin, 0))
            number = self._numbers.number(asked.plugin, asked.digest, after, asked.known)
            child.send(Line(id=line.id, answer=number))
        elif line.restart:
            child.send(Line(id=line.id, answer=self.restart()))

    def _pass_on(self, child: Child, event: dict[str, Any]) -> None:
        """An event of a worker, for whoever listens here and in the other workers."""
        if self._started and child.state != "ready" and not self._stopping and event.get("kind") in FLEETING:
            return
        event = {**event, "worker": child.worker}
        self.heard(event)
        self._tell_all(Line(event=event), but=child, must=False)

    def tell_event(self, event: dict[str, Any]) -> None:
        """An event of the supervisor's own, for those who listen in the workers."""
        self._tell_all(Line(event=event), must=False)

    def _tell_all(self, line: Line, *, but: Child | None = None, must: bool = True) -> None:
        for child in self._children:
            if child is not but:
                child.send(line, must=must)

    def _state(self) -> DeskState:
        places = {place.current.name: place.restarts for place in self._places}
        rows = [
            WorkerRow(
                worker=child.worker,
                name=child.name,
                pid=child.pid,
                path=child.path,
                state=child.state,
                since=child.since,
                restarts=places.get(child.name, 0),
            )
            for child in self._children
            if child.name in places or child.state == "leaving"
        ]
        return DeskState(tuple(rows), self._roll)

    def _tell_state(self) -> None:
        self._tell_all(Line(state=self._state()))

    def _set_roll(self, **changes: Any) -> None:
        self._roll = msgspec.structs.replace(self._roll, **changes)
        self._tell_state()


class _Refused(ConfigError):
    """A setting that a worker refused, in its words."""

    def __init__(self, text: str) -> None:
        HotdeskError.__init__(self, text)


@contextlib.asynccontextmanager
async def open_workers(
    config: Config,
    *,
    read_config: Callable[[], Config],
    events: Events,
    heard: Callable[[dict[str, Any]], None],
    log_events: bool = True,
    ready_s: float = READY_S,
) -> AsyncIterator[Supervisor]:
    """Run `config.workers` workers while the context is open; when it opens one serves, and all that can.

    *read_config* gives the settings anew when all are replaced. *events* takes the supervisor's own events, *heard* is
    called with the workers'. Raises `ConfigError` or `HotdeskError` when they can't start. Leaving the context stops
    them as `Supervisor.stop` does.
    """
    supervisor = Supervisor(config, read_config=read_config, events=events, ready_s=ready_s)
    supervisor.heard = heard
    supervisor._log_events = log_events
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(events.listen(supervisor.tell_event))
        await supervisor._start(stack)
        yield supervisor


@contextlib.contextmanager
def _socket_folder(data: Path) -> Iterator[Path]:
    """Where workers have the sockets for each other: `run` in the data folder, which only its user may enter."""
    folder = data / "run"
    if len(str(folder.absolute() / "worker-00-00000000.sock")) > MAX_SOCKET_PATH:  # the kernel takes no longer name
        with tempfile.TemporaryDirectory(prefix="hotdesk-") as short:
            yield Path(short)
        return
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        folder.chmod(0o700)
        for left in folder.glob("*.sock"):
            left.unlink(missing_ok=True)
    except OSError as exc:
        raise BackendError(f"{folder} can't be used: {exc.strerror}; choose another folder with --data") from exc
    yield folder.absolute()


def _close_all(socks: list[socket.socket]) -> None:
    for sock in socks:
        sock.close()
