"""A guest that gives or takes too much: the host's memory and time stay bounded."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.wasm.alone import TURN, alone, code_of
from tests.wasm.components import LOOP, RESULT, component, text

from hotdesk.runtime.wasm import MAX_TABLE_ELEMENTS, Machine
from hotdesk.runtime.wasm_calls import GuestFault
from hotdesk.runtime.wasm_imports import IMPORTED

MIB = 1024 * 1024
PAGE = 65536
GROWN = "(drop (memory.grow (i32.const 1000)))"
"""About all that a guest may have."""


def resident() -> int:
    """This process's bytes in memory."""
    return int(psutil.Process().memory_info().rss)


def peak() -> int:
    """The most that there were since `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmHWM")


def forget_peak() -> None:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


def listing(count: int, chars: int = 0) -> str:
    """A body of `list-tools`: *count* tools, each of whose four texts is the same *chars* bytes of the memory."""
    fields = "".join(
        f"(i32.store offset={at} (local.get $m) (i32.const {16 * MIB})) (i32.store offset={at + 4} (local.get $m)"
        f" (i32.const {chars}))"
        for at in (0, 8, 16, 24)
    )
    fill = (
        f"(local.set $m (i32.const {PAGE})) (loop $l {fields} (local.set $m (i32.add (local.get $m) (i32.const 32)))"
        f" (local.set $n (i32.add (local.get $n) (i32.const 1))) (br_if $l (i32.lt_u (local.get $n)"
        f" (i32.const {count}))))"
        if chars
        else ""
    )
    return (
        f"{GROWN} {fill} (i32.store (i32.const {RESULT}) (i32.const {PAGE}))"
        f" (i32.store (i32.const {RESULT + 4}) (i32.const {count})) (i32.const {RESULT})"
    )


@pytest.fixture(scope="module")
def roomy() -> object:
    """A machine whose guests have room for a reply of 64 MiB."""
    machine = Machine(IMPORTED, memory_bytes=128 * MIB, output_bytes=4 * MIB)
    yield machine
    machine.close()


async def test_a_reply_of_64_mib_is_refused_and_not_kept(roomy: Machine) -> None:
    """The call fails with both sizes, within a second, and what was copied on the way is let go."""
    huge = component({"respond": f"(drop (memory.grow (i32.const 1040))) {text('answer', PAGE, 64 * MIB)}"})
    code = code_of(roomy, huge)
    async with alone(roomy, code) as guest:  # what wasmtime itself needs for the first time
        await guest.call("")
        await guest.call("bot.respond", TURN)
    before = resident()
    forget_peak()
    for _ in range(5):
        async with alone(roomy, code) as guest:
            await guest.call("")
            ended = await guest.call("bot.respond", TURN, timeout_s=5)
        assert "67,108,864 bytes; the limit is 4,194,304" in str(ended.value)
        assert ended.seconds < 1
    assert peak() - before < 300 * MIB, "the guest's memory, and two copies on the way"
    assert resident() - before < 20 * MIB


@pytest.mark.parametrize(
    ("count", "chars"),
    [(2_000_000, 0), (500_000, 0), (130_000, 0), (30, MIB), (8, 4 * MIB), (1000, 30_000)],
    ids=["two million", "half a million", "as many as fit", "30 of 4 MiB", "8 of 16 MiB", "1,000 of 120 kB"],
)
async def test_a_list_of_records_is_bounded(machine: Machine, count: int, chars: int) -> None:
    """A list that is long, or whose texts are the same bytes again and again, is a failed call, and bounded.

    wasmtime lifts at most 128 MiB in one call before it traps, and no epoch ends that: about a quarter of a second.
    """
    code = code_of(machine, component({"list-tools": listing(count, chars)}))
    before = resident()
    forget_peak()
    async with alone(machine, code) as guest:
        await guest.call("")
        ended = await guest.call("tools.list-tools", timeout_s=5)
    assert isinstance(ended.value, GuestFault), "it was let through"
    assert ended.seconds < 2.5
    assert peak() - before < 500 * MIB


async def test_what_failed_calls_copied_does_not_add_up(machine: Machine) -> None:
    """Five refused lists take no more memory than one."""
    code = code_of(machine, component({"list-tools": listing(100_000)}))

    async def once() -> None:
        async with alone(machine, code) as guest:
            await guest.call("")
            assert isinstance((await guest.call("tools.list-tools", timeout_s=5)).value, GuestFault)

    for _ in range(2):
        await once()
    before = resident()
    for _ in range(5):
        await once()
    assert resident() - before < 100 * MIB


async def test_a_result_whose_clean_up_traps_is_not_leaked(machine: Machine) -> None:
    """A guest that gives a text and then traps in its `post-return` costs nothing that stays."""
    trap = ('(func (export "freed") (param i32) (', '(func (export "freed") (param i32) (unreachable) (')
    code = code_of(machine, component({"respond": f"{GROWN} {text('answer', PAGE, 3 * MIB)}"}, heap=trap))

    async def once() -> None:
        async with alone(machine, code) as guest:
            await guest.call("")
            assert isinstance((await guest.call("bot.respond", TURN, timeout_s=5)).value, GuestFault)

    for _ in range(5):
        await once()
    before = resident()
    for _ in range(40):
        await once()
    assert resident() - before < 60 * MIB, "forty texts of 3 MiB would be 120"


async def test_a_list_within_the_limit_is_taken(machine: Machine) -> None:
    """The bound is on what is too much alone: a thousand tools come through."""
    async with alone(machine, component({"list-tools": listing(1000, 20)})) as guest:
        await guest.call("")
        found = (await guest.call("tools.list-tools", timeout_s=5)).value
    assert found == [("\0" * 20,) * 4] * 1000


@pytest.mark.parametrize("size", [4 * MIB + 1, 60 * MIB])
async def test_an_argument_that_is_too_long_ends_the_call(machine: Machine, size: int) -> None:
    """A host function is not called with a text over the limit: the guest traps."""
    body = f"{GROWN} (call $base.log (i32.const 1) (i32.const {PAGE}) (i32.const {size}) (i32.const 0) (i32.const 0))"
    data = component({"respond": f"{body} {text('next', 0, 0)}"}, imports={"base": ("log",)})
    async with alone(machine, data) as guest:
        await guest.call("")
        ended = await guest.call("bot.respond", TURN)
        assert f"{size:,} bytes; the limit is 4,194,304" in str(ended.value)
        assert guest.owner.lines == []


def growing(grow: str, size: str, most: int) -> str:
    """A body that does *grow* for as long as that is allowed, and never ends if *size* is then over *most*."""
    too_much = f"(if (i32.gt_u ({size}) (i32.const {most})) (then {LOOP}))"
    return f"(loop $l (br_if $l (i32.ne (i32.const -1) ({grow})))) {too_much} (unreachable)"


GREEDY: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "grows for ever": ({"respond": growing("memory.grow (i32.const 1)", "memory.size", 64 * MIB // PAGE)}, {}),
    "asks for 4 GiB": ({"respond": growing("memory.grow (i32.const 65535)", "memory.size", 64 * MIB // PAGE)}, {}),
    "begins with 4 GiB": ({"respond": text("next", 0, 0)}, {"memory": "65535"}),
    "five memories": (
        {"respond": text("next", 0, 0)},
        {"wrap": " ".join(f"(core module $m{n} (memory 1)) (core instance (instantiate $m{n}))" for n in range(5))},
    ),
    "a hundred instances": (
        {"respond": text("next", 0, 0)},
        {"wrap": " ".join(f"(core module $m{n}) (core instance (instantiate $m{n}))" for n in range(100))},
    ),
    "a table of a million": ({"respond": text("next", 0, 0)}, {"more": "(table 1000000 funcref)"}),
    "tables that grow": (
        {"respond": growing("table.grow $t (ref.null func) (i32.const 999)", "table.size $t", MAX_TABLE_ELEMENTS)},
        {"more": "(table $t 1 funcref)"},
    ),
    "a heap of garbage-collected arrays": (
        {
            "respond": "(loop $l (table.set $t (local.get $n) (array.new_default $a (i32.const 1000000)))"
            " (local.set $n (i32.add (local.get $n) (i32.const 1))) (br $l)) (unreachable)"
        },
        {"more": "(type $a (array (mut i8))) (table $t 1024 anyref)"},
    ),
    "a huge array": (
        {"respond": f"(drop (array.new_default $a (i32.const 20000000))) {text('next', 0, 0)}"},
        {"more": "(type $a (array (mut i64)))"},
    ),
}


@pytest.mark.parametrize("kind", GREEDY)
async def test_a_guest_has_no_more_memory_than_it_is_given(machine: Machine, kind: str) -> None:
    """However a guest goes about it, it gets a bounded share, and its call fails."""
    bodies, options = GREEDY[kind]
    code = code_of(machine, component(bodies, **options))
    before = resident()
    forget_peak()
    started = time.monotonic()
    async with alone(machine, code) as guest:
        ended = await guest.call("")
        if ended.value is None:
            ended = await guest.call("bot.respond", TURN, timeout_s=2)
    assert isinstance(ended.value, GuestFault)
    assert peak() - before < 100 * MIB
    assert time.monotonic() - started < 1
