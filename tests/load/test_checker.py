"""The judge catches every kind of fault, and only that kind."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from tests.load.checker import KINDS, Verdict, judge, main
from tests.load.history import Accepted, Event, History, Recorded, Replied, Sent, Streamed, read_history


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
    assert (verdict.replies, verdict.streams) == (2, 1)


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
