"""Values cross between Python and a guest's memory: every shape, there and back, within limits."""

from __future__ import annotations

import ctypes
from typing import Any

import psutil
import pytest
import wasmtime._ffi as raw
from tests.wasm.alone import alone, code_of
from tests.wasm.components import DATA, EXPORTS, component, giving
from wasmtime.component import Component

from hotdesk.runtime.wasm import Machine
from hotdesk.runtime.wasm_calls import GuestFault
from hotdesk.runtime.wit_contract import EXPORTS as CONTRACT
from hotdesk.runtime.wit_contract import IMPORTS, words
from hotdesk.runtime.wit_values import VALUE, Arguments, TooMuch, describe, read_values, release, write_value

ffi: Any = raw

TEXTS = ["", "hello", "naïve", "你好，世界", "🙂🙃", "a\0b", "\u200d\ufeff", "x" * 70_000, "é" * 33_000]


def back_and_forth(shape: Any, value: Any, limit: int = 1 << 20) -> Any:
    """*value* written for wasmtime, and read from there."""
    memory = ffi.wasmtime_component_val_t()
    write_value(ctypes.addressof(memory), shape, value)
    try:
        [found] = read_values(ctypes.addressof(memory), 1, limit)
    finally:
        release(memory)
    return found


ERROR = ("variant", dict.fromkeys(("denied", "other"), "string") | {"none": None})
SHAPES: list[tuple[Any, list[Any]]] = [
    ("string", TEXTS),
    ("u16", [0, 1, 65535]),
    ("u32", [0, 7, 2**32 - 1]),
    (("option", "string"), [None, "", "x"]),
    (("option", "u32"), [None, 0, 9]),
    (("result", None, ERROR), [(True, None), (False, ("denied", "kv")), (False, ("none", None))]),
    (("result", "string", None), [(True, "x"), (False, None)]),
    (("result", ("option", "string"), ERROR), [(True, None), (True, "v"), (False, ("other", ""))]),
    (("list", "string"), [[], [""], ["a", "b", "你"] * 50]),
    (("list", ("record", (("a", "string"), ("b", "u16")))), [[], [("x", 1), ("y", 2)]]),
    (("record", (("status", "u16"), ("body", "string"))), [(200, "ok"), (0, "")]),
    (("record", (("inner", ("record", (("x", "string"),))), ("list", ("list", "u32")))), [(("deep",), [1, 2, 3])]),
    (ERROR, [("denied", "kv"), ("none", None)]),
]


@pytest.mark.parametrize(("shape", "values"), SHAPES, ids=[words(shape) for shape, _ in SHAPES])
def test_every_shape_comes_back_as_it_was(shape: Any, values: list[Any]) -> None:
    """What is written for a guest and read again is equal, at the ends of its range too."""
    for value in values:
        assert back_and_forth(shape, value) == value


def test_every_import_s_results_can_be_written() -> None:
    """For each function that the host offers: a failure, and something that is well."""
    sample = {"string": "x", "u16": 1, "u32": 1}

    def example(shape: Any) -> Any:
        if isinstance(shape, str):
            return sample[shape]
        kind = shape[0]
        if kind == "record":
            return tuple(example(one) for _, one in shape[1])
        if kind == "list":
            return [example(shape[1])] * 2
        return example(shape[1]) if kind == "option" else (True, None if shape[1] is None else example(shape[1]))

    for interface, functions in IMPORTS.items():
        for name, function in functions.items():
            if function.result is not None:
                value = example(function.result)
                assert back_and_forth(function.result, value) == value, (interface, name)
                if function.result[0] == "result":
                    failure = False, ("denied", "kv")
                    assert back_and_forth(function.result, failure) == failure, (interface, name)


def test_half_a_surrogate_becomes_a_question_mark() -> None:
    """A text that is no Unicode, which JSON of a visitor may hold, is passed on without what can't be said."""
    assert back_and_forth("string", "a\ud800b") == "a?b"
    arguments = Arguments(["string"])
    arguments.fill(["a\udfffb"])
    assert read_values(ctypes.addressof(arguments.pointer.contents), 1, 100) == ["a?b"]


@pytest.mark.parametrize("limit", [4, 99])
def test_a_text_over_the_limit_is_not_copied(limit: int) -> None:
    """The limit is in bytes, and what has just as many is taken."""
    assert back_and_forth("string", "x" * limit, limit) == "x" * limit
    with pytest.raises(TooMuch, match=f"{limit + 1} bytes; the limit is {limit}"):
        back_and_forth("string", "x" * (limit + 1), limit)
    with pytest.raises(TooMuch):
        back_and_forth("string", "é" * limit, limit)


def test_the_limit_of_a_list_is_for_all_of_it() -> None:
    """Many texts, each within the limit, are together over it; so are many records of nothing."""
    assert back_and_forth(("list", "string"), ["x" * 50] * 10, 10 * (50 + VALUE)) == ["x" * 50] * 10
    with pytest.raises(TooMuch):
        back_and_forth(("list", "string"), ["x" * 50] * 10, 10 * (50 + VALUE) - 1)
    records = ("list", ("record", (("a", "string"), ("b", "string"))))
    with pytest.raises(TooMuch):
        back_and_forth(records, [("", "")] * 100, 100 * VALUE + 100)
    assert back_and_forth(records, [("", "")] * 10, 10_000) == [("", "")] * 10


def test_arguments_are_laid_out_once_and_filled_again() -> None:
    """Short texts after long ones, records, and bools: each call sees its own."""
    arguments = Arguments([("id", "text"), "string", "bool"])
    address = ctypes.addressof(arguments.pointer.contents)
    for text in [*TEXTS, *reversed(TEXTS)]:
        for flag in (True, False):
            arguments.fill([("id", text), text[::-1], flag])
            assert read_values(address, arguments.count, 1 << 20) == [("id", text), text[::-1], flag]
        arguments.shrink()
    with pytest.raises(ValueError, match="argument 2 is"):
        arguments.fill([("id", "x"), "y"])


def test_a_kind_that_the_contract_has_not_is_an_error() -> None:
    """A float, say, which no function of the contract gives."""
    memory = ffi.wasmtime_component_val_t()
    memory.kind = 10
    with pytest.raises(TypeError, match="not in the contract"):
        read_values(ctypes.addressof(memory), 1, 100)
    with pytest.raises(TypeError, match="has no map"):
        write_value(ctypes.addressof(memory), ("map", "string"), {})


VALUES: dict[str, list[Any]] = {
    "middleware.before": [
        (True, one)
        for one in (
            ("next", None),
            ("leave", None),
            ("rewrite", "你好"),
            ("answer", ("text", '{"close": true}')),
            ("hand-over", ("reason", "")),
            ("drop", "why"),
            ("model", "{}"),
            ("other", "{}"),
        )
    ]
    + [(False, "no"), (False, "")],
    "chunks.transform": [(True, ("shown", "held")), (False, "no")],
    "tools.list-tools": [[], [("a", "b", "{}", "")] * 3],
    "tools.call-tool": [(True, "1"), (False, "no")],
    "intake.receive": [(True, ([], (200, "", "", ""))), (True, ([("c", "t", "i", "{}")] * 2, (599, "{}", "x", "")))],
    "delivery.deliver": [(True, None), (False, "later")],
    "lifecycle.configure": [(True, True), (True, False), (False, "no")],
    "lifecycle.export-state": [None, "", '{"n": 1}'],
    "lifecycle.probe": [(True, None), (False, "no")],
}


@pytest.mark.parametrize("function", VALUES)
async def test_what_a_guest_gives_is_what_the_host_sees(machine: Machine, function: str) -> None:
    """Every case of every result comes through a real guest's memory as it was meant."""
    samples = {"string": "x", "bool": True}
    arguments = [
        samples[one] if isinstance(one, str) else ("x",) * len(one[1])
        for one in CONTRACT[function.partition(".")[0]][function.partition(".")[2]].parameters
    ]
    for value in VALUES[function]:
        async with alone(machine, giving({function: value})) as guest:
            await guest.call("")
            assert (await guest.call(function, *arguments)).value == value


async def test_a_guest_sees_every_text_whole(machine: Machine) -> None:
    """What goes in comes back from a guest that says a turn's text again: empty, wide, long, with a zero in it."""
    echo = component(
        {
            "call-tool": f"(i32.store8 (i32.const {DATA}) (i32.const 0))"
            f" (i32.store (i32.const {DATA + 4}) (local.get 2)) (i32.store (i32.const {DATA + 8}) (local.get 3))"
            f" (i32.const {DATA})"
        }
    )
    async with alone(machine, echo) as guest:
        await guest.call("")
        for text in TEXTS:
            assert (await guest.call("tools.call-tool", "name", text)).value == (True, text)
        assert (await guest.call("tools.call-tool", "name", "a\ud800")).value == (True, "a?")


async def test_text_that_is_no_utf_8_is_a_fault(machine: Machine) -> None:
    """Half a surrogate, a cut-off character, a stray byte: the call fails, and says so."""
    for wrong in (b"\xed\xa0\x80", b"\xe4\xbd", b"\xff", b"ok\x80"):
        async with alone(machine, giving({"tools.call-tool": (True, wrong)})) as guest:
            await guest.call("")
            ended = (await guest.call("tools.call-tool", "x", "y")).value
            assert isinstance(ended, GuestFault)
            assert "utf-8" in str(ended)


def test_the_contracts_types_are_described_in_its_own_words(machine: Machine) -> None:
    """A real component's reflected types are, word for word, those of the contract's tables."""
    first = {interface: next(iter(functions)) for interface, (_, functions) in EXPORTS.items()}
    component_ = Component(machine.engine, component(dict.fromkeys(first.values(), "(unreachable)")))
    found = component_.type.exports(machine.engine)
    for interface, functions in CONTRACT.items():
        items = found[f"hotdesk:plugin/{interface}@1.0.0"].ty.exports(machine.engine)  # type: ignore[union-attr]
        for name, function in functions.items():
            kind: Any = items[name].ty
            assert [describe(one) for _, one in kind.params] == [words(one) for one in function.parameters]
            assert (None if kind.result is None else describe(kind.result)) == (
                None if function.result is None else words(function.result)
            )


LONG = 65_536
"""Where a long text is in the memory of a guest."""


@pytest.mark.parametrize(
    ("size", "says"), [(3 << 20, ""), (5 << 20, "the limit is 4,194,304"), (3 << 20, "utf-8")],
    ids=["taken", "over the limit", "no text"],
)  # fmt: skip
async def test_what_a_result_took_is_free_after_its_call(machine: Machine, size: int, says: str) -> None:
    """A hundred long texts, each from a new instance, leave no memory behind, taken or refused."""
    last = 0xFF if says == "utf-8" else 0x61
    body = (
        f"(i32.store8 (i32.const {LONG + size - 1}) (i32.const {last})) (i32.store8 (i32.const {DATA}) (i32.const 0))"
        f" (i32.store (i32.const {DATA + 4}) (i32.const {LONG})) (i32.store (i32.const {DATA + 8}) (i32.const {size}))"
        f" (i32.const {DATA})"
    )
    code = code_of(machine, component({"call-tool": body}, memory="96"))
    process, warm = psutil.Process(), 0
    for number in range(110):
        async with alone(machine, code) as guest:
            await guest.call("")
            given = (await guest.call("tools.call-tool", "x", "y")).value
            if says:
                assert isinstance(given, GuestFault)
                assert says in str(given)
            else:
                assert given == (True, "\0" * (size - 1) + "a")
        if number == 9:
            warm = process.memory_info().rss
    assert process.memory_info().rss - warm < 100 << 20
