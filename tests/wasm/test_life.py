"""Generations of components: swaps with Python and back, rollback, turns in flight, cancelling, the stop of a host."""

from __future__ import annotations

import asyncio
import gc
import time
from pathlib import Path

import pytest
from tests.wasm.components import (
    DATA,
    LOOP,
    NEXT,
    RESULT,
    TRAP,
    answering,
    component,
    escaped,
    giving,
    giving_back,
    text,
    when_shouted,
)
from tests.wasm.conftest import StartGuests
from tests.wasm.test_bad_answers import asking, server
from tests.wasm.test_bad_loads import refused
from tests.wasm.test_faults import BUSY, FILES, stores, traffic
from tests.web.visitors import open_desk

from conftest import Desk, wait_until
from hotdesk.config import PluginSettings

SPINS = "(loop $l (br_if $l (i32.gt_u (call $base.time-left) (i32.const {left}))))"
"""Computes until so many milliseconds are left."""


def slow(said: str, left: int) -> bytes:
    """A bot that computes until *left* milliseconds are left, and then says *said*."""
    body = SPINS.format(left=left) + giving_back(text("answer", DATA, len(said.encode())))
    return component({"respond": when_shouted(body)}, imports={"base": ("time-left",)}, data=escaped(said.encode()))


def alive(desk: Desk) -> float:
    """The gauge of generations that are alive."""
    value = desk.host.metrics.registry.get_sample_value("hotdesk_generations_alive")
    assert value is not None
    return value


async def ask(desk: Desk, conversation: str) -> str:
    """Send what a guest computes for, and return the message's id at once."""
    async with desk.http.post(
        f"{desk.url}/v1/conversations/{conversation}/messages", json={"text": "! now"}
    ) as response:
        return (await response.json())["id"]  # type: ignore[no-any-return]


PYTHON = (
    "from hotdesk_sdk import hookimpl\n\nSTATE = {{'from': 'python {n}'}}\n\n"
    "@hookimpl\nasync def respond(turn):\n    return 'python {n}: ' + str(STATE['from'])\n\n"
    "@hookimpl\nasync def export_state(ctx):\n    return STATE\n\n"
    "@hookimpl\nasync def import_state(ctx, state, version):\n    STATE['from'] = state\n"
)

REMEMBERS = component(
    {
        "import-state": "(global.set $at (local.get 0)) (global.set $size (local.get 1))"
        f" (i32.store (i32.const {RESULT}) (i32.const 0)) (i32.const {RESULT})",
        "export-state": f"(i32.store (i32.const {RESULT}) (i32.const 1))"
        f" (i32.store (i32.const {RESULT + 4}) (global.get $at))"
        f" (i32.store (i32.const {RESULT + 8}) (global.get $size)) (i32.const {RESULT})",
        "respond": when_shouted(TRAP, f"(drop (block (result i32) {text('answer', 0, 0)}))")
        + f" (i32.store (i32.const {RESULT + 8}) (global.get $at))"
        f" (i32.store (i32.const {RESULT + 12}) (global.get $size)) (i32.const {RESULT})",
    },
    data="null",
    more=f"(global $at (mut i32) (i32.const {DATA})) (global $size (mut i32) (i32.const 4))",
    heap=("(global.set $heap (i32.const 16384))", ""),
)
"""Says and hands on the state that it was given; keeps its memory from call to call. Traps when it is shouted at."""


async def test_a_name_goes_from_python_to_wasm_and_back_with_its_state(start_guests: StartGuests) -> None:
    """One plugin's folder: Python, then a component, then Python again; each gets what the one before kept."""
    desk = await start_guests({"bot/__init__.py": PYTHON.format(n=1)})
    assert await desk.reply() == "python 1: python 1"
    desk.write("bot/plugin.wasm", REMEMBERS)
    (desk.folder / "bot/__init__.py").unlink()
    await desk.wait_generation("bot", 2)
    assert await desk.reply() == '{"from":"python 1"}'
    desk.write("bot/__init__.py", PYTHON.format(n=3))
    await desk.wait_generation("bot", 3)
    assert await desk.reply() == "python 3: {'from': 'python 1'}"
    await wait_until(lambda: stores(desk) == 0, "the component's Store is closed")
    await wait_until(lambda: alive(desk) == 1, "one generation is left")


async def test_an_instance_that_takes_a_dead_ones_place_has_its_state(start_guests: StartGuests) -> None:
    """State in memory survives a trap as it was imported: the new instance gets it again."""
    first = giving({"lifecycle.export-state": '"kept"'})
    desk = await start_guests({"bot.wasm": first}, probation_calls=0)
    desk.write("bot.wasm", REMEMBERS)
    await desk.wait_generation("bot", 2)
    assert await desk.reply() == '"kept"'
    guest = desk.host.plugins.entry("bot").current.guest  # type: ignore[union-attr]
    assert guest is not None
    [instance] = guest._instances
    assert await desk.reply("!") is None
    await wait_until(lambda: instance not in guest._machine.instances, "its Store is closed")
    assert await desk.reply() == '"kept"'
    [another] = guest._instances
    assert another is not instance
    assert guest.instances == 1


async def test_a_component_that_traps_in_probation_is_rolled_back(start_guests: StartGuests) -> None:
    """No message goes without the old one's answer, the old one serves again, and one Store is left."""
    desk = await start_guests({**FILES, "bad.wasm": answering("old")})
    async with traffic(desk):
        assert await desk.reply("!") == "old"
        desk.write("bad.wasm", component({"respond": "(unreachable)"}))
        await desk.wait_generation("bad", 2)
        for number in range(5):
            assert await desk.reply("!", f"c{number}") == "old"
        await desk.wait_event("plugin_rolled_back", plugin="bad")
    shown = await desk.plugin("bad")
    assert "unreachable" in shown["error"]["message"]
    await wait_until(lambda: stores(desk) == 1, "one Store is alive")
    await wait_until(lambda: alive(desk) == 3, "three plugins, a generation each")


async def test_a_turn_in_flight_ends_on_the_component_that_it_began_with(start_guests: StartGuests) -> None:
    """While an old instance computes the new generation answers; the old turn has the old answer, and then it goes."""
    desk = await start_guests({"slow.wasm": slow("old", 9600), "slow.toml": "timeout_ms = 10000\n"}, standby_s=0.05)
    first = asyncio.create_task(desk.reply("!", "one"))
    await wait_until(lambda: busy(desk, "slow"), "it computes")
    desk.write("slow.wasm", answering("new"))
    await desk.wait_generation("slow", 2)
    assert await desk.reply("!", "two") == "new"
    assert not first.done()
    assert stores(desk) == 2
    assert await first == "old"
    await wait_until(lambda: stores(desk) == 1, "the old Store is closed")
    await wait_until(lambda: alive(desk) == 1, "the old generation is gone")


def busy(desk: Desk, name: str) -> bool:
    """Whether a guest of plugin *name* is in a call."""
    generation = desk.host.plugins.entry(name).current
    guest = generation.guest if generation is not None else None
    return guest is not None and any(one.call is not None for one in guest._instances)


async def test_a_guest_that_computes_is_stopped_when_its_turn_is_cancelled(start_guests: StartGuests) -> None:
    """From the cancelling on it takes less than 100 ms until the guest is over and its Store is closed."""
    desk = await start_guests(
        {"slow.wasm": component({"respond": LOOP}), "slow.toml": "timeout_ms = 10000\n"}, breaker_failures=20
    )
    took = []
    for number in range(3):
        message = await ask(desk, f"c{number}")
        await wait_until(lambda: busy(desk, "slow"), "it computes")
        started = time.monotonic()
        async with desk.http.post(f"{desk.url}/v1/conversations/c{number}/messages/{message}/cancel") as response:
            assert response.status == 202
        await wait_until(lambda: stores(desk) == 0, "its Store is closed")
        took.append(time.monotonic() - started)
    assert min(took) < 0.1, took
    shown = await desk.plugin("slow")
    assert shown["failures"] == 0, "it is not the plugin's fault"


async def test_a_guest_that_waits_for_the_host_is_stopped_when_its_turn_is_cancelled(
    start_guests: StartGuests,
) -> None:
    """The same while it waits for a server that never answers: the connection is given up as well."""
    async with server(None) as (port, open_ones):
        desk = await start_guests(
            {
                "slow.wasm": asking("http.fetch", "GET", f"http://127.0.0.1:{port}/", "", ""),
                "slow.toml": 'timeout_ms = 10000\ncapabilities = ["http:127.0.0.1"]\n',
            },
            settings={"slow": PluginSettings(grant=("http:127.0.0.1",))},
            http_hosts=(f"127.0.0.1:{port}",),
        )
        message = await ask(desk, "c")
        await wait_until(lambda: bool(open_ones), "it asks")
        started = time.monotonic()
        async with desk.http.post(f"{desk.url}/v1/conversations/c/messages/{message}/cancel") as response:
            assert response.status == 202
        await wait_until(lambda: stores(desk) == 0, "its Store is closed")
        assert time.monotonic() - started < 1
        await wait_until(lambda: not open_ones, "its connection is closed")


@pytest.mark.parametrize("what", ["computes", "waits", "is made", "is compiled"])
async def test_a_host_stops_whatever_a_guest_does(tmp_path: Path, what: str) -> None:
    """A stop ends guests that compute, wait for a server, are made or are compiled, within its time."""
    folder = tmp_path / "plugins"
    folder.mkdir()
    (folder / "slow.toml").write_text('timeout_ms = 60000\ncapabilities = ["http:127.0.0.1"]\n')
    async with server(None) as (port, open_ones):
        guest = {
            "computes": component({"respond": LOOP}),
            "waits": asking("http.fetch", "GET", f"http://127.0.0.1:{port}/", "", ""),
            "is made": component({"respond": NEXT}, more=f"(func $s {LOOP}) (start $s)"),
            "is compiled": component(
                {"respond": "(if (local.get $n) (then (local.set $m (i32.const 1))))" * 90_000 + NEXT}
            ),
        }[what]
        (folder / "slow.wasm").write_bytes(answering("x") if what in ("is made", "is compiled") else guest)
        async with open_desk(
            tmp_path,
            stop_timeout_s=0.5,
            plugin_settings={"slow": PluginSettings(grant=("http:127.0.0.1",))},
            http_hosts=(f"127.0.0.1:{port}",),
        ) as desk:
            if what in ("is made", "is compiled"):
                desk.write("slow.wasm", guest)
                loader = desk.host.plugins._maker._wasm
                await wait_until(
                    (lambda: loader.instances == 2)
                    if what == "is made"
                    else (lambda: loader._opened[1]._lock.locked()),  # type: ignore[index]
                    f"it {what}",
                )
            else:
                await ask(desk, "c")
                await wait_until(lambda: open_ones or (what == "computes" and busy(desk, "slow")), f"it {what}")
            stopping = time.monotonic()
        assert time.monotonic() - stopping < 5
        assert stores(desk) == 0


async def test_traps_open_the_breaker_and_leave_no_store(start_guests: StartGuests) -> None:
    """Trap after trap: each instance is replaced, none is left, the breaker opens, and what follows is not run."""
    desk = await start_guests(
        {**FILES, "bad.wasm": component({"respond": "(unreachable)"})}, breaker_failures=5, probation_calls=0
    )
    await desk.wait_event("plugin_loaded", plugin="bad")
    for number in range(8):
        assert await desk.reply("!", f"c{number}") == "the next one"
    shown = await desk.plugin("bad")
    assert shown["breaker"] == "open"
    assert shown["failures"] == 5
    await wait_until(lambda: stores(desk) == 0, "no Store is left")
    assert alive(desk) == 3


async def test_many_guests_that_trap_at_once_leave_nothing(start_guests: StartGuests) -> None:
    """Thirty turns at once on eight instances, a third of which trap: each is answered, and instances come again."""
    desk = await start_guests(
        {
            **FILES,
            "bad.wasm": component(
                {"respond": when_shouted("(unreachable)", giving_back(text("answer", DATA, 2)))}, data="ok"
            ),
            "bad.toml": "order = 1\n",
        },
        breaker_failures=20,
    )
    await desk.wait_event("plugin_loaded", plugin="bad")
    replies = await asyncio.gather(*(desk.reply("!" if n % 3 == 0 else "x", f"c{n}") for n in range(30)))
    assert replies == ["the next one" if n % 3 == 0 else "ok" for n in range(30)]
    await wait_until(lambda: stores(desk) <= 8, "there are no more than eight")
    assert await desk.reply("x") == "ok"


async def test_a_config_that_the_guest_traps_on_is_refused(start_guests: StartGuests) -> None:
    """A trap in `configure` is told; the generation serves on with an instance that has the old config."""
    desk = await start_guests(
        {
            **FILES,
            "bad.wasm": component({"configure": "(unreachable)", "respond": NEXT}),
            "bad.toml": "[config]\nn = 1\n",
        }
    )
    await desk.wait_event("plugin_loaded", plugin="bad")
    desk.write("bad.toml", "[config]\nn = 2\n")
    await desk.wait_event("plugin_failed", plugin="bad")
    shown = await desk.plugin("bad")
    assert (shown["generation"], shown["state"], shown["config"]) == (1, "ACTIVE", {"n": 1})
    assert await desk.reply("!") == "the next one"
    assert await desk.reply("hello") == BUSY["echo"]
    await wait_until(lambda: stores(desk) <= 1, "no Store is left over")


async def test_a_refused_generation_leaves_no_generation(start_guests: StartGuests) -> None:
    """Ten components that trap in `setup` leave neither a Store nor a generation."""
    desk = await start_guests({**FILES, "bad.wasm": answering("old")})
    for number in range(10):
        await refused(desk, component({"setup": "(unreachable)"}, data=str(number)))
    assert alive(desk) <= 6, "a load makes room for the next"

    def gone() -> bool:
        gc.collect()  # a refused generation is proven gone when the collector comes round
        return (stores(desk), alive(desk)) == (1, 3)

    await wait_until(gone, "only what serves is left")
    assert await desk.reply("!") == "old"
