"""`requires`: loaded after, reloaded with, unloaded with, and never in a circle."""

from __future__ import annotations

import asyncio
from typing import Any

from conftest import Desk, StartDesk, echo, wait_until

HEAD = "import asyncio\nfrom hotdesk_sdk import hookimpl\n"


def words(word: str) -> str:
    return f"{HEAD}WORD = {word!r}\n@hookimpl\nasync def on_reply(reply): ...\n"


def bot(*names: str, more: str = "") -> str:
    said = " + ".join(f"ctx.require('{name}').WORD" for name in names)
    return (
        f"{HEAD}@hookimpl\nasync def setup(ctx):\n    global WORD\n    WORD = {said}\n{more}"
        "@hookimpl\nasync def respond(turn): return WORD\n"
    )


def needs(*names: str) -> str:
    return f"requires = {list(names)}"


async def serving(desk: Desk) -> dict[str, int]:
    return {p["name"]: p["generation"] for p in (await desk.admin("GET", "plugins"))["plugins"] if p["generation"]}


async def say(desk: Desk, text: str | None) -> None:
    async def same() -> bool:
        return await desk.reply() == text

    await wait_until(same, f"the answer is {text}", timeout_s=3.0)


CHAIN = {
    "c.py": bot("b"),
    "c.toml": needs("b"),
    "b.py": bot("a").replace("respond(turn)", "on_reply(reply)"),
    "b.toml": needs("a"),
    "a.py": words("one"),
}


async def test_requirements_are_loaded_first(start_desk: StartDesk) -> None:
    """A chain whose names sort the other way round serves as soon as the host does."""
    desk = await start_desk(CHAIN)
    assert await serving(desk) == {"a": 1, "b": 1, "c": 1}
    assert await desk.reply() == "one"


async def test_dependants_are_loaded_with_what_they_require(start_desk: StartDesk) -> None:
    """A new version of a requirement swaps everything that stands on it, near and far, in one go."""
    desk = await start_desk(CHAIN)
    desk.write("a.py", words("two"))
    await desk.wait_event("plugin_swapped", plugin="a", generation=2)
    assert await desk.reply() == "two"
    assert await serving(desk) == {"a": 2, "b": 2, "c": 2}


async def test_dependants_are_loaded_in_their_order(start_desk: StartDesk) -> None:
    """Where a dependant requires the changed one both directly and by way of another, it gets the new ones of both."""
    desk = await start_desk(
        {
            "a.py": words("one "),
            "b.py": bot("a").replace("respond(turn)", "on_reply(reply)"),
            "b.toml": needs("a"),
            "aa.py": bot("a", "b"),
            "aa.toml": needs("a", "b"),
        }
    )
    assert await desk.reply() == "one one "
    for word in ("two ", "three "):
        desk.write("a.py", words(word))
        await say(desk, word * 2)
    await asyncio.gather(*(desk.host.plugins.reload(name) for name in ("a", "b", "aa", "b", "a")))
    assert await desk.reply() == "three three "


async def test_a_dependants_own_change_leaves_the_requirement_alone(start_desk: StartDesk) -> None:
    """Saving what stands on top swaps that alone."""
    desk = await start_desk(CHAIN)
    desk.write("c.py", bot("b").replace("return WORD", "return WORD + '!'"))
    await say(desk, "one!")
    assert await serving(desk) == {"a": 1, "b": 1, "c": 2}


async def test_a_requirement_that_breaks_its_dependants_is_refused(start_desk: StartDesk) -> None:
    """When a dependant can't be loaded against the new version, nothing is swapped, and it is told."""
    desk = await start_desk(CHAIN)
    desk.write("a.py", words("two").replace("WORD", "RENAMED"))
    failed = await desk.wait_event("plugin_failed")
    assert "WORD" in failed["message"]
    assert await desk.reply() == "one"
    assert await serving(desk) == {"a": 1, "b": 1, "c": 1}
    desk.write("a.py", words("three"))
    await say(desk, "three")


async def test_a_plugin_waits_for_what_it_requires(start_desk: StartDesk) -> None:
    """It is PENDING with the missing name until that arrives, then serves by itself."""
    desk = await start_desk({"bot.py": bot("late"), "bot.toml": needs("late")})
    shown = await desk.plugin("bot")
    assert (shown["state"], shown["waiting_for"], shown["error"]) == ("PENDING", "late", None)
    assert await desk.reply() is None
    desk.write("late.py", words("here"))
    await say(desk, "here")
    assert (await desk.plugin("bot"))["waiting_for"] is None


async def test_a_requirement_that_goes_takes_its_dependants(start_desk: StartDesk) -> None:
    """Deleted or disabled, it unloads all that stands on it; they wait, and come back with it."""
    desk = await start_desk(CHAIN)
    (desk.folder / "a.py").unlink()
    for name in "abc":
        await desk.wait_event("plugin_unloaded", plugin=name)
    assert (await desk.plugin("b"))["waiting_for"] == "a"
    assert await desk.reply() is None
    desk.write("a.py", words("back"))
    await say(desk, "back")
    await desk.admin("POST", "plugins/a/disable")
    assert await desk.reply() is None
    await desk.admin("POST", "plugins/a/enable")
    await say(desk, "back")


async def test_dependants_are_torn_down_first(start_desk: StartDesk) -> None:
    """When all go, at a swap or at the end, each is torn down while what it requires is still whole."""
    more = "@hookimpl\nasync def teardown(ctx):\n    await asyncio.sleep(0.02)\n    LOG.append(ctx.require('a').WORD)\n"
    desk = await start_desk(
        {"a.py": words("one") + "LOG = []\n", "b.py": bot("a", more=more + "LOG = []\n"), "b.toml": needs("a")}
    )
    a, b = desk.host.plugins.entry("a").current, desk.host.plugins.entry("b").current
    assert a is not None
    assert b is not None
    desk.write("a.py", words("two"))
    await desk.wait_event("plugin_swapped", plugin="b")
    await wait_until(lambda: a.state.value == b.state.value == "CLOSED", "both are closed")
    assert "plugin_leftover" not in [event["kind"] for event in desk.events]


async def test_a_circle_is_refused_with_its_names(start_desk: StartDesk) -> None:
    """Plugins that require each other are refused, whether at the start or while the host runs; all are named."""
    desk = await start_desk(
        {name: echo(1) for name in ("a.py", "b.py", "c.py", "own.py")}
        | {"a.toml": needs("b"), "b.toml": needs("c"), "c.toml": needs("a"), "own.toml": needs("own")}
    )
    for name in ("a", "b", "c"):
        shown = await desk.plugin(name)
        assert (shown["state"], shown["error"]["step"]) == ("FAILED", "requires")
        assert all(f" {other} " in f"{shown['error']['message']} " for other in "abc"), shown["error"]
    assert "own → own" in (await desk.plugin("own"))["error"]["message"]
    desk.write("c.toml", "")
    await wait_until(lambda: len([e for e in desk.host.plugins.entries if e.current]) == 3, "the circle is open")


async def test_a_circle_closed_by_an_update_is_refused(start_desk: StartDesk) -> None:
    """An update that would close a circle among plugins that serve is refused; they go on serving."""
    desk = await start_desk({"a.py": words("one"), "b.py": bot("a"), "b.toml": needs("a")})
    desk.write("a.toml", needs("b"))
    failed = await desk.wait_event("plugin_failed", plugin="a")
    assert "a → b → a" in failed["message"]
    assert await desk.reply() == "one"
    desk.write("a.toml", "")
    desk.write("a.py", words("two"))
    await say(desk, "two")


async def test_changes_of_both_at_once_end_with_both(start_desk: StartDesk) -> None:
    """Requirement and dependant saved in the same moment, again and again: both newest versions serve, together."""
    desk = await start_desk({"a.py": words("0"), "b.py": bot("a"), "b.toml": needs("a")})
    for number in range(1, 15):
        desk.write("b.py", bot("a").replace("return WORD", f"return WORD + ' {number}'"))
        desk.write("a.py", words(str(number)))
        await say(desk, f"{number} {number}")
    kinds: list[Any] = [event["kind"] for event in desk.events]
    assert "plugin_failed" not in kinds


async def test_a_requirement_deleted_while_its_dependant_loads(start_desk: StartDesk) -> None:
    """A dependant whose requirement goes while its new version is set up does not come to serve without it."""
    desk = await start_desk({"a.py": words("one"), "b.py": bot("a"), "b.toml": needs("a")})
    desk.write("b.py", bot("a", more="    await asyncio.sleep(0.4)\n"))
    await wait_until(lambda: desk.host.plugins.entry("b").lock.locked(), "b is being loaded")
    (desk.folder / "a.py").unlink()
    await desk.wait_event("plugin_unloaded", plugin="a")
    await desk.wait_event("plugin_waiting", plugin="b")
    assert await serving(desk) == {}
    desk.write("a.py", words("two"))
    await say(desk, "two")
