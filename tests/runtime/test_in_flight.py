"""What is under way at a swap ends on the code it began with; what is none of its business is not touched."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from tests.runtime.traffic import traffic

from conftest import StartDesk, echo, wait_until

HEAD = "import asyncio\nfrom hotdesk_sdk import hookimpl\n"


def slow(version: int) -> str:
    """A handler of 300 ms that looks at its code, its globals and its config before and after."""
    return (
        f"{HEAD}VERSION = {version}\n\n"
        f"def helper():\n    return {version}\n\n"
        "@hookimpl\nasync def respond(ctx, turn):\n"
        "    before = (VERSION, helper(), ctx.config['word'], ctx.generation)\n"
        "    await asyncio.sleep(0.3)\n"
        "    after = (VERSION, helper(), ctx.config['word'], ctx.generation)\n"
        f"    return f'{version} {{before == after}} {{after}}'\n"
    )


async def test_a_handler_in_flight_ends_on_its_own_code(start_desk: StartDesk) -> None:
    """300 ms of work begun before a swap use the old code, the old globals and the old config to their end."""
    desk = await start_desk({"bot.py": slow(1), "bot.toml": "[config]\nword = 'one'"}, standby_s=0.0)
    under_way = asyncio.create_task(desk.say())
    await wait_until(lambda: desk.host.turns.live, "the turn runs")
    desk.write("bot.toml", "[config]\nword = 'two'")
    desk.write("bot.py", slow(2))
    await desk.wait_event("plugin_swapped", plugin="bot")
    assert not under_way.done()
    [reply] = (await under_way)["replies"]
    assert (reply["text"], reply["generation"]) == ("1 True (1, 1, 'one', 1)", 1)
    text = await desk.reply()
    assert text is not None
    assert text.startswith("2 True (2, 2, 'two'")


async def test_a_handler_that_outlives_the_drain_keeps_its_globals(start_desk: StartDesk) -> None:
    """Even when `drain_timeout_s` is over and the generation is released, a turn that still runs has its code."""
    desk = await start_desk(
        {"bot.py": slow(1), "bot.toml": "[config]\nword = 'one'"}, standby_s=0.0, drain_timeout_s=0.1
    )
    under_way = asyncio.create_task(desk.reply())
    await wait_until(lambda: desk.host.turns.live, "the turn runs")
    desk.write("bot.py", slow(2))
    left = await desk.wait_event("plugin_leftover", plugin="bot")
    assert left["leftovers"] == ["turns still under way: 1"]
    assert not under_way.done()
    assert await under_way == "1 True (1, 1, 'one', 1)"


async def test_a_stream_in_flight_goes_on_on_the_old_code(start_desk: StartDesk) -> None:
    """A streamed answer that has begun comes from one generation to its last chunk."""

    def source(version: int) -> str:
        return (
            f"{HEAD}VERSION = {version}\n"
            "@hookimpl\nasync def respond(turn):\n"
            "    for n in range(6):\n        yield f'{VERSION}.{n} '\n        await asyncio.sleep(0.05)\n"
        )

    desk = await start_desk({"bot.py": source(1)}, standby_s=0.0)
    chunks: list[str] = []

    async def read() -> None:
        async with desk.http.post(
            f"{desk.url}/v1/conversations/c/messages", json={"text": "x"}, headers={"Accept": "text/event-stream"}
        ) as response:
            async for line in response.content:
                chunks.extend([line.decode()] if line.startswith(b"data:") and b'"index"' in line else [])

    reading = asyncio.create_task(read())
    await wait_until(lambda: len(chunks) >= 2, "the stream has begun")
    desk.write("bot.py", source(2))
    await desk.wait_event("plugin_swapped", plugin="bot")
    assert len(chunks) < 6
    await reading
    assert [f"1.{n} " in chunk for n, chunk in enumerate(chunks)] == [True] * 6
    [_, reply] = await desk.record()
    assert (reply["text"], reply["generation"]) == ("1.0 1.1 1.2 1.3 1.4 1.5 ", 1)
    assert await desk.reply() == "2.0 2.1 2.2 2.3 2.4 2.5 "


async def test_a_turn_sees_one_generation_of_a_plugin(start_desk: StartDesk) -> None:
    """Middleware and bot of one plugin are of one generation in every turn, over many swaps under traffic."""

    def source(version: int) -> str:
        return (
            f"{HEAD}VERSION = {version}\n"
            "@hookimpl\nasync def middleware(turn, call_next):\n"
            "    reply = await call_next()\n    reply.text += f' {VERSION}'\n    return reply\n"
            "@hookimpl\nasync def respond(turn):\n    await asyncio.sleep(0.005)\n    return str(VERSION)\n"
        )

    desk = await start_desk({"bot.py": source(1)})
    async with traffic(desk, pause_s=0.002) as seen:
        for version in range(2, 22):
            desk.write("bot.py", source(version))
            await desk.wait_event("plugin_swapped", plugin="bot", generation=version)
            await seen.wait_more(1)
    pairs = [text.split() for text in seen.texts]
    assert all(first == second for first, second in pairs)
    assert {first for first, _ in pairs} >= {str(version) for version in range(2, 21)}


async def test_one_plugins_change_never_touches_another(start_desk: StartDesk) -> None:
    """Saving, breaking, deleting and disabling one plugin leaves the other's module, task and memory as they are."""
    other = (
        f"{HEAD}COUNT = []\n"
        "@hookimpl\nasync def setup(ctx):\n"
        "    async def run():\n        while True:\n"
        "            COUNT.append(1)\n            await asyncio.sleep(0.001)\n"
        "    ctx.task(run(), 'count')\n"
        "@hookimpl\nasync def on_reply(reply): ...\n"
    )
    desk = await start_desk({"bot.py": echo(1), "other.py": other})
    entry = desk.host.plugins.entry("other")
    generation = entry.current
    assert generation is not None
    desk.write("bot.py", echo(2))
    await desk.wait_event("plugin_swapped", plugin="bot")
    desk.write("bot.py", "broken(")
    await desk.wait_event("plugin_failed", plugin="bot")
    await desk.admin("POST", "plugins/bot/rollback")
    await desk.admin("POST", "plugins/bot/disable")
    (desk.folder / "bot.py").unlink()
    assert entry.current is generation
    counted: list[Any] = sys.modules[generation.module_name].COUNT
    before = len(counted)
    await wait_until(lambda: len(counted) > before + 3, "the other's task goes on")
    assert not [e for e in desk.events if e.get("plugin") == "other" and e["kind"] != "plugin_loaded"]


async def test_drained_says_what_was_under_way(start_desk: StartDesk) -> None:
    """The receipt of a swap tells how many turns still ran on the generation it replaced."""
    desk = await start_desk({"bot.py": slow(1), "bot.toml": "[config]\nword = 'one'"}, standby_s=0.0)
    turns = [asyncio.create_task(desk.reply(conversation=str(n))) for n in range(3)]
    await wait_until(lambda: desk.host.turns.live == 3, "three turns run")
    desk.write("bot.py", slow(2))
    await desk.wait_event("plugin_swapped", plugin="bot")
    await asyncio.gather(*turns)

    async def drained() -> Any:
        return (await desk.plugin("bot"))["receipt"]["drained"] is not None

    await wait_until(drained, "it is drained")
    assert (await desk.plugin("bot"))["receipt"]["drained"] == 3


async def test_a_swap_does_not_wait_for_turns_on_the_old_code(start_desk: StartDesk) -> None:
    """A save comes to serve within 90 ms though turns of 300 ms still run on the generation that it replaces."""
    desk = await start_desk({"bot.py": slow(1), "bot.toml": "[config]\nword = 'one'"}, standby_s=0.0)
    turns = []
    for version in (2, 3):
        turns.append(asyncio.create_task(desk.reply(conversation=str(version))))
        await wait_until(lambda: desk.host.turns.live == len(turns), "the turn runs")
        desk.write("bot.py", slow(version))
        swapped = await desk.wait_event("plugin_swapped", plugin="bot", generation=version)
        assert swapped["receipt"]["steps"]["total_ms"] < 90
        assert not any(turn.done() for turn in turns)
    assert [text and text[:6] for text in await asyncio.gather(*turns)] == ["1 True", "2 True"]
