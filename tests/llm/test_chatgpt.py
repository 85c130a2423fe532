"""The bundled bot: says what is missing, follows its settings while it runs, and asks for a person."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from model_server import ModelServer, Script
from tests.llm.asking import settings_of

from conftest import StartDesk, wait_until
from hotdesk.chat.intake import NewMessage
from hotdesk.config import LlmSettings
from hotdesk_sdk.testing import Desk

ROOT = Path(__file__).parents[2]
CHATGPT = {name: (ROOT / "plugins" / name).read_text() for name in ("chatgpt.py", "chatgpt.toml")}
HEAD = "from hotdesk_sdk import hookimpl\nHEARD = []\n\n"
HEARS = (
    f"{HEAD}@hookimpl\nasync def on_assigned(ctx, conversation):\n"
    "    HEARD.append((conversation.id, list(conversation.tags)))\n"
)
LAST = "from hotdesk_sdk import hookimpl\n\n@hookimpl\nasync def respond(turn):\n    return 'the next bot'\n"


def models_at(url: str, **more: Any) -> LlmSettings:
    return LlmSettings(models={"default": settings_of(url), "other": settings_of(url, model="other-model")}, **more)


async def test_without_a_model_it_says_so_once_and_leaves_the_turn(
    start_desk: StartDesk, capfd: pytest.CaptureFixture[str]
) -> None:
    """One line at the load with what to do; no failure, and no line a turn."""
    desk = await start_desk({**CHATGPT, "zlast.py": LAST, "zlast.toml": 'name = "zlast"\norder = 99\n'})
    for _ in range(3):
        assert await desk.reply("hello") == "the next bot"
    shown = await desk.plugin("chatgpt")
    assert shown["failures"] == 0
    lines = [line for line in "".join(capfd.readouterr()).splitlines() if "no_model" in line]
    assert len(lines) == 1
    assert "HOTDESK_LLM_API_KEY" in lines[0] or "[llm]" in lines[0]


async def test_a_grant_that_is_taken_away_is_said_with_what_gives_it(
    model_server: ModelServer, start_desk: StartDesk, capfd: pytest.CaptureFixture[str]
) -> None:
    """`[llm] grant = []`: it asks nobody, and leaves the turn."""
    desk = await start_desk(
        {**CHATGPT, "zlast.py": LAST, "zlast.toml": 'name = "zlast"\norder = 99\n'},
        llm=models_at(model_server.base_url, grant=()),
    )
    assert await desk.reply("hello") == "the next bot"
    assert model_server.requests == []
    [line] = [line for line in "".join(capfd.readouterr()).splitlines() if "no_model" in line]
    assert 'grant = ["llm"]' in line.replace("\\", "")


async def test_it_is_granted_the_model_by_default(model_server: ModelServer, start_desk: StartDesk) -> None:
    """Three lines of settings, and the desk answers, streaming."""
    desk = await start_desk(CHATGPT, llm=models_at(model_server.base_url))
    assert await desk.reply("hello") == "Hello there, friend"


async def test_a_plugin_that_nobody_named_is_not_granted_it(model_server: ModelServer, start_desk: StartDesk) -> None:
    """Asking for it in the manifest is not enough."""
    asks = (
        "from hotdesk_sdk import hookimpl\n\n@hookimpl\nasync def respond(ctx, turn):\n    return ctx.llm.stream('x')\n"
    )
    manifest = 'name = "mine"\ncapabilities = ["llm"]\n'
    desk = await start_desk({"mine.py": asks, "mine.toml": manifest}, llm=models_at(model_server.base_url))
    assert await desk.reply("hello") is None
    assert model_server.requests == []
    desk = await start_desk(
        {"mine.py": asks, "mine.toml": manifest}, llm=models_at(model_server.base_url, grant=("mine",))
    )
    assert await desk.reply("hello") == "Hello there, friend"


LIVE = {
    "temperature = 0.3": ("temperature = 1.25", lambda body: body["temperature"] == 1.25),
    "max_tokens = 800": ("max_tokens = 33", lambda body: body["max_tokens"] == 33),
    "history_tokens = 4000": ("history_tokens = 1", lambda body: len(body["messages"]) == 2),
    "tools = true": ("tools = false", lambda body: "tools" not in body),
    "You are the customer service of a small shop.": ("You are a pirate.", lambda body: "pirate" in str(body)),
    '"human",': ('"hello",', None),
    "I am asking a colleague": ("I am fetching a colleague", lambda body: True),
    "summarise = false": ("summarise = true", lambda body: True),
}


async def test_every_setting_is_live_without_a_swap(model_server: ModelServer) -> None:
    """A save of the manifest is followed by the next turn, on the same generation."""
    async with Desk.with_plugin(ROOT / "plugins/chatgpt.py", llm={"base_url": model_server.base_url}) as desk:
        await desk.say("first")
        generation = desk.host.plugins.entry("chatgpt").current
        for old, (fresh, holds) in LIVE.items():
            model_server.requests.clear()
            source = CHATGPT["chatgpt.toml"]
            assert old in source
            await desk.write("chatgpt.toml", source.replace(old, fresh))
            said = await desk.say("hello")
            if holds is None:
                assert said.text.startswith("I am asking a colleague")
                assert model_server.requests == []
            else:
                assert holds(model_server.requests[0].body or {}), fresh
            assert desk.host.plugins.entry("chatgpt").current is generation


async def test_the_model_is_chosen_live(model_server: ModelServer, start_desk: StartDesk) -> None:
    """By its name in the settings; one that is not there fails with those that are, and the next bot answers."""
    desk = await start_desk(CHATGPT, llm=models_at(model_server.base_url))
    source = CHATGPT["chatgpt.toml"]
    assert await desk.reply() == "Hello there, friend"
    for name, asked in (("other", "other-model"), ("", "m")):
        desk.write("chatgpt.toml", source.replace('model = ""', f'model = "{name}"'))

        async def follows(asked: str = asked) -> bool:
            await desk.reply()
            return (model_server.requests[-1].body or {})["model"] == asked

        await wait_until(follows, f"{asked} is asked")
    assert (await desk.plugin("chatgpt"))["generation"] == 1


@pytest.mark.parametrize("text", ["a HUMAN please", "转人工", "can I talk to a real person?"])
async def test_a_word_asks_for_a_person(model_server: ModelServer, start_desk: StartDesk, text: str) -> None:
    """The conversation is tagged, its state has the reason, and every plugin's `on_assigned` is called; no model is."""
    desk = await start_desk({**CHATGPT, "hears.py": HEARS}, llm=models_at(model_server.base_url))
    reply = await desk.reply(text)
    assert reply is not None
    assert reply.startswith("I am asking a colleague to join us.")
    assert model_server.requests == []
    await assert_handed_over(desk, "the visitor asked for a person")


async def test_the_models_own_call_asks_for_a_person(model_server: ModelServer, start_desk: StartDesk) -> None:
    """With its reason, and the visitor reads what the model makes of it."""
    model_server.default = Script(
        answers=lambda body: (
            Script(text="Somebody comes.")
            if body["messages"][-1]["role"] == "tool"
            else Script(tool_calls=[("hand_over", {"reason": "wants a refund by hand"})])
        )
    )
    desk = await start_desk({**CHATGPT, "hears.py": HEARS}, llm=models_at(model_server.base_url))
    assert await desk.reply("this is too much for you") == "Somebody comes."
    await assert_handed_over(desk, "wants a refund by hand")


async def assert_handed_over(desk: Any, reason: str) -> None:
    record = await desk.host.backend.record("c")
    assert record.tags == ("handoff",)
    assert msgspec.json.decode(record.state)["handoff"]["reason"] == reason
    heard = sys.modules[desk.host.plugins.entry("hears").current.module_name].HEARD
    await wait_until(lambda: heard, "on_assigned")
    assert heard == [("c", ["handoff"])]


async def test_a_swap_breaks_none_of_many_live_streams(model_server: ModelServer, start_desk: StartDesk) -> None:
    """200 answers under way when the bot's file is saved go on as they began; those after it are by the new one."""
    marked = CHATGPT["chatgpt.py"].replace("system=settings.system,", "system='generation one',")
    together = time.monotonic() + 3.0  # when those that begin before it end, however long it takes to begin them all

    def say(body: dict[str, Any]) -> Script:
        pieces = [f" {body['messages'][0]['content'][-3:]}"] * 4
        return Script(pieces=pieces, gap_s=max(0.02, (together - time.monotonic()) / 3))

    model_server.default = Script(answers=say)
    desk = await start_desk({**CHATGPT, "chatgpt.py": marked}, llm=models_at(model_server.base_url))
    before = [asyncio.create_task(finish(desk, f"c{n}")) for n in range(200)]
    await wait_until(lambda: sum(seen.content > 0 for seen in model_server.requests) == 200, "200 streams", 20)
    desk.write("chatgpt.py", marked.replace("generation one", "generation two"))
    await desk.wait_generation("chatgpt", 2)
    assert model_server.open == 200
    after = [asyncio.create_task(finish(desk, f"d{n}")) for n in range(5)]
    for tasks, number, word in ((before, 1, " one"), (after, 2, " two")):
        for ended in await asyncio.gather(*tasks):
            [reply] = ended.replies
            assert (ended.error, reply.text, reply.generation) == (None, word * 4, number)
            assert "cut" not in reply.metadata


async def finish(desk: Any, conversation: str) -> Any:
    accepted = await desk.host.intake.accept(NewMessage(conversation, "go"), door="test")
    return await accepted.turn.wait_ended()
