"""Who may speak: bounds, rates, origins, visitor tokens, the admin token."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from pathlib import Path
from typing import Any

import aiohttp
import jwt
import pytest
from tests.web.visitors import Answer, assert_error_frame, assert_one_shape, open_desk

from conftest import Desk, StartDesk, echo, wait_until
from hotdesk.app import open_host
from hotdesk.config import Config
from hotdesk.errors import ConfigError

SECRET = "a secret of the desk that is long enough"

GATED = """
import asyncio
from hotdesk_sdk import hookimpl

OPEN = asyncio.Event()

@hookimpl
async def routes():
    async def open_gate(request):
        OPEN.set()
        return "open"
    return [("GET", "/open", open_gate)]

@hookimpl
async def respond(turn):
    await OPEN.wait()
    return "at last"
"""


async def ask(desk: Desk, method: str, path: str, **options: Any) -> Answer:
    async with desk.http.request(method, f"{desk.url}{path}", **options) as response:
        return Answer(
            response.status, {name.lower(): value for name, value in response.headers.items()}, await response.read()
        )


async def speak(desk: Desk, text: str = "hi", conversation: str = "c", **options: Any) -> Answer:
    return await ask(desk, "POST", f"/v1/conversations/{conversation}/messages", json={"text": text}, **options)


async def refused_socket(desk: Desk, code: str, headers: dict[str, str] | None = None, **query: str) -> None:
    """The WebSocket door refuses the upgrade with *code*."""
    upgrade = {
        "Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": base64.b64encode(b"0" * 16).decode(), **(headers or {}),
    }  # fmt: skip
    assert_one_shape(await ask(desk, "GET", "/v1/ws", headers=upgrade, params=query), code)


# -- bounds ------------------------------------------------------------------------------------------------------


async def test_beyond_max_turns_nothing_is_accepted(start_desk: StartDesk) -> None:
    """With max_turns under way the next message is refused 503 with Retry-After on every door, and not kept."""
    desk = await start_desk({"gated.py": GATED}, max_turns=3)
    for number in range(3):
        assert (await speak(desk, conversation=f"c{number}")).status == 202
    refused = await speak(desk, conversation="one-too-many")
    assert_one_shape(refused, "overloaded")
    assert int(refused.headers["retry-after"]) >= 1
    streamed = await speak(desk, conversation="one-too-many", headers={"Accept": "text/event-stream"})
    assert_one_shape(streamed, "overloaded")
    async with desk.http.ws_connect(f"{desk.url}/v1/ws", params={"conversation": "one-too-many"}) as ws:
        await ws.send_json({"type": "message", "id": "m", "text": "hi"})
        assert_error_frame(await ws.receive_json(), "overloaded")
    assert await desk.host.backend.record("one-too-many") is None
    assert await desk.host.backend.record("c0") is not None
    await ask(desk, "GET", "/p/gated/open")
    await wait_until(lambda: desk.host.turns.live == 0, "the turns ended")
    assert await desk.reply("hi", "one-too-many") == "at last"


async def test_max_turns_holds_for_a_crowd_at_once(start_desk: StartDesk) -> None:
    """Of 100 messages at one instant, max_turns are accepted and the others refused; each accepted one is answered."""
    desk = await start_desk({"gated.py": GATED}, max_turns=10)
    answers = await asyncio.gather(*(speak(desk, conversation=f"c{number}") for number in range(100)))
    assert sorted(answer.status for answer in answers) == [202] * 10 + [503] * 90
    await ask(desk, "GET", "/p/gated/open")
    await wait_until(lambda: desk.host.turns.live == 0, "the turns ended")


async def test_a_message_that_can_not_be_kept_takes_no_room(start_desk: StartDesk) -> None:
    """A webhook whose message is no Unicode fails, again and again, without ever using up max_turns."""
    source = (
        "from hotdesk_sdk import InboundMessage, hookimpl\n"
        "@hookimpl\nasync def intake(request):\n"
        "    return [InboundMessage('c', '\\ud800')]\n"
    )
    desk = await start_desk({"bad.py": source, "echo.py": echo(1)}, max_turns=3)
    for _ in range(10):
        assert_one_shape(await ask(desk, "POST", "/hooks/bad"), "plugin_failed")
    assert await desk.reply() == "1: hello"


async def test_a_sender_over_its_rate_is_told_when_to_come_back(start_desk: StartDesk) -> None:
    """Over rate_per_minute a sender gets 429 with Retry-After, and nothing is kept; other senders go on."""
    desk = await start_desk({"echo.py": echo(1)}, rate_per_minute=6, rate_burst=3)

    async def send(sender: str) -> Answer:
        return await ask(
            desk,
            "POST",
            "/v1/conversations/c/messages",
            json={"text": "hi", "sender": {"id": sender}},
            params={"wait": "5"},
        )

    assert [(await send("ann")).status for _ in range(3)] == [200] * 3
    refused = await send("ann")
    assert_one_shape(refused, "rate_limited")
    assert 1 <= int(refused.headers["retry-after"]) <= 10
    assert (await send("bob")).status == 200
    assert len(await desk.record()) == 8
    async with desk.http.ws_connect(f"{desk.url}/v1/ws", params={"conversation": "c"}) as ws:
        await ws.send_json({"type": "message", "id": "m", "text": "hi", "sender": {"id": "ann"}})
        assert_error_frame(await ws.receive_json(), "rate_limited")


async def test_without_a_sender_the_address_counts(start_desk: StartDesk) -> None:
    """Who gives no sender id is limited by the address it comes from."""
    desk = await start_desk({"echo.py": echo(1)}, rate_per_minute=1, rate_burst=2)
    assert [(await speak(desk)).status for _ in range(4)] == [202, 202, 429, 429]


async def test_many_senders_take_little_memory(start_desk: StartDesk) -> None:
    """Senders whose allowance is remembered are bounded, however many come."""
    from hotdesk.web.access import MAX_BUCKETS, Access

    desk = await start_desk()
    access = Access(Config(rate_per_minute=1, data=desk.host.config.data, admin_token="long enough"))
    started = time.monotonic()
    for number in range(3 * MAX_BUCKETS):
        access.check_rate(f"sender {number}")
    assert len(access._buckets) <= MAX_BUCKETS + 1
    assert time.monotonic() - started < 5


async def test_limits_are_settings(start_desk: StartDesk) -> None:
    """max_text_bytes and max_body_bytes bound what is taken, on HTTP and on the WebSocket."""
    desk = await start_desk({"echo.py": echo(1)}, max_text_bytes=10, max_body_bytes=1000)
    assert await desk.reply("x" * 10) == "1: xxxxxxxxxx"
    assert_one_shape(await speak(desk, "x" * 11), "too_large")
    assert_one_shape(await speak(desk, "漢" * 4), "too_large")
    assert_one_shape(await speak(desk, "x" * 2000), "too_large")
    async with desk.http.ws_connect(f"{desk.url}/v1/ws", params={"conversation": "c"}) as ws:
        await ws.send_json({"type": "message", "id": "m", "text": "x" * 11})
        assert_error_frame(await ws.receive_json(), "too_large")
        await ws.send_json({"type": "message", "id": "m", "text": "x" * 2000})
        assert_error_frame(await ws.receive_json(), "too_large")
        assert (await ws.receive()).type is aiohttp.WSMsgType.CLOSE
        assert ws.close_code == 1009
    assert_one_shape(await ask(desk, "POST", "/hooks/nobody", data=b"x" * 2000), "too_large")


# -- origins -----------------------------------------------------------------------------------------------------


async def test_pages_of_other_origins_may_not_speak(start_desk: StartDesk) -> None:
    """A page's Origin must be the desk's own or in allowed_origins, on every visitor door."""
    desk = await start_desk({"echo.py": echo(1)}, allowed_origins=("https://shop.example",))
    own = desk.url
    for origin in (own, own.upper(), "https://shop.example", "HTTPS://SHOP.example"):
        assert (await speak(desk, headers={"Origin": origin})).status == 202, origin
        async with desk.http.ws_connect(
            f"{desk.url}/v1/ws", params={"conversation": "of sockets"}, headers={"Origin": origin}
        ) as ws:
            await ws.send_json({"type": "ping"})
            assert (await ws.receive_json())["type"] == "pong"
    for origin in ("https://evil.example", "null", "https://shop.example.evil", "http://shop.example", "//", ""):
        headers = {"Origin": origin}
        assert_one_shape(await speak(desk, headers=headers), "origin_not_allowed")
        for path in ("messages", "events"):
            assert_one_shape(
                await ask(desk, "GET", f"/v1/conversations/c/{path}", headers=headers), "origin_not_allowed"
            )
        await refused_socket(desk, "origin_not_allowed", headers, conversation="c")


async def test_a_star_allows_every_origin(start_desk: StartDesk) -> None:
    """`allowed_origins = ["*"]` lets every page speak."""
    desk = await start_desk({"echo.py": echo(1)}, allowed_origins=("*",))
    assert (await speak(desk, headers={"Origin": "https://any.example"})).status == 202


# -- visitor tokens ----------------------------------------------------------------------------------------------


def token(conversation: str = "c", *, secret: str = SECRET, **claims: Any) -> str:
    body = {"sub": "ann", "conv": conversation, "exp": int(time.time()) + 60, **claims}
    return jwt.encode({name: value for name, value in body.items() if value is not None}, secret, algorithm="HS256")


def forged_without_signature() -> str:
    def part(document: dict[str, Any]) -> str:
        return base64.urlsafe_b64encode(json.dumps(document).encode()).rstrip(b"=").decode()

    claims = {"sub": "ann", "conv": "c", "exp": int(time.time()) + 60}
    return f"{part({'alg': 'none', 'typ': 'JWT'})}.{part(claims)}."


BAD_TOKENS = {
    "none": "",
    "garbage": "garbage",
    "no_text": "\udcff\udcfe",
    "other_secret": token(secret="another secret that is also long enough"),
    "expired": token(exp=int(time.time()) - 1),
    "no_expiry": token(exp=None),
    "no_conversation": token(conv=None),
    "no_visitor": token(sub=None),
    "not_yet": token(nbf=int(time.time()) + 1000),
    "alg_none": forged_without_signature(),
    "other_algorithm": jwt.encode(
        {"sub": "a", "conv": "c", "exp": int(time.time()) + 60}, SECRET * 2, algorithm="HS512"
    ),
}


async def test_every_visitor_door_needs_a_token(start_desk: StartDesk) -> None:
    """With visitor_tokens on, every visitor door wants a token that is signed, in time and for the conversation."""
    desk = await start_desk({"echo.py": echo(1)}, visitor_tokens=True, visitor_secret=SECRET)
    good = {"Authorization": f"Bearer {token()}"}
    assert (await speak(desk, headers=good)).status == 202
    wrong = {}
    cases = {name: ("unauthorized", value) for name, value in BAD_TOKENS.items()}
    cases["other_conversation"] = ("forbidden", token("d"))
    for name, (code, value) in cases.items():
        headers = {"Authorization": f"Bearer {value}"} if value else {}
        try:
            assert_one_shape(await speak(desk, headers=headers), code)
            assert_one_shape(await speak(desk, headers=headers | {"Accept": "text/event-stream"}), code)
            for path in ("messages", "events"):
                assert_one_shape(await ask(desk, "GET", f"/v1/conversations/c/{path}", headers=headers), code)
            await refused_socket(desk, code, headers, conversation="c")
        except AssertionError as exc:
            wrong[name] = str(exc)
    assert not wrong
    assert len(await desk.host.backend.read("c", 0, 100) or ()) <= 2


async def test_a_token_opens_every_visitor_door(start_desk: StartDesk) -> None:
    """A good token works as a header and, for browsers' sockets and streams, as `?token=`; it names the sender."""
    desk = await start_desk({"echo.py": echo(1)}, visitor_tokens=True, visitor_secret=SECRET)
    good = token()
    posted = await ask(
        desk, "POST", "/v1/conversations/c/messages", params={"token": good, "wait": "5"},
        json={"text": "hi", "sender": {"id": "somebody else", "name": "Ann"}},
    )  # fmt: skip
    assert posted.status == 200
    record = (
        await ask(desk, "GET", "/v1/conversations/c/messages", headers={"Authorization": f"bearer {good}"})
    ).json()
    assert record["messages"][0]["sender"] == {"id": "ann", "name": "Ann"}
    async with desk.http.ws_connect(f"{desk.url}/v1/ws", params={"conversation": "c", "token": good}) as ws:
        await ws.send_json({"type": "message", "text": "hi", "sender": {"id": "somebody else"}})
        assert (await ws.receive_json())["type"] == "accepted"
    record = (await ask(desk, "GET", "/v1/conversations/c/messages", params={"token": good})).json()
    assert record["messages"][2]["sender"] == {"id": "ann"}
    async with desk.http.get(f"{desk.url}/v1/conversations/c/events", params={"token": good, "after": "0"}) as events:
        assert events.status == 200


async def test_a_token_that_runs_out_closes_the_door_behind_it(start_desk: StartDesk) -> None:
    """A socket that was opened with a good token can't speak once the token has expired."""
    desk = await start_desk({"echo.py": echo(1)}, visitor_tokens=True, visitor_secret=SECRET)
    short = token(exp=int(time.time()) + 2)
    async with desk.http.ws_connect(f"{desk.url}/v1/ws", params={"conversation": "c", "token": short}) as ws:

        async def refused() -> bool:
            await ws.send_json({"type": "message", "id": "m", "text": "hi"})
            while (frame := await ws.receive_json())["type"] == "reply":
                pass
            return bool(frame.get("code") == "unauthorized")

        await wait_until(refused, "the token has run out", 5)
    assert_one_shape(await speak(desk, headers={"Authorization": f"Bearer {short}"}), "unauthorized")


async def test_the_operator_issues_tokens(start_desk: StartDesk) -> None:
    """`POST /admin/tokens` gives a token that binds a conversation to a visitor for as long as was asked."""
    desk = await start_desk({"echo.py": echo(1)}, visitor_tokens=True)
    before = time.time()
    issued = await desk.admin("POST", "tokens", 201, json={"conversation": "c", "visitor": "ann", "seconds": 60})
    assert before + 59 <= issued["expires"] <= time.time() + 61
    headers = {"Authorization": f"Bearer {issued['token']}"}
    assert (await speak(desk, headers=headers)).status == 202
    assert_one_shape(await speak(desk, conversation="d", headers=headers), "forbidden")
    claims = jwt.decode(issued["token"], options={"verify_signature": False})
    assert (claims["sub"], claims["conv"]) == ("ann", "c")
    for bad in (
        {},
        {"conversation": "c"},
        {"conversation": "c", "visitor": ""},
        {"conversation": "c", "visitor": "a", "seconds": 0},
    ):
        await desk.admin("POST", "tokens", 400, json=bad)
    await desk.admin("POST", "tokens", 400, json={"conversation": "\n", "visitor": "a"})


async def test_tokens_last_over_a_restart(tmp_path: Path) -> None:
    """The secret that the host made for itself is kept, readable by its owner alone: tokens work after a restart."""
    async with open_desk(tmp_path, {"echo.py": echo(1)}, visitor_tokens=True) as desk:
        issued = await desk.admin("POST", "tokens", 201, json={"conversation": "c", "visitor": "ann"})
    assert (tmp_path / "data" / "visitor_secret").stat().st_mode & 0o077 == 0
    async with open_desk(tmp_path, visitor_tokens=True) as desk:
        assert (await speak(desk, headers={"Authorization": f"Bearer {issued['token']}"})).status == 202


async def test_tokens_can_not_be_issued_while_they_are_off(desk: Desk) -> None:
    """Without visitor_tokens there is nothing to sign with, and the answer says which setting it is."""
    answer = await desk.admin("POST", "tokens", 409, json={"conversation": "c", "visitor": "ann"})
    assert answer["error"]["code"] == "conflict"
    assert "visitor_tokens" in answer["error"]["hint"]


# -- the operator ------------------------------------------------------------------------------------------------


async def test_every_admin_door_needs_the_admin_token(desk: Desk) -> None:
    """Without the admin token, or with another, every admin path is 401, unknown plugins too."""
    doors = (
        ("GET", "/admin/plugins"), ("GET", "/admin/plugins/echo"), ("GET", "/admin/plugins/nobody"),
        ("POST", "/admin/plugins/echo/disable"), ("POST", "/admin/plugins/nobody/reload"),
        ("GET", "/admin/events"), ("POST", "/admin/tokens"),
    )  # fmt: skip
    for method, path in doors:
        for value in (None, "", "Bearer", "Bearer ", "Bearer wrong", "Basic dGVzdA==", "Bearer \udcff"):
            headers = {} if value is None else {"Authorization": value}
            assert_one_shape(await ask(desk, method, path, headers=headers), "unauthorized")
    assert await desk.reply() == "1: hello"


async def test_the_first_admin_token_is_shown_once_and_kept_as_a_hash(tmp_path: Path) -> None:
    """A host without an admin token makes one, shows it at the first start only, and keeps nothing but its hash."""
    async with open_desk(tmp_path, admin_token="") as desk:
        shown = desk.host.new_admin_token
        assert shown
        headers = {"Authorization": f"Bearer {shown}"}
        assert (await ask(desk, "GET", "/admin/plugins", headers=headers)).status == 200
    kept = [path.read_bytes() for path in (tmp_path / "data").iterdir()]
    assert not any(shown.encode() in content for content in kept)
    async with open_desk(tmp_path, admin_token="") as desk:
        assert desk.host.new_admin_token is None
        assert (await ask(desk, "GET", "/admin/plugins", headers=headers)).status == 200


async def test_a_short_admin_token_stops_the_start(tmp_path: Path) -> None:
    """An admin token under 8 characters is refused at start, and not repeated in the text."""
    with pytest.raises(ConfigError, match="8 characters") as caught:
        async with open_host(Config(data=str(tmp_path), admin_token="hunter2", port=0)):
            pass
    assert "hunter2" not in str(caught.value)


async def test_a_page_of_an_allowed_origin_may_fetch(start_desk: StartDesk) -> None:
    """The browser's preflight and the answer itself name the allowed origin; another origin gets neither."""
    desk = await start_desk({"echo.py": echo(1)}, allowed_origins=("https://shop.example",))
    url = f"{desk.url}/v1/conversations/c/messages"
    page = {"Origin": "https://shop.example"}
    async with desk.http.options(url, headers=page) as asked:
        assert asked.status == 204
        assert asked.headers["Access-Control-Allow-Origin"] == "https://shop.example"
        assert "Content-Type" in asked.headers["Access-Control-Allow-Headers"]
    async with desk.http.post(url, json={"text": "hello"}, headers=page) as answered:
        assert (answered.status, answered.headers["Access-Control-Allow-Origin"]) == (202, "https://shop.example")
    async with desk.http.options(url, headers={"Origin": "https://evil.example"}) as refused:
        assert refused.status == 403
        assert "Access-Control-Allow-Origin" not in refused.headers
