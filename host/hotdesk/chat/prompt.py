"""What a model is asked with: the system's words, what of the conversation fits, and the turn's own text and images."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hotdesk_sdk import Attachment, Message

from ..backend import Entry

__all__ = ["MAX_IMAGES", "Prompt", "build_prompt", "estimate_tokens", "in_turn_order"]

ENTRY_TOKENS = 4
"""What a message costs beside its text, by OpenAI's own counting guide."""

TILE_PX, TILE_TOKENS, IMAGE_TOKENS = 512, 170, 85
"""An image costs a base and so much for each tile of it, by OpenAI's pricing of images in detail."""

MAX_SIDE_PX, MAX_SHORT_PX = 2048, 768
"""An image is scaled down to these before it is cut into tiles."""

MAX_IMAGES = 8
"""How many images, the newest, go along; older ones are told in words."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """Messages for a model, and about how many tokens they are; what was there to be told, and what did not fit."""

    messages: list[dict[str, Any]]
    tokens: int
    entries: Sequence[Entry]
    """All that was said before, oldest first."""

    cut: Sequence[Entry]
    """The first of `entries`: those that are not in `messages`."""

    images: int
    """How many images go along as data."""


BEFORE = "What was said before, in short: "

Show = Callable[[Attachment], Awaitable[str | None]]
"""An image as a data URL, or None when it can't be shown."""


def estimate_tokens(text: str) -> int:
    """About how many tokens *text* is: four letters of ASCII are one, and so is each character beyond it.

    No tokenizer is asked: each model has its own, and most are fetched from a network that may not be there. It is
    over the truth for Chinese by a third, and within a fifth for English.
    """
    size = len(text)
    if text.isascii():
        return size // 4 + 1
    beyond = (len(text.encode("utf-8", "replace")) - size) // 2
    beyond = min(beyond, size)
    return (size - beyond) // 4 + beyond + 1


def image_tokens(attachment: Attachment) -> int:
    width, height = attachment.width or 1024, attachment.height or 1024
    scale = min(1.0, MAX_SIDE_PX / max(width, height), MAX_SHORT_PX / min(width, height))
    tiles = -(-int(width * scale) // TILE_PX) * -(-int(height * scale) // TILE_PX)
    return IMAGE_TOKENS + TILE_TOKENS * max(1, tiles)


def in_turn_order(entries: Sequence[Entry], seq: int) -> list[Entry]:
    """What was said before the turn of the message *seq*, each reply right after the message that it answers.

    Messages that came meanwhile have turns of their own; replies to earlier ones may be numbered above *seq*.
    """
    places: dict[str, list[Entry]] = {}
    order: list[list[Entry]] = []
    for entry in entries:
        if isinstance(entry, Message):
            if entry.seq < seq:
                place: list[Entry] = [entry]
                places[entry.id] = place
                order.append(place)
        elif (at := places.get(entry.to or "")) is not None:
            at.append(entry)
        else:
            order.append([entry])
    return [entry for place in order for entry in place]


async def build_prompt(
    entries: Sequence[Entry],
    text: str,
    attachments: Sequence[Attachment],
    *,
    system: str,
    summary: str,
    budget: int,
    show: Show,
    describe: Callable[[Attachment], str],
) -> Prompt:
    """The prompt for *text* with *attachments*, said after *entries* (oldest first).

    Of the entries the newest that fit into *budget* tokens; the text itself is always in it, and so are *system* and
    *summary*. Images go along as data where *show* gives that, else in words.
    """
    content, images, tokens = await _content(text, attachments, MAX_IMAGES, show, describe)
    newest: dict[str, Any] = {"role": "user", "content": content}
    left = budget - tokens
    kept: list[dict[str, Any]] = []
    first = len(entries)
    for index in range(len(entries) - 1, -1, -1):
        entry = entries[index]
        pictures = entry.attachments if isinstance(entry, Message) else ()
        cost = estimate_tokens(entry.text) + ENTRY_TOKENS
        if pictures:
            cost += sum(image_tokens(one) for one in pictures[:images])
        if cost > left:
            break
        left -= cost
        first = index
        if pictures:
            content, images, _ = await _content(entry.text, pictures, images, show, describe)
        else:
            content = entry.text
        kept.append({"role": "user" if isinstance(entry, Message) else "assistant", "content": content})
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    if summary:
        messages.append({"role": "system", "content": f"{BEFORE}{summary}"})
    kept.reverse()
    messages += kept
    messages.append(newest)
    return Prompt(messages, budget - left, entries, entries[:first], MAX_IMAGES - images)


async def _content(
    text: str, attachments: Sequence[Attachment], images: int, show: Show, describe: Callable[[Attachment], str]
) -> tuple[Any, int, int]:
    """A message's content: how many images may still follow, and about how many tokens it is."""
    tokens = estimate_tokens(text) + ENTRY_TOKENS
    if not attachments:
        return text, images, tokens
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}] if text else []
    for attachment in attachments:
        url = await show(attachment) if images > 0 else None
        if url is not None:
            images -= 1
            tokens += image_tokens(attachment)
            parts.append({"type": "image_url", "image_url": {"url": url}})
        else:
            words = describe(attachment)
            tokens += estimate_tokens(words)
            parts.append({"type": "text", "text": words})
    if all(part["type"] == "text" for part in parts):  # for servers that know no parts
        return "\n".join(part["text"] for part in parts), images, tokens
    return parts, images, tokens
