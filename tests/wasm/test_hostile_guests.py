"""What an attack on the sandbox found, one test for each: the host bounds it, refuses it, or goes on without."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import yarl
from tests.wasm.components import (
    DATA,
    LOOP,
    NEXT,
    RESULT,
    TRAP,
    component,
    escaped,
    giving,
    giving_back,
    leb,
    section,
    text,
    when_shouted,
)
from tests.wasm.conftest import StartGuests
from tests.wasm.test_bad_answers import BACK, ERRORS, asking, server
from tests.wasm.test_baseline import padded
from tests.wasm.test_faults import FILES, others_are_served, stores
from tests.web.visitors import raw_events, raw_stream, request_bytes

from conftest import Desk, wait_until
from hotdesk.config import PluginSettings
from hotdesk.runtime import wasm_imports
from hotdesk.runtime.wasm_cache import CodeCache
from hotdesk.runtime.wasm_calls import DONE, GuestCall, Stopped
from hotdesk.runtime.wasm_compiler import Compiler
from hotdesk.runtime.wit_names import without_mangled_names

NAME, BUFFER = 65_536, 1 << 17
"""Where the constants of these guests are, and a large text."""


def put(at: int, said: str) -> str:
    """*said* as data of a core module."""
    return f'(data (i32.const {at}) "{escaped(said.encode())}")'


def quoted(size: int) -> str:
    """Writes a JSON text of *size* bytes to `BUFFER`."""
    return (
        f"(memory.fill (i32.const {BUFFER}) (i32.const 97) (i32.const {size}))"
        f" (i32.store8 (i32.const {BUFFER}) (i32.const 34))"
        f" (i32.store8 (i32.const {BUFFER + size - 1}) (i32.const 34)) "
    )


def until_refused(function: str, arguments: str, *, most: int, before: str = "") -> tuple[str, dict[str, Any]]:
    """A bot's body that calls *function* until it is refused, *most* times at most; and the options that it needs.

    It says the error's case (`-` for none), and how many calls that were as a letter, `A` for one. That letter is also
    the first byte at `NAME`.
    """
    interface, _, name = function.partition(".")
    body = (
        f"{before} (loop $l (local.set $n (i32.add (local.get $n) (i32.const 1)))"
        f" (i32.store8 (i32.const {NAME}) (i32.add (i32.const 64) (local.get $n)))"
        f" (call ${function} {arguments} (i32.const {BACK}))"
        f" (br_if $l (i32.and (i32.eqz (i32.load8_u (i32.const {BACK})))"
        f" (i32.lt_u (local.get $n) (i32.const {most})))))"
        f" (i32.store8 (i32.const {DATA}) (if (result i32) (i32.load8_u (i32.const {BACK}))"
        f" (then (i32.add (i32.const 48) (i32.load8_u (i32.const {BACK + 4})))) (else (i32.const 45))))"
        f" (i32.store8 (i32.const {DATA + 1}) (i32.add (i32.const 64) (local.get $n)))"
        f" {text('answer', DATA, 2)}"
    )
    return body, {"imports": {interface: (name,)}, "memory": "32"}


def refusing(function: str, arguments: str, *, most: int, before: str = "", more: str = "") -> bytes:
    """A bot that is nothing but `until_refused`."""
    body, options = until_refused(function, arguments, most=most, before=before)
    return component({"respond": body}, more=more, **options)


def refused_at(case: str, count: int) -> str:
    """What `until_refused` says."""
    return f"{ERRORS.index(case)}{chr(64 + count)}"


async def loaded(start_guests: StartGuests, files: dict[str, str | bytes], **config: Any) -> Desk:
    """A host whose components are all there."""
    desk = await start_guests(files, **config)
    for name in files:
        if name.endswith(".wasm"):
            await desk.wait_event("plugin_loaded", plugin=name.removesuffix(".wasm"))
    return desk


# ---- names that explode when they are demangled ---------------------------------------------------------------------


def exploding(levels: int, width: int) -> str:
    """A C++ name whose types are functions of the types before, so that its plain form grows by *width* each level."""

    def earlier(number: int) -> str:
        digits, left = "", number - 1
        while number and (not digits or left):
            digits, left = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"[left % 36] + digits, left // 36
        return f"S{digits}_"

    name, last = "_Z1f1a", 0
    for level in range(levels):
        name += f"PF{earlier(last) * width}E"
        last = 2 * level + 2
    return name


EXPLODING = exploding(29, 8)


@pytest.fixture
def log() -> Any:
    """Takes what the cache says."""
    return SimpleNamespace(warning=lambda *_, **__: None)


async def test_a_name_that_explodes_when_demangled_costs_nothing(
    start_guests: StartGuests, tmp_path: Path, log: Any
) -> None:
    """A trap in a function with such a name, of 861 bytes, is a trap like any other, however it was compiled."""
    assert len(EXPLODING) == 861
    data = component(
        {"respond": when_shouted(f"(call $f) {LOOP}")}, more=f'(func $f (@name "{EXPLODING}") {TRAP} {TRAP})'
    )
    assert EXPLODING.encode() in data
    # Before it is run, which without the mend would take all memory: neither way of compiling keeps the name.
    cache = CodeCache(tmp_path / "native", 1 << 24, log)
    cache.open()
    compiler = Compiler(cache, key="key", max_mb=1024, timeout_s=20.0, niceness=5)
    try:
        for baseline in (False, True):
            native = await compiler.compile("p", data, "digest", baseline=baseline)
            assert EXPLODING[1:].encode() in native, "native code has the guest's names"
            assert EXPLODING.encode() not in native
    finally:
        await compiler.aclose()
    desk = await loaded(start_guests, {**FILES, "bad.wasm": data, "bad.toml": "timeout_ms = 1000\n"})
    process = psutil.Process()
    before, began = process.memory_info().rss, time.monotonic()
    assert await desk.reply("!") == "the next one"
    assert time.monotonic() - began < 1.0
    assert process.memory_info().rss - before < 50 << 20
    assert "unreachable" in (await desk.plugin("bad"))["last_failure"]["problem"]
    await wait_until(lambda: stores(desk) <= 1, "its Store is closed")


@pytest.mark.parametrize("name", ["_Z1f1a", "__Z1f", "___Z1f", "_ZN4core3fmt17h0123456789abcdefE"])
def test_a_mangled_name_loses_its_first_byte(name: str) -> None:
    """One byte is another one; no size changes."""
    data = component({"respond": NEXT}, more=f'(func $f (@name "{name}") (nop))')
    changed = without_mangled_names(data)
    assert len(changed) == len(data)
    assert [at for at in range(len(data)) if data[at] != changed[at]] == [data.index(name.encode())]
    assert f"?{name[1:]}".encode() in changed


@pytest.mark.parametrize("name", ["plain", "_RNvC7mycrate3foo", "_f", "zZ", "_", "a_Z1f", "_z1f"])
def test_any_other_name_stays(name: str) -> None:
    """Rust's own kind too, whose demangler is bounded; so do texts that only look like names."""
    data = component({"respond": NEXT}, data="_Z1f1a", more=f'(func $f (@name "{name}") (nop))')
    assert without_mangled_names(data) == data


@pytest.mark.parametrize(
    "raw",
    [
        b"\x01",  # a core module without a size
        b"\x01\xff\xff\xff\xff\xff\x01",  # with a size of over 32 bits
        b"\x01\x7f\0asm\x01\0\0\0",  # longer than the file
        b"\x01\x11\0asm\x01\0\0\0\x00\x7f\x04name\x01\x00",  # a section inside that is longer than its module
        b"\x01\x11\0asm\x01\0\0\0\x00\x07\x04name\x01\x7f",  # a name section that is cut off
    ],
)
def test_what_is_malformed_is_refused(raw: bytes) -> None:
    """As a `ValueError`, which the process that compiles tells; never another exception, never without end."""
    with pytest.raises(ValueError, match=r"cut off|longer|32 bits"):
        without_mangled_names(b"\0asm\x0d\0\x01\0" + raw)


# ---- what a guest may leave behind ----------------------------------------------------------------------------------

SETS = f"(i32.const {NAME}) (i32.const 1) (i32.const 1) (i32.const {BUFFER}) (i32.const 60000)"


async def test_the_state_of_a_conversation_is_bounded(start_guests: StartGuests) -> None:
    """256 KiB in all: four values of 60,000 bytes, also over several turns; another conversation has its own."""
    data = refusing("base.state-set", SETS, most=20, before=quoted(60_000))
    desk = await loaded(start_guests, {"bad.wasm": data})
    assert await desk.reply("x") == refused_at("too-large", 5)
    assert await desk.reply("x") == refused_at("too-large", 1)
    assert await desk.reply("x", "another") == refused_at("too-large", 5)
    assert (await desk.plugin("bad"))["failures"] == 0


async def test_a_call_that_was_given_up_writes_no_more() -> None:
    """A guest whose turn has gone on without it is stopped at its next look at the state."""
    state: dict[str, Any] = {}
    turn: Any = SimpleNamespace(
        conversation=SimpleNamespace(state=state, set_by_guests=0), record=SimpleNamespace(state=b"")
    )
    call = GuestCall(asyncio.get_running_loop(), "bot.respond", (), time.monotonic() + 1, turn)
    instance: Any = SimpleNamespace(call=call)
    assert wasm_imports.state_set(instance, "a", "1") == (True, None)
    call.cancelled = True
    for function, given in ((wasm_imports.state_set, ("a", "2")), (wasm_imports.state_get, ("a",))):
        with pytest.raises(Stopped):
            function(instance, *given)
    assert state == {"a": 1}


TELLS_TAGS = (
    "from hotdesk_sdk import hookimpl\n\n@hookimpl\nasync def respond(turn):\n"
    "    tags = turn.conversation.tags\n    return f'{len(tags)} {len(set(tags))}'\n"
)


@pytest.mark.parametrize(
    ("tags", "says"),
    [
        ([f"t{number}" for number in range(33)], "at most 32 tags"),
        (["x" * 129], "128 characters"),
        ([f"{number:0128}" for number in range(32)], ""),
        (["a", "b", "a", "b", "a"], ""),
    ],
    ids=["too many", "too long", "as many and as long as may be", "twice"],
)
async def test_tags_are_bounded(start_guests: StartGuests, tags: list[str], says: str) -> None:
    """More tags than an answer may have, or longer ones, fail the call and none is kept; a tag is kept once."""
    extra = json.dumps({"tags": tags})
    answer = text("answer", DATA, 2).removesuffix(f"(i32.const {RESULT})")
    body = giving_back(
        f"{answer} (i32.store (i32.const {RESULT + 16}) (i32.const {NAME}))"
        f" (i32.store (i32.const {RESULT + 20}) (i32.const {len(extra)})) (i32.const {RESULT})"
    )
    data = component({"respond": when_shouted(body)}, data="ok", memory="2", more=put(NAME, extra))
    desk = await loaded(start_guests, {"bad.wasm": data, "tells.py": TELLS_TAGS, "tells.toml": "order = 900\n"})
    said = [await desk.reply("!"), await desk.reply("!")]
    if says:
        assert said == ["0 0"] * 2
        assert says in (await desk.plugin("bad"))["last_failure"]["problem"]
    else:
        assert said == ["ok"] * 2
        assert await desk.reply("how many?") == f"{len(set(tags))} {len(set(tags))}"


@pytest.mark.parametrize("depth", [32, 33, 900])
async def test_what_is_kept_may_not_nest_deeply(start_guests: StartGuests, depth: int) -> None:
    """Nobody could read it again: the state and the store say `invalid`, an answer's metadata fails its call."""
    deep = "[" * depth + "]" * depth
    about = '{"metadata": {"a": ' + "[" * (depth - 2) + "]" * (depth - 2) + "}}"
    key, value = f"(i32.const {NAME}) (i32.const 1)", f"(i32.const {BUFFER}) (i32.const {len(deep)})"
    files: dict[str, str | bytes] = {
        "state.wasm": refusing("base.state-set", f"{key} (i32.const 1) {value}", most=1, more=put(BUFFER, deep)),
        "kv.wasm": refusing("kv.set", f"{key} {value}", most=1, more=put(BUFFER, deep)),
        "kv.toml": 'capabilities = ["kv"]\n',
        "about.wasm": giving({"bot.respond": (True, ("answer", ("fine", about)))}),
    }
    for name, fine in (("state", "-A"), ("kv", "-A"), ("about", "fine")):
        desk = await loaded(
            start_guests,
            {file: data for file, data in files.items() if file.startswith(f"{name}.")},
            settings={"kv": PluginSettings(grant=("kv",))} if name == "kv" else {},
        )
        said = await desk.reply("x")
        if depth <= 32:
            assert said == fine, name
        elif name == "about":
            assert said is None
            assert "nests deeper than 32" in (await desk.plugin(name))["last_failure"]["problem"]
        else:
            assert said == refused_at("invalid", 1), name


async def test_a_store_is_written_to_no_faster_than_it_may(start_guests: StartGuests) -> None:
    """4 MiB at once, then 256 KiB a second: the fifth value of a million bytes has to wait."""
    arguments = f"(i32.const {NAME}) (i32.const 1) (i32.const {BUFFER}) (i32.const 1000000)"
    data = refusing("kv.set", arguments, most=20, before=quoted(1_000_000))
    desk = await loaded(
        start_guests,
        {"bad.wasm": data, "bad.toml": 'capabilities = ["kv"]\ntimeout_ms = 5000\n'},
        settings={"bad": PluginSettings(grant=("kv",))},
    )
    assert await desk.reply("x") == refused_at("too-large", 5)
    assert (await desk.plugin("bad"))["failures"] == 0


# ---- what a guest may say to others ---------------------------------------------------------------------------------


def sending(conversation: str, *, most: int) -> bytes:
    """A bot that sends to *conversation*; its intake opens the conversation `hooked`."""
    arguments = f"(i32.const {BUFFER}) (i32.const {len(conversation)}) (i32.const {BUFFER + 100}) (i32.const 5)"
    body, options = until_refused("base.send", arguments, most=most)
    # The constants of `giving` begin at DATA, where the answer goes; there is nothing that they are needed for later.
    took = (True, ([("hooked", "hello", "", "")], (200, "", "", "")))
    more = put(BUFFER, conversation) + put(BUFFER + 100, "psst!")
    return giving({"intake.receive": took}, instead={"respond": when_shouted(giving_back(body))}, more=more, **options)


async def test_a_guest_speaks_where_it_belongs(start_guests: StartGuests) -> None:
    """In the conversation at hand and in those that its own intake opened; another's is denied."""
    said = {}
    for name in ("own", "somebody", "hooked"):
        desk = await loaded(start_guests, {"bad.wasm": sending(name, most=1)})
        await desk.say("hello", "somebody")
        async with desk.http.post(f"{desk.url}/hooks/bad", data=b"x") as response:
            assert response.status == 200
        said[name] = str(await desk.reply("!", "own"))
        heard = [one["text"] for one in await desk.record(name)]
        assert ("psst!" in heard) is (name != "somebody"), name
    assert said == {"own": "-A", "somebody": refused_at("denied", 1), "hooked": "-A"}


async def test_a_guest_sends_no_faster_than_it_may(start_guests: StartGuests) -> None:
    """50 messages at once, then five a second."""
    desk = await loaded(start_guests, {"bad.wasm": sending("own", most=60)})
    said = str(await desk.reply("!", "own"))
    assert said[0] == str(ERRORS.index("too-large"))
    sent = [one["text"] for one in await desk.record("own")].count("psst!")
    assert 50 <= sent < 60
    assert ord(said[1]) - 64 == sent + 1


HEADERS = {
    "a length": {"Content-Length": "5"},
    "an encoding": {"Transfer-Encoding": "chunked"},
    "a cookie": {"Set-Cookie": "a=b; Path=/"},
    "a connection": {"connection": "close"},
    "a name of two": {"a: b": "c"},
    "a name with a space": {"a b": "c"},
    "no name": {"": "c"},
    "a foreign name": {"X-\u00c9": "e"},
    "a foreign value": {"X-E": "\u00e9"},
}


async def test_an_intake_can_not_make_its_answer_two(start_guests: StartGuests) -> None:
    """Headers that frame the answer, or that speak for the whole origin, are the host's; names are what HTTP has."""
    kinds = {f"h{number}": kind for number, kind in enumerate(HEADERS)}
    files: dict[str, str | bytes] = {
        f"{name}.wasm": giving({"intake.receive": (True, ([], (200, json.dumps(HEADERS[kind]), "hello", "")))})
        for name, kind in kinds.items()
    }
    fine = json.dumps({"Content-Type": "text/plain", "X-Fine": "yes, it is"})
    files["fine.wasm"] = giving({"intake.receive": (True, ([], (200, fine, "hello", "")))})
    desk = await loaded(start_guests, files)
    for name, kind in kinds.items():
        async with desk.http.post(f"{desk.url}/hooks/{name}", data=b"x") as response:
            assert response.status >= 500, kind
            assert "Set-Cookie" not in response.headers
        assert (await desk.plugin(name))["failures"] == 1, kind
    async with desk.http.post(f"{desk.url}/hooks/fine", data=b"x") as response:
        assert (response.status, response.headers["X-Fine"], await response.text()) == (200, "yes, it is", "hello")


@pytest.mark.parametrize("query", ["a=1%26admin%3D1", "a=1&a=2", "flag", "x=%2B+y", "a=caf%C3%A9&", ""])
async def test_an_intake_gets_the_query_as_it_was_sent(start_guests: StartGuests, query: str) -> None:
    """Nothing decoded and joined again: `&` within a value would be another name, and a signature would not match."""
    body = (
        f"(memory.fill (i32.const {RESULT}) (i32.const 0) (i32.const 64)) (i32.store16 (i32.const {RESULT + 12})"
        f" (i32.const 200)) (i32.store (i32.const {RESULT + 24}) (local.get 4)) (i32.store (i32.const {RESULT + 28})"
        f" (local.get 5)) (i32.const {RESULT})"
    )
    desk = await loaded(start_guests, {"hook.wasm": component({"receive": body})})
    async with desk.http.get(yarl.URL(f"{desk.url}/hooks/hook?{query}", encoded=True)) as response:
        assert (response.status, await response.text()) == (200, query)


FETCHES = {
    "another host": ("GET", '{"Host": "admin.internal"}'),
    "in other letters": ("GET", '{"hOST": "admin.internal"}'),
    "with a space": ("GET", '{" host": "admin.internal"}'),
    "a connection": ("GET", '{"Connection": "Upgrade", "Upgrade": "websocket"}'),
    "a length": ("POST", '{"Content-Length": "5"}'),
    "an encoding": ("POST", '{"Transfer-Encoding": "chunked"}'),
    "a proxy": ("GET", '{"Proxy-Authorization": "x"}'),
    "a tunnel": ("CONNECT", ""),
    "a tunnel in other letters": ("connect", ""),
}


async def test_a_fetch_is_the_one_that_was_granted(start_guests: StartGuests) -> None:
    """Headers and methods that make another request of it are `invalid`; without them the same request is sent."""
    async with server(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok") as (port, _):
        url = f"http://127.0.0.1:{port}/"
        cases = {**FETCHES, "nothing of the kind": ("GET", '{"X-Fine": "yes"}')}
        files: dict[str, str | bytes] = {}
        for number, (method, headers) in enumerate(cases.values()):
            files[f"b{number}.wasm"] = asking("http.fetch", method, url, headers, "", when=f"!{chr(65 + number)}")
            files[f"b{number}.toml"] = 'capabilities = ["http:127.0.0.1"]\n'
        granted = PluginSettings(grant=("http:127.0.0.1",))
        desk = await loaded(
            start_guests,
            files,
            settings={f"b{number}": granted for number in range(len(cases))},
            http_hosts=(f"127.0.0.1:{port}",),
        )
        said = {kind: await desk.reply(f"!{chr(65 + number)}") for number, kind in enumerate(cases)}
    assert said.pop("nothing of the kind") == "ok"
    wrong = {kind: one for kind, one in said.items() if not str(one).startswith(str(ERRORS.index("invalid")))}
    assert not wrong


async def test_a_request_to_the_model_has_what_there_is(start_guests: StartGuests) -> None:
    """A key that the contract does not have is refused by its name, and goes to no model."""
    data = asking("llm.complete", '{"messages": [], "api_base": "http://elsewhere.test/"}')
    desk = await loaded(
        start_guests,
        {"bad.wasm": data, "bad.toml": 'capabilities = ["llm"]\n'},
        settings={"bad": PluginSettings(grant=("llm",))},
    )
    said = str(await desk.reply("!"))
    assert said[0] == str(ERRORS.index("invalid"))
    assert "not api_base" in said


# ---- the loop, and the time of others -------------------------------------------------------------------------------


async def test_a_wake_up_for_what_was_taken_does_not_spin() -> None:
    """The loop goes on when the guest's thread was put off between what it said and whom it wakes for it."""
    loop = asyncio.get_running_loop()
    call = GuestCall(loop, "x", (), loop.time() + 9, None)
    taking = asyncio.create_task(call.take())
    await asyncio.sleep(0)
    assert call._waiter is not None
    call._waiter.set_result(None)  # for what somebody took already
    guest = threading.Timer(0.3, call.say, [(DONE, 1)])
    guest.start()
    rounds = 0
    while not taking.done():
        await asyncio.sleep(0.01)
        rounds += 1
    assert await taking == (DONE, 1)
    assert rounds > 10
    guest.join()


STATE = (
    f"(i32.store (i32.const {RESULT}) (i32.const 1)) (i32.store (i32.const {RESULT + 4}) (i32.const {DATA}))"
    f" (i32.store (i32.const {RESULT + 8}) (i32.const 2)) (i32.const {RESULT})"
)
"""What `export-state` gives: `{}`, which is at `DATA`."""


async def test_a_guest_that_does_not_hand_its_state_over_goes_on(
    start_guests: StartGuests, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The thorough compilation is given up when `export-state` takes for ever, and what serves answers on."""
    again = "(if (i32.load (i32.const 60000)) (then (loop (br 0)))) (i32.store (i32.const 60000) (i32.const 1))"
    data = component({"respond": text("answer", DATA, 2), "export-state": f"{again} {STATE}"}, data="{}")
    desk = await loaded(
        start_guests,
        {"bad.wasm": padded(data), "bad.toml": "timeout_ms = 2000\n"},
        wasm_cache=str(tmp_path / "native"),
        setup_timeout_s=0.5,
    )
    lines: list[str] = []

    def is_told() -> bool:
        lines.append("".join(capfd.readouterr()))
        return "plugin_not_optimised" in "".join(lines)

    await wait_until(is_told, "it is given up")
    assert [await desk.reply("x", f"c{number}") for number in range(3)] == ["{}"] * 3
    assert (await desk.plugin("bad"))["failures"] == 0
    await wait_until(lambda: stores(desk) == 1, "the instance that looped has ended")


def emitting(size: int, times: int, *, more: dict[str, str] | None = None, wanted: int = 0) -> bytes:
    """A bot that emits *times* texts of *size* bytes, and traps unless they end with the error's case *wanted*; 0 is
    none. Then it says a dot."""
    body = (
        f"(memory.fill (i32.const {BUFFER}) (i32.const 97) (i32.const {size}))"
        f" (block $end (loop $l (local.set $n (i32.add (local.get $n) (i32.const 1)))"
        f" (call $base.emit (i32.const {BUFFER}) (i32.const {size}) (i32.const {BACK}))"
        f" (br_if $end (i32.load8_u (i32.const {BACK})))"
        f" (br_if $l (i32.lt_u (local.get $n) (i32.const {times})))))"
        f" (if (i32.ne (i32.const {wanted}) (if (result i32) (i32.load8_u (i32.const {BACK}))"
        f" (then (i32.load8_u (i32.const {BACK + 4}))) (else (i32.const 0)))) (then (unreachable)))"
        f" {text('answer', DATA, 0)}"
    )
    return component(
        {"respond": when_shouted(giving_back(body)), **(more or {})}, imports={"base": ("emit",)}, data="{}", memory="8"
    )


SIZE, TIMES = 60_000, 200


async def test_a_slow_reader_does_not_cut_a_guests_stream(start_guests: StartGuests) -> None:
    """Who stands still for longer than the guest's `timeout_ms` reads the whole stream all the same."""
    desk = await loaded(
        start_guests,
        {"bad.wasm": emitting(SIZE, TIMES), "bad.toml": "timeout_ms = 300\n"},
        max_reply_chars=100_000_000,
        max_buffer_bytes=100_000_000,
    )
    async with raw_stream(desk.url, receive_buffer=4096) as (reader, writer):
        headers = {"Accept": "text/event-stream", "Content-Type": "application/json"}
        writer.write(request_bytes("POST", "/v1/conversations/c/messages", headers, b'{"text":"!"}'))
        await asyncio.sleep(0.9)
        read, replies = 0, []
        async for kind, data in raw_events(reader):
            read += len(data["text"]) if kind == "chunk" else 0
            replies += [len(data["text"])] if kind == "reply" else []
    assert (await desk.plugin("bad"))["failures"] == 0
    assert (read, replies) == (SIZE * TIMES, [SIZE * TIMES])
    assert [len(one["text"]) for one in await desk.record() if one["text"] != "!"] == [SIZE * TIMES]


PASSES_ON = (
    f"(i64.store (i32.const {RESULT}) (i64.const 0)) (i64.store (i32.const {RESULT + 8}) (i64.const 0))"
    f" (i64.store (i32.const {RESULT + 12}) (i64.const 0)) (i32.store (i32.const {RESULT + 4}) (local.get 8))"
    f" (i32.store (i32.const {RESULT + 8}) (local.get 9)) (i32.const {RESULT})"
)


@pytest.mark.parametrize(("times", "case"), [(7, ""), (60, "too-large")], ids=["420,000 bytes", "3,600,000 bytes"])
async def test_a_bot_with_state_whose_own_chunks_wait_for_it(start_guests: StartGuests, times: int, case: str) -> None:
    """Its one instance emits while its `chunks` wait for that instance: up to a megabyte is held, more is refused."""
    data = emitting(
        60_000, times, more={"transform": PASSES_ON, "export-state": STATE}, wanted=ERRORS.index(case) if case else 0
    )
    desk = await loaded(start_guests, {"bad.wasm": data, "bad.toml": "timeout_ms = 2000\n"}, max_reply_chars=10_000_000)
    async with asyncio.timeout(5):
        said = str(await desk.reply("!"))
    if case:  # what was on its way already, and a megabyte behind that
        assert 1_000_000 < len(said) <= 2 * 1024 * 1024
    else:
        assert len(said) == 60_000 * times
    assert (await desk.plugin("bad"))["failures"] == 0


async def test_a_bot_that_emits_for_ever_leaves_the_loop_to_others(start_guests: StartGuests) -> None:
    """Others are answered meanwhile as before, and it ends when its reply is as long as one may be."""
    desk = await loaded(
        start_guests, {**FILES, "bad.wasm": emitting(1, 1 << 30), "bad.toml": "timeout_ms = 10000\n"},
        max_reply_chars=2000,
    )  # fmt: skip
    floods = itertools.count()

    async def cause() -> None:
        async with asyncio.timeout(5):
            ended = await desk.say("!", f"flood{next(floods)}")
        assert ended["error"] == {"code": "stream_cut", "message": "the reply is over 2000 characters"}
        assert len(ended["replies"][0]["text"]) == 2000

    await others_are_served(desk, cause)
    await wait_until(lambda: stores(desk) <= 1, "no Store is left over")


# ---- log lines ------------------------------------------------------------------------------------------------------

FORGED = "x\n2026-01-01 00:00:00 [error    ] forged\x1b[2J"


def test_a_log_line_is_one_line() -> None:
    """The event and the keys have what could forge a line, or move a cursor, written out; the host's names stay its."""
    lines: list[tuple[str, dict[str, Any]]] = []
    owner = SimpleNamespace(
        log=SimpleNamespace(info=lambda event, **fields: lines.append((event, fields))),
        log_budget=wasm_imports.Budget(1.0, 10.0),
    )
    instance: Any = SimpleNamespace(owner=owner, call=None)
    fields = {FORGED: 1, "self": 2, "event": 3, "plugin": 4, "fine": 5}
    wasm_imports.log(instance, "info", FORGED, json.dumps(fields))
    [(event, named)] = lines
    assert all(one.isprintable() for one in (event, *named))
    assert sorted(named.values()) == [1, 2, 3, 4, 5]
    assert not named.keys() & {"self", "event", "plugin"}
    assert named["fine"] == 5


async def test_a_guest_forges_no_log_line(start_guests: StartGuests, capfd: pytest.CaptureFixture[str]) -> None:
    """In the log itself, also by the fields' values; a field called `self` is no failure."""
    fields = json.dumps({"self": FORGED, "event": FORGED, FORGED: FORGED})
    given = f"(i32.const {NAME}) (i32.const {len(FORGED)}) (i32.const {BUFFER}) (i32.const {len(fields)})"
    data = component(
        {"respond": f"(call $base.log (i32.const 2) {given}) {text('answer', DATA, 2)}"},
        imports={"base": ("log",)},
        data="ok",
        memory="4",
        more=put(NAME, FORGED) + put(BUFFER, fields),
    )
    desk = await loaded(start_guests, {"bad.wasm": data})
    assert await desk.reply("x") == "ok"
    assert (await desk.plugin("bad"))["failures"] == 0
    written = "".join(capfd.readouterr())
    assert "forged" in written
    assert not [line for line in written.splitlines() if line.startswith("2026-01-01 00:00:00")]
    assert "\x1b[2J" not in written


# ---- what compiling says --------------------------------------------------------------------------------------------


def with_long_names() -> bytes:
    """A component with a core module that exports one name of 49,000 characters twice."""
    name = "\u00e9".encode() * 49_000
    exports = b"\x02" + 2 * (leb(len(name)) + name + b"\0\0")
    module = (
        b"\0asm\x01\0\0\0"
        + section(1, b"\x01\x60\0\0")
        + section(3, b"\x01\0")
        + section(7, exports)
        + section(10, b"\x01\x02\0\x0b")
    )
    return component({"respond": NEXT}) + section(1, module)


async def test_a_long_compile_error_is_one_components_own(start_guests: StartGuests) -> None:
    """Names of 49,000 characters are in the compiler's message, which the host reads: in words, and not all of it."""
    desk = await start_guests({**FILES, "bad.wasm": with_long_names()})
    failed = await desk.wait_event("plugin_failed", plugin="bad")
    assert "duplicate" in failed["message"]
    assert len(failed["message"]) < 1000
    desk.write("good.wasm", component({"respond": giving_back(text("answer", DATA, 4)) + NEXT}, data="good"))
    await desk.wait_event("plugin_loaded", plugin="good")
    assert await desk.reply("!") == "good"
