"""The judge catches every kind of fault, and only that kind."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from tests.load.checker import KINDS, Verdict, judge, main
from tests.load.history import (
    Accepted,
    Event,
    Heard,
    History,
    Joined,
    Owned,
    Recorded,
    Replied,
    Sent,
    Streamed,
    read_history,
)


def message(id: str, seq: int) -> Recorded:
    return Recorded(conversation="c", id=id, time=9.0, type="message", seq=seq)


def reply(to: str, seq: int, **changes: object) -> Recorded:
    entry = Recorded(
        conversation="c", id=f"r-{to}", time=9.0, type="reply", seq=seq, to=to, text="ab",
        plugin="bot", generation=1, marks=("v1", "v1"),
    )  # fmt: skip
    return msgspec.structs.replace(entry, **changes)


def shown(to: str, seq: int, **changes: object) -> Replied:
    event = Replied(
        conversation="c", id=f"r-{to}", time=2.0, seq=seq, to=to, text="ab",
        plugin="bot", generation=1, marks=("v1", "v1"),
    )  # fmt: skip
    return msgspec.structs.replace(event, **changes)


def sent(id: str, time: float, **changes: object) -> Sent:
    return msgspec.structs.replace(Sent(conversation="c", id=id, time=time), **changes)


def accepted(id: str, time: float, seq: int) -> Accepted:
    return Accepted(conversation="c", id=id, time=time, seq=seq)


def streamed(id: str, text: str, *, ended: bool = True) -> Streamed:
    return Streamed(conversation="c", id=id, time=3.0, text=text, ended=ended)


def stay(after: int, *seqs: int, again: tuple[int, ...] = ()) -> list[Event]:
    """A reader that came with `after=` and was shown replies."""
    joined = Joined(conversation="c", id="s", time=2.0, after=after)
    return [joined, *(Heard(conversation="c", id="s", time=3.0, seq=seq, again=seq in again) for seq in seqs)]


def owned(epoch: int, by: int, time: float) -> Owned:
    return Owned(conversation="", id=f"w{by}", time=time, partition=0, partitions=1, epoch=epoch, by=by)


PROMISES: list[Event] = [sent("m1", 0.0), accepted("m1", 1.0, 1), sent("m2", 1.5), accepted("m2", 2.0, 2)]
RECORD: list[Event] = [message("m1", 1), message("m2", 2), reply("m1", 3), reply("m2", 4)]


def counts(verdict: Verdict) -> dict[str, int]:
    return {kind: verdict.count(kind) for kind in KINDS if verdict.count(kind)}


def test_a_history_without_fault_is_clean():
    """Two messages, answered in order and read back, are no fault; nor is a repeat, nor one never accepted."""
    more = [
        sent("m1", 3.0),
        accepted("m1", 3.1, 1),
        shown("m1", 3),
        shown("m1", 3),
        streamed("m2", "ab"),
        sent("m3", 4.0),
    ]
    verdict = judge([*PROMISES, *more, *RECORD])
    assert verdict.faults == ()
    assert (verdict.sent, verdict.accepted, verdict.unaccepted) == (3, 2, 1)
    assert (verdict.replies, verdict.streams, verdict.restarts) == (2, 1, 0)


def test_what_a_change_of_owner_may_do_is_no_fault():
    """A stream that began anew, or has a hole; a repeat that overtakes; an owner that lost, and won, the partition."""
    more = [
        msgspec.structs.replace(streamed("m1", "ab"), restarts=2),
        msgspec.structs.replace(streamed("m2", "b"), holes=1),
        *stay(0, 4, 3, 4, again=(4,)),
        *(owned(1, 7, -1.0), owned(2, 8, 0.2), owned(3, 7, 1.7)),
    ]
    replies = [reply("m1", 3, by=8, count=1), reply("m2", 4, by=7, count=2)]
    verdict = judge([*PROMISES, *more, *RECORD[:2], *replies])
    assert verdict.faults == ()
    assert verdict.restarts == 2


def test_an_owner_that_nobody_saw_may_have_been_anybody():
    """Where an epoch was passed over between two looks, the reply of a third is no fault."""
    looks = [owned(1, 7, -1.0), owned(3, 8, 5.0)]
    assert judge([*PROMISES, *looks, *RECORD[:3], reply("m2", 4, by=9)]).faults == ()


FAULTY: dict[str, tuple[str, list[Event]]] = {
    "accepted and not in the record": ("lost", [*PROMISES, message("m1", 1), reply("m1", 2)]),
    "never answered": ("lost", [*PROMISES, message("m1", 1), message("m2", 2), reply("m1", 3)]),
    "a reply shown and not kept": (
        "lost",
        [*PROMISES, sent("m3", 2.5), shown("m3", 6), *RECORD, message("m3", 5)],
    ),
    "the same id twice in the record": ("doubled", [*PROMISES, *RECORD, message("m1", 5)]),
    "the same reply twice in the record": ("doubled", [*PROMISES, *RECORD, reply("m2", 5)]),
    "two replies to one message": ("doubled", [*PROMISES, *RECORD, reply("m2", 5, id="r-other")]),
    "a second reply shown": ("doubled", [*PROMISES, shown("m2", 4, id="r-m2-again"), *RECORD]),
    "two seqs for one id": ("doubled", [*PROMISES, accepted("m2", 3.0, 7), *RECORD]),
    "a message that nobody sent": ("doubled", [*PROMISES, *RECORD, message("ghost", 5), reply("ghost", 6)]),
    "a hole in the seqs": ("reordered", [*PROMISES, *RECORD[:3], reply("m2", 5)]),
    "the record out of order": (
        "reordered",
        [*PROMISES, RECORD[0], RECORD[2], RECORD[1], RECORD[3]],
    ),
    "replies in the wrong order": (
        "reordered",
        [*PROMISES, message("m1", 1), message("m2", 2), reply("m2", 3), reply("m1", 4)],
    ),
    "a reply before its message": (
        "reordered",
        [sent("m1", 0.0), accepted("m1", 1.0, 2), reply("m1", 1), message("m1", 2)],
    ),
    "messages recorded in another order than sent": (
        "reordered",
        [
            *(sent("m1", 0.0), accepted("m1", 1.0, 2), sent("m2", 1.5), accepted("m2", 2.0, 1)),
            *(message("m2", 1), message("m1", 2), reply("m2", 3), reply("m1", 4)),
        ],
    ),
    "two generations in one turn": ("mixed", [*PROMISES, *RECORD[:3], reply("m2", 4, marks=("v1", "v2"))]),
    "two generations in one turn, shown": (
        "mixed",
        [*PROMISES, shown("m2", 4, marks=("v2", "v1")), *RECORD[:3], reply("m2", 4, marks=())],
    ),
    "one generation with two versions": (
        "mixed",
        [*PROMISES, *RECORD[:3], reply("m2", 4, marks=("v2", "v2"))],
    ),
    "a stream that stopped": ("broken", [*PROMISES, streamed("m2", "a", ended=False), *RECORD]),
    "a stream with a hole": ("broken", [*PROMISES, streamed("m2", "b"), *RECORD]),
    "a reader misses a reply": ("lost", [*PROMISES, *RECORD, *stay(0, 4)]),
    "a reader is shown a reply twice": ("doubled", [*PROMISES, *RECORD, *stay(0, 3, 4, 4)]),
    "a reader is shown what it had": ("doubled", [*PROMISES, *RECORD, *stay(3, 3, 4)]),
    "a reader is shown replies in another order": ("reordered", [*PROMISES, *RECORD, *stay(0, 4, 3)]),
    "a state that was written over": (
        "stale",
        [*PROMISES, *RECORD[:2], reply("m1", 3, count=1), reply("m2", 4, count=1)],
    ),
    "a reply by one that had lost the partition": (
        "stale",
        [*PROMISES, owned(1, 7, -1.0), owned(2, 8, 1.2), *RECORD[:3], reply("m2", 4, by=7)],
    ),
    "a reply by a former owner behind one of the next": (
        "stale",
        [
            *(*PROMISES, owned(1, 7, -1.0), owned(2, 8, 1.7)),
            *(*RECORD[:2], reply("m1", 3, by=8), reply("m2", 4, by=7)),
        ],
    ),
}


@pytest.mark.parametrize("name", FAULTY)
def test_a_fault_is_caught(name: str):
    """Each hand-made fault is counted once, under its kind and under no other."""
    kind, events = FAULTY[name]
    assert counts(judge(events)) == {kind: 1}


def test_a_message_that_expects_no_reply_is_not_lost_without_one():
    """Where no bot answers, an accepted message in the record is all there is."""
    assert judge([sent("m1", 0.0, expects_reply=False), accepted("m1", 1.0, 1), message("m1", 1)]).faults == ()


def test_conversations_are_judged_apart():
    """Another conversation may use the same ids and seqs."""
    events = [*PROMISES, *RECORD]
    twins = [msgspec.structs.replace(event, conversation="d") for event in events]
    assert judge([*events, *twins]).faults == ()


def test_a_saved_history_is_judged_like_a_fresh_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """What `save` wrote is read back equal, and the command says what it finds and fails on a fault."""
    history = History()
    for event in (*PROMISES, shown("m1", 3), streamed("m2", "ab"), *RECORD):
        history.add(event)
    clean = history.save(tmp_path / "clean.jsonl")
    assert list(read_history(clean)) == history.events
    assert main([str(clean)]) == 0
    history.add(message("m1", 5))
    assert main([str(clean), str(history.save(tmp_path / "faulty.jsonl"))]) == 1
    assert "message m1 is in the record 2 times" in capsys.readouterr().out
