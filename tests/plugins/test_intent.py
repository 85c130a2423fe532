"""The bundled plugin `intent`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conftest import StartDesk
from hotdesk.errors import LoadFailed
from hotdesk_sdk.testing import Desk

INTENT = Path(__file__).parents[2] / "plugins" / "intent.py"
SHOW = """
from hotdesk_sdk import hookimpl

@hookimpl
async def respond(turn):
    c = turn.conversation
    return f"{c.state.get('intent')} {','.join(c.tags)} {c.assignee}"
"""


def desk_with(folder: Path, **config: Any) -> Any:
    """A desk whose bot tells what it sees of the conversation."""
    path = folder / "show.py"
    path.write_text(SHOW)
    return Desk.with_plugin(INTENT, path, config=config)


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("I want my Refund", "refund billing None"),
        ("我要退款！", "refund billing None"),
        ("请refund我", "refund billing None"),
        ("This is UNACCEPTABLE", "complaint urgent None"),
        ("where is order #12345?", "order order None"),
        ("订单12345呢", "order order None"),
        ("refunding", "None  None"),
        ("hello", "None  None"),
    ],
)
async def test_a_message_gives_its_conversation_an_intent(text: str, seen: str, tmp_path: Path) -> None:
    """The bundled rules: intent and tags are there for the bots of the same turn."""
    async with desk_with(tmp_path) as desk:
        assert (await desk.say(text)).text == seen


async def test_an_intent_lasts_until_the_next(tmp_path: Path) -> None:
    """A message that no rule fits leaves things as they are; tags add up, none twice; conversations are apart."""
    async with desk_with(tmp_path) as desk:
        assert (await desk.say("refund")).text == "refund billing None"
        assert (await desk.say("well?")).text == "refund billing None"
        assert (await desk.say("my refund, please")).text == "refund billing None"
        assert (await desk.say("a complaint")).text == "complaint billing,urgent None"
        assert (await desk.say("well?", conversation="other")).text == "None  None"


async def test_it_answers_and_hands_over(tmp_path: Path) -> None:
    """A rule with an answer is the end of the turn, and its assignee takes the conversation."""
    async with desk_with(tmp_path) as desk:
        said = await desk.say("can I talk to a human?")
        assert (said.plugin, said.text.startswith("I am asking a colleague")) == ("intent", True)
        assert (await desk.say("hello")).text == "human handoff support"
        assert "人工" in (await desk.say("转人工", conversation="zh")).text


async def test_the_first_rule_that_fits_decides(tmp_path: Path) -> None:
    """The order of the file; keywords and a pattern may stand in one rule."""
    rules = [{"intent": "one", "keywords": ["A.B"], "pattern": r"x\d"}, {"intent": "two", "pattern": "a|x"}]
    async with desk_with(tmp_path, rules=rules) as desk:
        for number, (text, intent) in enumerate({"a.b": "one", "axb": "two", "X1": "one", "X": "two"}.items()):
            assert (await desk.say(text, conversation=str(number))).text.startswith(intent)


@pytest.mark.parametrize(
    ("rule", "problem"),
    [
        ({"intent": "a"}, "'a' has neither keywords nor a pattern"),
        ({"intent": "a", "pattern": "("}, "'a' has a bad pattern"),
        ({"pattern": "a"}, "`intent`"),
        ({"intent": "a", "keyword": ["b"]}, "`keyword`"),
    ],
)
async def test_a_bad_rule_is_refused(rule: dict[str, Any], problem: str, tmp_path: Path) -> None:
    """A rule that can't be meant is refused with its intent or its place."""
    with pytest.raises(LoadFailed, match=problem):
        async with desk_with(tmp_path, rules=[rule]):
            pass


async def test_changed_rules_are_taken_live(start_desk: StartDesk) -> None:
    """Saving intent.toml changes the rules, with no swap."""
    manifest = INTENT.with_suffix(".toml").read_text()
    desk = await start_desk({"intent.py": INTENT.read_text(), "intent.toml": manifest, "show.py": SHOW})
    assert await desk.reply("a complaint", conversation="a") == "complaint urgent None"
    desk.write("intent.toml", manifest.replace('"urgent"', '"furious"'))
    await desk.wait_event("plugin_configured", plugin="intent")
    assert await desk.reply("a complaint", conversation="b") == "complaint furious None"
    assert (await desk.plugin("intent"))["generation"] == 1
