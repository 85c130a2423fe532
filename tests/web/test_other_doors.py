"""Webhooks, plugin pages, probes and the admin API."""

from __future__ import annotations

import asyncio
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from tests.web.test_access import ask
from tests.web.visitors import assert_one_shape, sse_events

from conftest import ADMIN_TOKEN, Desk, StartDesk, echo, wait_until
from hotdesk.errors import DOOR_ERRORS

HOOK = """
from hotdesk_sdk import Answer, InboundMessage, Intake, Sender, hookimpl

@hookimpl
async def intake(request):
    kind = request.path.strip("/")
    if kind == "nothing":
        return None
    if kind == "dicts":
        return [{"conversation": "shop/1", "text": "from a dict", "id": "d1", "sender": {"id": "ann"}}]
    if kind == "pair":
        return [InboundMessage("shop/1", "first", "p1"), InboundMessage("shop/2", "second", "p2")], {"ok": True}
    if kind == "answer":
        return Answer(418, "teapot", {"X-Pot": "yes"})
    if kind == "echo":
        return (), {"method": request.method, "query": dict(request.query), "agent": request.headers["user-agent"],
                    "body": request.text()}
    if kind == "raise":
        raise ValueError("no")
    bad = {"bad": 5, "text": [{"conversation": "c", "text": 5}], "who": [InboundMessage("\\n", "x")],
           "none": [InboundMessage("c", None)], "field": [{"text": "x"}], "object": [object()],
           "meta": [InboundMessage("c", "x", metadata={"a": object()})],
           "deep": [InboundMessage("c", "x", metadata={"a": DEEP})],
           **{name: ([InboundMessage("c", "x")], answer) for name, answer in ANSWERS.items()}}
    return bad[kind]

DELIVERED, DEEP = [], []
for _ in range(40):
    DEEP = [DEEP]

ANSWERS = {"status": Answer(99), "code": 1000, "word": Answer("200"), "list": Answer(200, "", []),
           "split": Answer(200, "", {"x": "a\\r\\nb: c"}), "name": Answer(200, "", {"a b": "c"}),
           "value": Answer(200, "", {"a": 5}), "length": Answer(200, "", {"Content-Length": "0"})}

@hookimpl
async def deliver(conversation, reply):
    DELIVERED.append((conversation.id, conversation.channel, reply.text))

@hookimpl
async def routes():
    async def delivered(request):
        return DELIVERED
    async def answer(request):
        kind = ANSWERS[request.match_info["kind"]]
        return kind if isinstance(kind, Answer) else Answer(kind)
    return [("GET", "/delivered", delivered), ("GET", "/answers/{kind}", answer)]
"""

ANSWERS = ("status", "code", "word", "list", "split", "name", "value", "length")
"""Answers that HTTP can't say."""

PAGES = """
from aiohttp import web
from hotdesk_sdk import Answer, hookimpl

VERSION = 1

@hookimpl
async def routes(ctx):
    async def page(request):
        return f"<h1>{VERSION} {request.match_info.get('name', '')} {request.query.get('q', '')}</h1>"
    async def data(request):
        return {"got": await request.json()}
    async def nothing(request):
        return None
    async def answer(request):
        return Answer(201, b"bytes", {"X-A": "b"})
    async def moved(request):
        raise web.HTTPFound("/elsewhere")
    async def broken(request):
        raise ValueError("no")
    async def slow(request):
        import asyncio
        await asyncio.sleep(60)
    return [("GET", "/", page), ("GET", "/hello/{name}", page), web.post("/data", data), ("GET", "/nothing", nothing),
            ("GET", "/answer", answer), ("GET", "/moved", moved), ("GET", "/broken", broken), ("GET", "/slow", slow)]
"""


def sample(desk: Desk, name: str, **labels: str) -> float:
    return desk.host.metrics.registry.get_sample_value(name, labels) or 0.0


# -- webhooks ----------------------------------------------------------------------------------------------------


async def test_a_webhook_becomes_messages(start_desk: StartDesk) -> None:
    """What `intake` finds is accepted and answered; the webhook's answer is the hook's; a reply is delivered."""
    desk = await start_desk({"shop.py": HOOK, "echo.py": echo(1)})
    answer = await ask(desk, "POST", "/hooks/shop/pair")
    assert (answer.status, answer.json()) == (200, {"ok": True})
    await wait_until(lambda: desk.host.turns.live == 0, "both turns ended")
    record = await desk.host.backend.read("shop/1", 0, 10)
    assert record is not None
    assert [entry.text for entry in record] == ["first", "1: first"]

    async def delivered() -> Any:
        return len((await ask(desk, "GET", "/p/shop/delivered")).json()) == 2

    await wait_until(delivered, "both replies are delivered")
    said = (await ask(desk, "GET", "/p/shop/delivered")).json()
    assert sorted(map(tuple, said)) == [("shop/1", "shop", "1: first"), ("shop/2", "shop", "1: second")]


async def test_a_webhook_that_comes_twice_counts_once(start_desk: StartDesk) -> None:
    """The channel's own ids make a webhook that is delivered again harmless; dicts do as messages."""
    desk = await start_desk({"shop.py": HOOK, "echo.py": echo(1)})
    for _ in range(3):
        assert (await ask(desk, "POST", "/hooks/shop/dicts")).status == 202
    await wait_until(lambda: desk.host.turns.live == 0, "the turn ended")
    record = await desk.host.backend.read("shop/1", 0, 10)
    assert record is not None
    assert [entry.text for entry in record] == ["from a dict", "1: from a dict"]
    assert record[0].id == "d1"


async def test_a_webhook_sees_the_request(start_desk: StartDesk) -> None:
    """Method, path, query, lower-case headers and the body reach the hook; any method does."""
    desk = await start_desk({"shop.py": HOOK})
    answer = await ask(desk, "PUT", "/hooks/shop/echo?a=1", data="bödy".encode(), headers={"User-Agent": "bell"})
    assert answer.json() == {"method": "PUT", "query": {"a": "1"}, "agent": "bell", "body": "bödy"}
    teapot = await ask(desk, "GET", "/hooks/shop/answer")
    assert (teapot.status, teapot.body, teapot.headers["x-pot"]) == (418, b"teapot", "yes")
    assert (await ask(desk, "GET", "/hooks/shop/nothing")).status == 202


async def test_a_webhook_that_fails_is_the_plugins_fault(start_desk: StartDesk) -> None:
    """A hook that raises or returns what it may not is 500 plugin_failed, and nothing of it is kept."""
    desk = await start_desk({"shop.py": HOOK}, probation_calls=0, breaker_failures=40)
    for kind in ("raise", "bad", "text", "who", "none", "field", "object", "meta", "deep", *ANSWERS):
        assert_one_shape(await ask(desk, "POST", f"/hooks/shop/{kind}"), "plugin_failed")
    assert await desk.host.backend.unfinished() == []
    assert await desk.host.backend.record("c") is None
    for kind in ANSWERS:
        assert_one_shape(await ask(desk, "GET", f"/p/shop/answers/{kind}"), "plugin_failed")


async def test_an_unknown_webhook_is_404(start_desk: StartDesk) -> None:
    """No such plugin, and a plugin without `intake`, are both not_found."""
    desk = await start_desk({"echo.py": echo(1)})
    assert_one_shape(await ask(desk, "POST", "/hooks/nobody"), "not_found")
    assert_one_shape(await ask(desk, "POST", "/hooks/echo/x"), "not_found")


# -- pages -------------------------------------------------------------------------------------------------------


async def test_a_plugin_has_pages(start_desk: StartDesk) -> None:
    """A plugin's routes are served below /p/{plugin}/: text, HTML, JSON, an Answer, nothing, and HTTP exceptions."""
    desk = await start_desk({"site.py": PAGES})
    page = await ask(desk, "GET", "/p/site/hello/ann?q=1")
    assert (page.body, page.headers["content-type"]) == (b"<h1>1 ann 1</h1>", "text/html; charset=utf-8")
    assert (await ask(desk, "GET", "/p/site")).status == (await ask(desk, "GET", "/p/site/")).status == 200
    assert (await ask(desk, "POST", "/p/site/data", json=[1])).json() == {"got": [1]}
    assert (await ask(desk, "GET", "/p/site/nothing")).status == 204
    answer = await ask(desk, "GET", "/p/site/answer")
    assert (answer.status, answer.body, answer.headers["x-a"]) == (201, b"bytes", "b")
    moved = await ask(desk, "GET", "/p/site/moved", allow_redirects=False)
    assert (moved.status, moved.headers["location"]) == (302, "/elsewhere")


async def test_a_page_that_is_not_there_has_the_one_error_shape(start_desk: StartDesk) -> None:
    """Unknown page, unknown plugin, wrong method and a handler that fails or hangs have their codes."""
    desk = await start_desk({"site.py": PAGES, "site.toml": "timeout_ms = 200\n", "echo.py": echo(1)})
    assert_one_shape(await ask(desk, "GET", "/p/site/none"), "not_found")
    assert_one_shape(await ask(desk, "GET", "/p/nobody/"), "not_found")
    assert_one_shape(await ask(desk, "GET", "/p/echo/"), "not_found")
    wrong = await ask(desk, "DELETE", "/p/site/data")
    assert_one_shape(wrong, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"
    assert_one_shape(await ask(desk, "GET", "/p/site/broken"), "plugin_failed")
    assert_one_shape(await ask(desk, "GET", "/p/site/slow"), "plugin_failed")
    assert await desk.reply() == "1: hello"


async def test_pages_are_those_of_the_generation_that_serves(start_desk: StartDesk) -> None:
    """After a swap a page is the new generation's."""
    desk = await start_desk({"site.py": PAGES})
    desk.write("site.py", PAGES.replace("VERSION = 1", "VERSION = 2"))
    await desk.wait_generation("site", 2)
    assert (await ask(desk, "GET", "/p/site/")).body == b"<h1>2  </h1>"


# -- probes ------------------------------------------------------------------------------------------------------


async def test_probes_say_alive_and_ready(desk: Desk) -> None:
    """/healthz is alive; /readyz is ready and says what stands behind `accepted`."""
    alive = await ask(desk, "GET", "/healthz")
    assert (alive.status, alive.json()) == (200, {"status": "alive"})
    ready = await ask(desk, "GET", "/readyz")
    assert ready.status == 200
    body = ready.json()
    assert (body["status"], body["backend"], body["plugins"]) == ("ready", "sqlite", 1)
    assert "synchronous=FULL" in body["durability"]
    desk.host.intake.stop()
    stopping = await ask(desk, "GET", "/readyz")
    assert (stopping.status, stopping.json()["status"]) == (503, "not ready")
    assert_one_shape(await ask(desk, "POST", "/v1/conversations/c/messages", json={"text": "x"}), "stopping")
    assert (await ask(desk, "GET", "/healthz")).status == 200


async def test_metrics_are_prometheus_text(desk: Desk) -> None:
    """/metrics parses as Prometheus text and counts what happened."""
    await desk.say("hi", id="m")
    await desk.say("hi", id="m")
    await ask(desk, "POST", "/v1/conversations/c/messages", data=b"x", headers={"Content-Type": "application/json"})
    answer = await ask(desk, "GET", "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    samples = {
        (found.name, tuple(sorted(found.labels.items()))): found.value
        for family in text_string_to_metric_families(answer.body.decode())
        for found in family.samples
    }
    assert samples["hotdesk_messages_total", (("door", "http"),)] == 2
    assert samples["hotdesk_duplicates_total", ()] == 1
    assert samples["hotdesk_turns_total", (("outcome", "replied"),)] == 1
    assert samples["hotdesk_errors_total", (("code", "bad_json"),)] == 1
    assert samples["hotdesk_turn_seconds_count", ()] == 1
    assert samples["hotdesk_turn_seconds_bucket", (("le", "+Inf"),)] == 1
    assert samples["hotdesk_call_seconds_count", (("hook", "respond"), ("plugin", "echo"))] == 1
    assert samples["hotdesk_backend_writes_total", ()] >= 2
    codes = {dict(labels)["code"] for (name, labels) in samples if name == "hotdesk_errors_total"}
    assert codes <= set(DOOR_ERRORS)


# -- admin -------------------------------------------------------------------------------------------------------


async def test_the_admin_api_shows_plugins(desk: Desk) -> None:
    """The list and the single plugin tell state, generation, order and hooks; one alone also its config."""
    listed = await desk.admin("GET", "plugins")
    assert listed["watch"]
    [shown] = listed["plugins"]
    assert (shown["name"], shown["state"], shown["generation"], shown["enabled"]) == ("echo", "ACTIVE", 1, True)
    assert shown["hooks"] == ["respond"]
    assert (await desk.plugin("echo"))["config"] == {}


async def test_admin_actions_answer_with_the_plugin(desk: Desk) -> None:
    """Reload, disable and enable act and show the result; unknown names and actions have their codes."""
    assert (await desk.admin("POST", "plugins/echo/disable"))["enabled"] is False
    assert await desk.reply() is None
    assert (await desk.admin("POST", "plugins/echo/enable"))["enabled"] is True
    assert await desk.reply() is not None
    for path, status, code in (
        ("plugins/nobody/reload", 404, "plugin_not_found"),
        ("plugins/echo/dance", 404, "not_found"),
        ("plugins/all/reload", 404, "plugin_not_found"),
    ):
        assert (await desk.admin("POST", path, status))["error"]["code"] == code
    assert (await desk.admin("GET", "plugins/nobody", 404))["error"]["code"] == "plugin_not_found"


async def test_a_reload_that_fails_is_422_and_says_why(start_desk: StartDesk) -> None:
    """Reloading a plugin whose source is broken is 422 with the reason; the old generation serves."""
    desk = await start_desk({"echo.py": echo(1)}, watch="frozen")
    desk.write("echo.py", "def broken(:\n")
    answer = await desk.admin("POST", "plugins/echo/reload", 422)
    assert answer["error"]["code"] == "unprocessable"
    assert "echo.py" in answer["error"]["message"]
    assert await desk.reply() == "1: hello"


async def test_nothing_to_roll_back_to_is_a_conflict(desk: Desk) -> None:
    """Rolling back a plugin that has had one generation only is 409."""
    assert (await desk.admin("POST", "plugins/echo/rollback", 409))["error"]["code"] == "conflict"


async def test_admin_events_tell_every_swap(desk: Desk) -> None:
    """The admin event stream tells a swap and its receipt as it happens, and ends when the host stops."""
    headers = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
    async with desk.http.get(f"{desk.url}/admin/events", headers=headers) as response:
        assert response.status == 200
        events = sse_events(response)
        desk.write("echo.py", echo(2))
        seen: dict[str, Any] = {}
        async with asyncio.timeout(10):
            while "plugin_swapped" not in seen:
                event = await anext(events)
                seen[event.kind] = event.data
        assert seen["plugin_swapped"]["plugin"] == "echo"
