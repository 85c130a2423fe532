"""What the tests of the model server stand on: a plain HTTP client, the official one, and ways to read what they get.

Not a `conftest.py`: who puts this folder on the path for the server's sake would find that one before their own.
"""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import openai
import pytest
from model_server import ModelServer, Script, Seen

MESSAGES: list[Any] = [{"role": "user", "content": "hello"}]
ORDER_TOOL = {
    "type": "function",
    "function": {
        "name": "order_status",
        "parameters": {"type": "object", "properties": {"order": {"type": "string"}}, "required": ["order"]},
    },
}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


class Asking:
    """A server, and a plain client that asks it."""

    def __init__(self, server: ModelServer, http: aiohttp.ClientSession) -> None:
        self.server = server
        self.http = http

    def post(self, model: str = "m", messages: list[Any] = MESSAGES, **more: Any) -> Any:
        body = {"model": model, "messages": messages, **more}
        return self.http.post(f"{self.server.base_url}/chat/completions", json=body)

    async def read(self, script: Script | None = None, **more: Any) -> bytes:
        """The whole body of a streamed answer."""
        if script is not None:
            self.server.next(script)
        async with self.post(**{"stream": True, **more}) as response:
            return await response.read()  # type: ignore[no-any-return]

    async def events(self, script: Script | None = None, **more: Any) -> list[Any]:
        """The events of a streamed answer, the last as text."""
        return events_of(await self.read(script, **more))

    async def broken(self, script: Script, **more: Any) -> bytes:
        """What came of an answer that breaks off."""
        self.server.next(script)
        got = b""
        async with self.post(**{"stream": True, **more}) as response:
            try:
                async for data in response.content.iter_any():
                    got += data
            except (aiohttp.ClientPayloadError, aiohttp.ClientOSError):
                return got
        raise AssertionError("the answer did not break off")

    async def whole(self, script: Script | None = None, **more: Any) -> dict[str, Any]:
        if script is not None:
            self.server.next(script)
        async with self.post(**more) as response:
            return await response.json()  # type: ignore[no-any-return]

    @property
    def last(self) -> Seen:
        return self.server.requests[-1]


def events_of(body: bytes) -> list[Any]:
    datas = [line[6:] for line in body.replace(b"\r\n", b"\n").split(b"\n") if line.startswith(b"data: ")]
    return [data.decode() if data == b"[DONE]" else json.loads(data) for data in datas]


def deltas_of(events: list[Any], index: int = 0) -> list[dict[str, Any]]:
    chunks = [event for event in events if isinstance(event, dict) and "choices" in event]
    return [choice["delta"] for event in chunks for choice in event["choices"] if choice["index"] == index]


def texts_of(events: list[Any], key: str = "content", index: int = 0) -> list[str]:
    return [delta[key] for delta in deltas_of(events, index) if delta.get(key)]


@pytest.fixture(name="asking")
async def make_asking() -> AsyncIterator[Asking]:
    async with (
        ModelServer(Script(text="Hello there, friend"), tokens_per_second=0) as server,
        aiohttp.ClientSession() as http,
    ):
        yield Asking(server, http)


@pytest.fixture(name="client")
async def make_client(asking: Asking) -> AsyncIterator[openai.AsyncOpenAI]:
    """The official client, without retries of its own."""
    async with openai.AsyncOpenAI(base_url=asking.server.base_url, api_key="key", max_retries=0) as made:
        yield made
    await asyncio.sleep(0)
    gc.collect()
