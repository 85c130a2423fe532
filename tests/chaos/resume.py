"""How long conversations stood still: from what befell their owner, or Redis, to the first answer after it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from time import perf_counter

from tests.chaos.owners import partition_of
from tests.load.history import Accepted, Event, Recorded, Replied, Sent

__all__ = ["Outage", "Return", "accepted_within", "first_accepts", "loss_windows", "resume_times"]

TRAFFIC_S = 1.0
"""A conversation had traffic when a message of it waited as its owner was lost, or came within so long."""


@dataclass(frozen=True, slots=True)
class Outage:
    """At this moment something befell the owner of *partitions*."""

    kind: str
    at: float
    partitions: frozenset[int]

    @classmethod
    def now(cls, kind: str, partitions: frozenset[int]) -> Outage:
        return cls(kind, perf_counter(), partitions)


@dataclass(frozen=True, slots=True)
class Return:
    """At this moment Redis was there again, and these hosts were well."""

    at: float
    hosts: frozenset[int]


def resume_times(
    events: Iterable[Event], outages: Sequence[Outage], given_up: Collection[tuple[str, str]] = ()
) -> dict[str, list[float]]:
    """By kind of outage, for each conversation with traffic: from the outage to its first reply after it.

    What counts is the reply as the visitor saw it, also where the visitor's own host was the one that was lost and it
    had to find that out first. What was *given_up*, by conversation and id, is left out: it may have sat in a host that
    was stopped, and nobody asked another for it.
    """
    asked: dict[str, dict[str, float]] = defaultdict(dict)
    answered: dict[tuple[str, str], float] = {}
    for event in events:
        if isinstance(event, Sent):
            if (event.conversation, event.id) not in given_up:
                asked[event.conversation].setdefault(event.id, event.time)
        elif isinstance(event, Replied) and event.to is not None:
            answered.setdefault((event.conversation, event.to), event.time)
    found: dict[str, list[float]] = defaultdict(list)
    for outage in outages:
        for conversation, messages in asked.items():
            if partition_of(conversation) not in outage.partitions:
                continue
            replies = [
                reply
                for id, first in messages.items()
                if first < outage.at + TRAFFIC_S and (reply := answered.get((conversation, id), 0.0)) > outage.at
            ]
            if replies:
                found[outage.kind].append(min(replies) - outage.at)
    return found


def loss_windows(events: Iterable[Event], crashes: Sequence[float]) -> list[float]:
    """For each message that was accepted and is not in the record: how long before the next crash that was."""
    kept: set[tuple[str, str]] = set()
    accepted: dict[tuple[str, str], float] = {}
    for event in events:
        if isinstance(event, Recorded):
            kept.add((event.conversation, event.id))
        elif isinstance(event, Accepted):
            accepted.setdefault((event.conversation, event.id), event.time)
    gone = [time for key, time in accepted.items() if key not in kept]
    return [min((crash - time for crash in crashes if crash > time), default=float("inf")) for time in gone]


def first_accepts(accepts: Sequence[tuple[float, int]], returns: Sequence[Return]) -> tuple[list[float], list[float]]:
    """From each return of Redis to the first `accepted` of any host, and to that of the last of all that were well."""
    first: list[float] = []
    last: list[float] = []
    for back in returns:
        seen: dict[int, float] = {}
        for time, host in accepts:
            if time > back.at and host in back.hosts:
                seen.setdefault(host, time - back.at)
        if seen:
            first.append(min(seen.values()))
            last.append(max(seen.values()))
    return first, last


def accepted_within(events: Iterable[Event], seconds: float) -> float:
    """The share of messages, in percent, that were accepted within *seconds* of being sent for the first time."""
    asked: dict[tuple[str, str], float] = {}
    kept: dict[tuple[str, str], float] = {}
    for event in events:
        if isinstance(event, Sent):
            asked.setdefault((event.conversation, event.id), event.time)
        elif isinstance(event, Accepted):
            kept.setdefault((event.conversation, event.id), event.time)
    soon = sum(kept.get(key, float("inf")) - first <= seconds for key, first in asked.items())
    return 100 * soon / max(1, len(asked))
