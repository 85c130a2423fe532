"""A component that can't be loaded: what serves goes on, the operator reads why, and nothing of it is left."""

from __future__ import annotations

import time
from typing import Any

import pytest
import wasmtime
from tests.wasm.alone import alone
from tests.wasm.components import (
    FOREIGN,
    LOOP,
    NEXT,
    RESULT,
    TRAP,
    ZERO,
    answering,
    component,
    giving,
    leb,
    section,
)
from tests.wasm.conftest import StartGuests
from tests.wasm.test_amounts import listing
from tests.wasm.test_faults import BUSY, FILES, stores, traffic
from wasmtime.component import Component

from conftest import Desk, wait_until
from hotdesk.errors import LoadFailed
from hotdesk.runtime.wasm import Machine
from hotdesk.runtime.wit_inspect import inspect_component

STATE = {"lifecycle.export-state": '{"count": 3}'}
OLD = giving({"bot.respond": (True, ("answer", ("old", ""))), **STATE})
NEW = giving({"bot.respond": (True, ("answer", ("new", ""))), "lifecycle.import-state": (True, None)})
WRAPPED = '(component {imports} (core module $m (memory (export "memory") 1) (func (export "f"))) {rest})'
SMALL = '(core instance $i (instantiate $m)) (func $f (canon lift (core func $i "f")))'


def wat(text: str) -> bytes:
    return bytes(wasmtime.wat2wasm(text))


def exporting(items: str, name: str = "hotdesk:plugin/tools@1.0.0", imports: str = "") -> bytes:
    """A component that exports an instance with *items*; `$f` is a function without parameters."""
    rest = f'{SMALL} (instance $x {items}) (export "{name}" (instance $x))'
    return wat(WRAPPED.format(imports=imports, rest=rest))


def refusing(function: str, value: Any = (False, "there is no key"), **more: Any) -> bytes:
    return giving({f"lifecycle.{function}": value, "bot.respond": (True, ("next", None)), **more})


def trapping(function: str, body: str = TRAP) -> bytes:
    return component({"respond": NEXT, function: body})


def with_tools(*tools: tuple[str, str, str, str]) -> bytes:
    return giving({"tools.list-tools": list(tools)})


BAD: dict[str, tuple[Any, str, str]] = {
    "a loop in setup": (lambda: trapping("setup", LOOP), "setup", "took over 300 ms"),
    "a loop while it is made": (
        lambda: component({"respond": NEXT}, more=f"(func $s {LOOP}) (start $s)"),
        "setup",
        "took over 300 ms",
    ),
    "a trap while it is made": (
        lambda: component({"respond": NEXT}, more="(func $s (unreachable)) (start $s)"),
        "setup",
        "unreachable",
    ),
    "a trap in setup": (lambda: trapping("setup"), "setup", "unreachable"),
    "setup says no": (lambda: refusing("setup"), "setup", "there is no key"),
    "setup says no, and not why": (lambda: refusing("setup", (False, "")), "setup", "did not say why"),
    "a trap in probe": (lambda: trapping("probe"), "probe", "unreachable"),
    "a loop in probe": (lambda: trapping("probe", LOOP), "probe", "took over 300 ms"),
    "probe says no": (lambda: refusing("probe"), "probe", "there is no key"),
    "a trap in import-state": (lambda: trapping("import-state"), "import_state", "unreachable"),
    "state that it can't import": (lambda: refusing("import-state"), "import_state", "there is no key"),
    "a trap in its first export-state": (lambda: trapping("export-state"), "setup", "unreachable"),
    "a trap in list-tools": (lambda: component({"list-tools": TRAP}), "tools", "unreachable"),
    "two million tools": (lambda: component({"list-tools": listing(2_000_000)}), "tools", "too much data"),
    "tools without names": (lambda: component({"list-tools": listing(10)}), "tools", "a tool is named ''"),
    "a tool's parameters are no JSON": (lambda: with_tools(("t", "", "{", "")), "tools", "is not JSON"),
    "a tool's parameters are a list": (lambda: with_tools(("t", "", "[]", "")), "tools", "is no JSON object"),
    "a tool's parameters are no schema": (
        lambda: with_tools(("t", "", '{"type": "object", "properties": 7}', "")),
        "tools",
        "is no JSON Schema",
    ),
    "two tools of one name": (
        lambda: with_tools(*[("t", "", '{"type": "object"}', "")] * 2),
        "tools",
        "two tools are named 't'",
    ),
    "it needs WASI to begin": (
        lambda: component({"respond": NEXT}, foreign=True, more="(func $s (call $foreign)) (start $s)"),
        "setup",
        f"{FOREIGN}#exit",
    ),
    "a newer contract": (lambda: component({"respond": NEXT}, version="1.7.0"), "inspect", "is newer than"),
    "an older contract": (lambda: component({"respond": NEXT}, version="0.9.0"), "inspect", "is older than"),
    "a contract of next year": (lambda: component({"respond": NEXT}, version="2.0.0"), "inspect", "is newer than"),
    "an interface that there is not": (
        lambda: exporting("", "hotdesk:plugin/middelware@1.0.0"),
        "inspect",
        "did you mean 'middleware'?",
    ),
    "a function too few": (
        lambda: exporting('(export "list-tools" (func $f))'),
        "inspect",
        "without its function 'call-tool'",
    ),
    "a function too many": (
        lambda: exporting("".join(f'(export "{name}" (func $f))' for name in ("list-tools", "call-tool", "more"))),
        "inspect",
        "tools.more, which the contract does not have",
    ),
    "fifty thousand functions": (
        lambda: exporting("".join(f'(export "f{n}" (func $f))' for n in range(50_000))),
        "inspect",
        "with 50,000 items",
    ),
    "a wrong signature": (
        lambda: exporting('(export "list-tools" (func $f)) (export "call-tool" (func $f))'),
        "inspect",
        "takes () and gives nothing",
    ),
    "a function for an interface": (
        lambda: wat(WRAPPED.format(imports="", rest=f'{SMALL} (export "hotdesk:plugin/tools@1.0.0" (func $f))')),
        "inspect",
        "not as an interface",
    ),
    "a host function that there is not": (
        lambda: component(
            {"respond": NEXT}, wrap='(import "hotdesk:plugin/base@1.0.0" (instance (export "shout" (func))))'
        ),
        "inspect",
        "base.shout, which the contract does not have",
    ),
    "an import that no host has": (
        lambda: exporting("", imports='(import "acme:database/store@1.0.0" (instance))'),
        "inspect",
        "it imports 'acme:database/store@1.0.0', which no host offers",
    ),
    "a core module": (lambda: wat('(module (func (export "respond")))'), "inspect", "it is a core module"),
    "an empty file": (lambda: b"", "parse", "the file is empty"),
    "a text": (lambda: b"def respond(turn): ...\n", "parse", "it is not WebAssembly"),
    "half a file": (lambda: NEW[: len(NEW) // 2], "parse", "it is cut off"),
    "a file with a hole": (
        lambda: NEW[:700] + bytes(200) + NEW[900:],
        "",
        "",
    ),
}


async def refused(desk: Desk, data: bytes) -> dict[str, Any]:
    """Put *data* in the serving component's place, and wait to be told that it failed."""
    count = sum(event["kind"] == "plugin_failed" for event in desk.events)
    desk.write("bad.wasm", data)

    def failed() -> Any:
        found = [event for event in desk.events if event["kind"] == "plugin_failed"]
        return found[-1] if len(found) > count else None

    return await wait_until(failed, "it fails")  # type: ignore[no-any-return]


async def test_what_can_not_be_loaded_changes_nothing(start_guests: StartGuests) -> None:
    """Of each kind: the old generation serves on, the step and the reason are told, and no Store is left."""
    desk = await start_guests({**FILES, "bad.wasm": OLD}, setup_timeout_s=0.3)
    assert await desk.reply("!") == "old"
    wrong = {}
    for kind, (make, step, says) in BAD.items():
        failed = await refused(desk, make())
        if (step and failed["step"] != step) or says not in failed["message"]:
            wrong[kind] = failed["step"], failed["message"]
        assert await desk.reply("!") == "old", kind
        assert await desk.reply("hello") == BUSY["echo"], kind
        await wait_until(lambda: stores(desk) == 1, f"one Store is alive after {kind}")
        shown = await desk.plugin("bad")
        assert (shown["generation"], shown["state"]) == (1, "ACTIVE"), kind
    assert not wrong


async def test_a_component_mends_what_a_bad_one_broke(start_guests: StartGuests) -> None:
    """After a row of bad ones the next good one is taken, with the state of the one that served all along."""
    desk = await start_guests({**FILES, "bad.wasm": OLD})
    for kind in ("a trap in setup", "half a file", "state that it can't import", "a wrong signature"):
        await refused(desk, BAD[kind][0]())
    desk.write("bad.wasm", NEW)
    await desk.wait_event("plugin_swapped", plugin="bad")
    assert await desk.reply("!") == "new"
    assert (await desk.plugin("bad"))["error"] is None
    await wait_until(lambda: stores(desk) == 1, "one Store is alive")


async def test_a_first_version_that_is_bad_serves_nobody(start_guests: StartGuests) -> None:
    """A host starts with a component that can't be made, says why, and takes the good one."""
    desk = await start_guests({**FILES, "bad.wasm": BAD["a trap in setup"][0]()})
    assert await desk.reply("!") == "the next one"
    assert "unreachable" in (await desk.plugin("bad"))["error"]["message"]
    assert stores(desk) == 0
    desk.write("bad.wasm", NEW)
    await desk.wait_event("plugin_loaded", plugin="bad")
    assert await desk.reply("!") == "new"


ONCE = (
    f"(if (global.get $asked) (then {{then}})) (global.set $asked (i32.const 1))"
    f" (i32.store (i32.const {RESULT}) (i32.const 1)) (i32.store (i32.const {RESULT + 4}) (i32.const 16))"
    f" (i32.store (i32.const {RESULT + 8}) (i32.const 2)) (i32.const {RESULT})"
)
"""An `export-state` that gives `{}` when it is first asked."""


@pytest.mark.parametrize(
    ("then", "says"),
    [
        (TRAP, "unreachable"),
        (LOOP, "took over 300 ms"),
        ("(i32.store (i32.const 16) (i32.const 0x7b7b7b7b))", "not JSON"),
    ],
    ids=["trap", "loop", "no JSON"],
)
async def test_an_old_one_that_can_not_give_its_state_serves_on(
    start_guests: StartGuests, then: str, says: str
) -> None:
    """When the generation that serves fails in `export-state` it stays, and answers from a new instance."""
    old = component(
        {"respond": NEXT, "export-state": ONCE.format(then=then)},
        data="{}",
        more="(global $asked (mut i32) (i32.const 0))",
    )
    desk = await start_guests({**FILES, "bad.wasm": old}, setup_timeout_s=0.3)
    assert await desk.reply("!") == "the next one"
    failed = await refused(desk, NEW)
    assert failed["step"] == "export_state"
    assert says in failed["message"]
    assert await desk.reply("!") == "the next one"
    assert (await desk.plugin("bad"))["failures"] == 0, "turns went well"
    await wait_until(lambda: stores(desk) == 1, "one Store is alive")


def phis(count: int) -> str:
    """Conditions that each depend on the one before: what the compiler spends most time on."""
    return "".join(
        f"(if (local.get $n) (then (local.set $m (i32.const {n}))) (else (local.set $n (i32.const {n}))))"
        for n in range(count)
    )


def checks(tables: int) -> bytes:
    """A component with a function that is checked for half a second for each of *tables*.

    A table has 60,000 branches out of a block that gives 1,000 values, and for each branch all of these are looked at.
    That needs no memory, and a second core is of no use.
    """
    branches, values = 60_000, 1000
    types = leb(2) + b"\x60\0" + leb(values) + b"\x7f" * values + b"\x60\0\0"  # of the block, and of the function
    table = b"\x0e" + leb(branches) + b"\0" * (branches + 1)
    code = b"\0" + b"\x02\0" + b"\0" + table * tables + b"\x0b" + b"\0\x0b"  # no locals, block, unreachable, end
    functions = section(3, b"\1\1") + section(10, leb(1) + leb(len(code)) + code)
    return component({"respond": NEXT}) + section(1, b"\0asm\1\0\0\0" + section(1, types) + functions)


BOMBS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "a hundred thousand functions": (
        lambda: component({"respond": NEXT}, more="(func (result i32) (i32.const 1))" * 100_000),
        {"wasm_compile_mb": 256},
        "`wasm_compile_mb`",
    ),
    "a function that takes long": (
        lambda: checks(30),
        {"wasm_compile_timeout_s": 0.8},
        "compiling it took over 0.8 s (`wasm_compile_timeout_s`)",
    ),
    "a function that takes much": (
        lambda: component({"respond": phis(60_000) + NEXT}),
        {"wasm_compile_mb": 256},
        "`wasm_compile_mb`",
    ),
}


@pytest.mark.parametrize("kind", BOMBS)
async def test_a_compile_bomb_is_bounded(start_guests: StartGuests, kind: str) -> None:
    """Compiling is bounded in memory and in time, others are served meanwhile, and the next good one compiles."""
    make, config, says = BOMBS[kind]
    data = make()
    desk = await start_guests({**FILES, "bad.wasm": OLD}, **config)
    started = time.monotonic()
    async with traffic(desk) as times:
        failed = await refused(desk, data)
    assert time.monotonic() - started < 10
    assert (failed["step"], says in failed["message"]) == ("compile", True), failed
    assert len(times.seconds) > 20
    assert times.p99 < 0.3
    assert await desk.reply("!") == "old"
    desk.write("bad.wasm", answering(f"after {kind}"))
    await desk.wait_event("plugin_swapped", plugin="bad")
    assert await desk.reply("!") == f"after {kind}"


@pytest.mark.parametrize(
    "body",
    [
        "(block " * 50_000 + ")" * 50_000,
        "(block " * 100 + f"(br_table {' '.join(str(n % 100) for n in range(60_000))} (local.get 0))" + ")" * 100,
        "(drop " + "(i32.add (i32.const 1) " * 3000 + "(i32.const 1)" + ")" * 3001,
    ],
    ids=["50,000 blocks deep", "a table of 60,000 branches", "an expression 3,000 deep"],
)
async def test_deep_code_is_compiled_or_refused(start_guests: StartGuests, body: str) -> None:
    """Nesting that would overflow a compiler that recurses ends as an answer or as a refusal."""
    desk = await start_guests({**FILES, "bad.wasm": component({"respond": body + NEXT})}, wasm_compile_mb=512)
    await wait_until(lambda: any(event.get("plugin") == "bad" for event in desk.events), "it is loaded, or refused")
    assert await desk.reply("!") == "the next one"


def test_a_component_cut_at_any_byte_is_refused(machine: Machine) -> None:
    """By the inspection or by the compiler, and never anything worse; between two sections it is a smaller one."""
    whole = []
    for size in range(len(NEW)):
        try:
            inspected = inspect_component("cut", NEW[:size], file="cut.wasm", max_bytes=1 << 20)
            native = bytes(Component(machine.engine, NEW[:size]).serialize())
        except (LoadFailed, wasmtime.WasmtimeError):
            continue
        assert machine.load("cut", native, inspected, "cut.wasm").functions
        whole.append(size)
    assert len(whole) < 30, "there are about as many sections after the first export"


ZEROS: dict[str, tuple[tuple[Any, ...], Any]] = {
    "lifecycle.setup": (("{}",), (True, None)),
    "lifecycle.configure": (("{}",), (True, False)),
    "lifecycle.probe": ((), (True, None)),
    "lifecycle.export-state": ((), None),
    "lifecycle.import-state": (("{}", "1"), (True, None)),
    "delivery.deliver": (("c", ("hello", "{}")), (True, None)),
    "tools.list-tools": ((), []),
    "tools.call-tool": (("t", "{}"), (True, "")),
}
"""Functions with arguments, and what `ZERO` gives for each."""


async def test_zero_is_what_any_function_may_give(machine: Machine) -> None:
    """The default bodies of these tests are themselves good."""
    async with alone(machine, component({name.partition(".")[2]: ZERO for name in ZEROS})) as guest:
        await guest.call("")
        for name, (given, gives) in ZEROS.items():
            assert (await guest.call(name, *given)).value == gives, name
