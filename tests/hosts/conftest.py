"""Two hosts on one Redis, in one process: each with its doors, its plugins and its share of the conversations."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from tests.cli.conftest import hotdesk  # noqa: F401
from tests.redis_servers.server import RedisServer

from conftest import Desk, StartDesk, wait_until
from hotdesk.backend.redis import RedisBackend

TALKER = """
import asyncio
from hotdesk_sdk import hookimpl

GATES = {}

def gate(name):
    return GATES.setdefault(name, asyncio.Event())

@hookimpl
async def routes():
    async def open_gate(request):
        gate(request.path.rpartition("/")[2]).set()
        return "open"
    return [("GET", "/open/{name}", open_gate)]

@hookimpl
async def respond(turn):
    what, _, name = turn.text.partition(" ")
    if what == "wait":
        await gate(name).wait()
    if what == "words":
        return words(name)
    if what == "count":
        turn.conversation.state["count"] = turn.conversation.state.get("count", 0) + 1
        return str(turn.conversation.state["count"])
    return f"heard {turn.text}"

async def words(text):
    for word in text.split():
        yield word + " "
        if word == "stop":
            await gate("stream").wait()
"""


@dataclass
class Hosts:
    """Two hosts, and conversations that each of them owns."""

    a: Desk
    b: Desk
    names: Iterator[str]

    def owned_by(self, desk: Desk) -> str:
        """A conversation that nobody used, whose turns run at *desk*."""
        return next(name for name in self.names if desk.host.backend.owns(name))


StartHosts = Callable[..., Awaitable[Hosts]]


def backend_of(desk: Desk) -> RedisBackend:
    backend = desk.host.backend
    assert isinstance(backend, RedisBackend)
    return backend


async def settled(*desks: Desk) -> None:
    """Every partition has one owner among *desks*, and that one is whom it should have."""

    def shared_out() -> bool:
        backends = [backend_of(desk) for desk in desks]
        names = tuple(backends[0].members.alive)
        if len(names) != len(desks) or any(tuple(sorted(b.members.alive)) != tuple(sorted(names)) for b in backends):
            return False
        return all(
            [b.me for b in backends if b.partitions.all[number].mine] == [backends[0].members.owner_of(number, names)]
            for number in range(len(backends[0].partitions.all))
        )

    await wait_until(shared_out, "the partitions are shared out")


@pytest.fixture
async def start_hosts(start_desk: StartDesk, redis: RedisServer) -> StartHosts:
    """Start two hosts with the same plugins on one Redis."""

    async def start(plugins: dict[str, str] | None = None, **config: Any) -> Hosts:
        url = f"{redis.url}?partitions=32"
        plugins = plugins or {"talker.py": TALKER}
        a = await start_desk(plugins, backend=url, **config)
        b = await start_desk(plugins, backend=url, **config)
        await settled(a, b)
        return Hosts(a, b, (f"c{number}" for number in range(10_000)))

    return start


@pytest.fixture
async def hosts(start_hosts: StartHosts) -> Hosts:
    """Two hosts with a bot that says what it heard, waits at a gate, streams words, or counts."""
    return await start_hosts()
