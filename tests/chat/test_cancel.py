"""A turn that is given up: wherever it stands it ends at once, with what was said so far, and nobody is blamed."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import pytest

from conftest import Desk, StartDesk, echo, wait_until
from hotdesk.backend import StoredReply
from hotdesk.chat.intake import Accepted, NewMessage
from hotdesk.config import PluginSettings
from hotdesk.runtime.python import PREFIX

HEAD = "import asyncio, time\nfrom hotdesk_sdk import Reply, hookimpl\nNOTES = []\n"

STREAM = (
    f"{HEAD}"
    "@hookimpl\nasync def respond(turn):\n"
    "    if turn.text != 'go': return\n"
    "    try:\n"
    "        yield 'one '\n        yield 'two '\n        NOTES.append('said')\n"
    "        await asyncio.sleep(60)\n        yield 'never'\n"
    "    finally:\n"
    "        NOTES.append('closing')\n        await asyncio.sleep(0.2)\n        NOTES.append('closed')\n"
)

WAITS = (
    f"{HEAD}"
    "@hookimpl\nasync def respond(turn):\n"
    "    if turn.text != 'go': return\n"
    "    NOTES.append('asked')\n"
    "    try:\n        await asyncio.sleep(60)\n"
    "    finally:\n        NOTES.append(time.monotonic())\n"
)


def bot(*lines: str) -> str:
    return f"{HEAD}@hookimpl\nasync def respond(turn):\n" + "".join(f"    {line}\n" for line in lines)


def layer(*lines: str) -> str:
    return f"{HEAD}@hookimpl\nasync def middleware(turn, call_next):\n" + "".join(f"    {line}\n" for line in lines)


def notes(desk: Desk, name: str) -> list[Any]:
    """What a plugin wrote down of itself."""
    generation = desk.host.plugins.entry(name).current
    assert generation is not None
    assert generation.module_name.startswith(PREFIX)
    found: list[Any] = sys.modules[generation.module_name].NOTES
    return found


async def begin(desk: Desk, text: str = "go", id: str = "m") -> Accepted:
    return await desk.host.intake.accept(NewMessage("c", text, id), door="test")


async def ended(accepted: Accepted) -> tuple[tuple[StoredReply, ...], str | None]:
    assert accepted.turn is not None
    async with asyncio.timeout(10):
        end = await accepted.turn.wait_ended()
    assert end is not None
    return end.replies, end.error[0] if end.error else None


def turns(desk: Desk, outcome: str) -> float:
    return desk.host.metrics.registry.get_sample_value("hotdesk_turns_total", {"outcome": outcome}) or 0.0


async def failures(desk: Desk, *names: str) -> list[tuple[int, str]]:
    shown = [await desk.plugin(name) for name in names]
    return [(one["failures"], one["breaker"]) for one in shown]


# -- the phases --------------------------------------------------------------------------------------------------


async def test_a_queued_turn_is_cancelled_without_waiting_for_those_before(start_desk: StartDesk) -> None:
    """A turn behind another ends at once and never runs; the one before it, and the one behind it, are answered."""
    gate = bot("NOTES.append(turn.text)", "while 'open' not in NOTES: await asyncio.sleep(0.005)", "return turn.text")
    desk = await start_desk({"a.py": gate})
    first, second, third = [await begin(desk, text, text) for text in ("1", "2", "3")]
    await wait_until(lambda: notes(desk, "a") == ["1"], "the first runs")
    assert desk.host.turns.cancel("c", "2")
    assert await ended(second) == ((), "cancelled")
    assert desk.host.turns.live == 2
    notes(desk, "a").append("open")
    assert [(await ended(one))[0][0].text for one in (first, third)] == ["1", "3"]
    assert "2" not in notes(desk, "a")
    assert desk.host.turns.live == 0
    assert await desk.host.backend.unfinished() == []


async def test_before_the_first_chunk_there_is_no_reply(start_desk: StartDesk) -> None:
    """A turn that has said nothing ends without a reply; what its bot waited for is closed within 100 ms."""
    desk = await start_desk({"a.py": WAITS})
    accepted = await begin(desk)
    await wait_until(lambda: notes(desk, "a"), "the bot waits")
    at = time.monotonic()
    assert desk.host.turns.cancel("c", "m")
    assert await ended(accepted) == ((), "cancelled")
    assert notes(desk, "a")[1] - at < 0.1
    assert turns(desk, "cancelled") == 1
    assert [entry["type"] for entry in await desk.record()] == ["message"]


@pytest.mark.parametrize("shape", ["generator", "iterator", "reply", "turn.stream"])
async def test_what_was_said_so_far_is_the_reply(start_desk: StartDesk, shape: str) -> None:
    """Mid-stream the chunks shown are stored, marked cut and cancelled, after every `finally` has run to its end."""
    source = {
        "generator": STREAM,
        "iterator": STREAM.replace("@hookimpl\nasync def respond", "async def chunks")
        + "@hookimpl\nasync def respond(turn):\n    return chunks(turn)\n",
        "reply": STREAM.replace("@hookimpl\nasync def respond", "async def chunks")
        + "@hookimpl\nasync def respond(turn):\n    return Reply(chunks=chunks(turn), metadata={'own': 1})\n",
        "turn.stream": STREAM.replace("yield 'one '", "await turn.stream('one ')")
        .replace("yield 'two '", "await turn.stream('two ')")
        .replace("yield 'never'", "return 'never'"),
    }[shape]
    desk = await start_desk({"a.py": source, "b.py": layer("return await call_next()")})
    accepted = await begin(desk)
    await wait_until(lambda: "said" in notes(desk, "a"), "two chunks are said")
    assert desk.host.turns.cancel("c", "m")
    [reply], error = await ended(accepted)
    assert (reply.text, error) == ("one two ", "cancelled")
    assert reply.metadata == {"cut": True, "cancelled": True, **({"own": 1} if shape == "reply" else {})}
    assert notes(desk, "a") == ["said", "closing", "closed"]
    [_, kept] = await desk.record()
    assert (kept["text"], kept["metadata"], kept["plugin"]) == ("one two ", reply.metadata, "a")


async def test_layers_that_wrap_a_stream_unwind_too(start_desk: StartDesk) -> None:
    """A middleware's own generator is closed with the bot's, outermost last, and what it had shown stands."""
    wrap = (
        f"{HEAD}@hookimpl\nasync def middleware(turn, call_next):\n"
        "    reply = await call_next()\n    reply.chunks = loud(reply.chunks)\n    return reply\n"
        "async def loud(chunks):\n"
        "    try:\n        async for chunk in chunks:\n            yield chunk.upper()\n"
        "    finally:\n        NOTES.append('unwound')\n"
    )
    desk = await start_desk({"a.py": STREAM, "b.py": wrap})
    accepted = await begin(desk)
    await wait_until(lambda: "said" in notes(desk, "a"), "two chunks are said")
    assert desk.host.turns.cancel("c", "m")
    [reply], _ = await ended(accepted)
    assert reply.text == "ONE TWO "
    assert notes(desk, "b") == ["unwound"]
    assert notes(desk, "a")[-1] == "closed"


async def test_a_stream_that_nobody_pulls_is_closed(start_desk: StartDesk) -> None:
    """A layer that holds a begun stream back is cancelled, and the stream that it held is closed as well."""
    holds = layer("reply = await call_next()", "NOTES.append('holds')", "await asyncio.sleep(60)", "return reply")
    desk = await start_desk({"a.py": STREAM, "b.py": holds})
    accepted = await begin(desk)
    await wait_until(lambda: notes(desk, "b"), "the layer holds the stream")
    assert desk.host.turns.cancel("c", "m")
    assert await ended(accepted) == ((), "cancelled")
    assert notes(desk, "a") == ["closing", "closed"]


async def test_a_layer_that_awaits_in_a_task_of_its_own_is_reached(start_desk: StartDesk) -> None:
    """What is further in is cancelled at once, also behind a shield or a task group of a middleware."""
    lines = {
        "shield": ["return await asyncio.shield(asyncio.ensure_future(call_next()))"],
        "group": ["async with asyncio.TaskGroup() as group:", "    task = group.create_task(call_next())"],
        "wait_for": ["return await asyncio.wait_for(call_next(), 50)"],
    }
    for name, body in lines.items():
        desk = await start_desk({"a.py": WAITS, "b.py": layer(*body)})
        accepted = await begin(desk)
        await wait_until(lambda desk=desk: notes(desk, "a"), "the bot waits")
        at = time.monotonic()
        assert desk.host.turns.cancel("c", "m")
        assert await ended(accepted) == ((), "cancelled"), name
        await wait_until(lambda desk=desk: len(notes(desk, "a")) == 2, "the bot is closed")
        assert notes(desk, "a")[1] - at < 0.1, name
        assert await failures(desk, "a", "b") == [(0, "closed")] * 2, name


async def test_a_plugin_that_ignores_it_is_left_behind(start_desk: StartDesk) -> None:
    """A bot that goes on all the same holds its conversation for about a second; what it said before stands."""
    stubborn = bot(
        "if turn.text != 'go':",
        "    yield 'fine'",
        "    return",
        "yield 'so far'",
        "NOTES.append('said')",
        "until = time.monotonic() + 2.5",
        "while time.monotonic() < until:",
        "    try:",
        "        await asyncio.sleep(0.05)",
        "    except asyncio.CancelledError:",
        "        pass",
        "yield 'too late'",
    )
    desk = await start_desk({"a.py": stubborn})
    accepted, behind = await begin(desk), await begin(desk, "on", "n")
    await wait_until(lambda: notes(desk, "a"), "the bot has said something")
    at = time.monotonic()
    assert desk.host.turns.cancel("c", "m")
    [reply], error = await ended(accepted)
    assert (reply.text, error) == ("so far", "cancelled")
    assert 0.5 < time.monotonic() - at < 1.8
    assert (await ended(behind))[0][0].text == "fine"
    assert await failures(desk, "a") == [(0, "closed")]


async def test_a_plugin_that_swallows_it_and_answers_is_too_late(start_desk: StartDesk) -> None:
    """An answer that comes out of a cancelled call is not taken, from a bot or from a layer."""
    swallows = bot(
        "try:", "    NOTES.append(1)", "    await asyncio.sleep(60)", "except BaseException:", "    return 'no'"
    )
    catches = layer("try:", "    return await call_next()", "except BaseException:", "    return 'no'")
    for plugins in ({"a.py": swallows}, {"a.py": WAITS, "b.py": catches}):
        desk = await start_desk(plugins)
        accepted = await begin(desk)
        await wait_until(lambda desk=desk: notes(desk, "a"), "the bot waits")
        assert desk.host.turns.cancel("c", "m")
        assert await ended(accepted) == ((), "cancelled")
        assert [entry["type"] for entry in await desk.record()] == ["message"]


# -- whose fault it is -------------------------------------------------------------------------------------------


async def test_nobody_is_blamed_and_nobody_else_is_asked(start_desk: StartDesk) -> None:
    """A cancel is no failure, opens no breaker and rolls nothing back, also when the bot raises on its way out.

    No other bot is asked, and no layer is tried after the one that it hit.
    """
    for raises in ("raise", "raise ValueError('on the way out')", "raise TimeoutError", "sys.exit()"):
        source = bot("NOTES.append(1)", "try:", "    await asyncio.sleep(60)", "except BaseException:", f"    {raises}")
        desk = await start_desk(
            {
                "a.py": f"import sys\n{source}",
                "z.py": f"{echo(1)}NOTES = []\n".replace("    return", "    NOTES.append(1)\n    return"),
            },
            breaker_failures=1,
            settings={"a": PluginSettings(order=1), "z": PluginSettings(order=2)},
        )
        desk.write("a.py", f"import sys\n{source}# the second version, in probation\n")
        await desk.wait_generation("a", 2)
        accepted = await begin(desk)
        await wait_until(lambda desk=desk: notes(desk, "a"), "the bot waits")
        assert desk.host.turns.cancel("c", "m")
        assert await ended(accepted) == ((), "cancelled"), raises
        assert notes(desk, "z") == []
        assert await failures(desk, "a") == [(0, "closed")], raises
        assert (await desk.plugin("a"))["generation"] == 2
        assert not [e for e in desk.events if e["kind"] in ("plugin_rolled_back", "breaker_opened")]
        assert turns(desk, "cancelled") == 1


async def test_an_indispensable_plugin_refuses_nothing_when_it_is_cancelled(start_desk: StartDesk) -> None:
    """With `on_failure = "refuse"` too, a cancelled turn ends as cancelled and not as refused."""
    holds = layer("NOTES.append(1)", "await asyncio.sleep(60)", "return await call_next()")
    desk = await start_desk({"a.py": echo(1), "b.py": holds}, settings={"b": PluginSettings(on_failure="refuse")})
    accepted = await begin(desk)
    await wait_until(lambda: notes(desk, "b"), "the layer waits")
    assert desk.host.turns.cancel("c", "m")
    assert await ended(accepted) == ((), "cancelled")
    assert turns(desk, "refused") == 0


# -- what comes after --------------------------------------------------------------------------------------------


async def test_twice_is_once_and_after_the_end_it_is_too_late(start_desk: StartDesk) -> None:
    """A second cancel adds nothing; a turn that has ended, or never was, can't be cancelled."""
    desk = await start_desk({"a.py": STREAM, "echo.py": echo(1)})
    accepted = await begin(desk)
    await wait_until(lambda: "said" in notes(desk, "a"), "two chunks are said")
    assert desk.host.turns.cancel("c", "m")
    assert desk.host.turns.cancel("c", "m")
    assert len((await ended(accepted))[0]) == 1
    await wait_until(lambda: desk.host.turns.live == 0, "the turn ended")
    assert not desk.host.turns.cancel("c", "m")
    assert not desk.host.turns.cancel("c", "never")
    assert not desk.host.turns.cancel("never", "m")
    assert turns(desk, "cancelled") == 1
    assert await desk.reply("next") == "1: next"


async def test_the_conversation_goes_on_after_a_cancel(start_desk: StartDesk) -> None:
    """Hundreds of turns cancelled at every moment leave each conversation with one end a turn, and able to go on."""
    source = bot(
        "if turn.text == 'on': return 'on'",
        "for n in range(5):",
        "    await turn.stream(f'{n}')",
        "    await asyncio.sleep(0.002)",
    )
    desk = await start_desk({"a.py": source})

    async def converse(lane: int) -> None:
        for number in range(20):
            accepted = await desk.host.intake.accept(NewMessage(f"c{lane}", "go", f"m{number}"), door="test")
            await asyncio.sleep((lane * 20 + number) % 50 * 0.0004)
            desk.host.turns.cancel(f"c{lane}", f"m{number}")
            replies, error = await ended(accepted)
            said = "".join(reply.text for reply in replies)
            assert "01234".startswith(said)
            assert error == ("cancelled" if len(said) < 5 or replies[0].metadata else None)
        assert await desk.reply("on", f"c{lane}") == "on"

    await asyncio.gather(*(converse(lane) for lane in range(10)))
    assert desk.host.turns.live == 0
    assert await failures(desk, "a") == [(0, "closed")]
    assert turns(desk, "cancelled") > 100


# -- streams of the host's own -----------------------------------------------------------------------------------

OF_HOST = (
    f"{HEAD}from hotdesk_sdk import LlmTimeout\n"
    "class Stream:\n"
    "    of_host = True\n"
    "    def __init__(self, batches): self.batches = batches\n"
    "    def __aiter__(self): return self\n"
    "    async def next_batch(self):\n"
    "        NOTES.append('pulled')\n"
    "        await asyncio.sleep(0.15)\n"
    "        batch = self.batches.pop(0) if self.batches else []\n"
    "        if batch == 'fails': raise LlmTimeout('default', 'gap', 1.0)\n"
    "        return batch\n"
    "    async def aclose(self): NOTES.append('closed')\n"
)


def of_host(batches: list[Any]) -> str:
    return f"{OF_HOST}@hookimpl\nasync def respond(turn):\n    return Reply(chunks=Stream({json.dumps(batches)}))\n"


WRAPPED = layer("reply = await call_next()", "reply.chunks = same(reply.chunks)", "return reply") + (
    "async def same(chunks):\n    async for chunk in chunks:\n        yield chunk\n"
)


@pytest.mark.parametrize("wrapped", [False, True])
async def test_a_stream_of_the_hosts_own_has_no_deadline_of_the_plugins(start_desk: StartDesk, wrapped: bool) -> None:
    """It is pulled a batch at a time, is never late by `timeout_ms`, its plugin's or a layer's, and comes whole."""
    plugins = {"a.py": of_host([["a", "b"], ["c"], ["d", "e", "f"]]), **({"b.py": WRAPPED} if wrapped else {})}
    quick = PluginSettings(timeout_ms=50)
    desk = await start_desk(plugins, settings={"a": quick, "b": quick})
    [reply], error = await ended(await begin(desk))
    assert (reply.text, error) == ("abcdef", None)
    assert notes(desk, "a") == ["pulled"] * 4 + ["closed"]
    assert await failures(desk, "a", *(["b"] if wrapped else [])) == [(0, "closed")] * (1 + wrapped)


async def test_a_model_that_fails_first_leaves_the_turn_to_the_next_bot(start_desk: StartDesk) -> None:
    """Before the first chunk another bot is asked; if nobody answers, the error says what the model's trouble was."""
    desk = await start_desk({"a.py": of_host(["fails"])})
    assert await ended(await begin(desk)) == ((), "llm_timeout")
    assert turns(desk, "failed") == 1
    desk.write("echo.py", echo(1))
    await desk.wait_generation("echo", 1)
    assert await desk.reply() == "1: hello"


@pytest.mark.parametrize("wrapped", [False, True])
async def test_a_model_that_fails_later_cuts_the_reply(start_desk: StartDesk, wrapped: bool) -> None:
    """After the first chunk the reply ends there, marked cut, with the model's trouble in words for visitors."""
    desk = await start_desk({"a.py": of_host([["a", "b"], "fails"]), **({"b.py": WRAPPED} if wrapped else {})})
    accepted = await begin(desk)
    [reply], error = await ended(accepted)
    assert (reply.text, reply.metadata, error) == ("ab", {"cut": True}, "stream_cut")
    assert accepted.turn is not None
    assert accepted.turn.ended is not None
    assert accepted.turn.ended.error == ("stream_cut", "the language model took too long")
    assert notes(desk, "a")[-1] == "closed"


async def test_a_cancel_closes_a_stream_of_the_hosts_own(start_desk: StartDesk) -> None:
    """The stream is closed within 100 ms, before its first batch and in the middle."""
    for pulls in (1, 2):
        desk = await start_desk({"a.py": of_host([["a"], ["b"], ["c"]])})
        accepted = await begin(desk)
        await wait_until(lambda desk=desk, pulls=pulls: len(notes(desk, "a")) == pulls, "it is pulled")
        at = time.monotonic()
        assert desk.host.turns.cancel("c", "m")
        await wait_until(lambda desk=desk: notes(desk, "a")[-1] == "closed", "it is closed")
        assert time.monotonic() - at < 0.1
        replies, error = await ended(accepted)
        assert ("".join(reply.text for reply in replies), error) == ("a" * (pulls - 1), "cancelled")
