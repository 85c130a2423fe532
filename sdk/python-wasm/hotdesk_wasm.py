"""The thin layer of a hotdesk plugin in Python as a component: decisions, JSON, the log, masking.

A function whose WIT result has an error raises `Err("the error's text")`. Any other exception is a trap.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from componentize_py_types import Err
from wit_world.imports import base, types

__all__ = [
    "LEAVE",
    "NEXT",
    "Err",
    "Lifecycle",
    "answer",
    "are_texts",
    "changed",
    "config",
    "denied",
    "drop",
    "emit",
    "hand_over",
    "inbound",
    "log",
    "mask",
    "mask_piece",
    "model",
    "or_fail",
    "parse",
    "require",
    "response",
    "rewrite",
    "tool",
]

DEEPEST = 100
"""Levels of JSON. Deeper JSON is refused, for reading it the stack would end, which is a trap."""

NEXT = types.Decision_Next()
LEAVE = types.Decision_Leave()


def rewrite(text: str) -> types.Decision:
    return types.Decision_Rewrite(text)


def changed(was: str, now: str) -> types.Decision:
    """`rewrite` where the text is another, else `NEXT`."""
    return NEXT if was == now else rewrite(now)


def answer(text: str, **extra: Any) -> types.Decision:
    return types.Decision_Answer(types.Reply(text, json.dumps(extra)))


def hand_over(reason: str, text: str = "") -> types.Decision:
    return types.Decision_HandOver(types.Handover(reason, text))


def drop(reason: str) -> types.Decision:
    return types.Decision_Drop(reason)


def model(**options: Any) -> types.Decision:
    return types.Decision_Model(json.dumps(options))


def parse(text: str) -> Any:
    """Read JSON as the contract has it: an empty text stands for {}. Raises `ValueError`, also where it is too deep."""
    if text.count("[") + text.count("{") > DEEPEST:
        bare = re.sub(r'"[^"]*"?', "", re.sub(r"\\.", "", text, flags=re.DOTALL))
        depth = 0
        for bracket in re.findall(r"[][{}]", bare):
            depth += 1 if bracket in "[{" else -1
            if depth > DEEPEST:
                raise ValueError(f"this JSON nests deeper than {DEEPEST}")
    return json.loads(text or "{}")


def require(condition: object, error: str) -> None:
    """Raise `Err` with this text unless the condition holds."""
    if not condition:
        raise Err(error)


def or_fail(call: Callable[[], Any]) -> Any:
    """What *call* gives: `or_fail(lambda: kv.set("key", value))`. What the host refuses fails the plugin's own call,
    with its text; without this it would trap.
    """
    try:
        return call()
    except Err as refused:
        raise Err(getattr(refused.value, "value", refused.value)) from None


def emit(*chunks: str) -> None:
    """Send chunks of a streamed answer; the text of the decision `answer` comes after them."""
    for chunk in chunks:
        or_fail(functools.partial(base.emit, chunk))


def config() -> dict[str, Any]:
    """The manifest's config, with the operator's over it."""
    return dict(parse(base.config()))


def log(event: str, level: base.Level = base.Level.INFO, **fields: Any) -> None:
    base.log(level, event, json.dumps(fields))


def denied(call: Callable[[], Any]) -> str | None:
    """The capability that *call* was denied for, or None: `denied(lambda: kv.get("key"))`. Other errors go on."""
    try:
        call()
    except Err as refused:
        if isinstance(refused.value, types.Error_Denied):
            return refused.value.value
        raise
    return None


def tool(name: str, description: str, parameters: dict[str, Any]) -> types.Tool:
    """A function that the language model may call; the parameters are a JSON Schema of an object."""
    return types.Tool(name, description, json.dumps(parameters), "")


def inbound(conversation: str, text: str, id: str = "", **extra: Any) -> types.Inbound:
    """A message that a webhook brought."""
    return types.Inbound(conversation, text, id, json.dumps(extra))


def response(status: int, body: Any) -> types.Response:
    """What a webhook's caller is answered."""
    return types.Response(status, '{"content-type": "application/json"}', json.dumps(body), "")


def are_texts(value: Any) -> bool:
    """Whether a value out of JSON is a list of texts."""
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


class Lifecycle:
    """What a plugin's `Lifecycle` may leave out."""

    def setup(self, config: str) -> None:
        self.configure(config)

    def configure(self, config: str) -> bool:
        return False

    def probe(self) -> None:
        pass

    def export_state(self) -> str | None:
        return None

    def import_state(self, state: str, version: str) -> None:
        pass


def mask(text: str, words: Sequence[str]) -> str:
    """The text with an asterisk for each character of each of the words, whatever the case of its ASCII letters."""
    return mask_piece(text, words, last=True).text


def mask_piece(text: str, words: Sequence[str], last: bool) -> types.Piece:
    """A masked piece of a stream, and the tail that may yet become a word, held back unless this is the last piece."""
    longest_first = [re.escape(word) for word in sorted(filter(None, words), key=len, reverse=True)]
    found = [match.span(1) for match in _find(f"(?=({'|'.join(longest_first)}))", text)] if longest_first else []
    begun = [] if last else [re.escape(word[:size]) for word in words for size in range(1, len(word))]
    tails = [match.start() for match in _find(f"(?=(?:{'|'.join(begun)})\\Z)", text)] if begun else []
    cut = min(tails, default=len(text))
    for start, end in reversed(found):
        if start < cut < end:  # held back whole
            cut = start
    shown = list(text[:cut])
    for start, end in found:
        if end <= cut:
            shown[start:end] = "*" * (end - start)  # words may overlap
    return types.Piece("".join(shown), text[cut:])


def _find(pattern: str, text: str) -> Iterator[re.Match[str]]:
    return re.finditer(pattern, text, re.ASCII | re.IGNORECASE)
