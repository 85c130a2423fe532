"""The numbers of generations, the same in all workers: a number in the record means one version, whoever answered."""

from __future__ import annotations

from collections import defaultdict, deque

__all__ = ["Numbers"]

REMEMBERED = 64
"""Numbers of a plugin that are remembered with their version: workers are never further apart."""


class Numbers:
    """Kept by the supervisor while it runs; over its restarts each worker knows the last number from the archive."""

    def __init__(self) -> None:
        self._given: defaultdict[str, deque[tuple[int, str]]] = defaultdict(lambda: deque(maxlen=REMEMBERED))

    def last(self) -> dict[str, int]:
        """The last number of every plugin."""
        return {plugin: given[-1][0] for plugin, given in self._given.items() if given}

    def number(self, plugin: str, digest: str, after: int, known: int) -> int:
        """The number of the version *digest* for a worker that loads it next.

        *after* is the last number that serves or served in its process, 0 where none did; *known* the last that it
        has heard of. Workers that load the same versions in the same order get the same numbers, and one that comes
        later gets the number that the others gave what it finds. No number is given to two versions.
        """
        given = self._given[plugin]
        # the lowest for one that has served it: it follows the others, version by version
        same = [number for number, version in given if version == digest and number > after]
        if same:
            return min(same) if after else max(same)
        number = max(known, after, given[-1][0] if given else 0) + 1
        given.append((number, digest))
        return number
