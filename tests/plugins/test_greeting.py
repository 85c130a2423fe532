"""The bundled plugin `greeting`."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import StartDesk
from hotdesk.errors import LoadFailed
from hotdesk_sdk.testing import Desk

GREETING = Path(__file__).parents[2] / "plugins" / "greeting.py"


async def test_it_greets_once_and_then_falls_back() -> None:
    """The first message of each conversation is greeted, a later one gets a polite word."""
    async with Desk.with_plugin(GREETING) as desk:
        assert (await desk.say("hi")).text.startswith("Hello!")
        assert (await desk.say("blah")).text.startswith("I can't answer that yet.")
        assert (await desk.say("hi", conversation="other")).text.startswith("Hello!")


async def test_it_speaks_the_language_it_is_spoken_to() -> None:
    """Chinese for Chinese, English for all else."""
    async with Desk.with_plugin(GREETING) as desk:
        assert (await desk.say("你好")).text.startswith("您好")
        assert (await desk.say("天气 weather?")).text.startswith("这个问题")
        assert (await desk.say("weather?")).text.startswith("I can't")


async def test_it_lets_others_answer_first() -> None:
    """It is asked last: a first message that another bot answers is not greeted."""
    async with Desk.with_plugin(GREETING, GREETING.with_name("faq.py")) as desk:
        assert (await desk.say("refund")).plugin == "faq"
        assert (await desk.say("hm")).text.startswith("I can't answer that yet.")


async def test_a_missing_text_is_refused() -> None:
    """A probe finds what is missing before it serves."""
    with pytest.raises(LoadFailed, match=r"\[config.zh\] needs a text `fallback`"):
        async with Desk.with_plugin(GREETING, config={"zh": {"fallback": None}}):
            pass


async def test_changed_texts_are_taken_live(start_desk: StartDesk) -> None:
    """Saving greeting.toml changes the texts, with no swap; a missing one changes nothing."""
    manifest = GREETING.with_suffix(".toml").read_text()
    desk = await start_desk({"greeting.py": GREETING.read_text(), "greeting.toml": manifest})
    desk.write("greeting.toml", manifest.replace("Hello!", "Welcome!"))
    await desk.wait_event("plugin_configured", plugin="greeting")
    assert str(await desk.reply("hi", conversation="a")).startswith("Welcome!")
    desk.write("greeting.toml", manifest.replace("[config.zh]", "[config.de]"))
    assert "[config.zh]" in (await desk.wait_event("plugin_failed", plugin="greeting"))["message"]
    assert str(await desk.reply("hi", conversation="b")).startswith("Welcome!")
    assert (await desk.plugin("greeting"))["generation"] == 1
