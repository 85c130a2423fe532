"""The wall around every call: deadlines, failures, breakers, and who holds the loop."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from conftest import Desk, StartDesk, echo, wait_until
from hotdesk.config import PluginSettings

HEAD = "import asyncio, sys, time\nfrom hotdesk_sdk import hookimpl\n"


def bot(body: str) -> str:
    return f"{HEAD}@hookimpl\nasync def respond(turn):\n    {body}\n"


def layer(*lines: str) -> str:
    return f"{HEAD}@hookimpl\nasync def middleware(turn, call_next):\n" + "".join(f"    {line}\n" for line in lines)


QUICK = PluginSettings(timeout_ms=100)


def kinds(desk: Desk, *names: str) -> list[str]:
    return [event["kind"] for event in desk.events if event["kind"] in names]


# -- deadlines ---------------------------------------------------------------------------------------------------


async def test_a_call_that_is_late_is_skipped(start_desk: StartDesk) -> None:
    """A bot over its `timeout_ms` is cancelled, and the next one answers well within a second."""
    desk = await start_desk(
        {"echo.py": echo(1), "a.py": bot("await asyncio.sleep(30); return 'late'")}, settings={"a": QUICK}
    )
    started = time.monotonic()
    assert await desk.reply() == "1: hello"
    assert 0.1 <= time.monotonic() - started < 0.5
    assert (await desk.plugin("a"))["failures"] == 1


async def test_a_middleware_that_waits_for_a_slow_bot_is_not_late(start_desk: StartDesk) -> None:
    """Only a call's own time counts: what is further in has deadlines of its own."""
    desk = await start_desk(
        {
            "slow.py": bot("await asyncio.sleep(0.4); return 'slow'"),
            "outer.py": layer("r = await call_next()", "r.text += '!'", "return r"),
            "inner.py": layer("r = await call_next()", "r.text += '?'", "return r"),
        },
        settings={"outer": QUICK, "inner": QUICK},
    )
    assert await desk.reply() == "slow!?"
    assert (await desk.plugin("outer"))["failures"] == (await desk.plugin("inner"))["failures"] == 0


async def test_a_middlewares_own_time_counts_before_and_after(start_desk: StartDesk) -> None:
    """60 ms before `call_next` and 60 ms after it are 120 ms of one call; the answer from further in stands."""
    desk = await start_desk(
        {
            "slow.py": bot("await asyncio.sleep(0.2); return 'slow'"),
            "outer.py": layer(
                "await asyncio.sleep(0.06)", "r = await call_next()", "await asyncio.sleep(5)", "r.text = 'no'"
            ),
        },
        settings={"outer": QUICK},
    )
    started = time.monotonic()
    assert await desk.reply() == "slow"
    assert time.monotonic() - started < 0.6
    assert (await desk.plugin("outer"))["failures"] == 1


async def test_each_chunk_of_a_stream_has_the_deadline(start_desk: StartDesk) -> None:
    """A stream that takes longer than `timeout_ms` in all is fine as long as no chunk does."""
    source = bot("for n in range(6):\n        await asyncio.sleep(0.05)\n        yield str(n)")
    desk = await start_desk({"a.py": source}, settings={"a": QUICK})
    assert await desk.reply() == "012345"


async def test_a_call_that_ignores_its_cancellation_is_abandoned(start_desk: StartDesk) -> None:
    """The conversation goes on without it, the turn ends with an error, and the next message is answered."""
    stubborn = bot(
        "if turn.text != 'stick': return 'fine'\n"
        "    until = time.monotonic() + 3\n"
        "    while time.monotonic() < until:\n"
        "        try:\n            await asyncio.sleep(0.05)\n"
        "        except asyncio.CancelledError:\n            pass"
    )
    desk = await start_desk({"a.py": stubborn}, settings={"a": QUICK})
    started = time.monotonic()
    stuck = await desk.say("stick")
    assert time.monotonic() - started < 2.5
    assert stuck["replies"] == []
    assert await desk.reply("on") == "fine"
    assert time.monotonic() - started < 2.8


async def test_a_call_that_swallows_its_cancellation_once_is_late(start_desk: StartDesk) -> None:
    """Catching CancelledError and answering all the same is too late: the answer is not taken."""
    desk = await start_desk(
        {
            "a.py": bot(
                "try:\n        await asyncio.sleep(30)\n    except asyncio.CancelledError:\n        return 'too late'"
            ),
            "echo.py": echo(1),
        },
        settings={"a": QUICK},
    )
    assert await desk.reply() == "1: hello"


# -- failures ----------------------------------------------------------------------------------------------------


async def test_a_failing_plugin_is_skipped(start_desk: StartDesk) -> None:
    """With `on_failure = "skip"` bots and layers that raise are gone around."""
    desk = await start_desk(
        {"echo.py": echo(1), "a.py": bot("raise ValueError('x')"), "b.py": layer("raise KeyError(1)")}
    )
    assert await desk.reply() == "1: hello"


async def test_a_plugin_may_be_indispensable(start_desk: StartDesk) -> None:
    """With `on_failure = "refuse"`, from the manifest or the operator, the turn fails rather than go on without it."""
    desk = await start_desk(
        {"echo.py": echo(1), "a.py": layer("raise ValueError('x')"), "a.toml": 'on_failure = "refuse"'}
    )
    body = await desk.say()
    assert body["replies"] == []
    assert [entry["type"] for entry in await desk.record()] == ["message"]
    other = await start_desk(
        {"echo.py": echo(1), "a.py": layer("raise ValueError('x')"), "a.toml": 'on_failure = "refuse"'},
        settings={"a": PluginSettings(on_failure="skip")},
    )
    assert await other.reply() == "1: hello"


async def test_sys_exit_in_respond_ends_one_call(start_desk: StartDesk) -> None:
    """SystemExit, KeyboardInterrupt and GeneratorExit from a plugin are failures like any other."""
    for name in ("SystemExit", "KeyboardInterrupt", "MemoryError", "StopIteration", "StopAsyncIteration"):
        desk = await start_desk({"a.py": bot(f"raise {name}"), "echo.py": echo(1)})
        assert await desk.reply() == "1: hello", name
        assert (await desk.plugin("a"))["failures"] == 1


async def test_sys_exit_in_a_task_ends_the_task(start_desk: StartDesk) -> None:
    """`sys.exit()` in a raw task or a `ctx.task` does not end the host."""
    source = (
        f"{HEAD}async def leave(): sys.exit(1)\n"
        "@hookimpl\nasync def setup(ctx):\n    global T\n    ctx.task(leave(), 'leave')\n"
        "    T = asyncio.create_task(leave())\n    T.add_done_callback(lambda t: t.exception())\n"
        "@hookimpl\nasync def respond(turn): return 'still here'\n"
    )
    desk = await start_desk({"a.py": source})
    assert await desk.reply() == "still here"


async def test_call_next_runs_once(start_desk: StartDesk) -> None:
    """A second `call_next()` raises in the middleware; the first one's answer is what the visitor gets."""
    desk = await start_desk(
        {
            "echo.py": echo(1).replace(
                "    return", "    turn.conversation.state['n'] = 1 + turn.conversation.state.get('n', 0)\n    return"
            ),
            "twice.py": layer("await call_next()", "return await call_next()"),
        }
    )
    assert await desk.reply() == "1: hello"
    assert (await desk.plugin("twice"))["failures"] == 1
    assert (await desk.plugin("echo"))["calls"] == 1


async def test_a_layer_may_put_a_deadline_of_its_own_around_call_next(start_desk: StartDesk) -> None:
    """`asyncio.wait_for(call_next(), …)` works: the bot is cancelled, and the layer's own reply is taken."""
    desk = await start_desk(
        {
            "slow.py": bot("await asyncio.sleep(1 if turn.text == 'slow' else 0); return 'bot'"),
            "quick.py": layer(
                "try:",
                "    return await asyncio.wait_for(call_next(), 0.1)",
                "except asyncio.TimeoutError:",
                "    return 'sorry'",
            ),
        },
        settings={"slow": PluginSettings(timeout_ms=300), "quick": PluginSettings(timeout_ms=300)},
    )
    for _ in range(3):
        assert await desk.reply("slow") == "sorry"
        assert await desk.reply("fast") == "bot"
    assert (await desk.plugin("quick"))["failures"] == 0


async def test_a_deadline_further_in_reaches_through_wait_for(start_desk: StartDesk) -> None:
    """A bot that is late inside a layer's `wait_for` is skipped by its own deadline, not by the layer's."""
    desk = await start_desk(
        {
            "a.py": bot("await asyncio.sleep(9)"),
            "echo.py": echo(1),
            "outer.py": layer("return await asyncio.wait_for(call_next(), 5)"),
        },
        settings={"a": QUICK, "outer": QUICK},
    )
    assert await desk.reply() == "1: hello"
    assert (await desk.plugin("outer"))["failures"] == 0


# -- breaker -----------------------------------------------------------------------------------------------------


async def test_a_breaker_opens_tries_and_closes(start_desk: StartDesk) -> None:
    """It opens within 20 failing calls, keeps calls away, tries one after the cooldown, and closes when that works."""
    source = (
        f"{HEAD}from pathlib import Path\nCALLS = []\n"
        "@hookimpl\nasync def respond(ctx, turn):\n    CALLS.append(1)\n"
        "    if Path(ctx.config['flag']).exists(): return f'well {len(CALLS)}'\n    raise ValueError('ill')\n"
    )
    flag = "/nonexistent"
    desk = await start_desk({"echo.py": echo(1)}, breaker_cooldown_s=0.3)
    flag = str(desk.folder / ".well")
    desk.write("a.toml", f'[config]\nflag = "{flag}"')
    desk.write("a.py", source)
    await desk.wait_generation("a", 1)
    calls = 0
    while (await desk.plugin("a"))["breaker"] == "closed":
        assert await desk.reply() == "1: hello"
        calls += 1
        assert calls <= 20
    await desk.wait_event("breaker_opened", plugin="a")
    before = (await desk.plugin("a"))["calls"]
    assert [await desk.reply() for _ in range(5)] == ["1: hello"] * 5
    assert (await desk.plugin("a"))["calls"] == before

    async def tried() -> bool:
        await desk.reply()
        return bool((await desk.plugin("a"))["calls"] > before)

    await wait_until(tried, "one call is tried")
    shown = await desk.plugin("a")
    assert (shown["breaker"], shown["calls"]) == ("open", before + 1)
    (desk.folder / ".well").write_text("")

    async def well() -> bool:
        return str(await desk.reply()).startswith("well")

    await wait_until(well, "it is well again")
    await desk.wait_event("breaker_closed", plugin="a")
    assert (await desk.plugin("a"))["breaker"] == "closed"


async def test_timeouts_open_the_breaker_too(start_desk: StartDesk) -> None:
    """A plugin that is always late is soon not waited for any more."""
    desk = await start_desk(
        {"a.py": bot("await asyncio.sleep(9)"), "echo.py": echo(1)},
        settings={"a": PluginSettings(timeout_ms=20)},
        breaker_failures=3,
    )
    for _ in range(3):
        assert await desk.reply() == "1: hello"
    assert (await desk.plugin("a"))["breaker"] == "open"
    started = time.monotonic()
    assert await desk.reply() == "1: hello"
    assert time.monotonic() - started < 0.1


async def test_a_half_open_breaker_lets_one_call_through(start_desk: StartDesk) -> None:
    """Of many turns at once after the cooldown, one tries the plugin and the others go around it."""
    desk = await start_desk(
        {"a.py": bot("await asyncio.sleep(0.05); raise ValueError"), "echo.py": echo(1)},
        breaker_failures=2,
        breaker_cooldown_s=0.2,
    )
    await desk.reply()
    await desk.reply()
    before = (await desk.plugin("a"))["calls"]
    slot = desk.host.plugins.entry("a").slot
    assert slot is not None
    await wait_until(lambda: time.monotonic() >= slot.breaker.retry_at, "the cooldown is over")
    assert await asyncio.gather(*(desk.reply(conversation=str(n)) for n in range(10))) == ["1: hello"] * 10
    assert (await desk.plugin("a"))["calls"] == before + 1


async def test_a_new_generation_has_a_closed_breaker(start_desk: StartDesk) -> None:
    """A fix is not made to wait for its predecessor's cooldown."""
    desk = await start_desk({"a.py": bot("raise ValueError"), "echo.py": echo(1)}, breaker_failures=1)
    await desk.reply()
    assert (await desk.plugin("a"))["breaker"] == "open"
    desk.write("a.py", bot("return 'mended'"))
    await desk.wait_generation("a", 2)
    assert await desk.reply() == "mended"


# -- the loop ----------------------------------------------------------------------------------------------------


async def test_a_plugin_that_blocks_the_loop_is_named(start_desk: StartDesk) -> None:
    """A call that holds the loop for over 100 ms is an event with the plugin's name, the time and its stack."""
    source = (
        f"{HEAD}def dawdle():\n    time.sleep(0.3)\n@hookimpl\nasync def respond(turn):\n    dawdle()\n    return 'x'\n"
    )
    desk = await start_desk({"sleepy.py": source})
    assert await desk.reply() == "x"
    stalled: dict[str, Any] = await desk.wait_event("loop_stalled", plugin="sleepy")
    assert stalled["ms"] >= 100
    assert "dawdle" in stalled["stack"]
    assert f'{desk.folder / "sleepy.py"}", line 4' in stalled["stack"]


async def test_a_setup_that_blocks_the_loop_is_named(desk: Desk) -> None:
    """Also code that does not serve yet is found: a blocking `setup`."""
    desk.write("sleepy.py", f"{HEAD}@hookimpl\nasync def setup(ctx):\n    time.sleep(0.3)\n")
    await desk.wait_event("loop_stalled", plugin="sleepy")


async def test_a_slow_import_blocks_nobody(desk: Desk) -> None:
    """Module code runs beside the loop: a second of it delays no message and is no stall."""
    desk.write("slow.py", f"{HEAD}time.sleep(0.5)\n@hookimpl\nasync def on_reply(reply): ...\n")
    started = time.monotonic()
    await wait_until(lambda: any(e.name == "slow" and e.loading for e in desk.host.plugins.entries), "it is imported")
    assert await desk.reply() == "1: hello"
    assert time.monotonic() - started < 0.4
    await desk.wait_generation("slow", 1)
    assert [e["plugin"] for e in desk.events if e["kind"] == "loop_stalled" and e["plugin"]] == []
