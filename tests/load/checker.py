"""The one judge of a history, offline: what was lost, doubled, reordered, mixed or broken.

    python -m tests.load.checker FILE...        exit code 1 when there is a fault

lost       accepted and not in the record; in the record and never answered; shown to someone and not in the record;
           passed over in what a reader was shown
doubled    one id twice in the record, or under two seqs; two replies to one message; a message that nobody sent; a
           reply that a reader was shown twice, or had before it came
reordered  the record's seqs are not 1..n; replies not in the order of their messages; a message that was sent after
           another was accepted, and recorded before it; replies that a reader was shown in another order
mixed      a turn that saw two generations: its marks differ, or one generation of a plugin left two marks
broken     a stream without its proper end, or whose chunks are not its reply's text
stale      written by who was the owner no more: a reply by a process that had lost the partition before its message
           was sent, or before a later owner's reply; a state that is not what the conversation's turns made of it

A stream that began anew, on another host, is no fault and is counted.
"""

from __future__ import annotations

import math
import sys
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.load.history import (
    Accepted,
    Event,
    Heard,
    Joined,
    Owned,
    Recorded,
    Replied,
    Sent,
    Streamed,
    read_history,
)

__all__ = ["KINDS", "Fault", "Verdict", "judge"]

KINDS = ("lost", "doubled", "reordered", "mixed", "broken", "stale")

SHARED_GENERATIONS = False
"""Whether all hosts count a plugin's generations together. Today each process that says who it is counts for itself."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that must not be, and where."""

    kind: str
    conversation: str
    what: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.conversation}: {self.what}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a history holds. `unaccepted` messages got no promise: no fault here, though a run may forbid it."""

    sent: int
    accepted: int
    unaccepted: int
    replies: int
    streams: int
    faults: tuple[Fault, ...]
    restarts: int = 0

    def count(self, kind: str) -> int:
        """How many faults of this kind."""
        return sum(fault.kind == kind for fault in self.faults)

    def __str__(self) -> str:
        counts = ", ".join(f"{self.count(kind)} {kind}" for kind in KINDS)
        return (
            f"{self.sent} sent, {self.accepted} accepted, {self.unaccepted} unaccepted, {self.replies} replies, "
            f"{self.streams} streams ({self.restarts} begun anew): {counts}"
        )


@dataclass(slots=True)
class _Case:
    """One conversation's events, by kind."""

    conversation: str
    sent: list[Sent] = field(default_factory=list)
    accepted: list[Accepted] = field(default_factory=list)
    shown: list[Replied] = field(default_factory=list)
    streamed: list[Streamed] = field(default_factory=list)
    messages: list[Recorded] = field(default_factory=list)
    replies: list[Recorded] = field(default_factory=list)
    record: list[Recorded] = field(default_factory=list)
    joined: list[Joined] = field(default_factory=list)
    heard: dict[str, list[Heard]] = field(default_factory=dict)

    def add(self, event: Event) -> None:
        match event:
            case Sent():
                self.sent.append(event)
            case Accepted():
                self.accepted.append(event)
            case Replied():
                self.shown.append(event)
            case Streamed():
                self.streamed.append(event)
            case Recorded():
                self.record.append(event)
                (self.messages if event.type == "message" else self.replies).append(event)
            case Joined():
                self.joined.append(event)
            case Heard():
                self.heard.setdefault(event.id, []).append(event)

    def all_replies(self) -> list[Recorded | Replied]:
        """What is kept, then what was shown."""
        return [*self.replies, *self.shown]

    def fault(self, kind: str, what: str) -> Fault:
        return Fault(kind, self.conversation, what)


def judge(events: Iterable[Event]) -> Verdict:
    """Judge a whole history, the record that was read back included."""
    cases: dict[str, _Case] = {}
    looks: dict[int, list[Owned]] = defaultdict(list)
    partitions = 1
    for event in events:
        if isinstance(event, Owned):
            looks[event.partition].append(event)
            partitions = event.partitions
            continue
        case = cases.get(event.conversation)
        if case is None:
            case = cases[event.conversation] = _Case(event.conversation)
        case.add(event)
    faults: list[Fault] = []
    sent = accepted = unaccepted = 0
    tenures = {partition: _tenures(seen) for partition, seen in looks.items()}
    for case in cases.values():
        for find in (_lost, _doubled, _reordered, _mixed_turns, _broken, _misled_readers, _miscounted):
            faults += find(case)
        faults += _robbed(case, tenures.get(zlib.crc32(case.conversation.encode()) % partitions, []))
        promised = {event.id for event in case.accepted}
        asked = {event.id for event in case.sent}
        sent += len(asked)
        accepted += len(promised)
        unaccepted += len(asked - promised)
    faults += _mixed_generations(cases.values())
    return Verdict(
        sent=sent,
        accepted=accepted,
        unaccepted=unaccepted,
        replies=sum(len(case.replies) for case in cases.values()),
        streams=sum(len(case.streamed) for case in cases.values()),
        restarts=sum(stream.restarts for case in cases.values() for stream in case.streamed),
        faults=tuple(faults),
    )


def _lost(case: _Case) -> Iterable[Fault]:
    """One fault for each message that is gone, unanswered, or whose answer is."""
    recorded = {entry.id for entry in case.messages}
    answered = {entry.to for entry in case.replies}
    silent = {event.id for event in case.sent if not event.expects_reply}
    gone: dict[str | None, str] = {}
    for event in case.accepted:
        if event.id not in recorded:
            gone.setdefault(event.id, f"{event.id} was accepted as seq {event.seq} and is not in the record")
    kept = {entry.id for entry in case.replies}
    for shown in case.shown:
        if shown.id not in kept and shown.to not in answered:
            gone.setdefault(shown.to, f"reply {shown.id} to {shown.to} was shown and is not in the record")
    for entry in case.messages:
        if entry.id not in answered and entry.id not in silent:
            gone.setdefault(entry.id, f"{entry.id} is in the record and was never answered")
    return (case.fault("lost", what) for what in gone.values())


def _doubled(case: _Case) -> Iterable[Fault]:
    """One fault for each message or reply that is there more than once."""
    twice: dict[str, str] = {}
    for (type, id), count in Counter((entry.type, entry.id) for entry in case.record).items():
        if count > 1:
            twice[id] = f"{type} {id} is in the record {count} times"
    seqs: dict[str, set[int]] = defaultdict(set)
    promised_and_kept: list[Accepted | Recorded] = [*case.accepted, *case.messages]
    for event in promised_and_kept:
        seqs[event.id].add(event.seq)
    for id, found in seqs.items():
        if len(found) > 1:
            twice.setdefault(id, f"{id} has the seqs {sorted(found)}")
    answers: dict[str, set[str]] = defaultdict(set)
    for reply in case.all_replies():
        if reply.to is not None:
            answers[reply.to].add(reply.id)
    for to, ids in answers.items():
        if len(ids) > 1:
            twice.setdefault(to, f"{to} has the replies {sorted(ids)}")
    for id in {entry.id for entry in case.messages} - {event.id for event in case.sent}:
        twice.setdefault(id, f"{id} is in the record and nobody sent it")
    return (case.fault("doubled", what) for what in twice.values())


def _reordered(case: _Case) -> Iterator[Fault]:
    for expected, entry in enumerate(case.record, start=1):
        if entry.seq != expected:
            yield case.fault("reordered", f"entry {expected} of the record, {entry.id}, has seq {entry.seq}")
            break
    place: dict[str, int] = {}
    for number, entry in enumerate(case.record):
        if entry.type == "message":
            place.setdefault(entry.id, number)
    last = -1
    for number, entry in enumerate(case.record):
        if entry.type == "message" or entry.to is None or entry.to not in place:
            continue
        to = place[entry.to]
        if to < last:
            yield case.fault("reordered", f"reply {entry.id} comes after the reply to a later message")
        if to > number:
            yield case.fault("reordered", f"reply {entry.id} comes before its message {entry.to}")
        last = max(last, to)
    yield from _sent_out_of_order(case)


def _sent_out_of_order(case: _Case) -> Iterator[Fault]:
    """Walk the first sends in time; whatever was accepted before one of them must have a smaller seq."""
    seqs: dict[str, int] = {}
    for event in case.accepted:
        seqs.setdefault(event.id, event.seq)
    first_sent: dict[str, float] = {}
    for sent in case.sent:
        first_sent[sent.id] = min(sent.time, first_sent.get(sent.id, sent.time))
    promises = sorted(case.accepted, key=lambda event: event.time)
    highest, known = 0, 0
    for id, time in sorted(first_sent.items(), key=lambda item: item[1]):
        while known < len(promises) and promises[known].time < time:
            highest = max(highest, promises[known].seq)
            known += 1
        if id in seqs and seqs[id] < highest:
            yield case.fault("reordered", f"{id} has seq {seqs[id]}, and was sent after seq {highest} was accepted")


def _mixed_turns(case: _Case) -> Iterator[Fault]:
    for reply in {reply.id: reply for reply in case.all_replies()}.values():
        if len(set(reply.marks)) > 1:
            yield case.fault("mixed", f"reply {reply.id} to {reply.to} carries the marks {', '.join(reply.marks)}")


def _mixed_generations(cases: Iterable[_Case]) -> Iterator[Fault]:
    """A generation is one set of bytes, so all its replies carry one mark, in whatever conversation."""
    marks: dict[tuple[str, int, int], str] = {}
    for case in cases:
        for reply in {reply.id: reply for reply in case.all_replies()}.values():
            if len(set(reply.marks)) != 1:
                continue
            mark = reply.marks[0]
            who = 0 if SHARED_GENERATIONS else reply.by
            first = marks.setdefault((reply.plugin, who, reply.generation), mark)
            if first != mark:
                whose = f"{reply.plugin} generation {reply.generation}"
                yield case.fault("mixed", f"reply {reply.id} is marked {mark}, but {whose} marked {first} before")


def _broken(case: _Case) -> Iterator[Fault]:
    texts = {reply.to: reply.text for reply in case.replies}
    for stream in case.streamed:
        if not stream.ended:
            yield case.fault("broken", f"the stream for {stream.id} stopped after {len(stream.text)} characters")
        elif not stream.holes and stream.text != texts.get(stream.id):
            yield case.fault("broken", f"the chunks for {stream.id} are not the text of its reply")


def _misled_readers(case: _Case) -> Iterator[Fault]:
    """Each stay of a reader: what it was to be shown, against what it was, up to the last that it was shown.

    Only one fault a stay: what follows one is no news.
    """
    kept = [entry.seq for entry in case.replies]
    for stay in case.joined:
        heard = case.heard.get(stay.id, [])
        in_turn = [event.seq for event in heard if not event.again]
        if not in_turn:
            continue
        seen, last = {event.seq for event in heard}, stay.after
        missed = [seq for seq in kept if stay.after < seq < max(in_turn) and seq not in seen]
        for seq in in_turn:
            if seq <= last:
                twice = seq <= stay.after or in_turn.count(seq) > 1
                what = f"the reader {stay.id} (after {stay.after}) was shown {seq} behind {last}"
                yield case.fault("doubled" if twice else "reordered", what)
                break
            last = seq
        else:
            if missed:
                yield case.fault("lost", f"the reader {stay.id} was never shown {missed}, but {max(in_turn)}")


def _miscounted(case: _Case) -> Iterator[Fault]:
    """The n-th turn of a bot that counts in the conversation's state counts n; the first that does not is told."""
    counted = [reply for reply in case.replies if reply.count]
    for expected, reply in enumerate(counted, start=1):
        if reply.count != expected:
            yield case.fault("stale", f"reply {reply.id} to {reply.to}, turn {expected}, counts {reply.count}")
            break


@dataclass(frozen=True, slots=True)
class _Tenure:
    """Process *by* (-1: any may have) owned a partition, until at the latest *until*."""

    by: int
    until: float


def _tenures(looks: list[Owned]) -> list[_Tenure]:
    """Who owned a partition, one after the other. Where an epoch was passed over unseen, anybody may have."""
    found: list[_Tenure] = []
    for look, then in zip(looks, [*looks[1:], None], strict=True):
        until = math.inf if then is None else then.time
        found.append(_Tenure(look.by, until))
        if then is not None and then.epoch > look.epoch + 1:
            found.append(_Tenure(-1, until))
    return found


def _robbed(case: _Case, tenures: list[_Tenure]) -> Iterator[Fault]:
    """Replies in the order of the record, each by an owner of its time: none by one that had lost the conversation."""
    if not tenures:
        return
    first_sent: dict[str, float] = {}
    for sent in case.sent:
        first_sent[sent.id] = min(sent.time, first_sent.get(sent.id, sent.time))
    at = 0
    for reply in case.replies:
        if not reply.by:
            continue
        asked = first_sent.get(reply.to or "", -math.inf)
        here = at
        while here < len(tenures) and not (tenures[here].by in (-1, reply.by) and tenures[here].until > asked):
            here += 1
        if here == len(tenures):
            yield case.fault("stale", f"reply {reply.id} to {reply.to} is by process {reply.by}, no owner of its time")
        else:
            at = here


def main(paths: list[str]) -> int:
    """Judge every file; print the counts and the first faults of each."""
    bad = False
    for path in paths:
        verdict = judge(read_history(Path(path)))
        print(f"{path}: {verdict}")
        for fault in verdict.faults[:20]:
            print(f"  {fault}")
        bad = bad or bool(verdict.faults)
    return 1 if bad else 0


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m tests.load.checker FILE...")
    sys.exit(main(sys.argv[1:]))
