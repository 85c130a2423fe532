"""faq: answers from `faq.toml`. Shows a config that is checked as a whole and taken live, with no swap."""

import re
import unicodedata
from typing import Annotated, Any

import msgspec

from hotdesk_sdk import Ctx, Turn, hookimpl

WORD = re.compile(r"[^\W\u2e80-\U0010ffff]+")
"""A word of a script with spaces between words. Chinese and its likes, which have none, begin at U+2E80."""

Text = Annotated[str, msgspec.Meta(pattern=r"\S")]


class Answer(msgspec.Struct, forbid_unknown_fields=True):
    """One `[[config.answers]]`."""

    keywords: Annotated[list[Text], msgspec.Meta(min_length=1)]
    text: Text


class Settings(msgspec.Struct, forbid_unknown_fields=True):
    """All of `[config]`."""

    answers: list[Answer] = []


answers: list[tuple[set[str], str]] = []


@hookimpl
async def setup(ctx: Ctx) -> None:
    await configure(ctx.config)


@hookimpl
async def configure(config: dict[str, Any]) -> bool:
    """Check everything, then take it. What raises here is shown to the operator, and the old answers stay."""
    global answers
    settings = msgspec.convert(config, Settings)
    answers = [({needle(keyword) for keyword in answer.keywords}, answer.text) for answer in settings.answers]
    return True


@hookimpl
async def respond(turn: Turn) -> str | None:
    """The answer with the most keywords in the message; of equals the one that stands first."""
    text = fold(turn.text)
    searched = f"{words(text)}\n{text}"
    hits, answer = 0, None
    for keywords, given in answers:
        found = sum(keyword in searched for keyword in keywords)
        if found > hits:
            hits, answer = found, given
    return answer


def needle(keyword: str) -> str:
    """What is looked for: words as whole words, Chinese (or a lone "?") anywhere."""
    text = fold(keyword).strip()
    return text if re.search(r"[\u2e80-\U0010ffff]", text) or not WORD.search(text) else words(text)


def words(text: str) -> str:
    """The words of *text*, with one space around each."""
    return f" {' '.join(WORD.findall(text))} "


def fold(text: str) -> str:
    """One form for what people take for the same: case, full and half width."""
    return unicodedata.normalize("NFKC", text).casefold()
