"""A message that ends its worker whenever it is tried is given up in the end, and harms no other."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from tests.load.hosts import ADMIN_TOKEN, Server, host_on
from tests.redis_servers.server import RedisServer

from conftest import wait_until

POISON = """
import os, signal
from hotdesk_sdk import hookimpl

@hookimpl
async def respond(turn):
    if turn.text == "poison" and not os.path.exists("antidote"):
        os.kill(os.getpid(), signal.SIGKILL)
    return f"heard {turn.text}"
"""


@pytest.fixture(params=["sqlite", "redis"])
async def server(request: pytest.FixtureRequest, tmp_path: Path, redis: RedisServer) -> AsyncIterator[Server]:
    """A host in a process of its own, whose bot kills it for one word."""
    made = host_on(tmp_path, {"bot.py": POISON})
    if request.param == "redis":
        made.command.extend(["--backend", f"{redis.url}?partitions=8"])
    yield made
    await made.stop()


async def post(http: aiohttp.ClientSession, server: Server, conversation: str, body: dict[str, Any]) -> dict[str, Any]:
    url = f"http://127.0.0.1:{server.port}/v1/conversations/{conversation}/messages"
    async with http.post(url, json=body) as response:
        return await response.json()  # type: ignore[no-any-return]


async def record(http: aiohttp.ClientSession, server: Server, conversation: str) -> list[dict[str, Any]]:
    url = f"http://127.0.0.1:{server.port}/v1/conversations/{conversation}/messages"
    async with http.get(url) as response:
        return (await response.json())["messages"]  # type: ignore[no-any-return]


@pytest.mark.slow
async def test_poison_becomes_a_dead_letter(server: Server) -> None:
    """A turn that kills its worker is tried `max_tries` times; then its conversation goes on, and so do all others."""
    async with aiohttp.ClientSession() as http:
        await server.start()
        with contextlib.suppress(aiohttp.ServerDisconnectedError):  # it may die before its answer is out
            await post(http, server, "bad", {"text": "poison", "id": "m"})
        deaths = 0
        while True:
            await server.wait_ended(10.0)
            deaths += 1
            assert deaths <= 5, "it is tried for ever"
            try:
                await server.start()
                for name in ("good", "bad"):
                    await post(http, server, name, {"text": "hello", "id": f"{name}{deaths}"})
                if deaths == 5:
                    break
            except (aiohttp.ClientError, RuntimeError):
                continue  # it died of it before it was asked

        async def answered() -> bool:
            entries = await record(http, server, "bad") + await record(http, server, "good")
            asked = {entry["id"] for entry in entries if entry["type"] == "message"} - {"m"}
            replies = [entry["to"] for entry in entries if entry["type"] == "reply"]
            return {"good5", "bad5"} <= asked and sorted(replies) == sorted(asked)

        await wait_until(answered, "all but the poison is answered, once")
        assert server.running

        [letter] = (await admin(http, server, "GET", "dead-letters"))["dead_letters"]
        assert (letter["conversation"], letter["seq"], letter["id"], letter["tries"]) == ("bad", 1, "m", 5)
        shown = await admin(http, server, "GET", "dead-letters/bad/1")
        assert shown["message"]["text"] == "poison"
        (server.folder / "antidote").touch()
        assert (await admin(http, server, "POST", "dead-letters/bad/1/requeue"))["status"] == "requeued"

        async def healed() -> bool:
            return any(entry.get("to") == "m" for entry in await record(http, server, "bad"))

        await wait_until(healed, "the dead letter is answered")
        assert (await admin(http, server, "GET", "dead-letters"))["dead_letters"] == []
        assert "error" in await admin(http, server, "POST", "dead-letters/bad/1/requeue")


async def admin(http: aiohttp.ClientSession, server: Server, method: str, path: str) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
    async with http.request(method, f"http://127.0.0.1:{server.port}/admin/{path}", headers=headers) as response:
        return await response.json()  # type: ignore[no-any-return]
