"""A guest that does its worst in a turn: the turn goes on without it, and nobody else waits."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from tests.wasm.components import DATA, DEEP, DEEPLY, LOOP, RESULT, TRAP, component, giving_back, text, when_shouted
from tests.wasm.conftest import StartGuests

from conftest import Desk, wait_until
from hotdesk.config import PluginSettings

ECHO = (
    "from hotdesk_sdk import hookimpl\n\n@hookimpl\nasync def respond(turn):\n"
    "    return None if turn.text.startswith(('!', '?')) else f'echo: {turn.text}'\n"
)
"""Answers the traffic, before any guest is asked; the guests get what begins with an exclamation or question mark."""

LAST = "from hotdesk_sdk import hookimpl\n\n@hookimpl\nasync def respond(turn):\n    return 'the next one'\n"
FILES = {"echo.py": ECHO, "echo.toml": "order = 10\n", "last.py": LAST, "last.toml": "order = 900\n"}
BUSY = {"echo": "echo: hello"}

TIMEOUT_MS = 200
SENDERS = 3
PAUSE_S = 0.005
WORSE_S = 0.05
"""By how much another plugin's p99 may grow."""

TRIES = 3
"""The machine does other things too: of so many measurements one is to be within bounds."""


@dataclass
class Times:
    """How long each message of the traffic took."""

    seconds: list[float] = field(default_factory=list)

    @property
    def p99(self) -> float:
        return sorted(self.seconds)[max(0, int(len(self.seconds) * 0.99) - 1)]


@contextlib.asynccontextmanager
async def traffic(desk: Desk) -> AsyncIterator[Times]:
    """Messages to the other plugin while the context is open; each is answered by it."""
    times, stop = Times(), asyncio.Event()

    async def send(number: int) -> None:
        due = time.monotonic()  # and not when it was sent: a loop that stands still sends nothing either
        while not stop.is_set():
            assert await desk.reply("hello", f"traffic-{number}") == BUSY["echo"]
            times.seconds.append(time.monotonic() - due)
            due = time.monotonic() + PAUSE_S
            await asyncio.sleep(PAUSE_S)

    tasks = [asyncio.create_task(send(number)) for number in range(SENDERS)]
    try:
        yield times
    finally:
        stop.set()
        await asyncio.gather(*tasks)


def stores(desk: Desk) -> float:
    """The gauge of Stores that are alive."""
    value = desk.host.metrics.registry.get_sample_value("hotdesk_wasm_stores")
    assert value is not None
    return value


async def others_are_served(desk: Desk, cause: Any) -> None:
    """While *cause* is done again and again, the other plugin's p99 is what it was before, give or take 50 ms."""
    found = []
    for _ in range(TRIES):
        async with traffic(desk) as before:
            await asyncio.sleep(0.3)
        async with traffic(desk) as during:
            until = time.monotonic() + 0.45
            while time.monotonic() < until:
                await cause()
        found.append((before.p99, during.p99, len(before.seconds), len(during.seconds)))
        if during.p99 <= before.p99 + WORSE_S:
            return
    raise AssertionError(f"p99 before and during, and of how many: {found}")


FLOOD = (
    f"(loop $l (call $base.log (i32.const 1) (i32.const {DATA}) (i32.const 4) (i32.const 0) (i32.const 0)) (br $l))"
    " (unreachable)"
)


GROWS = "(loop $l (br_if $l (i32.ne (i32.const -1) (memory.grow (i32.const 1))))) (unreachable)"
HUGE = f"(drop (memory.grow (i32.const 1010))) {text('answer', 65536, 64 * 1024 * 1024 - 14 * 65536)}"
ASKS = "(loop $l (drop (call $base.time-left)) (br $l)) (unreachable)"
KEEPS = (
    f"(loop $l (call $kv.set (i32.const {DATA}) (i32.const 1) (i32.const {DATA + 1}) (i32.const 1)"
    f" (i32.const {RESULT + 64})) (br $l)) (unreachable)"
)

NO_CASE = text("next", 0, 0).replace(
    f"(i32.const {RESULT + 4}) (i32.const 0)", f"(i32.const {RESULT + 4}) (i32.const 77)"
)
assert "77" in NO_CASE

FAULTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "endless loop": (LOOP, {}, "took over 200 ms"),
    "deep recursion": (DEEP, {"more": DEEPLY}, "call stack exhausted"),
    "4 GiB of memory": (GROWS, {}, "unreachable"),
    "unreachable": (TRAP, {}, "unreachable"),
    "a reply of 64 MiB": (giving_back(HUGE), {}, "the limit is 4,194,304"),
    "a log flood": (FLOOD, {"imports": {"base": ("log",)}, "data": "line"}, "took over 200 ms"),
    "asks for ever": (ASKS, {"imports": {"base": ("time-left",)}}, "took over 200 ms"),
    "stores for ever": (KEEPS, {"imports": {"kv": ("set",)}, "data": "k1"}, "took over 200 ms"),
}

NONSENSE: dict[str, tuple[str, dict[str, Any], str]] = {
    "divides by zero": ("(drop (i32.div_s (i32.const 1) (i32.const 0))) (unreachable)", {}, "divide by zero"),
    "a result out of bounds": ("(return (i32.const -4))", {}, "out of bounds"),
    "text that is not UTF-8": (giving_back(text("answer", DATA, 3)), {"data": "\\ff\\fe\\80"}, "utf-8"),
    "a surrogate": (giving_back(text("answer", DATA, 3)), {"data": "\\ed\\a0\\80"}, "utf-8"),
    "a case that there is not": (giving_back(NO_CASE), {}, "out of range"),
}


@pytest.mark.parametrize("kind", FAULTS)
async def test_a_fault_in_a_turn_is_one_plugins_own(start_guests: StartGuests, kind: str) -> None:
    """The turn goes on to the next bot, the instance is gone, the failure is told, and others' p99 stays."""
    body, options, says = FAULTS[kind]
    timeout_ms = TIMEOUT_MS if "took over" in says else 10 * TIMEOUT_MS  # a busy machine fills 64 MiB slowly
    desk = await start_guests(
        {
            **FILES,
            "bad.wasm": component({"respond": when_shouted(body)}, **options),
            "bad.toml": f'timeout_ms = {timeout_ms}\ncapabilities = ["kv"]\n',
        },
        settings={"bad": PluginSettings(grant=("kv",))},
        breaker_failures=20,
    )
    await desk.wait_event("plugin_loaded", plugin="bad")
    asked = 0

    async def cause() -> None:
        nonlocal asked
        asked += 1
        assert await desk.reply("! do it", f"bad-{asked}") == "the next one"
        assert await desk.reply("? do not", f"bad-{asked}") == "the next one"  # well, so that it is called again

    await cause()
    failed = (await desk.plugin("bad"))["last_failure"]
    assert says in str(failed), failed
    await others_are_served(desk, cause)
    shown = await desk.plugin("bad")
    assert (shown["failures"], shown["calls"], shown["breaker"]) == (asked, 2 * asked, "closed")
    await wait_until(lambda: stores(desk) <= 1, "the Stores of those that failed are closed")
    assert await desk.reply("hello", "after") == BUSY["echo"]


async def test_nonsense_of_every_kind_fails_its_call(start_guests: StartGuests) -> None:
    """One turn goes through a row of guests that trap or give what is no value, each is told why, and none is left."""
    names = {f"bad{number}": kind for number, kind in enumerate(NONSENSE)}
    guests = {
        f"{n}.wasm": component({"respond": when_shouted(NONSENSE[k][0])}, **NONSENSE[k][1]) for n, k in names.items()
    }
    desk = await start_guests({**FILES, **guests})
    assert await desk.reply("!") == "the next one"
    wrong = {}
    for name, kind in names.items():
        shown = await desk.plugin(name)
        if NONSENSE[kind][2] not in str(shown["last_failure"]):
            wrong[kind] = shown["last_failure"]
    assert not wrong
    await wait_until(lambda: stores(desk) == 0, "no Store is left")
