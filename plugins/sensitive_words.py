"""sensitive_words: keeps listed words out of messages and answers. Shows a middleware that works on streams too.

Chinese words are found anywhere, words of scripts with spaces only whole, and case makes no difference. A streamed
answer is held back only where a listed word may have begun, so at most by the length of the longest one.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Literal

import ahocorasick
import msgspec

from hotdesk_sdk import CallNext, Ctx, Reply, Turn, hookimpl

MASK = "*"
WIDE = {0xFEE0 + code: code for code in range(0x21, 0x7F)}  # full-width forms, as typed with a Chinese keyboard


class Settings(msgspec.Struct, forbid_unknown_fields=True):
    """All of `[config]`."""

    mode: Literal["mask", "refuse"] = "mask"
    words: list[str] = []
    file: str = ""
    refusal: str = "Sorry, I can't talk about that."


class Filter:
    """A word list, ready to search: thousands of words cost no more than one."""

    def __init__(self, settings: Settings) -> None:
        listed = list(settings.words)
        if settings.file:
            listed += Path(__file__).with_name(settings.file).read_text("utf-8").splitlines()
        words = {fold(word.strip()) for word in listed} - {""}
        self.mode, self.refusal = settings.mode, settings.refusal
        self.longest = max(map(len, words), default=0)
        self.words = ahocorasick.Automaton(ahocorasick.STORE_LENGTH)
        for word in words or {"\0"}:  # an automaton can't be empty
            self.words.add_word(word)
        self.words.make_automaton()

    def find(self, folded: str, *, begin: int = 0, more: bool = False) -> Iterator[slice]:
        """The words from *begin* on. With *more* to come, one at the very end may be part of a longer word yet."""
        for last, size in self.words.iter(folded, begin):
            start, end = last + 1 - size, last + 1
            cut_before = start > 0 and spaced(folded[start - 1]) and spaced(folded[start])
            cut_after = spaced(folded[last]) and (spaced(folded[end]) if end < len(folded) else more)
            if not cut_before and not cut_after:
                yield slice(start, end)

    def mask(self, text: str) -> str:
        shown = list(text)
        for word in self.find(fold(text)):
            shown[word] = MASK * (word.stop - word.start)
        return "".join(shown)

    async def mask_stream(self, chunks: AsyncIterator[str]) -> AsyncIterator[str]:
        """*chunks* masked as their whole text would be, however it is cut."""
        folded, shown, sent = " ", [" "], 1  # the end of the text so far, how it is shown, how much of that was sent
        async for chunk in chunks:
            folded, shown = folded + fold(chunk), [*shown, *chunk]
            for word in self.find(folded, begin=1, more=True):
                shown[word] = MASK * (word.stop - word.start)
            tails = range(max(1, len(folded) - self.longest), len(folded))
            begun = next((at for at in tails if self.words.match(folded[at:])), len(folded))  # a word may begin here
            ready = next((at for at in range(max(begun, sent), len(shown)) if shown[at] != MASK), len(shown))
            if ready > sent:
                yield "".join(shown[sent:ready])
            folded, shown, sent = folded[begun - 1 :], shown[begun - 1 :], ready - begun + 1
        for word in self.find(folded, begin=1):
            shown[word] = MASK * (word.stop - word.start)
        if len(shown) > sent:
            yield "".join(shown[sent:])


def fold(text: str) -> str:
    """*text* without differences of case and width, each character still in its place."""
    folded = text.translate(WIDE).casefold()
    return folded if len(folded) == len(text) else "".join(c.casefold() if len(c.casefold()) == 1 else c for c in text)


def spaced(char: str) -> bool:
    """Whether *char* is of a script with spaces between words; those without begin at U+2E80."""
    return char < "\u2e80" and char.isalnum()


current = Filter(Settings())


@hookimpl
async def setup(ctx: Ctx) -> None:
    await configure(ctx.config)


@hookimpl
async def configure(config: dict[str, Any]) -> bool:
    """Build the new filter in a thread, beside the traffic; then it is the current one."""
    global current
    current = await asyncio.to_thread(Filter, msgspec.convert(config, Settings))
    return True


@hookimpl
async def middleware(turn: Turn, call_next: CallNext) -> Reply | None:
    words = current
    if words.mode == "refuse":
        if any(words.find(fold(turn.text))):
            return Reply(words.refusal)
        reply = await call_next()  # nothing of an answer may be seen before it is known to be clean
        return Reply(words.refusal) if reply and any(words.find(fold(await reply.read()))) else reply
    turn.text = words.mask(turn.text)
    reply = await call_next()
    if reply is None:
        return None
    if reply.chunks is not None:
        reply.chunks = words.mask_stream(reply.chunks)
    else:
        reply.text = words.mask(reply.text)
    return reply
