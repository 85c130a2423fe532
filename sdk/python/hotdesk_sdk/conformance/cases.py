"""The claims. Each is a function that tries it on a `Subject`; its docstring is the claim."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from ..errors import HotdeskError
from ..testing import Desk
from .subject import NAME, ClaimFailed, Subject, expect, expect_in, wait_for

__all__ = ["CASES", "Case"]

AT_ONCE = 32
MOST = 2**31 - 1
"""The largest count that is a state."""


@dataclass(frozen=True, slots=True)
class Case:
    """One claim. `check` raises `ClaimFailed` when it is not kept."""

    check: Callable[[Subject], Awaitable[None]]

    @property
    def name(self) -> str:
        return self.check.__name__.removeprefix("_")

    @property
    def claim(self) -> str:
        return (self.check.__doc__ or "").partition("\n")[0]

    def __str__(self) -> str:
        return self.name


# ---- masking ----------------------------------------------------------------------------------------------------


async def _masks_a_whole_reply(subject: Subject) -> None:
    """Each character of a listed word becomes an asterisk, wherever it stands, whatever its case and the list's."""
    async with subject.desk(words=["DaMN", "heck"]) as desk:
        expect((await desk.say("echo Damn, what the HECK. Goddamned")).text, "****, what the ****. God****ed", "it")


async def _leaves_a_clean_reply_alone(subject: Subject) -> None:
    """An answer without a listed word stays as it is, beginnings of words and other scripts too."""
    async with subject.desk() as desk:
        for text in ("All is well.", "da he dam hec", "Größe, 你好, 🙂", "DÄMN", "hec\N{KELVIN SIGN}"):
            expect((await desk.say(f"echo {text}")).text, text, "the reply")


async def _masks_chinese_words(subject: Subject) -> None:
    """Characters are counted, not bytes: in a whole answer and in one whose words are split over chunks."""
    async with subject.desk(words=["笨蛋", "damn"]) as desk:
        expect((await desk.say("echo 你这个笨蛋！")).text, "你这个**！", "the reply")
        said = await desk.say("stream 你这个笨|蛋，笨|鸟")
        expect(said.text, "你这个**，笨鸟", "the streamed reply")
        expect(said.chunks, ("你这个", "**，", "笨鸟"), "its chunks")


async def _masks_the_longer_of_two_words(subject: Subject) -> None:
    """Where one listed word begins with another, the longer is found: in a whole answer and in a stream."""
    async with subject.desk(words=["he", "hell", "damn", "damnation"]) as desk:
        expect((await desk.say("echo hell HE damnation")).text, "**** ** *********", "the reply")
        said = await desk.say("stream he|ll |damna|tion dam|n it")
        expect(said.text, "**** ********* **** it", "the streamed reply")


async def _masks_words_that_overlap(subject: Subject) -> None:
    """Of words that overlap each is masked: in a whole answer, and in a stream that is cut inside of them."""
    async with subject.desk(words=["aba", "bac"]) as desk:
        for text, wanted in (("ababa", "*****"), ("an ababa abac ABABAC", "an ***** **** ******"), ("abab", "***b")):
            expect((await desk.say(f"echo {text}")).text, wanted, "the reply")
            for parts in (list(text), [text], [text[:5], text[5:]], [text[:3], text[3:]]):
                said = await desk.say("stream " + "|".join(parts))
                expect(said.text, wanted, f"the reply to the chunks {parts}")
                expect("".join(said.chunks), said.text, "what the chunks make together")
        said = await desk.say("stream x ab|aba|b, |y")
        expect(said.chunks, ("x ", "*****b, ", "y"), "the chunks")


async def _masks_words_split_over_chunks(subject: Subject) -> None:
    """A listed word in a stream is masked however the stream is cut, and none of its letters is ever shown."""
    text = "damn it, HECK no damndamn"
    for parts in (list(text), [text], ["da", "mn it, H", "", "ECK no dam", "nda", "mn"]):
        async with subject.desk() as desk:
            said = await desk.say("stream " + "|".join(parts))
            expect(said.text, "**** it, **** no ********", f"the reply to the chunks {parts}")
            expect("".join(said.chunks), said.text, "what the chunks make together")


async def _holds_back_no_more_than_it_must(subject: Subject) -> None:
    """Of a stream only an end that may be the beginning of a listed word waits for what comes next."""
    async with subject.desk() as desk:
        said = await desk.say("stream Hello there|, a da|y, the| sun")
        expect(said.chunks, ("Hello there", ", a ", "day, t", "he sun"), "the chunks")
        expect((await desk.say("stream one |two |three")).chunks, ("one ", "two ", "three"), "the chunks")
    async with subject.desk(words=[]) as desk:
        expect((await desk.say("stream d|a|mn")).chunks, ("d", "a", "mn"), "the chunks when no word is listed")


async def _shows_at_the_end_what_it_held(subject: Subject) -> None:
    """A stream that ends in the beginning of a listed word ends with it."""
    async with subject.desk() as desk:
        said = await desk.say("stream That is a d|a|m")
        expect(said.text, "That is a dam", "the reply")
        expect("".join(said.chunks), said.text, "what the chunks make together")


# ---- decisions --------------------------------------------------------------------------------------------------


async def _rewrites_what_is_said(subject: Subject) -> None:
    """Of a text that begins with "say " those further in get the rest; any other goes on as it is."""
    async with subject.desk() as desk:
        expect((await desk.say("say hello")).text, "The neighbour heard: hello", "the reply")
        expect((await desk.say("I say hello")).text, "The neighbour heard: I say hello", "the reply")


async def _hands_over(subject: Subject) -> None:
    """Who asks for a human is told that one comes; the conversation has the tag, and the reason in its state."""
    async with subject.desk() as desk:
        said = await desk.say("echo a human please")
        expect(said.text, "A person will be with you shortly.", "the reply")
        expect(said.plugin, NAME, "the plugin that answered")
        known = json.loads((await desk.say("known")).text)
        expect(known["tags"], ["handoff"], "the conversation's tags")
        expect(known["state"].get("handoff", {}).get("reason"), "asked for a human", "the reason in its state")


async def _drops(subject: Subject) -> None:
    """To spam there is no answer, from nobody, and no error either."""
    async with subject.desk() as desk:
        said = await desk.say("echo spam")
        expect(said.replies, (), "the replies")
        expect(said.error, None, "the error")
        expect((await desk.say("echo bread")).text, "bread", "the reply to what comes next")


# ---- answers ----------------------------------------------------------------------------------------------------


async def _streams_an_answer(subject: Subject) -> None:
    """A known order is answered in chunks, which together are the reply; the plugin's own masking sees them too."""
    async with subject.desk() as desk:
        said = await desk.say("where is order 1001?")
        expect(said.text, "Order 1001 is shipped.", "the reply")
        expect(said.chunks, ("Order ", "1001", " is ", "shipped."), "the chunks")
        late = await desk.say("and order x, order 1003, order 1001?")
        expect(late.text, "Order 1003 is **** late.", "the reply")
        expect("".join(late.chunks), late.text, "what the chunks make together")


async def _answers_without_a_stream(subject: Subject) -> None:
    """An unknown order is answered in one piece."""
    async with subject.desk() as desk:
        said = await desk.say("where is order 9999?")
        expect(said.text, "There is no order 9999.", "the reply")
        expect(said.chunks, (), "the chunks")


async def _counts(subject: Subject) -> None:
    """It counts the questions that it answered, known orders and unknown, and nothing else."""
    async with subject.desk() as desk:
        for text in ("order 1001", "order 9999", "count", "echo hello", "order 1002"):
            await desk.say(text)
        expect((await desk.say("count", conversation="another")).text, "Answered 3.", "the reply")


async def _does_the_first_that_fits(subject: Subject) -> None:
    """A text that asks for several things gets the first of them in the table of the README."""
    async with subject.desk() as desk:
        expect((await desk.say("say spam, human")).text, "A person will be with you shortly.", "the reply")
        expect((await desk.say("say spam")).replies, (), "the replies")
        for text, wanted in {
            "a trap: fail the secret count of order 1001": "Order 1001 is shipped.",
            "a trap: fail the secret count": "Answered 1.",
            "a trap: fail the secret": "Denied: kv.",
            "a trap: fail": "The neighbour heard: a trap: fail",
        }.items():
            expect((await desk.say(text)).text, wanted, "the reply")
        expect((await desk.say("count")).text, "Answered 1.", "the count, which a trap would have lost")


# ---- the life of a generation -----------------------------------------------------------------------------------


async def _keeps_its_state_over_a_swap(subject: Subject) -> None:
    """The next version goes on counting where this one was."""
    async with subject.desk() as desk:
        await desk.say("order 1001")
        await desk.say("order 1002")
        _served(await desk.replace(subject.place(version="2.0.0")))
        said = await desk.say("count")
        expect((said.text, said.generation), ("Answered 2.", 2), "the reply and its generation")


async def _takes_state_from_another_language(subject: Subject) -> None:
    """The state is JSON, so it is no matter what the version before was written in."""
    async with subject.desk(subject.place_old(41)) as desk:
        _served(await desk.replace(subject.place(version="2.0.0")))
        await desk.say("order 1001")
        expect((await desk.say("count")).text, "Answered 42.", "the reply")
        _served(await desk.replace(subject.place_old(MOST)))
        _served(await desk.replace(subject.place(version="2.0.0")))
        expect((await desk.say("count")).text, f"Answered {MOST}.", "the reply")


async def _gives_state_to_another_language(subject: Subject) -> None:
    """The state is a number and nothing around it, so the next version may be written in anything."""
    async with subject.desk() as desk:
        await desk.say("order 1001")
        await desk.say("order 1002")
        _served(await desk.replace(subject.place_next()))
        expect((await desk.say("hello")).text, "[2]", "the states that a version in Python is given")


async def _refuses_a_bad_state(subject: Subject) -> None:
    """A state that is no count refuses the new version, which says so; the old one serves on."""
    async with subject.desk(subject.place_old("many")) as desk:
        for bad in ("many", -1, True, 1.5, MOST + 1):
            if bad != "many":
                _served(await desk.replace(subject.place_old(bad)))
            serving = (await desk.say("hello")).generation
            _refused(await desk.replace(subject.place(version="2.0.0")), "import_state", "state is not a number")
            said = await desk.say("hello")
            expect((said.text, said.generation), ("The old one.", serving), f"the reply and its generation after {bad}")


async def _takes_a_config_live(subject: Subject) -> None:
    """A changed config is taken by the generation that serves, without a swap and without losing count."""
    async with subject.desk() as desk:
        await desk.say("order 1001")
        _served(await subject.configure(desk, ["darn"]))
        expect((await desk.say("echo damn and darn")).text, "damn and ****", "the reply")
        said = await desk.say("count")
        expect((said.text, said.generation), ("Answered 1.", 1), "the count and its generation")


async def _refuses_a_bad_config(subject: Subject) -> None:
    """Without a list of words it does not load; a change to such a config is refused, and the old one holds."""
    for bad in ("damn", [1, 2]):
        try:
            async with subject.desk(words=bad):
                raise ClaimFailed(f"it should refuse to load with words = {bad!r}; it loads")
        except HotdeskError as exc:
            expect_in("words must be a list of texts", exc, "why it does not load")
    async with subject.desk() as desk:
        for changed in ("damn", ["darn", 1]):
            _refused(await subject.configure(desk, changed), "configure", "words must be a list of texts")
            expect((await desk.say("echo damn and darn")).text, "**** and darn", "the reply under the old config")


# ---- tools and capabilities -------------------------------------------------------------------------------------


async def _lists_its_tool(subject: Subject) -> None:
    """The language model is offered one tool, with its description and schema."""
    async with subject.desk() as desk:
        expect([*desk.tools], ["order_status"], "the tools")
        tool = desk.tools["order_status"]
        expect(tool.description, "What became of an order.", "its description")
        schema = {"type": "object", "properties": {"number": {"type": "string"}}, "required": ["number"]}
        expect(tool.parameters, schema, "its schema")


async def _answers_its_tool(subject: Subject) -> None:
    """The tool gives JSON, and an error in words for an order that is not there; it counts nothing."""
    async with subject.desk() as desk:
        found = await desk.call_tool("order_status", {"number": "1003"})
        expect(json.loads(found), {"number": "1003", "status": "damn late"}, "what the tool gives")
        expect_in('no order 9"9', await desk.call_tool("order_status", {"number": '9"9'}), "the tool's error")
        expect((await desk.say("count")).text, "Answered 0.", "the count")


async def _is_told_of_a_refused_capability(subject: Subject) -> None:
    """What was not asked for is refused, and the operator is told; what is asked for and granted is not."""
    async with subject.desk(grant=["kv"]) as desk:
        expect((await desk.say("a secret")).text, "Denied: kv.", "the reply")
        told = [event for event in desk.events if event["kind"] == "capability_denied"]
        expect([(event["plugin"], event["capability"]) for event in told], [(NAME, "kv")], "what the operator is told")
        _served(await desk.replace(subject.place(version="2.0.0", capabilities=["kv"])))
        expect((await desk.say("a secret")).text, "Not denied.", "the reply of one that asks for it")


# ---- faults -----------------------------------------------------------------------------------------------------


async def _goes_on_after_an_error(subject: Subject) -> None:
    """An error that it gives fails that one call: the next bot is asked, and the state is as it was."""
    async with subject.desk() as desk:
        await desk.say("order 1001")
        expect((await desk.say("fail")).text, "The neighbour heard: fail", "the reply")
        expect(_failures(desk), 1, "how many calls failed")
        expect((await desk.say("count")).text, "Answered 1.", "the count")


async def _refuses_the_turn_where_it_must_not_be_skipped(subject: Subject) -> None:
    """With `on_failure = "refuse"` an error ends the turn: nobody else answers, and the visitor is told."""
    async with subject.desk(on_failure="refuse") as desk:
        said = await desk.say("fail")
        expect(said.replies, (), "the replies")
        expect(said.error and said.error[0], "turn_refused", "the error")
        expect((await desk.say("order 1002")).text, "Order 1002 is packed.", "the reply to what comes next")


async def _traps_alone(subject: Subject) -> None:
    """A trap ends that one call and its instance: the next bot is asked, and a new instance goes on, alone."""
    async with subject.desk() as desk:
        await desk.say("order 1001")
        for _ in range(3):
            expect((await desk.say("trap")).text, "The neighbour heard: trap", "the reply")
        expect(_failures(desk), 3, "how many calls failed")
        component = subject.is_component  # an exception in Python is no trap
        expect((await desk.say("count")).text, "Answered 0." if component else "Answered 1.", "the count after a trap")
        expect((await desk.say("order 1002")).text, "Order 1002 is packed.", "the reply to what comes next")
        await wait_for(lambda: desk.metric("hotdesk_wasm_stores"), int(component), "how many Stores are left")


# ---- many at once -----------------------------------------------------------------------------------------------


async def _serves_many_conversations_at_once(subject: Subject) -> None:
    """32 conversations at once get their own answers, and every question is counted once."""

    async def talk(desk: Desk, index: int) -> None:
        known = {1001: "shipped", 1002: "packed", 1003: "**** late"}
        for number, status in known.items():
            said = await desk.say(f"order {number}", conversation=f"c{index}")
            expect(said.text, f"Order {number} is {status}.", f"the reply in conversation {index}")
        expect((await desk.say(f"echo heck {index}", conversation=f"c{index}")).text, f"**** {index}", "the reply")

    async with subject.desk() as desk:
        await asyncio.gather(*(talk(desk, index) for index in range(AT_ONCE)))
        expect((await desk.say("count")).text, f"Answered {3 * AT_ONCE}.", "the count")


async def _answers_one_conversation_in_order(subject: Subject) -> None:
    """Messages of one conversation that come at once are answered one after the other, in their order."""
    async with subject.desk() as desk:
        texts = [text for n in range(8) for text in (f"order {2000 + n}", "count")]
        said = await asyncio.gather(*(desk.say(text) for text in texts))
        wanted = [text for n in range(8) for text in (f"There is no order {2000 + n}.", f"Answered {n + 1}.")]
        expect([one.text for one in said], wanted, "the replies")


def _failures(desk: Desk) -> float:
    return desk.metric("hotdesk_call_failures_total", plugin=NAME, hook="respond", kind="exception")


def _served(entry: Any) -> None:
    if entry.problem is not None:
        raise ClaimFailed(f"it should be taken; it is refused: {entry.problem.message}")


def _refused(entry: Any, step: str, why: str) -> None:
    if entry.problem is None:
        raise ClaimFailed(f"it should be refused because {why!r}; it is taken")
    expect(entry.problem.step, step, "the step that refuses it")
    expect_in(why, entry.problem.message, "the reason")


CASES: tuple[Case, ...] = (
    Case(_masks_a_whole_reply),
    Case(_leaves_a_clean_reply_alone),
    Case(_masks_chinese_words),
    Case(_masks_the_longer_of_two_words),
    Case(_masks_words_that_overlap),
    Case(_masks_words_split_over_chunks),
    Case(_holds_back_no_more_than_it_must),
    Case(_shows_at_the_end_what_it_held),
    Case(_rewrites_what_is_said),
    Case(_hands_over),
    Case(_drops),
    Case(_streams_an_answer),
    Case(_answers_without_a_stream),
    Case(_counts),
    Case(_does_the_first_that_fits),
    Case(_keeps_its_state_over_a_swap),
    Case(_takes_state_from_another_language),
    Case(_gives_state_to_another_language),
    Case(_refuses_a_bad_state),
    Case(_takes_a_config_live),
    Case(_refuses_a_bad_config),
    Case(_lists_its_tool),
    Case(_answers_its_tool),
    Case(_is_told_of_a_refused_capability),
    Case(_goes_on_after_an_error),
    Case(_refuses_the_turn_where_it_must_not_be_skipped),
    Case(_traps_alone),
    Case(_serves_many_conversations_at_once),
    Case(_answers_one_conversation_in_order),
)
"""Every claim, in the order in which they are best read."""
