"""What every test stands on: a real host in a folder of its own, and checks that nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from tests.redis_servers.fixtures import namespace, own_redis, redis, shared_redis  # noqa: F401

from hotdesk.app import Host, open_host
from hotdesk.config import Config, PluginSettings
from hotdesk.runtime.python import PREFIX

ADMIN_TOKEN = "test-admin-token"

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a shell; what tests start inherits it
    signal.signal(signal.SIGINT, signal.default_int_handler)


async def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = 10.0) -> Any:
    """Wait for *condition* (it may be async) to give something true, and return it."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    while True:
        value = condition()
        if isinstance(value, Awaitable):
            value = await value
        if value:
            return value
        if loop.time() > deadline:
            raise AssertionError(f"waited {timeout_s:g} s for: {what}")
        await asyncio.sleep(0.005)


class Desk:
    """A host under test: its folder, its HTTP client, and short words for what tests do."""

    def __init__(self, host: Host, folder: Path, http: aiohttp.ClientSession) -> None:
        self.host = host
        self.folder = folder
        self.http = http
        self.events: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        return self.host.url

    def write(self, name: str, source: str | bytes) -> Path:
        """Put a file into the plugins folder by atomic rename, the way a careful editor does."""
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_name(f".{target.name}.new")
        fresh.write_bytes(source.encode() if isinstance(source, str) else source)
        fresh.replace(target)
        return target

    async def say(self, text: str = "hello", conversation: str = "c", **fields: Any) -> dict[str, Any]:
        """Send a message with `?wait` and return the answer's JSON."""
        async with self.http.post(
            f"{self.url}/v1/conversations/{conversation}/messages", params={"wait": "10"}, json={"text": text, **fields}
        ) as response:
            body: dict[str, Any] = await response.json()
            assert response.status == 200, body
            return body

    async def reply(self, text: str = "hello", conversation: str = "c", **fields: Any) -> str | None:
        """Send a message and return the text of its reply."""
        replies = (await self.say(text, conversation, **fields))["replies"]
        return replies[0]["text"] if replies else None

    async def record(self, conversation: str = "c") -> list[dict[str, Any]]:
        """Everything said in a conversation."""
        async with self.http.get(
            f"{self.url}/v1/conversations/{conversation}/messages", params={"limit": "1000"}
        ) as response:
            return (await response.json())["messages"]  # type: ignore[no-any-return]

    async def admin(self, method: str, path: str, status: int = 200, **options: Any) -> dict[str, Any]:
        """Call the admin API."""
        headers = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
        async with self.http.request(method, f"{self.url}/admin/{path}", headers=headers, **options) as response:
            body: dict[str, Any] = await response.json()
            assert response.status == status, body
            return body

    async def plugin(self, name: str) -> dict[str, Any]:
        return await self.admin("GET", f"plugins/{name}")

    async def wait_generation(self, name: str, number: int) -> dict[str, Any]:
        """Wait until generation *number* of a plugin serves."""

        def serves() -> bool:
            return any(
                e.name == name and e.current is not None and e.current.number >= number
                for e in self.host.plugins.entries
            )

        await wait_until(serves, f"{name} generation {number}")
        return await self.plugin(name)

    async def wait_event(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Wait for an event, also one that has already been."""

        def found() -> dict[str, Any] | None:
            return next(
                (e for e in self.events if e["kind"] == kind and all(e.get(k) == v for k, v in fields.items())), None
            )

        return await wait_until(found, f"event {kind} {fields}")  # type: ignore[no-any-return]


StartDesk = Callable[..., Awaitable[Desk]]


@pytest.fixture
async def start_desk(tmp_path: Path) -> AsyncIterator[StartDesk]:
    """Start hosts: `desk = await start_desk({"faq.py": source}, max_turns=5)`. They stop with the test."""
    import contextlib

    async with contextlib.AsyncExitStack() as stack:
        count = 0

        async def start(
            plugins: dict[str, str] | None = None,
            *,
            settings: dict[str, PluginSettings] | None = None,
            folder: Path | None = None,
            data: Path | None = None,
            **config: Any,
        ) -> Desk:
            nonlocal count
            count += 1
            folder = folder or tmp_path / f"plugins{count}"
            folder.mkdir(exist_ok=True)
            for name, source in (plugins or {}).items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_text(source)
            events: list[dict[str, Any]] = []
            host = await stack.enter_async_context(
                open_host(
                    Config(
                        plugins=(str(folder),),
                        data=str(data or tmp_path / f"data{count}"),
                        port=0,
                        admin_token=ADMIN_TOKEN,
                        plugin_settings=settings or {},
                        **{"standby_s": 0.1, "stop_timeout_s": 3.0, **config},
                    ),
                    listen=events.append,
                )
            )
            http = await stack.enter_async_context(aiohttp.ClientSession())
            desk = Desk(host, folder, http)
            desk.events = events
            return desk

        yield start


@pytest.fixture
async def desk(start_desk: StartDesk) -> Desk:
    """A host with one bot that says its version and what it heard."""
    return await start_desk({"echo.py": echo(1)})


def echo(version: int) -> str:
    """The source of a bot that answers `{version}: {text}`."""
    return (
        "from hotdesk_sdk import hookimpl\n\n"
        f"VERSION = {version}\n\n"
        "@hookimpl\nasync def respond(turn):\n    return f'{VERSION}: {turn.text}'\n"
    )


@pytest.fixture(scope="module", autouse=True)
def collected_by_file() -> Iterator[None]:
    """What was there before a file's tests is kept from the collector, and so is what a test left, once it has ended.

    To look through all that the suite has imported takes a tenth of a second and more, and each host does as it
    starts. So it is done once a file, and what is found wrong then fails the last of its tests.
    """
    gc.freeze()
    yield
    gc.unfreeze()
    gc.collect()


@pytest.fixture(autouse=True)
async def nothing_left_behind() -> AsyncIterator[None]:
    """No task, thread or plugin module outlives its test."""
    tasks = asyncio.all_tasks()
    threads = set(threading.enumerate())
    yield
    gc.collect(1)  # what is young: a host that has ended let all loose
    gc.freeze()

    def left() -> list[Any]:
        return [
            *(task for task in asyncio.all_tasks() - tasks if task is not asyncio.current_task() and not task.done()),
            *(
                thread
                for thread in set(threading.enumerate()) - threads
                if not thread.name.startswith(("asyncio", "AnyIO", "ThreadPoolExecutor"))
            ),
            *(name for name in sys.modules if name.startswith(PREFIX)),
        ]

    for number in range(200):
        if not left():
            return
        if number == 20:  # a task that nobody holds is there until it is collected
            gc.unfreeze()
            gc.collect()
        await asyncio.sleep(0.01)
    raise AssertionError(f"left behind: {left()}")


@pytest.fixture(scope="session", autouse=True)
def clean_environment() -> None:
    """Settings come from the test alone."""
    for name in [name for name in os.environ if name.startswith("HOTDESK_")]:
        del os.environ[name]
