"""Starts, measures, kills and stops what is loaded: a host, or the bare aiohttp server, each a process of its own.

Everything of one run lives in a work folder under `tests/load/out`, on a real disk: a commit on tmpfs costs nothing.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import psutil
from tests.load.client import ConnectionLost, HttpClient

__all__ = ["ADMIN_TOKEN", "OUT", "Server", "Usage", "host_on", "running_bare", "running_host", "work_folder"]

ADMIN_TOKEN = "load-run-admin-token-0123456789"
OUT = Path(__file__).parent / "out"
READY_S = 30.0
STOP_S = 20.0


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process has of the machine at one moment."""

    rss_bytes: int
    cpu_s: float
    fds: int
    threads: int


class Server:
    """One server process on a port that stays the same when it is started again."""

    def __init__(self, command: list[str], *, port: int, folder: Path, env: Mapping[str, str] | None = None) -> None:
        self.port = port
        self.folder = folder
        self.log = folder / "server.log"
        self.command = command
        self._env = {**os.environ, **(env or {})}
        self._process: asyncio.subprocess.Process | None = None

    @property
    def plugins(self) -> Path:
        """The watched folder (a host's)."""
        return self.folder / "plugins"

    async def start(self, *, ready_s: float = READY_S) -> float:
        """Start it, wait until it is ready, and return the seconds that took."""
        began = perf_counter()
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self.command, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder, env=self._env
            )
        client = HttpClient(self.port)
        try:
            while True:
                try:
                    if (await client.request("GET", "/readyz")).status == 200:
                        return perf_counter() - began
                except ConnectionLost:
                    pass
                if self._process.returncode is not None or perf_counter() - began > ready_s:
                    raise RuntimeError(f"{' '.join(self.command)}: not ready; its log ends:\n{self.log_tail()}")
                await asyncio.sleep(0.01)
        finally:
            client.close()

    def usage(self) -> Usage:
        """RSS, CPU, descriptors and threads, now."""
        assert self._process is not None
        process = psutil.Process(self._process.pid)
        with process.oneshot():
            cpu = process.cpu_times()
            return Usage(process.memory_info().rss, cpu.user + cpu.system, process.num_fds(), process.num_threads())

    @property
    def pid(self) -> int:
        """The process, which must have been started; with `--workers` the workers are its children."""
        assert self._process is not None
        return self._process.pid

    async def kill(self) -> None:
        """SIGKILL, and wait until the process is gone."""
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        await self._process.wait()

    async def stop(self) -> None:
        """SIGTERM, and SIGKILL for one that does not heed it in time, which is an error."""
        if self._process is None or self._process.returncode is not None:
            return
        self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), STOP_S)
        except TimeoutError:
            await self.kill()
            raise RuntimeError(f"the server did not stop within {STOP_S:.0f} s of SIGTERM") from None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def wait_ended(self, timeout_s: float) -> None:
        """Wait until the process has ended by itself."""
        assert self._process is not None
        await asyncio.wait_for(self._process.wait(), timeout_s)

    def log_tail(self, lines: int = 15) -> str:
        """The end of what the server printed."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


@contextmanager
def work_folder(name: str) -> Iterator[Path]:
    """A folder for one run, gone afterwards."""
    OUT.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=OUT))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def host_on(folder: Path, plugins: Mapping[str, str]) -> Server:
    """A host, not started yet, whose data and plugins (file name to source) are in *folder*."""
    port = free_port()
    (folder / "plugins").mkdir(exist_ok=True)
    for name, source in plugins.items():
        (folder / "plugins" / name).write_text(source)
    command = [sys.executable, "-m", "hotdesk", "run", "--port", str(port)]
    command += ["--plugins", str(folder / "plugins"), "--data", str(folder / "data")]
    return Server(command, port=port, folder=folder, env={"HOTDESK_ADMIN_TOKEN": ADMIN_TOKEN})


@asynccontextmanager
async def running_host(name: str, plugins: Mapping[str, str]) -> AsyncIterator[Server]:
    """A host that is ready, in a work folder of its own; stopped and removed at the end."""
    with work_folder(name) as folder:
        async with _running(host_on(folder, plugins)) as server:
            yield server


@asynccontextmanager
async def running_bare() -> AsyncIterator[Server]:
    """The bare aiohttp server that the host is compared with."""
    with work_folder("bare") as folder:
        port = free_port()
        command = [sys.executable, str(Path(__file__).with_name("bare.py")), str(port)]
        async with _running(Server(command, port=port, folder=folder)) as server:
            yield server


@asynccontextmanager
async def _running(server: Server) -> AsyncIterator[Server]:
    try:
        await server.start()
        yield server
    finally:
        await server.stop()


def free_port() -> int:
    """A port that was free just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
