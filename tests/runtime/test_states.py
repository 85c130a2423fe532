"""The states of a generation, and what a plugin shows of them."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

import pytest

from conftest import Desk, StartDesk, echo, wait_until
from hotdesk.runtime.active import Generation, PluginState
from hotdesk.runtime.sources import Bundle, Source
from hotdesk_sdk import Manifest

PENDING, LOADING, ACTIVE, DRAINING, CLOSED, FAILED = PluginState

ALLOWED = {
    (PENDING, LOADING),
    (LOADING, ACTIVE),
    (LOADING, FAILED),
    (ACTIVE, DRAINING),
    (DRAINING, ACTIVE),
    (DRAINING, CLOSED),
    (FAILED, CLOSED),
}


def generation(state: PluginState) -> Generation:
    manifest = Manifest(name="faq")
    bundle = Bundle(Source("faq", Path("faq.py"), "py"), {}, manifest, "", "", {}, {})
    made = Generation("faq", 1, bundle, manifest)
    made.state = state
    return made


def test_there_are_six_states() -> None:
    """The states are the six of the house style, and a new generation is PENDING."""
    assert [state.value for state in PluginState] == ["PENDING", "LOADING", "ACTIVE", "DRAINING", "CLOSED", "FAILED"]
    assert generation(PENDING).state is PENDING


@pytest.mark.parametrize(("before", "after"), sorted(ALLOWED, key=str), ids=lambda state: state.value)
def test_a_move_that_makes_sense_is_made(before: PluginState, after: PluginState) -> None:
    """Every move of a generation's life is allowed, back from DRAINING (a rollback) included."""
    one = generation(before)
    one.move(after)
    assert one.state is after


@pytest.mark.parametrize(
    ("before", "after"),
    sorted(set(itertools.product(PluginState, PluginState)) - ALLOWED, key=str),
    ids=lambda state: state.value,
)
def test_a_move_that_makes_no_sense_is_refused(before: PluginState, after: PluginState) -> None:
    """All other moves raise, name the generation and both states, and change nothing."""
    one = generation(before)
    with pytest.raises(ValueError, match=rf"faq generation 1.*from {before.value} to {after.value}"):
        one.move(after)
    assert one.state is before


async def test_a_plugin_shows_the_state_of_what_serves(start_desk: StartDesk) -> None:
    """ACTIVE while it serves, even when its newest version was refused; CLOSED once disabled."""
    desk = await start_desk({"echo.py": echo(1)})
    assert (await desk.plugin("echo"))["state"] == "ACTIVE"
    desk.write("echo.py", "broken(")
    await desk.wait_event("plugin_failed", plugin="echo")
    shown = await desk.plugin("echo")
    assert (shown["state"], shown["generation"]) == ("ACTIVE", 1)
    await desk.admin("POST", "plugins/echo/disable")
    assert (await desk.plugin("echo"))["state"] == "CLOSED"


async def test_a_plugin_that_never_served_shows_why(start_desk: StartDesk) -> None:
    """FAILED with the reason when its first load was refused, PENDING with the name when it waits for another."""
    desk = await start_desk({"broken.py": "x = (", "eager.py": echo(1), "eager.toml": 'requires = ["nobody"]'})
    broken, eager = await desk.plugin("broken"), await desk.plugin("eager")
    assert (broken["state"], broken["error"]["step"], broken["error"]["line"]) == ("FAILED", "parse", 1)
    assert (eager["state"], eager["waiting_for"]) == ("PENDING", "nobody")


async def test_a_first_load_under_way_shows_LOADING(desk: Desk) -> None:
    """While a new plugin is set up it is LOADING, and the others go on answering."""
    slow = (
        "import asyncio\nfrom hotdesk_sdk import hookimpl\n"
        "@hookimpl\nasync def setup(ctx):\n    await asyncio.sleep(0.3)\n"
        "@hookimpl\nasync def on_reply(reply): ...\n"
    )
    desk.write("slow.py", slow)

    def state() -> str | None:
        return next((e.state().value for e in desk.host.plugins.entries if e.name == "slow"), None)

    await wait_until(lambda: state() == "LOADING", "slow.py is being loaded")
    assert await desk.reply() == "1: hello"
    await wait_until(lambda: state() == "ACTIVE", "slow.py serves")


async def test_a_generation_drains_while_it_is_used(start_desk: StartDesk) -> None:
    """A replaced generation is DRAINING until its last turn has ended, then CLOSED."""
    slow = echo(1).replace("    return", "    import asyncio\n    await asyncio.sleep(0.3)\n    return")
    desk = await start_desk({"echo.py": slow})
    old = desk.host.plugins.entry("echo").current
    assert old is not None
    under_way = asyncio.create_task(desk.reply())
    await wait_until(lambda: desk.host.turns.live, "the turn runs")
    desk.write("echo.py", echo(2))
    await desk.wait_generation("echo", 2)
    assert old.state is DRAINING
    assert await under_way == "1: hello"
    await wait_until(lambda: old.state is CLOSED, "the old generation is closed")
