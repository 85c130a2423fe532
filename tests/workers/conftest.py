"""Desks of several processes, on a Redis of the run's own."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import pytest_asyncio
from tests.cli.conftest import hotdesk
from tests.redis_servers import RedisServer
from tests.redis_servers.fixtures import redis, shared_redis
from tests.workers.desk import WHO, WorkerDesk, starting

__all__ = ["StartWorkers", "desk_of_two", "hotdesk", "redis", "served", "shared_redis", "start_workers"]

StartWorkers = Callable[..., Awaitable[WorkerDesk]]


@pytest.fixture
async def start_workers(tmp_path: Path, redis: RedisServer) -> AsyncIterator[StartWorkers]:
    """Start a desk of the test's own: `await start_workers(2, "--watch", "frozen", settings="max_turns = 5")`."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(
            workers: int = 2,
            *flags: str,
            plugins: dict[str, str] | None = None,
            settings: str = "",
            env: dict[str, str] | None = None,
            greets: bool = True,
        ) -> WorkerDesk:
            desk = WorkerDesk(tmp_path, redis.url, workers, *flags, env=env)
            for name, source in ({"who.py": WHO} if plugins is None else plugins).items():
                desk.write(f"plugins/{name}", source)
            if settings:
                desk.write("hotdesk.toml", settings)
            return await stack.enter_async_context(starting(desk, greets=greets))

        yield start


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[WorkerDesk]:
    """A desk of two workers that the tests of a run share, each of which leaves it as whole as it found it.

    Its Redis is its own, for `redis` forgets everything between two tests.
    """
    async with RedisServer() as server:
        desk = WorkerDesk(tmp_path_factory.mktemp("desk"), server.url, 2)
        desk.write("plugins/who.py", WHO)
        async with starting(desk):
            yield desk


@pytest.fixture
async def desk_of_two(served: WorkerDesk) -> WorkerDesk:
    """`served`, whole, with nothing said or logged yet, the plugin `who` at its first version, and no settings file."""
    (served.folder / "hotdesk.toml").unlink(missing_ok=True)
    await served.wait_whole()
    served.forget()
    return served
