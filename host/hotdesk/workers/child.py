"""A worker process as its supervisor has it: started, heard, told, ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from ..web.siblings import entrance_of
from .orders import LINE_LIMIT, Greeting, Line, Orders, decode_line, encode_line, pack_orders

__all__ = ["Child"]

MAX_UNSENT = 4 * 1024 * 1024
"""Bytes that wait for a worker that reads nothing, one that is stopped say; beyond it events are not sent to it."""


HUNG_UP_S = 5.0
"""How long a process may go on after it has hung up on its supervisor, which it does when all it has is on disk."""


BEAT_S = 1.0
"""So often a worker says that its event loop runs, and so often it is looked whether it did."""

STUCK_BEATS = 30
"""So many of them missed, and it is killed. Counted and not timed, so that a machine that slept kills nobody."""


class Child:
    """One process. *hear* is called with each line that it says."""

    def __init__(self, orders: Orders, hear: Callable[[Child, Line], None]) -> None:
        self.worker = orders.worker
        self.name = orders.name
        self.path = orders.path
        self._ready_at: float | None = None
        self.state = "starting"
        self.since = time.time()
        self.greeting: Greeting | None = None
        self.failed: tuple[str, str] | None = None
        self.left: int | None = None
        """How many of its turns it left to others; None when it did not end well."""
        self.asked: set[str] = set()
        """Plugins whose number it has asked for."""
        self.passed: dict[str, int] = {}
        """Numbers of plugins that it did not load when it began, as one that is disabled: it begins behind them."""
        self.ended = asyncio.Event()
        self._missed = 0
        self._stuck = False
        self._ready = asyncio.Event()
        self._orders = orders
        self._hear = hear
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._life = asyncio.create_task(self._live(), name=f"hotdesk-worker-{self.name}")

    @property
    def pid(self) -> int:
        return self._process.pid if self._process is not None else 0

    @property
    def code(self) -> int | None:
        """How it ended, as `subprocess` has it; None before, or when it could not be started."""
        return self._process.returncode if self._process is not None else None

    def describe_end(self) -> str:
        """How it ended, in words."""
        if self.failed is not None:
            return self.failed[1]
        if self._stuck:
            return f"its event loop stood still for {STUCK_BEATS * BEAT_S:g} s, so it was killed"
        if self.code is None:
            return "it could not be started"
        if self.code < 0:
            with contextlib.suppress(ValueError):
                return f"it was ended by {signal.Signals(-self.code).name}"
        return f"it ended with exit code {self.code}"

    @property
    def served_s(self) -> float:
        """How long it has served; 0 when it never did, however long it took to find that out."""
        return 0.0 if self._ready_at is None else time.monotonic() - self._ready_at

    def move(self, state: str) -> None:
        self.state, self.since = state, time.time()

    def send(self, line: Line, *, must: bool = True) -> None:
        """Tell it something. What need not be said is left out when it has not read for long."""
        writer = self._writer
        if writer is None or writer.is_closing():
            return
        if must or writer.transport.get_write_buffer_size() < MAX_UNSENT:
            writer.write(encode_line(line))

    def kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def wait_ready(self, seconds: float) -> str | None:
        """Wait until it serves; None then, else what is wrong. What is not ready in time is killed."""
        ready, ended = asyncio.ensure_future(self._ready.wait()), asyncio.ensure_future(self.ended.wait())
        try:
            await asyncio.wait({ready, ended}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ready.cancel()
            ended.cancel()
        if self.ended.is_set():
            return self.describe_end()
        if not self._ready.is_set():
            self.kill()
            await self.ended.wait()
            return f"it was not ready within {seconds:g} s"
        return None

    async def aclose(self) -> None:
        """Kill it if it still runs, and wait for its end."""
        self.kill()
        await asyncio.wait({self._life})

    async def _live(self) -> None:
        ours, theirs = socket.socketpair()
        heard_all = False
        try:
            try:
                self._process = await self._spawn(theirs.fileno())
            finally:
                theirs.close()
            reader, self._writer = await asyncio.open_unix_connection(sock=ours, limit=LINE_LIMIT)
            self._writer.write(pack_orders(self._orders))
            watching = asyncio.create_task(self._watch())
            try:
                await self._read(reader)
            finally:
                watching.cancel()
            heard_all = True
        except OSError as exc:
            self.failed = self.failed or ("other", f"it could not be started: {exc.strerror or exc}")
        finally:
            try:
                if self._process is not None:
                    await self._wait_gone(patient=heard_all)
            finally:
                ours.close() if self._writer is None else self._writer.close()
                for path in (self.path, entrance_of(self.path)):
                    Path(path).unlink(missing_ok=True)
                self.move("down")
                self.ended.set()

    async def _watch(self) -> None:
        """Kill it when nothing is heard of it for long while it serves: who connects to its place waits for it."""
        while True:
            await asyncio.sleep(BEAT_S)
            self._missed = self._missed + 1 if self.state == "ready" else 0
            if self._missed >= STUCK_BEATS:
                self._stuck = True
                self.kill()

    async def _wait_gone(self, *, patient: bool) -> None:
        """Wait until the process has ended. One that has hung up is about to, unless a plugin's thread keeps it."""
        assert self._process is not None
        if patient:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HUNG_UP_S):
                    await self._process.wait()
        self.kill()
        await self._process.wait()

    async def _spawn(self, control_fd: int) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            "-m",
            "hotdesk.workers.worker",
            str(control_fd),
            str(self.worker),  # read by nobody but people who look at `ps`
            stdin=asyncio.subprocess.DEVNULL,
            pass_fds=(control_fd, self._orders.listen_fd),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )

    async def _read(self, reader: asyncio.StreamReader) -> None:
        while data := await _read_line(reader):
            self._missed = 0
            try:
                line = decode_line(data)
            except (msgspec.DecodeError, ValueError):  # half a line of a process that died over it
                continue
            if line.ready is not None:
                self.greeting, self._ready_at = line.ready, time.monotonic()
                self.move("ready")
                self._hear(self, line)
                self._ready.set()
                continue
            if line.failed is not None:
                self.failed = line.failed
            elif line.stopped is not None:
                self.left = line.stopped
            self._hear(self, line)


async def _read_line(reader: asyncio.StreamReader) -> bytes:
    """The next line; empty when the process has hung up, also without having read all that it was told."""
    try:
        return await reader.readline()
    except ConnectionError:
        return b""
