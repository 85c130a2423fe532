"""Commands on their way to one Redis server: those of one loop tick travel together, one batch at a time.

A single command through redis-py costs some 77 µs of CPU, one of a batch of twenty 9 µs. So a lane sends what was
asked for while the batch before was under way: the busier it is, the larger its batches, as with a group commit.
The library's `Connection` makes the connections, with their authentication and TLS, and reads the answers. What is sent
is laid out by hiredis, in C: redis-py's own packing of a turn's two commands took a sixth of the turn's CPU.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import hashlib
import time
from collections.abc import Awaitable, Callable, Coroutine
from enum import Enum
from pathlib import Path
from typing import Any

import hiredis
from redis.asyncio.connection import Connection, SSLConnection
from redis.exceptions import (
    AskError,
    AuthenticationError,
    BusyLoadingError,
    ClusterDownError,
    MovedError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)

from ..errors import BackendError, BackendUnavailable
from .redis_url import RedisUrl

__all__ = ["CONNECT_S", "MISPLACED", "Command", "Lane", "Scripts", "Way", "connect", "explain", "own_task"]

LOADS = 3
"""How often scripts are loaded for one command before it fails."""

BATCH = 512
"""How many commands travel together at the most."""

CONNECT_S = 1.0
"""How long a connection with its handshake may take."""

ANSWER_S = 3.0
"""How long a batch may take; then its outcome is unknown, and the connection is given up."""

AGAIN_S = 0.15
"""After a connection could not be made, commands fail at once for so long; then the next one tries again."""

PATIENCE_S = 0.05
"""How long it waits for that try, which takes `CONNECT_S` with a server that is frozen."""

CONFIRM_MS = 1000
"""How long replicas have to confirm a batch."""

MISPLACED = (MovedError, AskError, TryAgainError, ClusterDownError)
"""Answers of a Cluster's server that say: not here, or not now. Nothing was done."""


def own_task(coro: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """A task of the backend's, on nobody's account even when a plugin's call led to it."""
    return asyncio.get_running_loop().create_task(coro, context=contextvars.Context())


class Way(Enum):
    """Which of the connections to a server a command takes. Each keeps its order, and waits for none of the others."""

    TURNS = "turns"
    """What turns wait for."""

    ASIDE = "aside"
    """What no turn waits for: its answers may be long."""

    LEASE = "lease"
    """That this worker is alive, whatever else is under way."""


class Scripts:
    """The Lua files of this room, by name, and the hashes that Redis knows them by."""

    def __init__(self) -> None:
        self.sources = {path.stem: path.read_bytes() for path in sorted((Path(__file__).parent / "lua").glob("*.lua"))}
        self.hashes = {name: hashlib.sha1(source).hexdigest() for name, source in self.sources.items()}

    def pack(self, name: str, keys: tuple[str | bytes, ...], args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The command that runs a script."""
        return ("EVALSHA", self.hashes[name], len(keys), *keys, *args)


async def connect(url: RedisUrl, host: str, port: int, *, scripts: Scripts | None, protocol: int = 2) -> Connection:
    """Connect and log in; *scripts* are loaded, for a server that was restarted or promoted knows none.

    Raises what the library raises, and `TimeoutError`.
    """
    options: dict[str, Any] = {
        "host": host,
        "port": port,
        "db": url.database,
        "username": url.user,
        "password": url.password,
        "socket_timeout": None,
        "socket_connect_timeout": CONNECT_S,
        "socket_keepalive": True,
        "protocol": protocol,
        "driver_info": None,
    }
    connection: Connection
    if url.tls:
        connection = SSLConnection(ssl_cert_reqs="required", ssl_ca_certs=url.ca, ssl_check_hostname=True, **options)
    else:
        connection = Connection(**options)
    try:
        async with asyncio.timeout(CONNECT_S):
            await connection.connect()  # type: ignore[no-untyped-call]
            if scripts is not None:
                load = [("SCRIPT", "LOAD", source) for source in scripts.sources.values()]
                await connection.send_packed_command(connection.pack_commands(load), check_health=False)
                for _ in load:
                    await connection.read_response()
    except BaseException:
        await _drop(connection)
        raise
    return connection


async def _drop(connection: Connection) -> None:
    with contextlib.suppress(Exception):
        await connection.disconnect(nowait=True)


def explain(exc: BaseException) -> str:
    """A failure in words that say what to do."""
    text = str(exc).rstrip(".") or type(exc).__name__
    if "connecting to" in text:
        return f"{text}; is a Redis running there? The URL has its host and port"
    if isinstance(exc, AuthenticationError | NoPermissionError):
        return f"{text}: mend the user and password in the URL, or what that user may do"
    if isinstance(exc, OutOfMemoryError) or "maxmemory" in text:
        return f"{text}: Redis has no memory left; raise maxmemory (nothing of the message was kept)"
    if "MISCONF" in text:
        return f"{text}: Redis can't write its file; look at its log and its disk"
    if isinstance(exc, TimeoutError):
        return "Redis did not answer in time"
    return text


class Command:
    """One command, and who waits for its answer. *slot* is its keys' (a Cluster's), -1 where it has none."""

    __slots__ = ("alone", "args", "asking", "future", "slot", "tries", "until", "writes")

    def __init__(self, args: tuple[Any, ...], future: asyncio.Future[Any], slot: int, writes: bool) -> None:
        self.args = args
        self.future = future
        self.slot = slot
        self.writes = writes
        self.tries = 0
        self.until = 0.0
        """When it is given up, once it was refused."""

        self.alone = False
        """Its refusal goes to who waits for the answer, and to nobody else."""

        self.asking = False
        """It is sent to the server that its slot is being moved to."""

    def fail(self, exc: BaseException) -> None:
        """Tell whoever waits for the answer; where one of several has failed already nobody waits for the others."""
        if not self.future.done():
            self.future.set_exception(exc)
            self.future.exception()  # so that nothing is logged of that


class Lane:
    """One connection to one server, made when it is needed and made again when it broke.

    `send` never waits. What is asked for while a batch is under way goes into the next, in order. A command whose
    answer did not come fails with `BackendUnavailable`: it may have been carried out.

    For a server of a Cluster, commands that it refuses are handed to *misplaced* in their order, before anything else
    is sent. With *together* the commands of one slot in a batch are carried out all or none: else one whose keys are
    being moved would be refused, and a later one overtake it.
    """

    def __init__(
        self,
        open: Callable[[], Awaitable[Connection]],
        *,
        name: str,
        scripts: Scripts,
        replicas: int = 0,
        on_batch: Callable[[int, float], None] | None = None,
        misplaced: Callable[[list[tuple[Command, Exception]]], None] | None = None,
        together: bool = False,
    ) -> None:
        self._open = open
        self._name = name
        self._scripts = scripts
        self._replicas = replicas
        self._on_batch = on_batch
        self._misplaced = misplaced
        self._together = together
        self._loop = asyncio.get_running_loop()
        self.queue: list[Command] = []
        self.flying: list[Command] = []
        """The batch that is under way."""

        self._began = 0.0
        self._landed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._connection: Connection | None = None
        self._down: str | None = None
        self._down_until = 0.0
        self._trying: asyncio.Task[None] | None = None
        self._tried_at = 0.0
        self._closed = False
        self._ending = "the host is stopping"

    @property
    def down(self) -> str | None:
        """Why the server can't be reached, while it can't."""
        return self._down

    @property
    def waiting_s(self) -> float:
        """How long the batch that is under way has been so."""
        return time.monotonic() - self._began if self.flying else 0.0

    async def wait_landed(self, timeout_s: float) -> bool:
        """Wait until the batch that is under way is answered; False when it is not by then."""
        if not self.flying:
            return True
        try:
            async with asyncio.timeout(timeout_s):
                await self._landed.wait()
        except TimeoutError:
            return False
        return True

    def send(self, command: Command) -> None:
        if self._closed:
            self._fail([command], BackendUnavailable(self._name, self._ending))
            return
        self.queue.append(command)
        if self._task is None:
            self._task = own_task(self._run())

    def take(self, moved: Callable[[Command], bool]) -> list[Command]:
        """Take out of the queue what is to go elsewhere."""
        taken = [command for command in self.queue if moved(command)]
        if taken:
            self.queue = [command for command in self.queue if not moved(command)]
        return taken

    async def _run(self) -> None:
        try:
            while self.queue:
                self.flying, self.queue = self.queue[:BATCH], self.queue[BATCH:]
                self._began = time.monotonic()
                self._landed.clear()
                try:
                    await self._exchange(self.flying)
                finally:
                    self.flying = []
                    self._landed.set()
        finally:
            self._task = None
            if self.queue:  # cancelled by the close
                self._fail(self.queue, BackendUnavailable(self._name, self._ending))
                self.queue = []

    async def _connected(self) -> Connection:
        if self._connection is not None and self._connection.is_connected:
            return self._connection
        self._connection = None
        now = time.monotonic()
        if self._trying is None and (self._down is None or now >= self._down_until):
            self._trying = own_task(self._try())
            self._tried_at = now
        if self._trying is not None:
            patience_s = None if self._down is None else max(0.0, self._tried_at + PATIENCE_S - now)
            await asyncio.wait([self._trying], timeout=patience_s)
        if self._connection is None:
            raise BackendUnavailable(self._name, self._down or "there is no connection")
        return self._connection

    async def _try(self) -> None:
        """Make a connection, also when nobody waits for it any more."""
        try:
            self._connection = await self._open()
            self._down = None
        except (RedisError, OSError, TimeoutError) as exc:
            self._down = explain(exc)
            self._down_until = time.monotonic() + AGAIN_S
        finally:
            self._trying = None

    async def _exchange(self, batch: list[Command]) -> None:
        started = time.perf_counter()
        results: list[Any] = []
        confirmed = self._replicas
        groups = [[command] for command in batch] if not self._together else _by_slot(batch)
        batch = [command for group in groups for command in group]
        sent = False
        try:
            connection = await self._connected()
            commands = _lay_out(groups)
            confirm = self._replicas and any(command.writes for command in batch)
            if confirm:
                commands.append(("WAIT", self._replicas, CONFIRM_MS))
            try:
                packed = list(map(hiredis.pack_command, commands))
            except (UnicodeError, TypeError):
                await self._exchange(self._sift(batch))
                return
            sent = True
            async with asyncio.timeout(ANSWER_S):
                await connection.send_packed_command(packed, check_health=False)
                for group in groups:
                    await _read_group(connection, group, results)
                if confirm:
                    confirmed = await connection.read_response()
        except BackendUnavailable as exc:
            self._fail(batch, exc)
            return
        except (RedisError, OSError, TimeoutError) as exc:
            await self.drop()
            again = self._settle(batch[: len(results)], results, confirmed if not self._replicas else 0)
            self._fail(again, BackendUnavailable(self._name, explain(exc)))
            self._fail(batch[len(results) :], BackendUnavailable(self._name, explain(exc), unsure=True))
            return
        except asyncio.CancelledError:
            self._fail(batch, BackendUnavailable(self._name, self._ending, unsure=sent))
            raise
        if self._on_batch is not None:
            self._on_batch(len(batch), time.perf_counter() - started)
        self.flying = []
        again = self._settle(batch, results, confirmed)
        if again:
            await self._load_scripts(again)

    def _sift(self, batch: list[Command]) -> list[Command]:
        """What of *batch* can be sent; the rest fails by itself: text that UTF-8 can't say, or no text at all."""
        sound = []
        for command in batch:
            try:
                hiredis.pack_command(command.args)
                sound.append(command)
            except (UnicodeError, TypeError) as exc:
                self._fail([command], exc)
        return sound

    def _settle(self, batch: list[Command], results: list[Any], confirmed: int) -> list[Command]:
        """Tell everyone their answer; what has to be sent again comes back."""
        again: list[Command] = []
        elsewhere: list[tuple[Command, Exception]] = []
        for command, result in zip(batch, results, strict=True):
            if isinstance(result, Exception):
                if isinstance(result, NoScriptError) and command.tries < LOADS:
                    again.append(command)
                    continue
                if self._misplaced is not None and isinstance(result, MISPLACED):
                    if not command.alone:
                        elsewhere.append((command, result))
                    else:
                        command.fail(result)
                    continue
                if isinstance(result, ReadOnlyError):  # a master that is one no longer: look for the new one
                    own_task(self.drop())
                self._fail([command], self._failure(result))
            elif command.writes and confirmed < self._replicas:
                reached = f"the write reached {confirmed} of the {self._replicas} replicas that were asked for"
                self._fail([command], BackendUnavailable(self._name, reached, unsure=True))
            elif not command.future.done():
                command.future.set_result(result)
        if elsewhere and self._misplaced is not None:
            self._misplaced(elsewhere)
        return again

    def _failure(self, exc: Exception) -> Exception:
        text = str(exc)
        away = (ReadOnlyError, BusyLoadingError, NoScriptError, OutOfMemoryError, NoPermissionError, *MISPLACED)
        if isinstance(exc, away) or text.startswith(("MISCONF", "NOREPLICAS", "LOADING", "OOM", "UNBLOCKED", "BUSY")):
            return BackendUnavailable(self._name, explain(exc))
        return BackendError(f"backend {self._name}: {text}")

    async def _load_scripts(self, again: list[Command]) -> None:
        """Somebody emptied the server's scripts: load them, and send once more what did not run, before the rest."""
        for command in again:
            command.tries += 1
        await self.drop()  # a new connection loads them
        self.queue = again + self.queue

    def _fail(self, commands: list[Command], exc: Exception) -> None:
        for command in commands:
            command.fail(exc)

    async def drop(self) -> None:
        """Give the connection up; the next command makes another."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await _drop(connection)

    async def aclose(self, reason: str = "the host is stopping", *, wait_s: float = ANSWER_S) -> None:
        """Finish what was asked for, and close; what is not answered in time fails with *reason*."""
        self._closed = True
        self._ending = reason
        if self._task is not None:
            await asyncio.wait([self._task], timeout=wait_s)
            if self._task is not None:
                self._task.cancel()
                await asyncio.wait([self._task])
        if self._trying is not None:
            self._trying.cancel()
            await asyncio.wait([self._trying])
        await self.drop()


def _by_slot(batch: list[Command]) -> list[list[Command]]:
    """The commands of each slot, in their order; between slots there is none. What has no slot stands by itself."""
    groups: dict[int, list[Command]] = {}
    for position, command in enumerate(batch, 1):
        groups.setdefault(command.slot if command.slot >= 0 else -position, []).append(command)
    return list(groups.values())


def _lay_out(groups: list[list[Command]]) -> list[tuple[Any, ...]]:
    """What is sent for *groups*: several commands of a slot as one transaction."""
    commands: list[tuple[Any, ...]] = []
    for group in groups:
        if group[0].asking:
            commands.append(("ASKING",))
        if len(group) == 1:
            commands.append(group[0].args)
        else:
            commands += (("MULTI",), *(command.args for command in group), ("EXEC",))
    return commands


async def _read_group(connection: Connection, group: list[Command], results: list[Any]) -> None:
    """Add the answer of each command of *group* to *results*; an error is an answer too."""
    if group[0].asking:
        await _read(connection)
    if len(group) == 1:
        results.append(await _read(connection))
        return
    begun = await _read(connection)
    answers = [await _read(connection) for _ in group]
    ended = await _read(connection)
    if isinstance(ended, list):
        results += ended
    elif isinstance(begun, Exception):  # this user may do no MULTI: each was carried out by itself
        results += answers
    else:
        results += [next((one for one in answers if isinstance(one, Exception)), ended)] * len(group)


async def _read(connection: Connection) -> Any:
    try:
        return await connection.read_response()
    except ResponseError as exc:
        return exc
