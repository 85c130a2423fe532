"""The bundled plugin `sensitive_words`."""

from __future__ import annotations

import itertools
import random
import time
from pathlib import Path
from typing import Any

import pytest

from conftest import StartDesk
from hotdesk.errors import LoadFailed
from hotdesk_sdk.testing import Desk

WORDS = Path(__file__).parents[2] / "plugins" / "sensitive_words.py"
HEADER = "from hotdesk_sdk import Reply, hookimpl\n\n@hookimpl\n"
ECHO = HEADER + "async def respond(turn):\n    return turn.text\n"
SAYS = HEADER + "async def respond(turn):\n    return bytes.fromhex(turn.text).decode()\n"
"""Answers with what the message spells in hex, so that only the answer has the words."""
GENERATOR = (
    HEADER
    + "async def respond(turn):\n    for part in turn.text.split('|'):\n        yield bytes.fromhex(part).decode()\n"
)
STREAM = (
    HEADER + "async def respond(turn):\n    for part in turn.text.split('|'):\n"
    "        await turn.stream(bytes.fromhex(part).decode())\n"
)
CHUNKS = (
    HEADER + "async def respond(turn):\n    async def chunks():\n        for part in turn.text.split('|'):\n"
    "            yield bytes.fromhex(part).decode()\n    return Reply(chunks=chunks())\n"
)


def desk_with(bot: str, folder: Path, **config: Any) -> Any:
    path = folder / "bot.py"
    path.write_text(bot)
    return Desk.with_plugin(WORDS, path, config=config)


def spelled(*parts: str) -> str:
    return "|".join(part.encode().hex() for part in parts)


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("damn it", "**** it"),
        ("DaMn", "****"),
        ("ｄａｍｎ", "****"),
        ("damnation", "damnation"),
        ("goddamn", "goddamn"),
        ("(damn)", "(****)"),
        ("这damn东西", "这****东西"),
        ("你这个混蛋东西", "你这个**东西"),
        ("son of a bitch!", "**************!"),
        ("a Damn, a 白痴", "a ****, a **"),
        ("fine", "fine"),
        ("", ""),
    ],
)
async def test_words_are_masked_both_ways(text: str, masked: str, tmp_path: Path) -> None:
    """In the message as the bots see it, and in the answer: whole words, Chinese anywhere, whatever the case."""
    async with desk_with(ECHO, tmp_path) as desk:
        assert (await desk.say(text)).text == masked
    async with desk_with(SAYS, tmp_path) as desk:
        said = await desk.say(spelled(text))
        assert (said.text, said.plugin) == (masked, "bot")


@pytest.mark.parametrize("bot", [GENERATOR, STREAM, CHUNKS], ids=["generator", "turn.stream", "chunks"])
@pytest.mark.parametrize(
    ("parts", "shown"),
    [
        (("I am ", "da", "mn ", "sure"), ("I am ", "**** ", "sure")),
        (("god", "damn", "ation"), ("go", "ddamn", "ation")),
        (("x", "damn"), ("x", "damn")),
        (("damn",), ("****",)),
        (("你这混", "蛋", "！"), ("你这", "**", "！")),
        (("混", "合"), ("混合",)),
        (("王八", "蛋白", "痴"), ("***", "**")),
    ],
)
async def test_a_stream_is_masked_as_it_goes(
    bot: str, parts: tuple[str, ...], shown: tuple[str, ...], tmp_path: Path
) -> None:
    """A word that is cut into chunks is caught, and no more is held back than may yet become a word."""
    async with desk_with(bot, tmp_path) as desk:
        said = await desk.say(spelled(*parts))
    assert "".join(said.chunks) == said.text == "".join(shown)
    assert len(said.chunks) >= len(shown) - 1


async def test_a_stream_is_masked_as_its_whole_text_would_be(tmp_path: Path) -> None:
    """However a text is cut: the same stars."""
    rnd = random.Random(7)
    words = ["ab", "a", "b中", "中国", "中国人", "ba ab", "国b"]
    cases = []
    for _ in range(150):
        text = "x" + "".join(rnd.choice("ab中国人 ") for _ in range(rnd.randint(0, 16)))
        cuts = sorted(rnd.sample(range(1, len(text) + 1), k=rnd.randint(0, min(len(text), 8))))
        cases.append([text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)]) if a < b])
    async with desk_with(SAYS, tmp_path, words=words) as desk:
        whole = [(await desk.say(spelled("".join(parts)))).text for parts in cases]
    async with desk_with(GENERATOR, tmp_path, words=words) as desk:
        streamed = [(await desk.say(spelled(*parts))).text for parts in cases]
    assert streamed == whole
    assert any("*" in text for text in whole)


async def test_refusing_shows_nothing_of_the_answer(tmp_path: Path) -> None:
    """In mode "refuse" a message or an answer with a listed word gets the refusal, and not one chunk."""
    config = {"mode": "refuse", "refusal": "no"}
    async with desk_with(ECHO, tmp_path, **config) as desk:
        said = await desk.say("damn")
        assert (said.text, said.plugin) == ("no", "sensitive_words")
        assert (await desk.say("fine")).text == "fine"
    async with desk_with(GENERATOR, tmp_path, **config) as desk:
        said = await desk.say(spelled("well, ", "da", "mn"))
        assert (said.text, said.chunks) == ("no", ())
        assert (await desk.say(spelled("well, ", "yes"))).text == "well, yes"


async def test_thousands_of_words_cost_no_more_than_one(tmp_path: Path) -> None:
    """10,000 words are loaded at once, all are found, and a message costs what it did."""
    words = [f"word{n}" for n in range(5000)] + [f"词{n}语" for n in range(5000)]

    async def seconds(desk: Any) -> float:
        start = time.perf_counter()
        for _ in range(200):
            await desk.say("a message of ordinary length, and 一些中文 as well")
        return time.perf_counter() - start

    async with desk_with(ECHO, tmp_path, words=["one"]) as desk:
        few = await seconds(desk)
    async with desk_with(ECHO, tmp_path, words=words) as desk:
        assert (await desk.say("word1 word4999 word5000 词4321语")).text == "***** ******** word5000 ******"
        assert await seconds(desk) < 3 * few + 0.5


async def test_words_come_from_a_file_too(start_desk: StartDesk) -> None:
    """`file` names a list beside the plugin, a word a line; both lists count."""
    manifest = WORDS.with_suffix(".toml").read_text().replace('file = ""', 'file = "words.txt"')
    plugins = {"sensitive_words.py": WORDS.read_text(), "sensitive_words.toml": manifest, "bot.py": ECHO}
    desk = await start_desk({**plugins, "words.txt": "rubbish\n\n  垃圾 \n"})
    assert await desk.reply("damn RUBBISH 垃圾") == "**** ******* **"
    desk.write("words.txt", "rubble\n")
    await desk.admin("POST", "plugins/sensitive_words/reload")
    assert await desk.reply("rubbish rubble") == "rubbish ******"


async def test_a_changed_list_is_taken_live(start_desk: StartDesk) -> None:
    """Saving the list changes what is masked, with no swap; a mistake in it changes nothing."""
    manifest = WORDS.with_suffix(".toml").read_text()
    desk = await start_desk({"sensitive_words.py": WORDS.read_text(), "sensitive_words.toml": manifest, "bot.py": ECHO})
    assert await desk.reply("damn darn") == "**** darn"
    desk.write("sensitive_words.toml", manifest.replace('"damn"', '"darn"'))
    await desk.wait_event("plugin_configured", plugin="sensitive_words")
    assert await desk.reply("damn darn") == "damn ****"
    desk.write("sensitive_words.toml", manifest.replace('mode = "mask"', 'mode = "hide"'))
    failed = await desk.wait_event("plugin_failed", plugin="sensitive_words")
    assert "hide" in failed["message"]
    assert await desk.reply("damn darn") == "damn ****"
    assert (await desk.plugin("sensitive_words"))["generation"] == 1


async def test_the_record_keeps_what_was_written(tmp_path: Path) -> None:
    """The customer's own words stay in the record as they came; only what plugins see is masked."""
    async with desk_with(ECHO, tmp_path) as desk:
        await desk.say("damn")
        assert [entry.text for entry in await desk.record()] == ["damn", "****"]


async def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """A list that is not there is refused at the start."""
    with pytest.raises(LoadFailed, match=r"nowhere\.txt"):
        async with desk_with(ECHO, tmp_path, file="nowhere.txt"):
            pass


async def test_an_empty_list_masks_nothing(tmp_path: Path) -> None:
    async with desk_with(ECHO, tmp_path, words=[]) as desk:
        assert (await desk.say("damn")).text == "damn"
