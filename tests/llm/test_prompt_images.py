"""The images of a prompt: fetched side by side, bounded together, and from the public network alone."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
from pathlib import Path
from typing import Any

from model_server import ModelServer, Script
from tests.llm.asking import settings_of
from tests.llm.raw_server import serving

from conftest import StartDesk
from hotdesk.chat.assistant import IMAGES_BYTES
from hotdesk.chat.prompt import MAX_IMAGES
from hotdesk.config import LlmSettings
from pictures import encoded, noise

PLUGINS = Path(__file__).parents[2] / "plugins"
CHATGPT = {name: (PLUGINS / name).read_text() for name in ("chatgpt.py", "chatgpt.toml")}


def parts_of(server: ModelServer) -> list[list[dict[str, Any]]]:
    """The parts of each message of a visitor that has such, in the last request."""
    messages = (server.requests[-1].body or {})["messages"]
    return [m["content"] if isinstance(m["content"], list) else [] for m in messages if m["role"] == "user"]


async def test_dead_images_are_waited_for_together(model_server: ModelServer, start_desk: StartDesk) -> None:
    """Eight of them take as long as one; the visitor is answered, and the model told of them in words."""
    model_server.default = Script(text="ok")
    asked = 0

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        await reader.readuntil(b"\r\n\r\n")
        asked += 1
        await asyncio.sleep(60)

    async with serving(hang) as url:
        place = url.removesuffix("/v1")
        llm = LlmSettings(models={"default": settings_of(model_server.base_url)})
        desk = await start_desk(dict(CHATGPT), llm=llm, image_hosts=(place.removeprefix("http://"),))
        desk.host.images._fetcher._seconds = 0.5  # ten, which this test has not
        images = [{"type": "image", "url": f"{place}/{number}.png"} for number in range(MAX_IMAGES)]
        began = time.monotonic()
        async with asyncio.timeout(8):
            assert await desk.reply("look", attachments=images) == "ok"
        assert 0.45 < time.monotonic() - began < 2
        assert asked == MAX_IMAGES
    content = (model_server.requests[-1].body or {})["messages"][-1]["content"]
    assert content.count("[image: at 127.0.0.1]") == MAX_IMAGES


async def test_the_bytes_of_all_images_together_are_bounded(model_server: ModelServer, start_desk: StartDesk) -> None:
    """The newest go along; those beyond the bound are told in words, and nobody is refused an answer."""
    model_server.default = Script(text="ok")
    llm = LlmSettings(models={"default": settings_of(model_server.base_url)})
    desk = await start_desk(dict(CHATGPT), llm=llm)
    pictures = [noise(IMAGES_BYTES * 3 // 8) for _ in range(4)]
    for data in pictures:
        body = json.dumps({"text": "look", "attachments": [{"type": "image", "data": encoded(data)}]}).encode()
        url = f"{desk.url}/v1/conversations/c/messages?wait=10"
        headers = {"Content-Type": "application/json"}
        async with desk.http.post(url, data=io.BytesIO(body), headers=headers) as response:
            assert (await response.json())["replies"][0]["text"] == "ok"
    assert await desk.reply("and now?") == "ok"
    shown = [
        base64.b64decode(part["image_url"]["url"].partition(",")[2])
        for parts in parts_of(model_server)
        for part in parts
        if part["type"] == "image_url"
    ]
    assert shown == pictures[-2:]
    assert sum(map(len, shown)) <= IMAGES_BYTES
    words = [m["content"] for m in (model_server.requests[-1].body or {})["messages"] if m["role"] == "user"]
    assert [isinstance(content, str) and "[image: PNG" in content for content in words[:2]] == [True, True]
