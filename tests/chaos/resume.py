"""How long conversations stood still: from what befell their owner, or Redis, to the first answer after it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

from tests.chaos.owners import partition_of
from tests.load.history import Accepted, Event, Recorded, Replied, Sent

__all__ = [
    "Absence",
    "Outage",
    "Resumed",
    "Return",
    "accepted_within",
    "first_accepts",
    "loss_windows",
    "resume_times",
]

READ_S = 0.5
"""So much later a visitor may come to read what it was told."""

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


@dataclass(frozen=True, slots=True)
class Absence:
    """A host was dead, stopped or cut off."""

    host: int
    began: float
    ended: float


@dataclass(frozen=True, slots=True)
class Resumed:
    """A conversation went on *seconds* after its owner was lost, as its visitor saw it.

    `stood`: all hosts that the visitor turned to meanwhile were well, so that nobody's patience is in it but ours.
    """

    kind: str
    seconds: float
    stood: bool


def resume_times(
    events: Iterable[Event],
    outages: Sequence[Outage],
    doors: Mapping[str, Sequence[tuple[float, int]]],
    absences: Sequence[Absence],
    given_up: Collection[tuple[str, str]] = (),
) -> list[Resumed]:
    """For each outage and each conversation with traffic: from the outage to its first reply after it.

    *doors* has when each conversation's visitor turned to which host. What was *given_up*, by conversation and id, is
    left out: it may have sat in a host that was stopped, and nobody asked another for it.
    """
    asked: dict[str, dict[str, float]] = defaultdict(dict)
    answered: dict[tuple[str, str], float] = {}
    for event in events:
        if isinstance(event, Sent):
            if (event.conversation, event.id) not in given_up:
                asked[event.conversation].setdefault(event.id, event.time)
        elif isinstance(event, Replied) and event.to is not None:
            answered.setdefault((event.conversation, event.to), event.time)
    found: list[Resumed] = []
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
                reply = min(replies)
                stood = _stood(doors[conversation], absences, outage.at, reply)
                found.append(Resumed(outage.kind, reply - outage.at, stood))
    return found


def _stood(doors: Sequence[tuple[float, int]], absences: Sequence[Absence], began: float, ended: float) -> bool:
    """Whether every host of *doors* was there for as long as somebody was at it, between *began* and *ended*."""
    for place, (since, host) in enumerate(doors):
        until = doors[place + 1][0] if place + 1 < len(doors) else ended
        since, until = max(since, began), min(until, ended)
        if since < until and any(gone.host == host and gone.began < until and gone.ended > since for gone in absences):
            return False
    return True


def loss_windows(events: Iterable[Event], crashes: Sequence[float]) -> list[float]:
    """For each message that was accepted and is not in the record: how long before the next crash that was.

    A visitor may read a promise just after the end of who gave it: that is 0. Infinite where no crash explains it.
    """
    kept: set[tuple[str, str]] = set()
    accepted: dict[tuple[str, str], float] = {}
    for event in events:
        if isinstance(event, Recorded):
            kept.add((event.conversation, event.id))
        elif isinstance(event, Accepted):
            accepted.setdefault((event.conversation, event.id), event.time)
    gone = [time for key, time in accepted.items() if key not in kept]
    return [
        min((max(0.0, crash - time) for crash in crashes if crash > time - READ_S), default=math.inf) for time in gone
    ]


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
