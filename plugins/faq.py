"""faq: answers from `faq.toml`. Shows a config that is checked as a whole and taken live, with no swap."""

import re
import unicodedata
from typing import Annotated, Any

import msgspec

from hotdesk_sdk import Ctx, Turn, hookimpl

Keyword = Annotated[str, msgspec.Meta(pattern=r"\S")]


class Answer(msgspec.Struct, forbid_unknown_fields=True):
    """One `[[config.answers]]`. A keyword of a language with spaces matches whole words; a Chinese one, anywhere."""

    keywords: Annotated[list[Keyword], msgspec.Meta(min_length=1)]
    text: Annotated[str, msgspec.Meta(pattern=r"\S")]


class Settings(msgspec.Struct, forbid_unknown_fields=True):
    """All of `[config]`."""

    answers: list[Answer] = []


class Book:
    """The answers, and one pattern that finds every keyword of them."""

    def __init__(self, settings: Settings) -> None:
        self.answers = settings.answers
        self.owners: dict[str, set[int]] = {}
        for number, answer in enumerate(settings.answers):
            for keyword in answer.keywords:
                self.owners.setdefault(fold(keyword), set()).add(number)
        # The longest first, so that "退货地址" is not read as "退货". (?!) matches nothing.
        keywords = sorted(self.owners, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(whole_word, keywords)) or "(?!)")

    def find(self, text: str) -> str | None:
        """The answer with the most keywords in *text*; of equals the one that stands first in the file."""
        found = set(self.pattern.findall(fold(text)))
        if not found:
            return None
        hits = [number for keyword in found for number in self.owners[keyword]]
        return self.answers[min(hits, key=lambda number: (-hits.count(number), number))].text


def fold(text: str) -> str:
    """One form for what people take for the same: case, full and half width, runs of spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


LETTER = r"[^\W\u2e80-\U0010ffff]"
"""A letter or digit of a script with spaces between words; from U+2E80 on come those without."""


def whole_word(keyword: str) -> str:
    """A pattern of *keyword* that does not match inside of a longer word."""
    before = f"(?<!{LETTER})" if re.match(LETTER, keyword) else ""
    after = f"(?!{LETTER})" if re.match(LETTER, keyword[-1]) else ""
    return before + re.escape(keyword) + after


book = Book(Settings())


@hookimpl
async def setup(ctx: Ctx) -> None:
    await configure(ctx.config)


@hookimpl
async def configure(config: dict[str, Any]) -> bool:
    """Check first, then take. What raises here is shown to the operator, and the old answers stay."""
    global book
    book = Book(msgspec.convert(config, Settings))
    return True


@hookimpl
async def respond(turn: Turn) -> str | None:
    return book.find(turn.text)
