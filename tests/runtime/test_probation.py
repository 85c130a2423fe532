"""Probation: a generation that fails in its first calls is taken back, and nobody sees an error."""

from __future__ import annotations

import time

import pytest
from tests.runtime.traffic import traffic

from conftest import Desk, StartDesk, echo, wait_until

HALF_BAD = (
    "from hotdesk_sdk import hookimpl\n\nCALLS = []\n\n"
    "@hookimpl\nasync def respond(turn):\n    CALLS.append(1)\n"
    "    if len(CALLS) % 2 == 0:\n        raise RuntimeError('every second call')\n    return 'new'\n"
)


async def gone(desk: Desk, name: str = "echo") -> None:
    """Wait until no standby is left."""
    await wait_until(lambda: desk.host.plugins.entry(name).standby is None, "the standby is gone")


@pytest.mark.parametrize("standby_s", [5.0, 0.0], ids=["standby", "reload from kept bytes"])
async def test_a_generation_that_fails_half_its_calls_is_rolled_back(start_desk: StartDesk, standby_s: float) -> None:
    """Within 20 calls and 1 s the old code answers again; every message had an answer, and none an error."""
    desk = await start_desk({"echo.py": echo(1)}, standby_s=standby_s)
    async with traffic(desk) as seen:
        await seen.wait_more()
        swapped = time.monotonic()
        desk.write("echo.py", HALF_BAD)
        await desk.wait_event("plugin_rolled_back", plugin="echo")
        assert time.monotonic() - swapped < 1.0
        await seen.wait_more(10)
    new = [text for text in seen.texts if text == "new"]
    assert len(new) <= 20
    assert set(seen.texts) <= {"new", "1: hello"}
    assert seen.texts[-1] == "1: hello"
    shown = await desk.plugin("echo")
    assert shown["error"]["step"] == "probation"
    assert "every second call" in shown["error"]["message"]
    assert f"{desk.folder / 'echo.py'}:9" in shown["error"]["message"]


async def test_a_swap_back_brings_the_very_generation_back(start_desk: StartDesk) -> None:
    """While it stands by, the old generation itself serves again: its number, its memory."""
    counting = (
        echo(1)
        .replace("VERSION = 1", "VERSION = 1\nSEEN = []")
        .replace("return f'{VERSION}: {turn.text}'", "SEEN.append(1); return f'{VERSION}: {len(SEEN)}'")
    )
    desk = await start_desk({"echo.py": counting}, standby_s=5.0)
    assert [await desk.reply(), await desk.reply()] == ["1: 1", "1: 2"]
    desk.write("echo.py", "from hotdesk_sdk import hookimpl\n@hookimpl\nasync def respond(turn): raise ValueError\n")
    await desk.wait_generation("echo", 2)
    assert await desk.reply() == "1: 3"
    assert (await desk.plugin("echo"))["generation"] == 1


@pytest.mark.parametrize("standby_s", [5.0, 0.0], ids=["standby", "reload from kept bytes"])
async def test_a_failed_turn_is_run_again_on_the_old_code(start_desk: StartDesk, standby_s: float) -> None:
    """The turn that failed is answered by the old code, with `turn.attempt` 2 and the turn's own text as it was."""
    old = echo(1).replace("{turn.text}", "{turn.text} ({turn.attempt})")
    desk = await start_desk({"echo.py": old}, standby_s=standby_s)
    desk.write(
        "echo.py",
        "from hotdesk_sdk import hookimpl\n@hookimpl\nasync def respond(turn):\n"
        "    turn.text = 'spoilt'; turn.conversation.state['spoilt'] = 1\n    raise ValueError('at once')\n",
    )
    await desk.wait_generation("echo", 2)
    await gone(desk) if not standby_s else None
    assert await desk.reply("hi") == "1: hi (2)"
    assert [e["type"] for e in await desk.record()] == ["message", "reply"]


async def test_a_timeout_in_probation_counts(start_desk: StartDesk) -> None:
    """A generation that is too slow in its first calls is rolled back as one that raises is."""
    desk = await start_desk({"echo.py": echo(1), "echo.toml": "timeout_ms = 100"}, standby_s=5.0)
    desk.write(
        "echo.py",
        "import asyncio\nfrom hotdesk_sdk import hookimpl\n"
        "@hookimpl\nasync def respond(turn): await asyncio.sleep(9)\n",
    )
    await desk.wait_generation("echo", 2)
    assert await desk.reply() == "1: hello"
    assert "100 ms" in (await desk.plugin("echo"))["error"]["message"]


async def test_a_wrong_return_value_in_probation_counts(start_desk: StartDesk) -> None:
    """A generation that returns what its hook may not return is rolled back too."""
    desk = await start_desk({"echo.py": echo(1)}, standby_s=5.0)
    desk.write("echo.py", "from hotdesk_sdk import hookimpl\n@hookimpl\nasync def respond(turn): return 42\n")
    await desk.wait_generation("echo", 2)
    assert await desk.reply() == "1: hello"


async def test_a_stream_that_breaks_before_its_first_chunk_is_run_again(start_desk: StartDesk) -> None:
    """A streaming bot in probation that fails before anything was shown is answered for by the old code."""
    desk = await start_desk({"echo.py": echo(1)}, standby_s=5.0)
    desk.write(
        "echo.py",
        "from hotdesk_sdk import hookimpl\n@hookimpl\nasync def respond(turn):\n    raise ValueError\n    yield 'x'\n",
    )
    await desk.wait_generation("echo", 2)
    assert await desk.reply() == "1: hello"


async def test_a_middleware_in_probation_is_rolled_back(start_desk: StartDesk) -> None:
    """A layer of the onion that raises, before or after `call_next`, is rolled back and the turn run again."""
    head = "from hotdesk_sdk import hookimpl\n@hookimpl\nasync def middleware(turn, call_next):\n"
    desk = await start_desk(
        {"echo.py": echo(1), "layer.py": f"{head}    r = await call_next(); r.text += '!'; return r\n"}, standby_s=5.0
    )
    for number, body in enumerate(("raise ValueError", "await call_next(); raise ValueError")):
        desk.write("layer.py", f"{head}    {body}\n")
        await desk.wait_event("plugin_swapped", plugin="layer", generation=2 + number)
        assert await desk.reply() == "1: hello!"


async def test_a_first_load_has_nothing_to_go_back_to(start_desk: StartDesk) -> None:
    """The first generation of a plugin fails like any call: skipped, told, not rolled back."""
    desk = await start_desk({"bot.py": HALF_BAD.replace("% 2 == 0", "> 0"), "echo.py": echo(1)})
    assert (await desk.plugin("bot"))["probation_left"] == 0
    assert await desk.reply() == "1: hello"
    assert (await desk.plugin("bot"))["generation"] == 1
    assert "plugin_rolled_back" not in [event["kind"] for event in desk.events]


async def test_probation_ends(start_desk: StartDesk) -> None:
    """After `probation_calls` good calls the standby is let go, and a failure is an ordinary one."""
    desk = await start_desk({"echo.py": echo(1)}, standby_s=30.0, probation_calls=5)
    late = echo(2) + "SEEN = []\n"
    late = late.replace("    return", "    SEEN.append(1)\n    assert len(SEEN) <= 5, 'late'\n    return")
    desk.write("echo.py", late)
    await desk.wait_generation("echo", 2)
    assert [await desk.reply() for _ in range(5)] == ["2: hello"] * 5
    await gone(desk)
    assert await desk.reply() is None
    assert (await desk.plugin("echo"))["generation"] == 2


async def test_what_was_rolled_back_from_is_not_loaded_again(start_desk: StartDesk) -> None:
    """The same bytes saved again stay refused; a fix is taken, and a reload by command insists."""
    desk = await start_desk({"echo.py": echo(1)}, standby_s=5.0)
    desk.write("echo.py", HALF_BAD.replace("% 2 == 0", "> 0"))
    await desk.wait_generation("echo", 2)
    assert await desk.reply() == "1: hello"
    desk.write("echo.py", HALF_BAD.replace("% 2 == 0", "> 0"))
    await wait_until(lambda: not desk.host.plugins.entry("echo").queued, "seen")
    desk.write("echo.py", echo(3))
    await desk.wait_event("plugin_swapped", plugin="echo", generation=3)
    assert await desk.reply() == "3: hello"


async def test_a_bad_config_in_probation_rolls_back_no_code(start_desk: StartDesk) -> None:
    """A `configure` that raises refuses the config; the generation, though new, is not blamed for it."""
    source = (
        "from hotdesk_sdk import hookimpl\nVERSION = {}\n"
        "@hookimpl\nasync def configure(ctx, config):\n    return len(config['word'])\n"
        "@hookimpl\nasync def respond(ctx, turn): return f'{{VERSION}} {{ctx.config[\"word\"]}}'\n"
    )
    desk = await start_desk({"bot.py": source.format(1), "bot.toml": "[config]\nword = 'a'"}, standby_s=5.0)
    desk.write("bot.py", source.format(2))
    await desk.wait_generation("bot", 2)
    desk.write("bot.toml", "[config]\nword = 7")
    failed = await desk.wait_event("plugin_failed", plugin="bot")
    assert failed["step"] == "configure"
    assert await desk.reply() == "2 a"
    assert (await desk.plugin("bot"))["generation"] == 2


async def test_a_rollback_takes_dependants_along(start_desk: StartDesk) -> None:
    """What was loaded anew for a swap goes back with it: the dependant uses the module that it was made with."""
    desk = await start_desk(
        {
            "words.py": "from hotdesk_sdk import hookimpl\nWORD = 'one'\n@hookimpl\nasync def on_reply(reply): ...\n",
            "bot.py": (
                "from hotdesk_sdk import hookimpl\n"
                "@hookimpl\nasync def respond(ctx, turn): return ctx.require('words').WORD + ''\n"
            ),
            "bot.toml": 'requires = ["words"]',
        },
        standby_s=5.0,
    )
    assert await desk.reply() == "one"
    desk.write("words.py", "from hotdesk_sdk import hookimpl\nWORD = 2\n@hookimpl\nasync def on_reply(reply): ...\n")
    await desk.wait_generation("words", 2)
    await desk.wait_generation("bot", 2)
    assert await desk.reply() == "one"
    assert (await desk.plugin("words"))["generation"] == 1
