"""Masks words: in a whole text, and in a stream without holding back more of it than must be."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterable

__all__ = ["Words"]


class Words:
    """A list of words, found anywhere in a text; of ASCII letters the case makes no difference.

    Raises `ValueError` when *given* is no list of texts.
    """

    def __init__(self, given: object) -> None:
        if not isinstance(given, list) or not all(isinstance(word, str) for word in given):
            raise ValueError("words must be a list of texts")
        words = {word for word in given if word}
        begun = {word[:size] for word in words for size in range(1, len(word))}
        self._word = _any_of(words, "(?=({}))")  # looks ahead, for words may overlap
        self._begun = _any_of(begun, r"(?:{})\Z")

    def mask(self, text: str) -> str:
        """*text* with an asterisk for each character of a word."""
        shown = list(text)
        for word in self._word.finditer(text):
            shown[word.start(1) : word.end(1)] = "*" * len(word[1])
        return "".join(shown)

    def mask_piece(self, text: str) -> tuple[str, str]:
        """What of *text* can be shown, masked, though more comes; and the end of it that may be the start of a word."""
        begun = self._begun.search(text)
        cut = begun.start() if begun else len(text)
        for word in reversed([*self._word.finditer(text)]):
            if word.start(1) < cut < word.end(1):
                cut = word.start(1)
        return self.mask(text)[:cut], text[cut:]

    async def mask_stream(self, chunks: AsyncIterator[str]) -> AsyncIterator[str]:
        """*chunks*, masked as their whole text would be, however it is cut."""
        held = ""
        async for chunk in chunks:
            shown, held = self.mask_piece(held + chunk)
            if shown:
                yield shown
        if held:
            yield self.mask(held)


def _any_of(parts: Iterable[str], form: str) -> re.Pattern[str]:
    longest_first = sorted(parts, key=len, reverse=True)
    return re.compile(form.format("|".join(map(re.escape, longest_first)) or r"\b\B"), re.IGNORECASE | re.ASCII)
