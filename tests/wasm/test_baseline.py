"""A large component is compiled quickly first; the thorough compilation takes its place, and nobody notices."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.wasm.alone import code_of
from tests.wasm.built import built
from tests.wasm.components import DATA, RESULT, ZERO, answering, component, text
from tests.wasm.conftest import StartGuests
from tests.wasm.toolchains import Unavailable

from conftest import Desk, wait_until
from hotdesk.runtime.wasm_loader import BACKGROUND_NICE


def padded(component: bytes) -> bytes:
    """The same with a custom section that makes it larger than what is compiled once."""
    content = b"\x07padding" + b"x" * 60_000
    size = bytes([len(content) & 0x7F | 0x80, len(content) >> 7 & 0x7F | 0x80, len(content) >> 14])
    return component + b"\0" + size + content


def guest_of(desk: Desk, name: str) -> Any:
    entry = desk.host.plugins.entry(name)
    assert entry.current is not None
    return entry.current.guest


def is_kept(native: Path) -> bool:
    """Whether the thorough compilation is done; the quick one is never kept."""
    return bool([*native.glob("*.native")])


async def test_it_answers_before_and_after(
    start_guests: StartGuests, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The same generation, on other code; every message that comes meanwhile is answered."""
    data = padded(answering("hello"))
    desk = await start_guests({"bot.wasm": data}, wasm_cache=str(tmp_path / "native"))
    answers = []
    while not is_kept(tmp_path / "native"):
        answers.append(await desk.reply("hi"))
    lines: list[str] = []

    def is_told() -> bool:
        lines.append("".join(capfd.readouterr()))
        return "plugin_optimised" in "".join(lines)

    await wait_until(is_told, "the thorough compilation serves")
    answers += [await desk.reply("hi") for _ in range(20)]
    assert set(answers) == {"hello"}
    shown = await desk.plugin("bot")
    assert (shown["generation"], shown["failures"]) == (1, 0)


async def test_a_small_one_is_compiled_once(start_guests: StartGuests, tmp_path: Path) -> None:
    """Thoroughly, and kept."""
    desk = await start_guests({"bot.wasm": answering("hello")}, wasm_cache=str(tmp_path / "native"))
    assert is_kept(tmp_path / "native")
    assert await desk.reply("hi") == "hello"


async def test_what_it_remembers_goes_with_it(start_guests: StartGuests, tmp_path: Path) -> None:
    """One that keeps state hands it over between two calls, whichever code counted."""
    try:
        plugin = await asyncio.to_thread(built, "zig")
    except Unavailable as exc:
        pytest.skip(str(exc))
    files = {
        "orders/plugin.wasm": padded((plugin / "plugin.wasm").read_bytes()),
        "orders/plugin.toml": (plugin / "plugin.toml").read_bytes(),
    }
    desk = await start_guests(files, wasm_cache=str(tmp_path / "native"))
    asked = 0
    while not is_kept(tmp_path / "native") or asked < 20:
        assert await desk.reply("order 1001?") == "Order 1001 is shipped."
        asked += 1
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
    start_guests: StartGuests, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The process that compiles in the background is killed: what serves goes on as it is, only slower."""
    desk = await start_guests({"first.wasm": answering("first")}, wasm_cache=str(tmp_path / "native"))
    (desk.folder / "bot.wasm").write_bytes(padded(answering("hello")))

    def is_killed() -> bool:
        background = [one for one in psutil.Process().children() if one.nice() == BACKGROUND_NICE]
        for one in background:
            one.kill()
        return bool(background)

    await wait_until(is_killed, "the thorough compilation has begun")
    lines: list[str] = []

    def is_told() -> bool:
        lines.append("".join(capfd.readouterr()))
        return "plugin_not_optimised" in "".join(lines)

    await wait_until(is_told, "its end is told")
    (desk.folder / "first.wasm").unlink()
    await desk.wait_event("plugin_unloaded", plugin="first")
    assert await desk.reply("hi") == "hello"
