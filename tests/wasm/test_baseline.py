"""A large component is compiled quickly first; the thorough compilation takes its place, and nobody notices."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.wasm.built import built
from tests.wasm.components import answering
from tests.wasm.conftest import StartGuests
from tests.wasm.toolchains import Unavailable

from conftest import Desk, wait_until


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


async def test_a_compilation_that_fails_later_changes_nothing(start_guests: StartGuests, tmp_path: Path) -> None:
    """It goes on as it is, only slower."""
    data = padded(answering("hello"))
    native = tmp_path / "native"
    desk = await start_guests({"bot.wasm": data}, wasm_cache=str(native))
    shutil.rmtree(native, ignore_errors=True)  # so that the second one has nowhere to write to, if it is not done yet
    for _ in range(20):
        assert await desk.reply("hi") == "hello"
