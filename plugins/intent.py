"""intent: tells what a conversation is about, by rule. Shows a middleware that notes, tags, and hands over.

The first rule that fits a message gives the conversation its intent; plugins further in find it in
`turn.conversation.state["intent"]`. A message that no rule fits leaves the intent as it was.
"""

import re
import unicodedata
from typing import Annotated, Any

import msgspec

from hotdesk_sdk import CallNext, Ctx, Reply, Turn, hookimpl

UNSPACED = re.compile(r"([\u2e80-\U0010ffff]+)")
"""Text in Chinese and the other scripts that have no spaces between words."""


class Rule(msgspec.Struct, forbid_unknown_fields=True):
    """One `[[config.rules]]`: `keywords`, a regular expression or both, and what a message that fits brings about."""

    intent: Annotated[str, msgspec.Meta(min_length=1)]
    keywords: list[Annotated[str, msgspec.Meta(pattern=r"\S")]] = []
    pattern: str = ""
    tags: list[str] = []
    assignee: str | None = None
    answer: str | None = None

    def compiled(self) -> re.Pattern[str]:
        """One pattern for all: keywords are found as whole words, those in Chinese anywhere."""
        keywords = [fold(keyword).strip() for keyword in self.keywords]
        parts = [re.escape(word) if UNSPACED.search(word) else rf"(?<!\w){re.escape(word)}(?!\w)" for word in keywords]
        if self.pattern:
            parts.append(self.pattern)
        if not parts:
            raise ValueError(f"the rule for intent {self.intent!r} has neither keywords nor a pattern")
        try:
            return re.compile("|".join(parts), re.IGNORECASE)
        except re.error as exc:
            raise ValueError(f"the rule for intent {self.intent!r} has a bad pattern: {exc}") from exc


class Settings(msgspec.Struct, forbid_unknown_fields=True):
    """All of `[config]`."""

    rules: list[Rule] = []


rules: list[tuple[re.Pattern[str], Rule]] = []


@hookimpl
async def setup(ctx: Ctx) -> None:
    await configure(ctx.config)


@hookimpl
async def configure(config: dict[str, Any]) -> bool:
    global rules
    rules = [(rule.compiled(), rule) for rule in msgspec.convert(config, Settings).rules]
    return True


@hookimpl
async def middleware(turn: Turn, call_next: CallNext) -> Reply | None:
    text = fold(turn.text)
    rule = next((rule for pattern, rule in rules if pattern.search(text)), None)
    if rule is None:
        return await call_next()
    conversation = turn.conversation
    conversation.state["intent"] = rule.intent
    conversation.tags += [tag for tag in rule.tags if tag not in conversation.tags]
    if rule.assignee is not None:
        conversation.assignee = rule.assignee
    return await call_next() if rule.answer is None else Reply(rule.answer)


def fold(text: str) -> str:
    """One form for what people take for the same, and Chinese set off by spaces, so that `\\b` works beside it."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return folded if folded.isascii() else UNSPACED.sub(r" \1 ", folded)
