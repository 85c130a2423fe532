"""Who requires whom: what is missing, who depends, and whether it goes in a circle. Changes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .entries import Entry

__all__ = ["dependants_of", "find_circle", "missing_of"]


def needs_of(entry: Entry | None) -> tuple[str, ...]:
    """What a plugin requires: in the version that serves, or in the one that waits."""
    if entry is None:
        return ()
    return entry.wants if entry.current is None else entry.current.manifest.requires


def missing_of(entries: Mapping[str, Entry], requires: Iterable[str]) -> list[str]:
    """Those of *requires* that do not serve."""
    return [name for name in requires if (entry := entries.get(name)) is None or entry.current is None]


def dependants_of(entries: Mapping[str, Entry], name: str) -> list[Entry]:
    """The plugins that serve and require *name*, directly or not, each after all that it requires."""
    after: dict[str, Entry] = {}
    begun: set[str] = set()

    def visit(required: str) -> None:
        for entry in entries.values():
            if entry.current is None or entry.name in begun or required not in entry.current.manifest.requires:
                continue
            begun.add(entry.name)
            visit(entry.name)
            after[entry.name] = entry

    visit(name)
    return list(reversed(after.values()))


def find_circle(entries: Mapping[str, Entry], name: str, requires: Iterable[str]) -> list[str] | None:
    """The way from *name* through what it *requires* back to itself, both ends included; None where there is none."""
    seen: set[str] = set()

    def walk(other: str, path: list[str]) -> list[str] | None:
        if other == name:
            return [*path, other]
        if other in seen:
            return None
        seen.add(other)
        ways = (walk(further, [*path, other]) for further in needs_of(entries.get(other)))
        return next((way for way in ways if way), None)

    return next((way for other in requires if (way := walk(other, [name]))), None)
