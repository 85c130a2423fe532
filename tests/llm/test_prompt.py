"""What a model is asked with: the newest of the conversation that fits, in the order of the turns."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from model_server import ModelServer, Script
from prometheus_client import CollectorRegistry
from tests.llm.asking import settings_of

from conftest import Desk, StartDesk, wait_until
from hotdesk.backend import Backend, Entry, StoredReply, TurnEnd, open_backend
from hotdesk.chat.intake import NewMessage
from hotdesk.chat.prompt import MAX_IMAGES, Prompt, build_prompt, estimate_tokens, image_tokens, in_turn_order
from hotdesk.chat.recent import ENTRIES, MAX_CHARS, Recent
from hotdesk.config import LlmSettings, PluginSettings
from hotdesk.metrics import Metrics
from hotdesk_sdk import Attachment, Message

ROOT = Path(__file__).parents[2]
CHATGPT = {name: (ROOT / "plugins" / name).read_text() for name in ("chatgpt.py", "chatgpt.toml")}


def said(seq: int, text: str, attachments: tuple[Attachment, ...] = ()) -> Message:
    return Message(f"m{seq}", "c", seq=seq, text=text, attachments=attachments)


def answered(seq: int, text: str, to: str | None) -> StoredReply:
    return StoredReply(f"r{seq}", "c", seq, to, text, "p", 1, {}, 0.0)


async def prompt_of(entries: list[Entry], *, budget: int = 1000, blind: bool = False, **more: Any) -> Prompt:
    async def show(attachment: Attachment) -> str | None:
        return None if blind else f"data:image/png;base64,{attachment.url}"

    given = {"text": "now", "attachments": (), "system": "", "summary": "", **more}
    text, attachments = given.pop("text"), given.pop("attachments")
    return await build_prompt(
        entries, text, attachments, budget=budget, show=show, describe=lambda one: f"[image {one.url}]", **given
    )


def words(prompt: Prompt) -> list[tuple[str, Any]]:
    return [(message["role"], message["content"]) for message in prompt.messages]


async def test_the_newest_that_fit_go_along() -> None:
    """None is passed over for an older, shorter one; the question itself always is in it."""
    entries: list[Entry] = [said(1, "old"), answered(2, "x" * 2000, "m1"), said(3, "new"), answered(4, "newer", "m3")]
    assert words(await prompt_of(entries, budget=100)) == [("user", "new"), ("assistant", "newer"), ("user", "now")]
    assert words(await prompt_of(entries, budget=1)) == [("user", "now")]
    whole = await prompt_of(entries, budget=10_000, system="be brief", summary="long ago")
    assert [role for role, _ in words(whole)] == ["system", "system", "user", "assistant", "user", "assistant", "user"]
    assert whole.cut == []


@pytest.mark.parametrize("budget", [10, 50, 100, 500, 2000])
async def test_a_prompt_keeps_to_its_budget(budget: int) -> None:
    """By the estimate, whatever is said; one entry more would be over it."""
    chance = random.Random(budget)
    alphabet = "ab 退款é"
    for _ in range(50):
        count = chance.randrange(30)
        entries: list[Entry] = [
            said(n, "".join(chance.choices(alphabet, k=chance.randrange(200)))) for n in range(count)
        ]
        prompt = await prompt_of(entries, budget=budget)
        costs = [estimate_tokens(message["content"]) + 4 for message in prompt.messages]
        assert sum(costs) == prompt.tokens
        assert prompt.tokens <= max(budget, costs[-1])
        assert len(prompt.cut) + len(prompt.messages) - 1 == len(entries)
        if prompt.cut:
            assert prompt.tokens + estimate_tokens(prompt.cut[-1].text) + 4 > budget


@pytest.mark.parametrize(("text", "tokens"), [("", 1), ("word " * 100, 126), ("退款" * 50, 101), ("🙂" * 10, 11)])
def test_tokens_are_estimated(text: str, tokens: int) -> None:
    """Four letters of ASCII, or one character beyond it."""
    assert estimate_tokens(text) == tokens


async def test_images_count_and_only_the_newest_go_along() -> None:
    """The rest, and all of them for a model that does not see, are told in words."""
    image = Attachment("image", "1", width=1024, height=1024)
    assert image_tokens(image) == 85 + 4 * 170
    few = [said(1, "see", (image,))]
    assert words(await prompt_of(list(few), budget=700)) == [("user", "now")]
    [(_, content), _] = words(await prompt_of(list(few), budget=900))
    assert [part["type"] for part in content] == ["text", "image_url"]
    assert words(await prompt_of(list(few), budget=900, blind=True))[0] == ("user", "see\n[image 1]")
    many: list[Entry] = [
        said(n, "", (Attachment("image", str(n), width=64, height=64),)) for n in range(MAX_IMAGES + 3)
    ]
    prompt = await prompt_of(many, budget=100_000, attachments=(Attachment("image", "now", width=64, height=64),))
    kinds = ["text" if isinstance(content, str) else content[0]["type"] for _, content in words(prompt)]
    assert kinds == ["text"] * 4 + ["image_url"] * (MAX_IMAGES - 1) + ["text"]
    assert prompt.images == MAX_IMAGES


def test_a_reply_stands_after_the_message_that_it_answers() -> None:
    """Though the visitor said more before it came; what a plugin said of its own accord stands where it was said."""
    entries: list[Entry] = [
        *(said(1, "one"), said(2, "two"), said(3, "three"), answered(4, "to one", "m1")),
        *(answered(5, "by itself", None), answered(6, "to two", "m2"), said(7, "four")),
    ]
    assert [entry.text for entry in in_turn_order(entries, 3)] == ["one", "to one", "two", "to two", "by itself"]


async def test_messages_that_come_faster_than_answers_are_told_in_the_order_of_turns(
    model_server: ModelServer, start_desk: StartDesk
) -> None:
    """Each turn sees the questions and answers before it, and nothing that was asked after it."""
    desk = await chat(start_desk, model_server)
    model_server.default = Script(
        answers=lambda body: Script(text=f"<{body['messages'][-1]['content']}>", first_s=0.05)
    )
    await asyncio.gather(*(desk.say(text, id=text) for text in ("a", "b", "c")))
    seen = [[m["content"] for m in request.body["messages"][1:]] for request in model_server.requests if request.body]
    order = [texts[-1] for texts in seen]
    assert seen == [
        [order[0]],
        [order[0], f"<{order[0]}>", order[1]],
        [order[0], f"<{order[0]}>", order[1], f"<{order[1]}>", order[2]],
    ]


async def chat(start_desk: StartDesk, server: ModelServer, data: Path | None = None, **config: Any) -> Desk:
    llm = LlmSettings(models={"default": settings_of(server.base_url)})
    return await start_desk(CHATGPT, llm=llm, data=data, settings={"chatgpt": PluginSettings(config=config)})


# -- summaries -----------------------------------------------------------------------------------------------------


def summary_or_answer(body: dict[str, Any]) -> Script:
    if body["messages"][0]["content"].startswith("Put this part"):
        return Script(text="the visitor wants a refund")
    return Script(text=f"answer to {body['messages'][-1]['content']}")


async def test_a_summary_is_written_beside_the_turns_and_outlives_a_restart(
    tmp_path: Path, model_server: ModelServer, start_desk: StartDesk
) -> None:
    """Begun when the budget is nearly full, used in the next turn, and kept with the conversation."""
    model_server.default = Script(answers=summary_or_answer)
    desk = await chat(start_desk, model_server, tmp_path / "data", summarise=True, history_tokens=100)
    for number in range(6):
        await desk.say(f"question {number} " + "word " * 20)
    summaries = [r for r in model_server.requests if (r.body or {})["messages"][0]["content"].startswith("Put this")]
    assert summaries
    assert "Visitor: question 0" in (summaries[0].body or {})["messages"][1]["content"]
    await wait_until(lambda: model_server.open == 0, "no summary is in the making")
    await desk.say("and now?")
    await wait_until(lambda: model_server.open == 0, "no summary is in the making")
    told = [
        message["content"]
        for request in model_server.requests
        for message in (request.body or {})["messages"]
        if message["role"] == "system" and "In short" not in message["content"] and "in short:" in message["content"]
    ]
    assert told[-1] == "What was said before, in short: the visitor wants a refund"
    record = await desk.host.backend.record("c")
    assert record is not None
    assert b"the visitor wants a refund" in record.state


async def test_a_summary_that_fails_is_no_turns_trouble(model_server: ModelServer, start_desk: StartDesk) -> None:
    """The turns are answered; it is tried again with a later one."""
    model_server.default = Script(
        answers=lambda body: (
            Script(status=400) if body["messages"][0]["content"].startswith("Put this part") else Script(text="yes")
        )
    )
    desk = await chat(start_desk, model_server, summarise=True, history_tokens=60)
    for number in range(5):
        assert await desk.reply(f"question {number} " + "word " * 20) == "yes"
    await wait_until(lambda: model_server.open == 0, "no summary is in the making")


async def test_nothing_falls_between_a_summary_and_the_history(
    model_server: ModelServer, start_desk: StartDesk
) -> None:
    """Each message is told to the model in a later turn's prompt or was in a summary, though they came all at once."""
    told: set[str] = set()

    def answer(body: dict[str, Any]) -> Script:
        text = " ".join(str(message["content"]) for message in body["messages"][1:])
        told.update(word for word in text.split() if word.startswith("#"))
        last = body["messages"][-1]["content"]
        lost.extend(n for n in range(int(last[1:3]) if last.startswith("#") else 0) if f"#{n:02}" not in told)
        return summary_or_answer(body) if body["messages"][0]["content"].startswith("Put this") else Script(text="yes")

    lost: list[int] = []
    model_server.default = Script(answers=answer)
    desk = await chat(start_desk, model_server, summarise=True, history_tokens=200)
    for first in range(0, 24, 6):
        messages = [
            desk.host.intake.accept(NewMessage("c", f"#{n:02} " + "word " * 12), door="test")
            for n in range(first, first + 6)
        ]
        accepted = await asyncio.gather(*messages)
        for one in accepted:
            assert one.turn is not None
            await one.turn.wait_ended()
    await wait_until(lambda: model_server.open == 0, "no summary is in the making")
    assert lost == []
    assert len(told) == 24


# -- the warm window -----------------------------------------------------------------------------------------------


@pytest.fixture
async def backend(tmp_path: Path) -> AsyncIterator[Backend]:
    journal = await open_backend(f"sqlite:///{tmp_path / 'journal.db'}", Metrics(CollectorRegistry()))
    yield journal
    await journal.aclose()


class Talk:
    """Conversations in a journal, each entry noted once it is on disk, the way the turns do."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.recent = Recent(backend)
        self.unanswered: dict[str, list[Message]] = {}

    async def say(self, conversation: str, text: str) -> None:
        message = Message(f"{conversation}-{random.random()}", conversation, 0, text)
        kept = await self.backend.append(message, channel="", locale=None)
        message = Message(message.id, conversation, kept.seq, text, at=kept.at)
        self.recent.note(message)
        self.unanswered.setdefault(conversation, []).append(message)

    async def answer(self, conversation: str, text: str) -> None:
        if waiting := self.unanswered.get(conversation):
            message = waiting.pop(0)
            reply = StoredReply(f"r-{random.random()}", conversation, 0, message.id, text, "p", 1, {}, 0.0)
            for stored in await self.backend.finish(TurnEnd(conversation, message.seq, (reply,))) or ():
                self.recent.note(stored)

    async def send(self, conversation: str, text: str) -> None:
        reply = StoredReply(f"s-{random.random()}", conversation, 0, None, text, "p", 1, {}, 0.0)
        stored = await self.backend.post(reply, deliver=False)
        if stored is not None:
            self.recent.note(stored)

    async def compare(self, conversation: str, before: int, limit: int) -> None:
        found = await self.recent.history(conversation, before, limit)
        assert [e.seq for e in found] == [e.seq for e in await self.backend.history(conversation, before, limit)]


@pytest.mark.parametrize("seed", range(4))
async def test_memory_says_what_the_journal_says(backend: Backend, seed: int) -> None:
    """After any row of messages, replies and sends, some of them at one time, for any place to look back from."""
    chance = random.Random(seed)
    talk = Talk(backend)
    for _ in range(120):
        names = [chance.choice("abc") for _ in range(chance.randrange(1, 5))]
        acts = [chance.choice([talk.say, talk.say, talk.answer, talk.send]) for _ in names]
        await asyncio.gather(*(act(name, "x" * chance.randrange(50)) for act, name in zip(acts, names, strict=True)))
        for name in "abc":
            await talk.compare(
                name, chance.choice([2**63 - 1, chance.randrange(1, 80)]), chance.choice([0, 1, 20, 64, 90])
            )
    assert talk.recent.hits > 60


async def test_reads_and_writes_at_one_time_lose_nothing(backend: Backend) -> None:
    """What is said while a window is read from the journal is in it afterwards."""
    chance = random.Random(3)
    talk = Talk(backend)
    for round_ in range(30):
        name = f"c{round_}"
        acts = [talk.say(name, str(n)) for n in range(8)] + [talk.recent.newest(name, 20) for _ in range(4)]
        chance.shuffle(acts)
        await asyncio.gather(*acts)
        await talk.compare(name, 2**63 - 1, 20)
        await talk.say(name, "last")
        await talk.compare(name, 2**63 - 1, 20)


async def test_a_purge_is_not_remembered(backend: Backend) -> None:
    """What the journal lost is not told to a model."""
    talk = Talk(backend)
    await talk.say("a", "x")
    assert len(await talk.recent.newest("a", 20)) == 1
    await talk.answer("a", "y")
    await backend.purge(2**40)
    talk.recent.forget_all()
    await talk.compare("a", 2**63 - 1, 20)


async def test_a_window_slides(backend: Backend) -> None:
    """It holds so many entries and no more, and the newest."""
    talk = Talk(backend)
    await talk.say("a", "first")
    await talk.recent.newest("a", 20)
    for number in range(ENTRIES + 10):
        await talk.say("a", str(number))
    assert len(talk.recent._windows["a"].entries) == ENTRIES
    misses = talk.recent.misses
    await talk.compare("a", 2**63 - 1, ENTRIES)
    assert talk.recent.misses == misses
    await talk.compare("a", 12, 20)


async def test_what_is_held_is_bounded_and_the_longest_unseen_goes_first(backend: Backend) -> None:
    """By what was read, and by what is said later in conversations that are held; those nobody reads cost nothing."""
    recent = Recent(backend)
    text = "x" * (MAX_CHARS // 16)
    for name in "abcd":
        await recent.newest(name, 20)
    await recent.newest("a", 20)
    for seq in range(1, 7):
        for name in "abcd":
            recent.note(Message(f"{name}{seq}", name, seq=seq, text=text))
            held = sum(len(entry.text) for window in recent._windows.values() for entry in window.entries.values())
            assert held <= MAX_CHARS
    assert "b" not in recent._windows
    recent.note(Message("z", "z", seq=1, text="nobody looks back here"))
    assert "z" not in recent._windows
