"""A large component is compiled quickly first; the thorough compilation takes its place, and nobody notices."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import wasmtime
from tests.wasm.alone import code_of
from tests.wasm.built import built
from tests.wasm.components import DATA, RESULT, ZERO, answering, component, section, text
from tests.wasm.conftest import StartGuests
from tests.wasm.test_bad_loads import phis
from tests.wasm.toolchains import Unavailable

from conftest import Desk, wait_until
from hotdesk.runtime.wasm_loader import BACKGROUND_NICE


def padded(component: bytes) -> bytes:
    """The same with a custom section that makes it larger than what is compiled once."""
    return component + section(0, b"\x07padding" + b"x" * 60_000)


def slow_to_compile(component: bytes) -> bytes:
    """The same with code that nobody calls: the thorough compilation takes half a second, and messages come first."""
    module = wasmtime.wat2wasm(f"(module (func (local $n i32) (local $m i32) {phis(15_000)}))")
    return component + section(1, bytes(module))


def guest_of(desk: Desk, name: str) -> Any:
    entry = desk.host.plugins.entry(name)
    assert entry.current is not None
    return entry.current.guest


def is_kept(native: Path) -> bool:
    """Whether the thorough compilation is done; the quick one is never kept."""
    return bool([*native.glob("*.native")])


@pytest.fixture
def is_told(capfd: pytest.CaptureFixture[str]) -> Callable[[str], bool]:
    """Whether an event is in the log by now."""
    lines: list[str] = []

    def look(event: str) -> bool:
        lines.append("".join(capfd.readouterr()))
        return event in "".join(lines)

    return look


async def test_it_answers_before_and_after(
    start_guests: StartGuests, tmp_path: Path, is_told: Callable[[str], bool]
) -> None:
    """The same generation, on other code; every message that comes meanwhile is answered."""
    data = slow_to_compile(answering("hello"))
    desk = await start_guests({"bot.wasm": data}, wasm_cache=str(tmp_path / "native"))
    answers = []
    while not is_told("_optimised"):
        answers.append(await desk.reply("hi"))
    assert len(answers) > 10, "it answered before and meanwhile"
    assert is_told("plugin_optimised")
    assert is_kept(tmp_path / "native")
    answers += [await desk.reply("hi") for _ in range(20)]
    assert set(answers) == {"hello"}
    shown = await desk.plugin("bot")
    assert (shown["generation"], shown["failures"]) == (1, 0)


async def test_a_small_one_is_compiled_once(start_guests: StartGuests, tmp_path: Path) -> None:
    """Thoroughly, and kept."""
    desk = await start_guests({"bot.wasm": answering("hello")}, wasm_cache=str(tmp_path / "native"))
    assert is_kept(tmp_path / "native")
    assert await desk.reply("hi") == "hello"


@pytest.mark.timeout(600)
async def test_what_it_remembers_goes_with_it(
    start_guests: StartGuests, tmp_path: Path, is_told: Callable[[str], bool]
) -> None:
    """One that keeps state hands it over between two calls, whichever code counted."""
    try:
        plugin = await asyncio.to_thread(built, "zig")
    except Unavailable as exc:
        pytest.skip(str(exc))
    files = {
        "orders/plugin.wasm": slow_to_compile((plugin / "plugin.wasm").read_bytes()),
        "orders/plugin.toml": (plugin / "plugin.toml").read_bytes(),
    }
    desk = await start_guests(files, wasm_cache=str(tmp_path / "native"))
    asked = 0
    while not is_told("_optimised"):
        assert await desk.reply("order 1001?") == "Order 1001 is shipped."
        asked += 1
    assert asked > 10, "it answered before and meanwhile"
    assert is_told("plugin_optimised")
    assert await desk.reply("count") == f"Answered {asked}."
    await wait_until(lambda: guest_of(desk, "orders").instances == 1, "the instance before has ended")
    assert guest_of(desk, "orders").keeps_state


async def test_without_it_the_thorough_one_serves_at_once(start_guests: StartGuests, tmp_path: Path) -> None:
    """`wasm_baseline = false`: what serves first is what is kept."""
    data = padded(answering("hello"))
    desk = await start_guests({"bot.wasm": data}, wasm_cache=str(tmp_path / "native"), wasm_baseline=False)
    assert is_kept(tmp_path / "native")
    assert await desk.reply("hi") == "hello"


COUNTS = component(
    {
        "respond": f"(i32.store8 (i32.const {DATA}) (i32.add (i32.load8_u (i32.const {DATA})) (i32.const 1)))"
        " (if (i32.eq (i32.load8_u (local.get 4)) (i32.const 33)) (then (local.set $n (i32.const 300000000))"
        " (loop (br_if 0 (local.tee $n (i32.sub (local.get $n) (i32.const 1)))))))"
        f" {text('answer', DATA, 1)}",
        "export-state": f"(i32.store8 (i32.const {RESULT}) (i32.const 1))"
        f" (i32.store (i32.const {RESULT + 4}) (i32.const {DATA})) (i32.store (i32.const {RESULT + 8}) (i32.const 1))"
        f" (i32.const {RESULT})",
        "import-state": f"(i32.store8 (i32.const {DATA}) (i32.load8_u (local.get 0))) {ZERO}",
    },
    data="0",
)
"""Says how many turns it has answered; takes its time for one that begins with an exclamation mark."""


async def test_a_call_under_way_keeps_what_it_changed(start_guests: StartGuests) -> None:
    """An upgrade that comes while the only instance answers waits for it, and takes over the state as it is then."""
    desk = await start_guests({"bot.wasm": COUNTS})
    guest = guest_of(desk, "bot")
    again = code_of(guest._machine, COUNTS)
    assert await desk.reply("a") == "1"
    slow = asyncio.create_task(desk.reply("!"))
    await wait_until(lambda: any(one.call is not None for one in guest._instances), "it answers")
    await guest.upgrade(again)
    assert await slow == "2"
    assert guest.code is again
    assert await desk.reply("a") == "3"


async def test_a_compilation_that_fails_later_changes_nothing(
    start_guests: StartGuests, tmp_path: Path, is_told: Callable[[str], bool]
) -> None:
    """The process that compiles in the background is killed: what serves goes on as it is, only slower."""
    desk = await start_guests({"first.wasm": answering("first")}, wasm_cache=str(tmp_path / "native"))
    (desk.folder / "bot.wasm").write_bytes(padded(answering("hello")))

    def is_killed() -> bool:
        killed = 0
        for one in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if one.nice() == BACKGROUND_NICE and any("wit_compile" in part for part in one.cmdline()):
                    one.kill()
                    killed += 1
        return bool(killed)

    await wait_until(is_killed, "the thorough compilation has begun")
    await wait_until(lambda: is_told("plugin_not_optimised"), "its end is told")
    await desk.wait_event("plugin_loaded", plugin="bot")
    assert await desk.reply("hi") == "hello"
