"""A host that is killed while its model speaks: after the restart the turn runs again, once."""

from __future__ import annotations

from pathlib import Path

import aiohttp
from model_server import ModelServer, Script
from tests.load.hosts import host_on

from conftest import wait_until

ROOT = Path(__file__).parents[2]


async def test_a_turn_that_was_killed_mid_stream_is_answered_once(tmp_path: Path, model_server: ModelServer) -> None:
    """The visitor sees one reply, the whole one of the second run; the model was asked twice and no more."""
    plugins = {name: (ROOT / "plugins" / name).read_text() for name in ("chatgpt.py", "chatgpt.toml")}
    server = host_on(tmp_path, plugins)
    server._env["HOTDESK_LLM_BASE_URL"] = model_server.base_url
    model_server.next(Script(text="first run, never ends", stall_after=2))
    model_server.default = Script(text="second run, whole")
    await server.start()
    try:
        url = f"http://127.0.0.1:{server.port}"
        async with aiohttp.ClientSession() as http:
            async with http.ws_connect(f"{url}/v1/ws?conversation=c") as socket:
                await socket.send_json({"type": "message", "id": "m", "text": "hello"})
                said = ""
                while said != "first run,":
                    event = await socket.receive_json(timeout=10)
                    said += event["text"] if event["type"] == "chunk" else ""
                await server.kill()
            await wait_until(lambda: model_server.open == 0, "the model saw its client go")
            await server.start()

            async def record() -> list[dict[str, str]]:
                async with http.get(f"{url}/v1/conversations/c/messages") as response:
                    entries = (await response.json())["messages"]
                    return entries if len(entries) > 1 else []

            entries = await wait_until(record, "the reply")
            assert [entry["type"] for entry in entries] == ["message", "reply"]
            assert entries[1]["text"] == "second run, whole"
            body = {"text": "hello", "id": "m"}
            async with http.post(f"{url}/v1/conversations/c/messages?wait=5", json=body) as response:
                assert [reply["text"] for reply in (await response.json())["replies"]] == ["second run, whole"]
            assert len(await record()) == 2
    finally:
        await server.stop()
    assert len(model_server.requests) == 2
