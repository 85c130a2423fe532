"""What a guest gives that makes no sense, and what it is told when a host function fails."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from tests.llm.asking import settings_of
from tests.wasm.components import DATA, LOOP, NEXT, RESULT, component, escaped, giving, giving_back, text
from tests.wasm.conftest import StartGuests
from tests.wasm.test_faults import BUSY, FILES, stores, traffic

from conftest import Desk, wait_until
from hotdesk.config import LlmSettings, PluginSettings
from hotdesk.runtime.wasm_calls import GuestFault

JSON = {"no JSON": "{", "a list": "[]", "a number": "7", "deep": "[" * 5000}

DECISIONS: dict[str, tuple[str, Any, str]] = {
    **{f"an answer's extra: {kind}": ("bot.respond", ("answer", ("x", raw)), "extra") for kind, raw in JSON.items()},
    "an answer's metadata is a list": ("bot.respond", ("answer", ("x", '{"metadata": []}')), "metadata"),
    "an answer's tags are numbers": ("bot.respond", ("answer", ("x", '{"tags": [1]}')), "tags"),
    "an answer's close is a text": ("bot.respond", ("answer", ("x", '{"close": "yes"}')), "close"),
    **{f"the model's options: {kind}": ("bot.respond", ("model", raw), "'model'") for kind, raw in JSON.items()},
    "an option that there is not": ("bot.respond", ("model", '{"temprature": 1}'), "temprature"),
    "a model without a grant": ("bot.respond", ("model", "{}"), "llm"),
    "a bot that rewrites": ("bot.respond", ("rewrite", "x"), "not for a bot"),
    "a bot that decides something else": ("bot.respond", ("other", '{"kind": "dance"}'), "does not know"),
    "a middleware that decides something else": ("middleware.before", ("other", "{}"), "does not know"),
    "an afterthought that is something else": ("middleware.after", ("other", "{}"), "does not know"),
    "an afterthought's extra is no JSON": ("middleware.after", ("answer", ("x", "{")), "extra"),
}


async def test_a_decision_that_makes_no_sense_fails_its_call(start_guests: StartGuests) -> None:
    """Each is refused with a reason, counted, and the turn goes on to the next one: here through all of them."""
    files: dict[str, bytes] = {}
    names = {f"bad{number}": kind for number, kind in enumerate(DECISIONS)}
    for name, kind in names.items():
        function, decision, _ = DECISIONS[kind]
        more = {"middleware.before": (True, ("next", None))} if function == "middleware.after" else {}
        files[f"{name}.wasm"] = giving({**more, function: (True, decision)})
    desk = await start_guests({**FILES, **files})
    for name in names:
        await desk.wait_event("plugin_loaded", plugin=name)
    assert await desk.reply("!") == "the next one"
    wrong = {}
    for name, kind in names.items():
        shown = await desk.plugin(name)
        if shown["failures"] != 1 or DECISIONS[kind][2] not in shown["last_failure"]["problem"]:
            wrong[kind] = shown["failures"], shown["last_failure"]
    assert not wrong


@pytest.mark.parametrize("on_failure", ["skip", "refuse"])
async def test_what_becomes_of_a_turn_is_the_operators_choice(start_guests: StartGuests, on_failure: str) -> None:
    """After a trap a turn is skipped past the guest or refused, as `on_failure` says."""
    desk = await start_guests(
        {**FILES, "bad.wasm": component({"respond": "(unreachable)"}), "bad.toml": f'on_failure = "{on_failure}"\n'}
    )
    await desk.wait_event("plugin_loaded", plugin="bad")
    body = await desk.say("!")
    if on_failure == "skip":
        assert [reply["text"] for reply in body["replies"]] == ["the next one"]
    else:
        assert body["error"]["code"] == "turn_refused"
        assert "unreachable" not in str(body), "a visitor reads nothing of the inside"


async def test_what_a_tool_gives_must_be_json(start_guests: StartGuests) -> None:
    """A tool's result that is no JSON is a failed call; one that is any JSON is not."""
    tools = {
        f"t{number}.wasm": giving(
            {"tools.list-tools": [(f"t{number}", "", '{"type": "object"}', "")], "tools.call-tool": (True, raw)}
        )
        for number, raw in enumerate(JSON.values())
    }
    desk = await start_guests({**FILES, **tools})
    for number, kind in enumerate(JSON):
        await desk.wait_event("plugin_loaded", plugin=f"t{number}")
        generation = desk.host.plugins.entry(f"t{number}").current
        assert generation is not None
        call = generation.tools[0].tool.call
        if kind in ("a list", "a number"):
            assert await call(x=1) == {"a list": [], "a number": 7}[kind]
        else:
            with pytest.raises(GuestFault, match=f"what tool 't{number}' gave is not JSON"):
                await call(x=1)


FINE = ("c", "hello", "", "")
BAD_HOOKS = {
    "a message's extra": ([FINE, ("c", "t", "", "{")], (200, "", "", "")),
    "a sender that is a text": ([FINE, ("c", "t", "", '{"sender": "x"}')], (200, "", "", "")),
    "the answer's headers": ([FINE], (200, "[", "", "")),
    "the answer's headers are numbers": ([FINE], (200, '{"x": 1}', "", "")),
    "the answer's extra": ([FINE], (200, "", "", "[")),
    "a body that is no base64": ([FINE], (200, "", "%%%", '{"base64": true}')),
    "a status that there is not": ([FINE], (7, "", "", "")),
    "a header that has two lines": ([FINE], (200, '{"x": "a\\r\\nb: c"}', "", "")),
}
"""What an `intake` gives, a message that is fine first."""


@pytest.mark.parametrize("body", ["(unreachable)", LOOP], ids=["trap", "loop"])
async def test_a_trap_in_a_tool_is_an_error_to_who_called_it(start_guests: StartGuests, body: str) -> None:
    """The call fails, or ends with who waits for it, and the next one gets an instance that works."""
    tool = giving(
        {"tools.list-tools": [("t", "", '{"type": "object"}', ""), ("u", "", '{"type": "object"}', "")]},
        instead={
            "call-tool": f"(if (i32.eq (i32.load8_u (local.get 0)) (i32.const 116)) (then {body}))"
            f" (i32.store8 (i32.const {RESULT}) (i32.const 0))"
            f" (i32.store (i32.const {RESULT + 4}) (i32.const {RESULT + 64}))"
            f" (i32.store (i32.const {RESULT + 8}) (i32.const 1)) (i32.store8 (i32.const {RESULT + 64}) (i32.const 55))"
            f" (i32.const {RESULT})"
        },
    )
    desk = await start_guests({**FILES, "bad.wasm": tool})
    await desk.wait_event("plugin_loaded", plugin="bad")
    generation = desk.host.plugins.entry("bad").current
    assert generation is not None
    bad, good = (loaded.tool.call for loaded in generation.tools)
    if body == LOOP:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(bad(), 0.2)
    else:
        with pytest.raises(GuestFault, match="unreachable"):
            await bad()
    assert await good() == 7
    await wait_until(lambda: stores(desk) == 1, "one Store is alive")


async def test_an_intake_that_gives_nonsense_answers_500(start_guests: StartGuests) -> None:
    """The webhook's caller gets a server error, nothing is taken in, and the failure is told."""
    hooks = {f"h{number}": giving({"intake.receive": (True, gives)}) for number, gives in enumerate(BAD_HOOKS.values())}
    good = giving({"intake.receive": (True, ([FINE], (200, "", "", "")))})
    desk = await start_guests({**FILES, **{f"{name}.wasm": data for name, data in {**hooks, "good": good}.items()}})
    for name, kind in zip(hooks, BAD_HOOKS, strict=True):
        await desk.wait_event("plugin_loaded", plugin=name)
        async with desk.http.post(f"{desk.url}/hooks/{name}", data=b"x") as response:
            assert response.status >= 500, kind
        assert (await desk.plugin(name))["failures"] == 1, kind
        async with desk.http.get(f"{desk.url}/v1/conversations/c/messages") as response:
            assert response.status == 404, f"there is a conversation after {kind}"
    async with desk.http.post(f"{desk.url}/hooks/good", data=b"x") as response:
        assert response.status == 200
    assert [said["text"] for said in await desk.record("c")][:1] == ["hello"], "the same with a good answer is"


# ---- what a host function says when it fails -----------------------------------------------------------------------

ERRORS = ("denied", "invalid", "too-large", "timeout", "unavailable", "other")
BACK = RESULT + 256


def texts(*given: str) -> tuple[str, str]:
    """Texts as data, and as arguments."""
    data, arguments, at = "", "", DATA
    for one in given:
        raw = one.encode()
        data += escaped(raw)
        arguments += f" (i32.const {at}) (i32.const {len(raw)})"
        at += len(raw)
    return data, arguments


def asking(function: str, *given: str, more: str = "", hook: str = "respond", when: str = "!") -> bytes:
    """A bot that calls *function* when a text begins with *when*, and says `0` to `5` for the error's case, with the
    error's text after it but for its first letter; or `ok`. *more* are arguments after the texts *given*."""
    interface, _, name = function.partition(".")
    data, arguments = texts("ok", *given)
    arguments = arguments.removeprefix(f" (i32.const {DATA}) (i32.const 2)")
    said, size = f"(i32.load (i32.const {BACK + 8}))", f"(i32.load (i32.const {BACK + 12}))"
    answer = f"(i32.store (i32.const {RESULT + 8}) (local.get $n)) (i32.store (i32.const {RESULT + 12}) (local.get $m))"
    body = (
        f"(call ${function} {arguments} {more} (i32.const {BACK}))"
        f" (local.set $n (i32.const {DATA})) (local.set $m (i32.const 2))"
        f" (if (i32.load8_u (i32.const {BACK})) (then"
        f" (i32.store8 {said} (i32.add (i32.const 48) (i32.load8_u (i32.const {BACK + 4}))))"
        f" (local.set $n {said}) (local.set $m {size})))"
        f" (drop (block (result i32) {text('answer', 0, 0)})) {answer} (i32.const {RESULT})"
    )
    for at, letter in reversed(list(enumerate(when))):
        body = giving_back(body) if at == len(when) - 1 else body
        body = f"(if (i32.eq (i32.load8_u offset={at} (local.get 4)) (i32.const {ord(letter)})) (then {body}))"
    return component({hook: f"{body} {NEXT}"}, imports={interface: (name,)}, data=data, memory="24")


async def start_asking(
    start_guests: StartGuests, data: bytes, *, asked: str = "", grant: str = "", timeout_ms: int = 1000, **config: Any
) -> Desk:
    desk = await start_guests(
        {**FILES, "bad.wasm": data, "bad.toml": f"capabilities = [{asked}]\ntimeout_ms = {timeout_ms}\n"},
        settings={"bad": PluginSettings(grant=tuple(one.strip('"') for one in grant.split() if one))},
        **config,
    )
    await desk.wait_event("plugin_loaded", plugin="bad")
    return desk


NOBODY = ".".join(["h" * 60] * 5)
"""A name that no resolver asks another for: it is longer than a name can be."""

FULL = f"(i32.const {1 << 16}) (i32.const {1100 * 1000})"
"""Over a megabyte of the memory, as a text."""

ASKED: dict[str, tuple[str, tuple[str, ...], str, str, str]] = {
    "a store without a grant": ("kv.get", ("k",), "kv", "", "denied"),
    "a store that it did not ask for": ("kv.get", ("k",), "", "kv", "denied"),
    "a host without a grant": ("http.fetch", ("GET", "http://h.test/", "", ""), "", "", "denied"),
    "no url": ("http.fetch", ("GET", "::", "", ""), "", "", "denied"),
    "a model without a grant": ("llm.complete", ('{"messages": []}',), "", "", "denied"),
    "a model's request that is no JSON": ("llm.complete", ("{",), "llm", "llm", "invalid"),
    "a model's request without messages": ("llm.complete", ("{}",), "llm", "llm", "invalid"),
    "a value that is no JSON": ("kv.set", ("k", "{"), "kv", "kv", "invalid"),
    "an empty key": ("kv.get", ("",), "kv", "kv", "invalid"),
    "a long key": ("kv.get", ("k" * 513,), "kv", "kv", "invalid"),
    "a value that is too large": ("kv.set", ("k", FULL), "kv", "kv", "too-large"),
    "state that is too large": ("base.state-set", ("k", f"(i32.const 1) {FULL}"), "", "", "too-large"),
    "state without a key": ("base.state-set", ("", "(i32.const 0) (i32.const 0) (i32.const 0)"), "", "", "invalid"),
    "state that is no JSON": (
        "base.state-set", ("k", f"(i32.const 1) (i32.const {DATA}) (i32.const 2)"), "", "", "invalid"
    ),
    "headers that are no JSON": (
        "http.fetch", ("GET", "http://h.test/", "[", ""), "http:h.test", "http:h.test", "invalid"
    ),
    "a method of two lines": (
        "http.fetch", ("GET / HTTP/1.1\r\nx: y\r\n", "http://h.test/", "", ""), "http:h.test", "http:h.test", "invalid"
    ),
    "a name that is nobody's": (
        "http.fetch", ("GET", f"http://{NOBODY}/", "", ""), f"http:{NOBODY}", f"http:{NOBODY}", "unavailable"
    ),
    "a file": ("http.fetch", ("GET", "file:///etc/hostname", "", ""), "", "", "denied"),
    "a word in its own conversation": ("base.send", ("own", "by the way"), "", "", ""),
    "a word to nobody": ("base.send", ("", "x"), "", "", "invalid"),
    "what goes well": ("kv.get", ("k",), "kv", "kv", ""),
}  # fmt: skip
"""Function and arguments, what the manifest asks for, what is granted, and the error's case that the guest is told."""


async def test_a_host_function_that_fails_tells_the_guest_why(start_guests: StartGuests) -> None:
    """Each error is a value of the contract: the guest goes on, its call is no failure, a denial is an event."""
    files: dict[str, str | bytes] = {}
    settings = {}
    for number, (function, given, asked, grant, _) in enumerate(ASKED.values()):
        plain = [one for one in given if not one.startswith("(i32.const")]
        more = " ".join(one for one in given if one.startswith("(i32.const"))
        when = f"!{chr(65 + number)}"
        files[f"b{number}.wasm"] = asking(function, *plain, more=more, when=when)
        files[f"b{number}.toml"] = f"capabilities = {[asked] if asked else []}\ntimeout_ms = 5000\n"
        settings[f"b{number}"] = PluginSettings(grant=(grant,) if grant else ())
    desk = await start_guests({**FILES, **files}, settings=settings)
    wrong = {}
    for number, (kind, (*_, case)) in enumerate(ASKED.items()):
        await desk.wait_event("plugin_loaded", plugin=f"b{number}")
        said = str(await desk.reply(f"!{chr(65 + number)}", "own"))
        if not (said.startswith(str(ERRORS.index(case))) if case else said == "ok"):
            wrong[kind] = said
        elif (shown := await desk.plugin(f"b{number}"))["failures"]:
            wrong[kind] = shown["last_failure"]
        if case == "denied":
            await desk.wait_event("capability_denied", plugin=f"b{number}")
    assert not wrong


@contextlib.asynccontextmanager
async def server(answer: bytes | None) -> AsyncIterator[tuple[int, list[int]]]:
    """A server that takes every connection and never says a word, or says *answer* and hangs up; its port."""
    open_ones: list[int] = []
    tasks: set[asyncio.Task[Any]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())  # type: ignore[arg-type]
        open_ones.append(1)
        with contextlib.suppress(ConnectionError):
            if answer is None:
                while await reader.read(1000):
                    pass
            else:
                await reader.read(1000)
                writer.write(answer)
        writer.close()
        open_ones.pop()

    started = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield started.sockets[0].getsockname()[1], open_ones
    finally:
        started.close()
        await started.wait_closed()
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)


async def test_an_address_inside_is_not_reached(start_guests: StartGuests) -> None:
    """A grant is not enough for what is in the host's own network: no connection is made unless `http_hosts` has it."""
    accepted = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.append(1)
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as started:
        port = started.sockets[0].getsockname()[1]
        data = asking("http.fetch", "GET", f"http://127.0.0.1:{port}/", "", "")
        asked, grant = '"http:127.0.0.1"', "http:127.0.0.1"
        desk = await start_asking(start_guests, data, asked=asked, grant=grant)
        assert str(await desk.reply("!")).startswith(str(ERRORS.index("unavailable")))
        assert (await desk.plugin("bad"))["failures"] == 0
        assert not accepted
        desk = await start_asking(start_guests, data, asked=asked, grant=grant, http_hosts=(f"127.0.0.1:{port}",))
        assert await desk.reply("!") == "ok"
        assert accepted


async def test_a_server_that_never_answers_holds_a_guest_no_longer_than_its_time(start_guests: StartGuests) -> None:
    """A host call that hangs ends with the guest's call; others are served, and nothing is left of either."""
    async with server(None) as (port, open_ones):
        data = asking("http.fetch", "GET", f"http://127.0.0.1:{port}/", "", "")
        desk = await start_guests(
            {**FILES, "bad.wasm": data, "bad.toml": 'capabilities = ["http:127.0.0.1"]\ntimeout_ms = 800\n'},
            settings={"bad": PluginSettings(grant=("http:127.0.0.1",))},
            http_hosts=(f"127.0.0.1:{port}",),
        )
        await desk.wait_event("plugin_loaded", plugin="bad")
        async with traffic(desk) as times, asyncio.timeout(5):
            asking_all = asyncio.gather(*(desk.reply("!", f"c{n}") for n in range(8)))
            await wait_until(lambda: len(open_ones) == 8, "all eight wait at the same time")
            replies = await asking_all
        assert all(reply == "the next one" or str(reply).startswith("3") for reply in replies), replies
        assert times.p99 < 0.3
        await wait_until(lambda: not open_ones, "its connections are closed")
    well = sum(reply != "the next one" for reply in replies)
    await wait_until(lambda: stores(desk) == well, "the Stores of those that answered are left, and no others")
    assert await desk.reply("hello") == BUSY["echo"]


@pytest.mark.parametrize(
    ("answer", "headers", "case"),
    [
        (b"", "", "unavailable"),
        (b"hello\r\n\r\n", "", "unavailable"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nhalf", "", "unavailable"),
        (b"", '{"x": "a\\r\\nb: c"}', "invalid"),
    ],
    ids=["nothing", "no HTTP", "half", "a header of two lines"],
)
async def test_a_fetch_that_breaks_off_is_an_error_to_the_guest(
    start_guests: StartGuests, answer: bytes, headers: str, case: str
) -> None:
    """Whatever a server does wrong, the guest is told that it does not answer; what is wrong to send is not sent."""
    async with server(answer) as (port, _):
        desk = await start_asking(
            start_guests,
            asking("http.fetch", "GET", f"http://127.0.0.1:{port}/", headers, ""),
            asked='"http:127.0.0.1"',
            grant="http:127.0.0.1",
            http_hosts=(f"127.0.0.1:{port}",),
        )
        assert str(await desk.reply("!")).startswith(str(ERRORS.index(case)))


async def test_a_model_that_never_answers_is_a_timeout_to_the_guest(start_guests: StartGuests) -> None:
    """The model has clocks of its own: when they are over the guest is told so, though its own time stood still."""
    async with server(None) as (port, _):
        desk = await start_asking(
            start_guests,
            asking("llm.complete", '{"messages": [{"role": "user", "content": "x"}]}'),
            asked='"llm"',
            grant="llm",
            timeout_ms=200,
            llm=LlmSettings(
                models={
                    "default": settings_of(
                        f"http://127.0.0.1:{port}/v1", connect_s=0.5, first_token_s=0.5, total_s=0.5, retries=0
                    )
                }
            ),
        )
        assert str(await desk.reply("!")).startswith(str(ERRORS.index("timeout")))
    assert (await desk.plugin("bad"))["failures"] == 0


async def test_emit_is_for_bots_alone(start_guests: StartGuests) -> None:
    """Outside of `respond` it is an error to the guest, and nothing is shown."""
    desk = await start_asking(start_guests, asking("base.emit", "x", hook="before"))
    assert str(await desk.reply("!")).startswith(str(ERRORS.index("invalid")))


async def test_fields_of_a_log_line_need_not_be_json(
    start_guests: StartGuests, capfd: pytest.CaptureFixture[str]
) -> None:
    """A guest's log line with fields that are no JSON, or with the host's own names, is a line all the same."""
    files = {}
    for number, fields in enumerate(
        ("{", "[1]", '{"plugin": "x", "event": 1, "level": 2, "exc_info": true}', "[" * 4000)
    ):
        data, arguments = texts("a_guests_line", fields)
        files[f"bad{number}.wasm"] = component(
            {"respond": f"(call $base.log (i32.const 3) {arguments}) {NEXT}"}, imports={"base": ("log",)}, data=data
        )
    desk = await start_guests({**FILES, **files})
    assert await desk.reply("!") == "the next one"
    for number in range(4):
        shown = await desk.plugin(f"bad{number}")
        assert (shown["failures"], shown["generation"]) == (0, 1), shown["last_failure"]
    lines = [line for line in "".join(capfd.readouterr()).splitlines() if "a_guests_line" in line]
    assert [sum(f"bad{number}" in line for line in lines) for number in range(4)] == [1] * 4, lines


async def test_a_trap_in_an_event_is_nobody_elses(start_guests: StartGuests) -> None:
    """An observer that traps or never ends holds up no turn."""
    for body in ("(unreachable)", LOOP):
        desk = await start_guests(
            {**FILES, "bad.wasm": component({"on-event": body}), "bad.toml": "timeout_ms = 100\n"}
        )
        await desk.wait_event("plugin_loaded", plugin="bad")
        assert [await desk.reply("hello", f"c{n}") for n in range(3)] == [BUSY["echo"]] * 3

        async def counted(desk: Desk = desk) -> bool:
            return bool((await desk.plugin("bad"))["failures"])

        await wait_until(counted, "the failure is counted")


STREAMS = (
    "from hotdesk_sdk import hookimpl\n\n@hookimpl\nasync def respond(turn):\n"
    "    for word in ('one ', 'two ', 'three'):\n        yield word\n"
)


@pytest.mark.parametrize("body", ["(unreachable)", LOOP, "(i32.const -4)"], ids=["trap", "loop", "nonsense"])
async def test_a_trap_in_transform_cuts_the_stream(start_guests: StartGuests, body: str) -> None:
    """A stream that its `chunks` plugin can't pass on ends: as an error or unchanged, and never hangs."""
    desk = await start_guests(
        {"bad.wasm": component({"transform": body}), "bad.toml": "timeout_ms = 200\n", "streams.py": STREAMS}
    )
    await desk.wait_event("plugin_loaded", plugin="bad")
    async with asyncio.timeout(5):
        said = await desk.say("hello")
    assert "error" in said or said["replies"][0]["text"] == "one two three", said

    async def counted() -> bool:
        return bool((await desk.plugin("bad"))["failures"])

    await wait_until(counted, "the failure is counted")
    await wait_until(lambda: stores(desk) == 0, "no Store is left over")


async def test_what_fails_for_want_of_a_grant_is_nobodys_rollback(start_guests: StartGuests) -> None:
    """A guest that gives up since it was refused something is not rolled back; the operator reads what to grant."""
    refused = component(
        {
            "respond": f"(call $kv.get (i32.const {DATA}) (i32.const 1) (i32.const {BACK}))"
            f" (i32.store8 (i32.const {RESULT}) (i32.const 1)) (i32.store (i32.const {RESULT + 4}) (i32.const {DATA}))"
            f" (i32.store (i32.const {RESULT + 8}) (i32.const 1)) (i32.const {RESULT})"
        },
        imports={"kv": ("get",)},
        data="k",
    )
    desk = await start_guests({"bot.wasm": giving({"bot.respond": (True, ("next", None))}), "bot.toml": ""})
    (desk.folder / "bot.wasm").write_bytes(refused)
    await desk.wait_event("plugin_swapped", plugin="bot")
    await desk.say("hello")
    shown = await desk.plugin("bot")
    assert shown["generation"] == 2
    assert "not asked for; in its manifest" in shown["last_failure"]["problem"]
    assert shown["component"]["instances"] == 1
