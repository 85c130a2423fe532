"""The bundled plugin `faq`."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import StartDesk
from hotdesk.errors import LoadFailed
from hotdesk_sdk.testing import Desk

FAQ = Path(__file__).parents[2] / "plugins" / "faq.py"


def answers(*pairs: tuple[list[str], str]) -> dict[str, object]:
    return {"answers": [{"keywords": keywords, "text": text} for keywords, text in pairs]}


@pytest.mark.parametrize(
    ("question", "part"),
    [
        ("How long does a refund take?", "three days"),
        ("REFUND!", "three days"),
        ("我要退款", "三天"),
        ("请问怎么退货？", "三天"),
        ("我要refund", "three days"),
        ("ｒｅｆｕｎｄ", "three days"),
        ("what are your opening  hours", "9:00"),
        ("几点开门？", "9:00"),
    ],
)
async def test_it_answers_out_of_the_box(question: str, part: str) -> None:
    """The bundled answers, in English and Chinese, whatever the case, the width and the neighbours."""
    async with Desk.with_plugin(FAQ) as desk:
        said = await desk.say(question)
    assert part in said.text
    assert said.plugin == "faq"


@pytest.mark.parametrize("question", ["hello", "refunding", "unrefunded", "你好", "", "？"])
async def test_it_leaves_the_rest_to_others(question: str) -> None:
    """A word inside of a longer one is another word, and silence leaves room for the next bot."""
    async with Desk.with_plugin(FAQ) as desk:
        assert not await desk.say(question)


async def test_the_answer_with_the_most_keywords_wins() -> None:
    """A question about two things gets the answer that knows more of its words; of equals, the first."""
    config = answers((["refund"], "refund"), (["refund", "late"], "late refund"), (["late"], "late"))
    async with Desk.with_plugin(FAQ, config=config) as desk:
        assert (await desk.say("my refund is late")).text == "late refund"
        assert (await desk.say("refund")).text == "refund"
        assert (await desk.say("refund late refund late")).text == "late refund"
        assert (await desk.say("late")).text == "late refund"


async def test_a_keyword_may_be_anything() -> None:
    """A phrase over any spaces, signs, letters with accents, patterns that mean nothing here."""
    config = answers(
        (["money back"], "phrase"), (["??"], "sign"), (["café"], "accent"), ([".*"], "dots"), (["24/7"], "slash")
    )
    async with Desk.with_plugin(FAQ, config=config) as desk:
        for question, answer in {
            "I want my money\n back": "phrase",
            "what??": "sign",
            "CAFÉ": "accent",
            "cafés": "",
            "anything": "",
            "open 24/7 ?": "slash",
        }.items():
            assert (await desk.say(question)).text == answer


async def test_a_changed_file_is_taken_live(start_desk: StartDesk) -> None:
    """Saving faq.toml changes the answers of the generation that serves; none is loaded."""
    manifest = FAQ.with_suffix(".toml").read_text()
    desk = await start_desk({"faq.py": FAQ.read_text(), "faq.toml": manifest})
    assert "three days" in str(await desk.reply("refund"))
    desk.write("faq.toml", manifest.replace("three days", "two hours"))
    await desk.wait_event("plugin_configured", plugin="faq")
    assert "two hours" in str(await desk.reply("refund"))
    assert (await desk.plugin("faq"))["generation"] == 1


async def test_a_bad_file_changes_nothing(start_desk: StartDesk) -> None:
    """A mistake in faq.toml is shown with its place, the old answers stay, and the mended file is taken."""
    manifest = FAQ.with_suffix(".toml").read_text()
    desk = await start_desk({"faq.py": FAQ.read_text(), "faq.toml": manifest})
    desk.write("faq.toml", manifest.replace('text = "A refund', 'txt = "A refund'))
    failed = await desk.wait_event("plugin_failed", plugin="faq")
    assert "`txt` - at `$.answers[0]`" in failed["message"]
    assert "three days" in str(await desk.reply("refund"))
    desk.write("faq.toml", manifest.replace("three days", "two hours"))
    await desk.wait_event("plugin_configured", plugin="faq")
    assert "two hours" in str(await desk.reply("refund"))
    assert (await desk.plugin("faq"))["error"] is None


@pytest.mark.parametrize(
    ("config", "place"),
    [
        ({"answers": [{"keywords": ["a"]}]}, "`text`"),
        ({"answers": [{"keywords": [], "text": "b"}]}, "keywords"),
        ({"answers": [{"keywords": [" "], "text": "b"}]}, "keywords"),
        ({"answers": [{"keywords": "a", "text": "b"}]}, "keywords"),
        ({"answers": "a"}, "answers"),
        ({"questions": []}, "questions"),
    ],
)
async def test_a_bad_config_is_refused(config: dict[str, object], place: str) -> None:
    """What can't be meant is refused at the start, with the place."""
    with pytest.raises(LoadFailed, match=place):
        async with Desk.with_plugin(FAQ, config=config):
            pass
