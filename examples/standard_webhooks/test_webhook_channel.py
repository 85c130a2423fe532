"""The channel against an independent signer and verifier, and a real server that receives the replies."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from standardwebhooks import Webhook

from hotdesk.app import open_host
from hotdesk.config import Config, PluginSettings
from hotdesk_sdk.testing import Desk

HERE = Path(__file__).parent
SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()
OTHER_SECRET = "whsec_" + base64.b64encode(bytes(range(1, 33))).decode()
ECHO = "from hotdesk_sdk import hookimpl\n@hookimpl\nasync def respond(turn):\n    return f'heard: {turn.text}'\n"


def body_of(text: str = "hello", **fields: Any) -> str:
    return json.dumps({"type": "message.created", "data": {"conversation": "ann", "text": text, **fields}})


def headers_of(body: str, *, id: str = "msg_1", secret: str = SECRET, age_s: float = 0) -> dict[str, str]:
    at = datetime.now(tz=UTC) - timedelta(seconds=age_s)
    return {
        "webhook-id": id,
        "webhook-timestamp": str(int(at.timestamp())),
        "webhook-signature": Webhook(secret).sign(id, at, body),
    }


@asynccontextmanager
async def channel(refuse_first: int = 0) -> AsyncIterator[tuple[str, asyncio.Queue[Any]]]:
    """A stand-in for the channel: its address, and the replies that it got and found well signed."""
    got: asyncio.Queue[Any] = asyncio.Queue()
    refusals = iter(range(refuse_first))

    async def receive(request: web.Request) -> web.Response:
        if next(refusals, None) is not None:
            return web.Response(status=503)
        got.put_nowait(Webhook(SECRET).verify(await request.read(), dict(request.headers)))
        return web.Response(status=204)

    app = web.Application()
    app.router.add_post("/replies", receive)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/replies", got
    finally:
        await runner.cleanup()


@asynccontextmanager
async def host(folder: Path, url: str) -> AsyncIterator[str]:
    """A host with this channel and a bot: the address of the webhook door."""
    plugins = folder / "plugins"
    plugins.mkdir()
    for name in ("webhook_channel.py", "webhook_channel.toml"):
        (plugins / name).write_bytes((HERE / name).read_bytes())
    (plugins / "echo.py").write_text(ECHO)
    settings = PluginSettings(grant=("http:127.0.0.1",), config={"secret": SECRET, "url": url})
    config = Config(
        plugins=(str(plugins),), data=str(folder / "data"), port=0, plugin_settings={"webhook_channel": settings}
    )
    async with open_host(config) as running:
        yield f"{running.url}/hooks/webhook_channel"


async def test_a_signed_message_is_answered_with_a_signed_reply(tmp_path: Path) -> None:
    """A message comes in by webhook, and its reply leaves by one; each side believes the other's signature."""
    body = body_of(sender={"id": "ann", "name": "Ann"})
    async with channel() as (url, got), host(tmp_path, url) as door, aiohttp.ClientSession() as http:
        async with http.post(door, data=body, headers=headers_of(body)) as response:
            assert response.status == 202
        reply = await got.get()
    assert reply["type"] == "reply.created"
    assert reply["data"] == {"conversation": "ann", "to": "msg_1", "text": "heard: hello"}


async def test_a_webhook_that_is_sent_twice_counts_once(tmp_path: Path) -> None:
    """The webhook's id is the message's: a repeat is accepted again and answered once."""
    body, after = body_of("once"), body_of("after")
    async with channel() as (url, got), host(tmp_path, url) as door, aiohttp.ClientSession() as http:
        for sent, id in ((body, "msg_1"), (body, "msg_1"), (after, "msg_2")):
            async with http.post(door, data=sent, headers=headers_of(sent, id=id)) as response:
                assert response.status == 202
        replies = [await got.get(), await got.get()]
    assert [reply["data"]["text"] for reply in replies] == ["heard: once", "heard: after"]


async def test_a_reply_that_the_channel_refuses_is_tried_again(tmp_path: Path) -> None:
    """A channel that is down for a moment gets its replies later, in order."""
    first, second = body_of("1"), body_of("2")
    async with channel(refuse_first=2) as (url, got), host(tmp_path, url) as door, aiohttp.ClientSession() as http:
        for sent, id in ((first, "msg_1"), (second, "msg_2")):
            async with http.post(door, data=sent, headers=headers_of(sent, id=id)) as response:
                assert response.status == 202
        replies = [await got.get(), await got.get()]
    assert [reply["data"]["text"] for reply in replies] == ["heard: 1", "heard: 2"]


FORGERIES: dict[str, dict[str, str | None]] = {
    "no id": {"webhook-id": None},
    "another id": {"webhook-id": "msg_2"},
    "no timestamp": {"webhook-timestamp": None},
    "a timestamp that is no number": {"webhook-timestamp": "now"},
    "a timestamp that was not signed": {"webhook-timestamp": str(int(time.time()) + 60)},
    "no signature": {"webhook-signature": None},
    "an empty signature": {"webhook-signature": ""},
    "a signature that is not ASCII": {"webhook-signature": "v1,é"},
}


@pytest.mark.parametrize("changes", FORGERIES.values(), ids=FORGERIES.keys())
async def test_a_forged_webhook_is_refused(changes: dict[str, str | None]) -> None:
    """A header that is missing or was changed is answered 401, and nothing is taken in."""
    headers = {name: value for name, value in (headers_of(body_of()) | changes).items() if value is not None}
    await assert_refused(headers)


@pytest.mark.parametrize("age_s", [310, -310])
async def test_a_webhook_from_another_time_is_refused(age_s: float) -> None:
    """One that was overheard can't be played again after five minutes."""
    await assert_refused(headers_of(body_of(), age_s=age_s))


async def test_a_signature_for_something_else_is_refused() -> None:
    """Another secret, another body, another version of the scheme."""
    await assert_refused(headers_of(body_of(), secret=OTHER_SECRET))
    await assert_refused(headers_of(body_of("goodbye")))
    headers = headers_of(body_of())
    await assert_refused(headers | {"webhook-signature": headers["webhook-signature"].replace("v1,", "v1a,")})


async def assert_refused(headers: dict[str, str]) -> None:
    async with Desk.with_plugin("webhook_channel.py", config={"secret": SECRET}) as desk:
        taken = await desk.webhook("webhook_channel", body_of(), headers=headers)
    assert (taken.answer.status, list(taken.messages)) == (401, [])
    assert taken.answer.body["error"]["code"] == "signature_invalid"


async def test_one_signature_of_several_is_enough() -> None:
    """While a secret is being changed, a sender signs with the old and the new one."""
    headers, old = headers_of(body_of()), headers_of(body_of(), secret=OTHER_SECRET)
    headers["webhook-signature"] = f"v1a,asymmetric {old['webhook-signature']} {headers['webhook-signature']}"
    async with Desk.with_plugin("webhook_channel.py", config={"secret": SECRET}) as desk:
        [message] = (await desk.webhook("webhook_channel", body_of(), headers=headers)).messages
    assert (message.id, message.conversation, message.text) == ("msg_1", "webhook-ann", "hello")


@pytest.mark.parametrize(("body", "code"), [("{", "bad_json"), ('{"type": "message.created"}', "bad_message")])
async def test_a_signed_body_that_is_no_event_is_refused(body: str, code: str) -> None:
    """A good signature does not make a good body."""
    async with Desk.with_plugin("webhook_channel.py", config={"secret": SECRET}) as desk:
        taken = await desk.webhook("webhook_channel", body, headers=headers_of(body))
    assert (taken.answer.status, taken.answer.body["error"]["code"]) == (400, code)


@pytest.mark.parametrize("secret", ["", "whsec_c2hvcnQ=", "whsec_***", 7])
async def test_without_a_good_secret_it_does_not_serve(secret: object) -> None:
    """A channel that can't verify must not take messages."""
    with pytest.raises(Exception, match="secret"):
        async with Desk.with_plugin("webhook_channel.py", config={"secret": secret}):
            pass


async def test_the_channel_of_the_readme_gets_its_answer(tmp_path: Path) -> None:
    """The stand-in channel of README.md sends a message and gets the reply."""
    [source] = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {"__name__": "channel"}
    exec(source, names)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    async with host(tmp_path, f"http://127.0.0.1:{port}/replies") as door:
        assert await names["main"](SECRET, "hello", door, port) == "heard: hello"
