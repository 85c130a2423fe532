"""The servers as pytest fixtures, for a conftest to import; `shared_redis` has to come along with `redis`."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from .namespace import Namespace, can_use_namespaces
from .resp import Connection
from .server import RedisServer

__all__ = ["namespace", "own_redis", "redis", "shared_redis"]


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def shared_redis() -> AsyncIterator[RedisServer]:
    """The one server behind `redis`; nobody else's."""
    async with RedisServer() as server:
        yield server


@pytest.fixture
async def redis(shared_redis: RedisServer) -> AsyncIterator[RedisServer]:
    """A server as good as new in 2 ms, which all the tests of a run share one after the other.

    Before the test all connections of others are closed and all keys, scripts, functions and counters are gone. It
    stays up: a test that stops, kills or freezes it, or changes a setting, fails, for that is what `own_redis` is for.
    """
    if not shared_redis.running:
        await shared_redis.start()
    shared_redis.thaw()
    async with await shared_redis.open() as connection:
        await connection.pipeline([("CLIENT", "KILL", "TYPE", "normal"), ("CLIENT", "KILL", "TYPE", "pubsub")])
        for command in (("FLUSHALL",), ("SCRIPT", "FLUSH"), ("FUNCTION", "FLUSH"), ("CONFIG", "RESETSTAT")):
            await connection.command(*command)
        settings = await settings_of(connection)
        pid = shared_redis.pid
    yield shared_redis
    problem = "a test that stops, kills or freezes its server takes own_redis"
    assert shared_redis.running, problem
    assert shared_redis.pid == pid, problem
    async with await shared_redis.open() as connection:
        assert await settings_of(connection) == settings, "a test that changes settings takes own_redis"


async def settings_of(connection: Connection) -> dict[str, str]:
    """All settings by name; Redis gives them in another order while it writes its append-only file anew."""
    flat = await connection.command("CONFIG", "GET", "*")
    return dict(zip(flat[::2], flat[1::2], strict=True))


@pytest.fixture
async def own_redis() -> AsyncIterator[RedisServer]:
    """A server of the test's own, `appendfsync always`: for the test to kill, freeze, restart and set."""
    async with RedisServer() as server:
        yield server


@pytest.fixture
async def namespace() -> AsyncIterator[Namespace]:
    """A network namespace of the test's own; skipped where there can be none, with the reason."""
    if reason := can_use_namespaces():
        pytest.skip(reason)
    async with Namespace() as made:
        yield made
