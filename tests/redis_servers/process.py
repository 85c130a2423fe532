"""One server process: its settings, its start and the many ways in which it ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Self

from .ports import free_port
from .program import find_redis
from .resp import Argument, Connection, Reply, ReplyError

__all__ = ["PortTaken", "ServerProcess", "StartFailed", "start_all", "wait_for"]

READY_S = 20.0
STOP_S = 20.0
"""A server that shuts down waits up to 10 s for replicas that lag."""

TRIES = 4
LOOK_AGAIN_S = 0.004
LOOK_S = 0.05
"""For the first look whether a server is ready, doubled for each one that was too short on a busy machine; who has
taken the port may never answer."""


class StartFailed(RuntimeError):
    """A server did not start; the text ends with the end of its log."""


class PortTaken(StartFailed):
    """Somebody took the port between the look whether it is free and the start."""


class ServerProcess(ABC):
    """A server of its own process group, on a port that stays the same over restarts, in a folder that goes with it.

    The process is a plain child, bound to no event loop: a fixture may start it on one and a test kill it on another.
    """

    def __init__(self, *, address: str, folder: Path | None, pick_port: Callable[[], int] | None) -> None:
        """*folder* is where the server's own folder is made; the system's for temporary files unless it is given."""
        self.address = address
        self.folder = Path(tempfile.mkdtemp(prefix="redis-", dir=folder))
        self.log = self.folder / "server.log"
        self.port = 0
        self._pick_port = pick_port or (lambda: free_port(address))
        self._process: subprocess.Popen[bytes] | None = None
        self._log_from = 0

    @abstractmethod
    def settings(self) -> Iterable[str]:
        """The lines of the settings file, once the port is known."""

    @abstractmethod
    def arguments(self) -> Sequence[str]:
        """What stands in the command after the settings file."""

    @abstractmethod
    async def open(self) -> Connection:
        """A connection of one's own, for many commands, or for those that block or subscribe."""

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            self.remove()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.remove()

    async def aclose(self) -> None:
        """Kill the process and remove the folder, for those who called `start` by themselves; a second call is fine."""
        self.remove()

    def remove(self) -> None:
        """The same without a loop: nothing can come in between, a cancelled test least of all."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def running(self) -> bool:
        """There is a process; it may be frozen."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The process, which must have been started."""
        assert self._process is not None
        return self._process.pid

    async def start(self) -> None:
        """Start it and wait until it answers `PING`, also through `LOADING`.

        The first start finds a port and tries another if that is taken; later ones come back to it, with the settings
        as the server itself may have rewritten them. Raises `StartFailed`; then no process is left.
        """
        if self.running:
            raise RuntimeError(f"{self} runs already")
        program = await asyncio.to_thread(find_redis)
        if self.port:
            await self._launch(program)
            return
        for left in reversed(range(TRIES)):
            self.port = self._pick_port()
            (self.folder / "server.conf").write_text("".join(f"{line}\n" for line in self.settings()))
            try:
                await self._launch(program)
                return
            except PortTaken:
                self.port = 0
                if not left:
                    raise

    async def stop(self) -> None:
        """SIGTERM, and wait until it is gone; one that is frozen is thawed for it.

        Raises `RuntimeError` for one that does not heed it in time, and kills it. One that is not running is left so.
        """
        if not self.running:
            return
        self._signal(signal.SIGTERM)
        self._signal(signal.SIGCONT)
        try:
            await self._wait_gone(STOP_S)
        except TimeoutError:
            await self.kill()
            raise RuntimeError(f"{self} did not stop within {STOP_S:.0f} s of SIGTERM") from None

    async def kill(self) -> None:
        """SIGKILL, frozen or not, and wait until it is gone."""
        if self.running:
            self._signal(signal.SIGKILL)
            await self._wait_gone(STOP_S)

    def freeze(self) -> None:
        """SIGSTOP: connections are taken by the system and nothing is answered, until `thaw`."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)

    async def restart(self) -> None:
        """Stop it if it runs, and start it on the same port with the same data."""
        await self.stop()
        await self.start()

    async def command(self, *args: Argument, timeout_s: float = 10.0) -> Reply:
        """Run one command on a connection of its own. Raises what `Connection.open` and `Connection.command` do."""
        async with await self.open() as connection:
            return await connection.command(*args, timeout_s=timeout_s)

    async def info(self, section: str = "default") -> dict[str, str]:
        """The fields of `INFO section`."""
        lines = str(await self.command("INFO", section)).splitlines()
        return dict(line.split(":", 1) for line in lines if ":" in line and not line.startswith("#"))

    def log_tail(self, lines: int = 15) -> str:
        """The end of what it printed since it was last started."""
        with self.log.open("rb") as log:
            log.seek(self._log_from)
            return "\n".join(log.read().decode(errors="replace").splitlines()[-lines:])

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.address}:{self.port}>"

    def _signal(self, number: signal.Signals) -> None:
        if self.running:
            os.killpg(self.pid, number)

    async def _wait_gone(self, timeout_s: float) -> None:
        async with asyncio.timeout(timeout_s):
            while True:
                if not self.running:
                    return
                await asyncio.sleep(LOOK_AGAIN_S)

    async def _launch(self, program: Path) -> None:
        self._spawn([str(program), str(self.folder / "server.conf"), *self.arguments()])
        look_s = LOOK_S

        async def answers() -> str | None:
            if not self.running:
                taken = "address already in use" in self.log_tail().lower()
                raise (PortTaken if taken else StartFailed)(f"{self} did not start; its log ends:\n{self.log_tail()}")
            nonlocal look_s
            try:
                async with asyncio.timeout(look_s), await self.open() as connection:
                    told = await connection.command("INFO", "server")
                    if f"process_id:{self.pid}\r\n" not in told:  # it is not ours that listens there
                        return "somebody else answers"
                    await connection.command("PING")
            except TimeoutError:
                look_s *= 2
                raise
            return None

        try:
            await wait_for(answers, f"{self} answers", timeout_s=READY_S)
        except BaseException as exc:
            await self.kill()
            if isinstance(exc, TimeoutError):
                raise StartFailed(f"{exc}; its log ends:\n{self.log_tail()}") from None
            raise

    def _spawn(self, command: Sequence[str]) -> None:
        with self.log.open("ab") as log:
            self._log_from = log.tell()
            # A group of its own: Ctrl-C in a terminal is for the tests and not for the server, and a kill takes along
            # the children that rewrite its files.
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder, start_new_session=True
            )


async def start_all(servers: Iterable[ServerProcess]) -> None:
    """Start them side by side. Raises the first failure once all the others have ended."""
    try:
        async with asyncio.TaskGroup() as group:
            for server in servers:
                group.create_task(server.start())
    except* StartFailed as failures:
        first: BaseException = failures
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from None


async def wait_for(missing: Callable[[], Awaitable[str | None]], what: str, *, timeout_s: float) -> None:
    """Wait until *missing*, which says what there is to wait for, says None.

    A server that can't be reached or answers with an error is waited for too. Raises `TimeoutError` with the last word.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    last: str | None = "nothing was answered"
    while True:
        with contextlib.suppress(TimeoutError):
            try:
                async with asyncio.timeout_at(deadline):
                    last = await missing()
            except (ReplyError, ConnectionError, EOFError) as exc:
                last = f"{type(exc).__name__}: {exc}"
        if last is None:
            return
        if loop.time() >= deadline:
            raise TimeoutError(f"waited {timeout_s:g} s until {what}: {last}")
        await asyncio.sleep(LOOK_AGAIN_S)
