"""Images through the doors: refused at the door or kept, in the record by a URL, and read by whoever may."""

from __future__ import annotations

import asyncio
import hashlib
import json
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest
from tests.web.visitors import (
    Answer,
    assert_error_frame,
    assert_one_shape,
    exchange,
    open_desk,
    raw_socket,
    request_bytes,
)

from conftest import ADMIN_TOKEN, Desk, StartDesk, echo, wait_until
from hotdesk_sdk import Attachment
from hotdesk_sdk.testing import Desk as PluginDesk
from pictures import FORMATS, encoded, noise, picture, png

SHOW = """
import msgspec
from hotdesk_sdk import hookimpl

@hookimpl
async def respond(turn):
    return msgspec.json.encode(turn.message.attachments).decode()
"""


def image(data: bytes, **fields: Any) -> dict[str, Any]:
    return {"type": "image", "data": encoded(data), **fields}


async def fetched(desk: Desk, url: str, **headers: str) -> Answer:
    async with desk.http.get(desk.url + url, headers=headers) as response:
        return Answer(
            response.status,
            {name.lower(): value for name, value in response.headers.items()},
            await response.read(),
        )


# -- into the record -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
async def test_an_upload_is_in_the_record_by_its_url(kind: str, start_desk: StartDesk) -> None:
    """The record, the hook and the events have the URL and what its bytes are; nowhere is base64, and no claim."""
    desk = await start_desk({"show.py": SHOW})
    data = picture(kind, (31, 17))
    hash = hashlib.sha256(data).hexdigest()
    lies = {"mime": "text/html", "hash": "0" * 64, "width": 1, "height": 1, "bytes": 1}
    reply = await desk.reply("", quote("a/b ü", safe=""), attachments=[image(data, **lies)])
    expected = {
        "type": "image", "url": f"/v1/conversations/{quote('a/b ü', safe='')}/images/{hash}", "mime": FORMATS[kind],
        "hash": hash, "width": 31, "height": 17, "bytes": len(data),
    }  # fmt: skip
    assert reply is not None
    assert json.loads(reply) == [expected]
    record = await desk.record(quote("a/b ü", safe=""))
    assert record[0]["attachments"] == [expected]
    answer = await fetched(desk, expected["url"])
    assert (answer.status, answer.body) == (200, data)


async def test_a_url_is_kept_as_it_is(start_desk: StartDesk) -> None:
    """Nothing is asked of it; a claim of its type stays a claim, what can't be one is dropped."""
    desk = await start_desk()
    sent = [
        {"type": "image", "url": "https://shop.example/a.png?b=c#d", "mime": "image/png", "hash": "0" * 64, "width": 9},
        {"type": "image", "url": "https://shop.example/b", "mime": "text/html"},
    ]
    await desk.say("look", attachments=sent)
    assert (await desk.record())[0]["attachments"] == [
        {"type": "image", "url": "https://shop.example/a.png?b=c#d", "mime": "image/png"},
        {"type": "image", "url": "https://shop.example/b"},
    ]


async def test_no_image_is_in_the_journal(start_desk: StartDesk, tmp_path: Path) -> None:
    """The journal holds the hash, and not a byte of the image."""
    desk = await start_desk(data=tmp_path / "data")
    data = noise(100_000)
    await desk.say("x", attachments=[image(data)])
    for path in (tmp_path / "data").glob("hotdesk.db*"):
        assert encoded(data)[1000:1100].encode() not in path.read_bytes()


async def test_a_desk_of_a_plugins_own_test_takes_images(tmp_path: Path) -> None:
    """`Desk.say(attachments=…)` goes the same way."""
    (tmp_path / "show.py").write_text(SHOW)
    async with PluginDesk.with_plugin(tmp_path / "show.py") as desk:
        said = await desk.say("look", attachments=[Attachment("image", data=encoded(picture("GIF")))])
    assert json.loads(said.text)[0]["mime"] == "image/gif"


async def test_a_webhooks_images_are_checked_too(start_desk: StartDesk) -> None:
    """What an `intake` hook found is kept as an upload is, and refused as one is."""
    desk = await start_desk(
        {
            "hook.py": "from hotdesk_sdk import hookimpl\n\n@hookimpl\nasync def intake(request):\n"
            "    image = {'type': 'image', 'data': request.text()}\n"
            "    return [{'conversation': 'c', 'text': 'x', 'attachments': [image]}]\n"
        }
    )
    async with desk.http.post(f"{desk.url}/hooks/hook", data=encoded(picture())) as response:
        assert response.status == 202
    assert (await desk.record())[0]["attachments"][0]["mime"] == "image/png"
    async with desk.http.post(f"{desk.url}/hooks/hook", data="aGVsbG8=") as response:
        assert (await response.json())["error"]["code"] == "bad_attachment"


# -- refused -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refused:
    """Attachments that are not taken, the code that says so, and a word of the reason."""

    name: str
    code: str
    word: str
    attachments: list[dict[str, Any]]


LIMIT = 150_000
REFUSED = (
    Refused("text", "bad_attachment", "no PNG", [image(b"hello")]),
    Refused("text_that_claims_png", "bad_attachment", "no PNG", [image(b"<html>", mime="image/png")]),
    Refused("svg", "bad_attachment", "no PNG", [image(b"<svg xmlns='http://www.w3.org/2000/svg'/>")]),
    Refused("empty", "bad_attachment", "no PNG", [image(b"")]),
    Refused("header_cut_short", "bad_attachment", "header", [image(png(9, 9)[:30])]),
    Refused("too_many_pixels", "bad_attachment", "pixels", [image(png(20_000, 20_000, b"x"))]),
    Refused("no_base64", "bad_attachment", "base64", [{"type": "image", "data": "not base64!"}]),
    Refused("large_no_base64", "bad_attachment", "base64", [{"type": "image", "data": "ab*d" * 40_000}]),
    Refused("large_no_image", "bad_attachment", "no PNG", [image(bytes(LIMIT))]),
    Refused("too_large", "too_large", "over 150000 bytes", [image(png(9, 9, bytes(LIMIT)))]),
    Refused("data_url_of_percents", "bad_attachment", "data: url", [{"type": "image", "url": "data:image/png,%89PNG"}]),
    Refused("data_url_of_text", "bad_attachment", "no PNG", [{"type": "image", "url": "data:image/png;base64,aGk="}]),
    Refused("second_of_two", "bad_attachment", "attachments[1]", [image(picture()), image(b"hello")]),
    Refused("file_url", "bad_attachment", "http", [{"type": "image", "url": "file:///etc/passwd"}]),
    Refused("relative_url", "bad_attachment", "http", [{"type": "image", "url": "/v1/conversations/c/images/0"}]),
    Refused("url_inside", "bad_attachment", "inside", [{"type": "image", "url": "http://169.254.169.254/latest"}]),
    Refused("url_with_password", "bad_attachment", "password", [{"type": "image", "url": "http://a:b@shop.example/"}]),
    Refused("long_url", "bad_attachment", "2048", [{"type": "image", "url": "https://shop.example/" + "a" * 2048}]),
    Refused("nine", "bad_message", "length", [{"type": "image", "url": "https://shop.example/"}] * 9),
)  # fmt: skip


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
async def test_an_attachment_is_refused_at_the_door(case: Refused, start_desk: StartDesk) -> None:
    """Over HTTP and over a WebSocket: one clear error, nothing in the journal, and no file."""
    desk = await start_desk(max_image_bytes=LIMIT)
    body = {"text": "x", "id": "m", "attachments": case.attachments}
    answer = await exchange(
        desk.url,
        request_bytes(
            "POST", "/v1/conversations/c/messages", {"Content-Type": "application/json"}, json.dumps(body).encode()
        ),
    )
    assert_one_shape(answer, case.code)
    assert case.word in answer.json()["error"]["message"]
    async with raw_socket(desk.url, "conversation=c") as visitor:
        visitor.say("x", id="m", attachments=case.attachments)
        frame = await visitor.receive_json()
        assert_error_frame(frame, case.code)
        assert case.word in frame["message"]
        if case.code != "bad_message":
            assert frame["to"] == "m"
        visitor.say("next", id="n")
        assert await visitor.receive_json() == {"type": "accepted", "id": "n", "seq": 1}
    kept = {path.name for path in Path(desk.host.config.data).glob("images/*/*") if path.is_file()}
    assert not kept


# -- in order ------------------------------------------------------------------------------------------------------


async def test_messages_stay_in_order_whatever_comes_with_them(start_desk: StartDesk) -> None:
    """Frames of one socket, with images new and known, large and small, bad ones, URLs and none, all at once: the
    seq of each is in the order of sending, in each of four conversations."""
    desk = await start_desk({"echo.py": echo(1)})
    known = noise(3_000)

    async def visit(conversation: str) -> None:
        async with desk.http.ws_connect(f"{desk.url}/v1/ws?conversation={conversation}", max_msg_size=0) as visitor:
            good, frames = [], []
            for number in range(120):
                id = f"{conversation}-{number}"
                attachments = {
                    0: [image(noise(200_000 if number % 28 else 1_000_000))],
                    1: [image(known)],
                    2: [],
                    3: [image(b"bad" * (10 if number % 2 else 60_000))],
                    4: [{"type": "image", "url": "https://shop.example/"}],
                    5: [image(noise(500)), image(known)],
                    6: [],
                }[number % 7]
                if number % 7 != 3:
                    good.append(id)
                frames.append({"type": "message", "id": id, "text": str(number), "attachments": attachments})
            for frame in frames:
                await visitor.send_str(json.dumps(frame))
            accepted, errors = [], []
            while len(accepted) + len(errors) < len(frames):
                heard = await visitor.receive_json(timeout=20)
                if heard["type"] == "accepted":
                    accepted.append((heard["seq"], heard["id"]))
                elif heard["type"] == "error":
                    errors.append(heard["to"])
            assert [id for _, id in accepted] == good
            assert accepted == sorted(accepted)
            assert len(errors) == len(frames) - len(good)

    await asyncio.gather(*(visit(f"c{n}") for n in range(4)))
    await wait_until(lambda: desk.host.turns.live == 0, "all turns ended")
    for n in range(4):
        record = await desk.record(f"c{n}")
        said = [entry["text"] for entry in record if entry["type"] == "message"]
        assert said == sorted(said, key=int)
        assert [entry["text"] for entry in record if entry["type"] == "reply"] == [f"1: {text}" for text in said]


# -- the door of images --------------------------------------------------------------------------------------------


async def test_an_image_is_served_as_what_it_is_and_may_do_nothing(desk: Desk) -> None:
    """The checked type, no guessing, a sandbox, and a cache for good; asked for again by its tag, 304."""
    data = picture("GIF") + b"<script>alert(1)</script>"
    await desk.say("x", attachments=[image(data, mime="text/html")])
    url = (await desk.record())[0]["attachments"][0]["url"]
    answer = await fetched(desk, url)
    assert (answer.status, answer.body) == (200, data)
    assert answer.headers["content-type"] == "image/gif"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["content-security-policy"] == "sandbox"
    assert answer.headers["cache-control"] == "private, max-age=31536000, immutable"
    again = await fetched(desk, url, **{"If-None-Match": answer.headers["etag"]})
    assert (again.status, again.body) == (304, b"")


async def test_only_its_own_conversation_shows_an_image(desk: Desk) -> None:
    """Another conversation's URL, one that never was, and what is no hash are all 404."""
    await desk.say("x", "mine", attachments=[image(picture())])
    await desk.say("x", "other")
    url = (await desk.record("mine"))[0]["attachments"][0]["url"]
    for wrong in (
        url.replace("/mine/", "/other/"),
        url.replace("/mine/", "/never/"),
        url[:-1] + ("0" if url[-1] != "0" else "1"),
        url[:-1],
        url.upper().replace("/V1/CONVERSATIONS/MINE/IMAGES", "/v1/conversations/mine/images"),
        "/v1/conversations/mine/images/..%2f..%2fhotdesk.db",
    ):
        answer = await fetched(desk, wrong)
        assert_one_shape(answer, "not_found")
    await desk.say("x", "other", attachments=[image(await body_of(desk, url))])
    assert (await fetched(desk, url.replace("/mine/", "/other/"))).status == 200


async def body_of(desk: Desk, url: str) -> bytes:
    return (await fetched(desk, url)).body


async def test_an_image_wants_the_token_that_the_record_wants(start_desk: StartDesk) -> None:
    """Without a token 401, with another conversation's 403, with the right one, in the header or the query, 200."""
    desk = await start_desk({"echo.py": echo(1)}, visitor_tokens=True, allowed_origins=("https://shop.example",))
    tokens = {
        name: (await desk.admin("POST", "tokens", 201, json={"conversation": name, "visitor": "v"}))["token"]
        for name in ("c", "d")
    }
    async with desk.http.post(
        f"{desk.url}/v1/conversations/c/messages",
        params={"wait": "5"},
        json={"text": "x", "attachments": [image(picture())]},
        headers={"Authorization": f"Bearer {tokens['c']}"},
    ) as response:
        assert response.status == 200
    message = (await desk.host.backend.read("c", 0, 1) or [])[0]
    url = message.attachments[0].url  # type: ignore[union-attr]
    assert url is not None
    assert_one_shape(await fetched(desk, url), "unauthorized")
    assert_one_shape(await fetched(desk, url, Authorization=f"Bearer {tokens['d']}"), "forbidden")
    assert (await fetched(desk, url, Authorization=f"Bearer {tokens['c']}")).status == 200
    assert (await fetched(desk, f"{url}?token={tokens['c']}")).status == 200
    assert_one_shape(
        await fetched(desk, f"{url}?token={tokens['c']}", Origin="https://evil.example"), "origin_not_allowed"
    )
    allowed = await fetched(desk, f"{url}?token={tokens['c']}", Origin="https://shop.example")
    assert allowed.headers["access-control-allow-origin"] == "https://shop.example"


async def test_an_image_is_there_after_a_restart(tmp_path: Path) -> None:
    """In its conversation, and in no other."""
    data = noise(150_000)
    async with open_desk(tmp_path) as desk:
        await desk.say("x", attachments=[image(data), image(data)])
    async with open_desk(tmp_path) as desk:
        url = (await desk.record())[0]["attachments"][1]["url"]
        assert await body_of(desk, url) == data
        assert (await fetched(desk, url.replace("/c/", "/d/"))).status == 404
        await desk.say("x", "d", attachments=[image(data)])
        assert await body_of(desk, url.replace("/c/", "/d/")) == data


@asynccontextmanager
async def running_host(home: Path) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """A host in a process of its own, to be killed."""
    (home / "plugins").mkdir(exist_ok=True)
    script = (
        "import asyncio, sys\nfrom hotdesk.app import open_host\nfrom hotdesk.config import Config\n"
        "async def main():\n"
        f"    config = Config(plugins=({str(home / 'plugins')!r},), data={str(home / 'data')!r}, port=0,"
        f" admin_token={ADMIN_TOKEN!r})\n"
        "    async with open_host(config, log_events=False) as host:\n"
        "        sys.stderr.write(host.url + '\\n')\n        sys.stderr.flush()\n        await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
    )
    try:
        assert process.stderr is not None
        while True:
            line = (await asyncio.wait_for(process.stderr.readline(), 20)).decode().strip()
            assert line, "the host ended"
            if line.startswith("http://"):
                break
        yield process, line
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def test_a_killed_host_has_the_image_of_every_accepted_message(tmp_path: Path) -> None:
    """kill -9 amid uploads: whatever the record shows afterwards is there, whole; and what was accepted is shown."""
    accepted: list[str] = []
    async with running_host(tmp_path) as (process, url), aiohttp.ClientSession() as http:

        async def send(lane: int) -> None:
            for number in range(1000):
                id = f"{lane}-{number}"
                body = {"text": "x", "id": id, "attachments": [image(noise(20_000 + lane * 60_000))]}
                async with http.post(f"{url}/v1/conversations/c/messages", json=body) as response:
                    assert response.status == 202
                accepted.append(id)
                if len(accepted) == 60:
                    process.send_signal(signal.SIGKILL)

        outcomes = await asyncio.gather(*(send(lane) for lane in range(4)), return_exceptions=True)
        assert all(isinstance(outcome, aiohttp.ClientError | ConnectionError) for outcome in outcomes), outcomes
    async with open_desk(tmp_path) as desk:
        record = await desk.record()
        assert {entry["id"] for entry in record} >= set(accepted)
        assert len(accepted) >= 60
        for entry in record:
            (attachment,) = entry["attachments"]
            body = await body_of(desk, attachment["url"])
            assert hashlib.sha256(body).hexdigest() == attachment["hash"]
