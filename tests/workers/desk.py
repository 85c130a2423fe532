"""A desk of several worker processes under test, started the way that an operator starts it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from conftest import ADMIN_TOKEN, wait_until

__all__ = ["WHO", "WorkerDesk", "starting"]

WHO = """
import os

from hotdesk_sdk import hookimpl

VERSION = 1

async def who(request):
    return {"pid": os.getpid(), "version": VERSION}

@hookimpl
async def routes():
    return [("GET", "/", who)]

@hookimpl
async def respond(turn):
    return f"{VERSION}: {turn.text}"
"""
"""A bot, and a page that tells which process has the door."""

START_S = 30.0
STOP_S = 15.0


class WorkerDesk:
    """`hotdesk run --workers N` in a folder; its output, its log and its doors. It is bound to no event loop."""

    def __init__(
        self, folder: Path, backend: str, workers: int, *flags: str, env: dict[str, str] | None = None
    ) -> None:
        self.folder = folder
        self.url = ""
        self.token = ADMIN_TOKEN
        self.command = [
            sys.executable, "-m", "hotdesk", "run", "--port", "0", "--backend", backend, "--workers", str(workers),
            "--log-format", "json", *flags,
        ]  # fmt: skip
        self.env = {**os.environ, "HOTDESK_ADMIN_TOKEN": ADMIN_TOKEN, "HOTDESK_STOP_TIMEOUT_S": "5", **(env or {})}
        self._workers = workers
        self._process: subprocess.Popen[bytes] | None = None
        self._seen = 0

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    def write(self, name: str, text: str) -> None:
        """Put a file into the desk's folder by rename."""
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_name(f".{target.name}.new")
        fresh.write_text(text)
        fresh.replace(target)

    async def start(self, *, greets: bool = True) -> None:
        """Start it, and wait until it has said where it serves, if it *greets*."""
        (self.folder / "plugins").mkdir(parents=True, exist_ok=True)
        with (self.folder / "said").open("wb") as said, (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(  # noqa: ASYNC220 - bound to no loop, for a desk that tests share
                self.command, stdin=subprocess.DEVNULL, stdout=said, stderr=log, cwd=self.folder, env=self.env
            )
        if greets:
            self.url = (await self.wait_said("  at  ")).split()[-1]
            await self.wait_said("  try  ")

    @property
    def said(self) -> list[str]:
        """The lines that it printed since it started, or since `forget`."""
        return (self.folder / "said").read_text().splitlines()[self._seen :]

    def forget(self) -> None:
        """Let what was said and logged until now be of no account."""
        self._seen += len(self.said)
        (self.folder / "log").write_bytes(b"")

    async def wait_said(self, words: str) -> str:
        """Wait for a line that has *words*, also one that was printed before."""

        def found() -> str | None:
            line = next((line for line in self.said if words in line), None)
            if line is None and self.process.poll() is not None:
                raise AssertionError(f"it ended with {self.process.returncode}: {self.said} {self.log_text()[-2000:]}")
            return line

        try:
            return await wait_until(found, f"{words!r} said", START_S)  # type: ignore[no-any-return]
        except AssertionError as exc:
            raise AssertionError(f"{exc}\nit said {self.said}\nits log ends {self.log_text()[-4000:]}") from None

    def log_text(self) -> str:
        return (self.folder / "log").read_text()

    def logged(self, event: str, **fields: Any) -> list[dict[str, Any]]:
        """The log lines of an event."""
        lines = [json.loads(line) for line in self.log_text().splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == event and all(line.get(k) == v for k, v in fields.items())]

    async def wait_whole(self) -> None:
        """Wait until every place has a worker that serves, and none is being replaced."""

        async def is_whole() -> bool:
            _, body = await self.ask("GET", "/admin/workers")
            states = [row["state"] for row in body["workers"]]
            return states == ["ready"] * self._workers and body["restart"]["state"] != "running"

        await wait_until(is_whole, "all workers to serve", START_S)

    async def wait_ended(self) -> int:
        """Wait for the supervisor's end; its exit code."""
        await wait_until(lambda: self.process.poll() is not None, "the desk to end", START_S)
        return self.process.returncode

    async def stop(self) -> int:
        """SIGTERM, and wait; its exit code."""
        self.process.terminate()
        return await self.wait_ended()

    async def aclose(self) -> None:
        """Whatever has become of it: nothing of it is left."""
        if self._process is None:
            return
        workers = self.children()
        if self._process.poll() is None:
            for pid in workers:
                _send(pid, signal.SIGCONT)
            self._process.terminate()
            try:
                await wait_until(lambda: self.process.poll() is not None, "the desk to end", STOP_S)
            except AssertionError:
                self._process.kill()
                self._process.wait()
        for pid in workers:
            _send(pid, signal.SIGKILL)

    def children(self) -> list[int]:
        """The worker processes, as the kernel has them."""
        pid = self.process.pid
        try:
            return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        except FileNotFoundError:
            return []

    # -- doors -----------------------------------------------------------------------------------------------

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"} if self.token else {}

    async def ask(self, method: str, path: str, **options: Any) -> tuple[int, Any]:
        """One request on a connection of its own: the status, and the JSON or text."""
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as http,
            http.request(method, f"{self.url}{path}", headers=self._headers(), **options) as response,
        ):
            if response.content_type == "application/json":
                return response.status, await response.json()
            return response.status, await response.text()

    async def workers(self) -> list[dict[str, Any]]:
        status, body = await self.ask("GET", "/admin/workers")
        assert status == 200, body
        return body["workers"]  # type: ignore[no-any-return]

    async def pids(self) -> list[int]:
        """The process in each place."""
        return [row["pid"] for row in await self.workers() if row["state"] != "leaving"]

    async def roll(self) -> dict[str, Any]:
        """Wait until no restart is under way; how the last one went."""

        async def over() -> dict[str, Any] | None:
            _, body = await self.ask("GET", "/admin/workers")
            return body["restart"] if body["restart"]["state"] != "running" else None

        return await wait_until(over, "the restart to be over", START_S)  # type: ignore[no-any-return]

    async def passed(self) -> float:
        """How many connections the workers that there are have passed on to each other."""
        _, text = await self.ask("GET", "/metrics")
        lines = [line for line in text.splitlines() if line.startswith("hotdesk_connections_passed_total{")]
        return sum(float(line.split()[1]) for line in lines)

    async def say(self, text: str, conversation: str, *, wait_s: int = 10) -> dict[str, Any]:
        path = f"/v1/conversations/{conversation}/messages?wait={wait_s}"
        status, body = await self.ask("POST", path, json={"text": text})
        assert status == 200, body
        return body  # type: ignore[no-any-return]

    @asynccontextmanager
    async def connection(self, *, but: int = 0) -> AsyncIterator[tuple[aiohttp.ClientSession, int]]:
        """A session that keeps one connection, and the pid of the worker at its other end, which is not *but*."""
        while True:
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1), headers=self._headers()) as http:
                async with http.get(f"{self.url}/p/who/") as page:
                    pid = (await page.json())["pid"]
                if pid != but:
                    yield http, pid
                    return

    async def on_each(self, method: str, path: str, **options: Any) -> dict[int, tuple[int, Any]]:
        """The answer of every worker, by its pid: asked on new connections until each has had one."""
        answers: dict[int, tuple[int, Any]] = {}
        wanted = set(await self.pids())
        for _ in range(1000):
            async with self.connection() as (http, pid):
                if pid not in answers:
                    async with http.request(method, f"{self.url}{path}", **options) as response:
                        is_json = response.content_type == "application/json"
                        answers[pid] = response.status, await (response.json() if is_json else response.text())
            if set(answers) >= wanted:
                return answers
        raise AssertionError(f"only {list(answers)} of {wanted} were reached")


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


@asynccontextmanager
async def starting(desk: WorkerDesk, *, greets: bool = True) -> AsyncIterator[WorkerDesk]:
    """Start it, and leave nothing of it."""
    try:
        await desk.start(greets=greets)
        yield desk
    finally:
        await desk.aclose()
