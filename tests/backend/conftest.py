"""Journals under test: each kind behind one factory, workers on one Redis, and worker processes to stop and to kill."""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from tests.backend.worker import Worker
from tests.redis_servers import Link, RedisServer

from conftest import wait_until
from hotdesk.errors import BackendUnavailable

ROOT = Path(__file__).parents[2]
_names = itertools.count()
PARTITIONS = 32
"""So many that of three workers none goes without by the chance of its name, but once in a hundred thousand."""


class Journal:
    """One journal, opened by one worker after the other."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.kind = url.partition(":")[0]
        self._worker: Worker | None = None

    async def open(self, *, again: bool = False, start: bool = True) -> Worker:
        """Open it; *again*: close it first, as a stop of the host does."""
        if again:
            await self.aclose()
        assert self._worker is None
        self._worker = await Worker.open(self.url)
        if start:
            await self._worker.start()
        return self._worker

    async def aclose(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            await worker.aclose()


@pytest.fixture(params=["sqlite", "redis"])
def journal_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a journal of each kind may be, all empty."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'hotdesk.db'}"
    server: RedisServer = request.getfixturevalue("redis")
    return f"{server.url}?partitions={PARTITIONS}&prefix=t{next(_names)}"


@pytest.fixture
async def journal(journal_url: str) -> AsyncIterator[Journal]:
    """A journal that is not open yet."""
    journal = Journal(journal_url)
    yield journal
    await journal.aclose()


@pytest.fixture
async def backend(journal: Journal) -> Worker:
    """A worker that has an empty journal open."""
    return await journal.open()


# -- many workers on one Redis -----------------------------------------------------------------------------------


StartWorker = Callable[[str], Awaitable[Worker]]


@pytest.fixture
async def open_worker() -> AsyncIterator[StartWorker]:
    """Open workers by URL, for the test to start. They leave with the test, last one first."""
    opened: list[Worker] = []

    async def open(url: str) -> Worker:
        worker = await Worker.open(url)
        opened.append(worker)
        return worker

    yield open
    for worker in reversed(opened):
        await worker.aclose()


@pytest.fixture
async def start_worker(open_worker: StartWorker) -> StartWorker:
    """Start workers by URL: `worker = await start_worker(url_of(redis))`."""

    async def start(url: str) -> Worker:
        worker = await open_worker(url)
        await worker.start()
        return worker

    return start


def url_of(server: RedisServer, *, partitions: int = PARTITIONS, port: int | None = None) -> str:
    """The URL of a journal in *server*, by way of another *port* where one is given."""
    return f"{server.url_at(server.address, port or server.port)}?partitions={partitions}"


def key(number: int, name: str) -> str:
    """A key of a partition."""
    return f"hotdesk{{{number}}}:{name}"


async def settled(*workers: Worker) -> None:
    """Every partition has one owner among *workers*, and that one is whom it should have."""

    def shared_out() -> bool:
        backends: list[Any] = [worker.backend for worker in workers]
        names = tuple(backends[0].members.alive)
        if any(sorted(one.members.alive) != sorted(one.me for one in backends) for one in backends):
            return False
        return all(
            [one.me for one in backends if one.partitions.all[number].mine]
            == [backends[0].members.owner_of(number, names)]
            for number in range(len(backends[0].partitions.all))
        )

    await wait_until(shared_out, "the partitions are shared out")


async def die(worker: Worker) -> None:
    """What others see of a worker that is killed: no word to anybody, and no lease renewed."""
    backend: Any = worker.backend
    backend._closing = True
    await backend.partitions.aclose()
    await backend._servers.aclose()


def conversation_of(worker: Worker, *, not_in: set[int] = frozenset()) -> str:  # type: ignore[assignment]
    """A conversation that no test used before, whose turns run at *worker*."""
    backend: Any = worker.backend
    for number in itertools.islice(_names, 10_000):
        name = f"c{number}"
        if backend.owns(name) and backend.partitions.of(name).number not in not_in:
            return name
    raise AssertionError(f"{backend.me} owns no partition that is asked for")


# -- worker processes --------------------------------------------------------------------------------------------


class Process:
    """A worker in a process of its own; see `worker._Program` for what it can be told to do."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._tokens = itertools.count()
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self.begun: list[tuple[str, int, str, int]] = []
        """Conversation, seq, id and attempt of each turn."""

        self.ready = asyncio.Event()
        self._reading = asyncio.ensure_future(self._read())

    @classmethod
    async def open(cls, url: str) -> Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.backend.worker", url,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=None, cwd=ROOT,
        )  # fmt: skip
        worker = cls(process)
        await asyncio.wait_for(worker.ready.wait(), 10)
        return worker

    async def _read(self) -> None:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            if not line.startswith(b"{"):
                continue  # a line of the log
            said = json.loads(line)
            if "ready" in said:
                self.ready.set()
            elif "begun" in said:
                self.begun.append(tuple(said["begun"]))
            elif (waiting := self._waiting.pop(said.get("token"), None)) is not None:
                waiting.set_result(said)

    def order(self, do: str, **what: Any) -> asyncio.Future[Any]:
        """Have something done; what comes has `answer`, or `failed` and `problem`."""
        token = next(self._tokens)
        waiting = self._waiting[token] = asyncio.get_running_loop().create_future()
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, "token": token, **what}).encode() + b"\n")
        return waiting

    async def ask(self, do: str, **what: Any) -> Any:
        """Have something done that does not fail."""
        said = await asyncio.wait_for(self.order(do, **what), 10)
        assert "failed" not in said, said
        return said["answer"]

    async def refused(self, do: str, **what: Any) -> str:
        """Have something done that fails: how."""
        said = await asyncio.wait_for(self.order(do, **what), 10)
        return str(said["failed"])

    def freeze(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    async def kill(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()
        await self._reading

    async def aclose(self) -> None:
        await self.kill()


StartProcess = Callable[[str], Awaitable[Process]]


@pytest.fixture
async def start_process() -> AsyncIterator[StartProcess]:
    """Start worker processes by URL. They are killed with the test."""
    started: list[Process] = []

    async def start(url: str) -> Process:
        process = await Process.open(url)
        started.append(process)
        return process

    yield start
    for process in started:
        await process.kill()


# -- connections -------------------------------------------------------------------------------------------------


async def answers(*workers: Worker) -> None:
    """Wait until each worker can write and read, on whichever of its connections."""

    async def ready() -> bool:
        try:
            for worker in workers:
                await worker.backend.ping()
                await worker.backend.record("nobody")
        except BackendUnavailable:
            return False
        return True

    await wait_until(ready, "Redis answers")


async def drop_asking(link: Link, server: RedisServer) -> None:
    """Drop those connections through *link* that ask, and keep those that hear: what they are told by now is lost."""
    clients = [
        dict(field.partition("=")[::2] for field in line.split())
        for line in str(await server.command("CLIENT", "LIST")).splitlines()
    ]
    hearing = {int(client["addr"].rpartition(":")[2]) for client in clients if client.get("ssub", "0") != "0"}
    for end in list(link.ends):
        assert end.transport is not None
        if not end.near and end.transport.get_extra_info("sockname")[1] not in hearing:
            assert end.other is not None
            end.other.drop()
            end.drop()
