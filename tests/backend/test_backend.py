"""What every journal promises, whatever it is kept in: numbering, one end a turn, state, recovery, retention."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter

import pytest
from tests.backend.conftest import Journal
from tests.backend.worker import Worker, message, reply

from conftest import wait_until
from hotdesk.backend import ConversationRecord, Entry, StoredReply, TurnEnd
from hotdesk.errors import BackendUnavailable
from hotdesk_sdk import Message

ODD_NAMES = (
    "{", "}", "{}", "{0}", "}{", "a b", "line\nbreak", "tab\t", "\0", "naïve", "🙂", "ß" * 200, "c:x", "*", "a\\b",
    "%s", "0", "e:{1}:c", '"', "'; DROP TABLE journal;--", "x" * 200,
)  # fmt: skip
"""Names that mean something to a Redis, to SQL, or to nobody."""


async def entries_of(worker: Worker, conversation: str, after: int = 0) -> list[Entry]:
    entries = await worker.backend.read(conversation, after, 10_000)
    assert entries is not None
    return entries


# -- numbering ---------------------------------------------------------------------------------------------------


async def test_appends_are_numbered_in_the_order_asked(backend: Worker) -> None:
    """Appends of one moment get seq 1, 2, 3 … in the order they were asked for, in every conversation."""
    asked = [backend.append(f"c{n % 3}", f"m{n}") for n in range(300)]
    assert [(await future).seq for future in asked] == [n // 3 + 1 for n in range(300)]
    assert [(entry.id, entry.seq) for entry in await entries_of(backend, "c1")] == [
        (f"m{3 * n + 1}", n + 1) for n in range(100)
    ]


async def test_messages_replies_and_ends_share_one_order(backend: Worker) -> None:
    """2,000 appends, ends and posts of one moment are numbered as they were asked for, without a gap or a repeat."""
    drawn = random.Random(5)
    names = [f"c{n}" for n in range(20)]
    for name in names:
        await backend.append(name, "m")
    expected: dict[str, list[str]] = {name: ["m"] for name in names}
    asked: list[asyncio.Future[object]] = []
    ended = set()
    for n in range(2000):
        name = drawn.choice(names)
        kind = drawn.choice(["append", "append", "post", "end"])
        if kind == "end" and name in ended:
            kind = "post"
        expected[name].append(f"{kind}{n}")
        if kind == "append":
            asked.append(asyncio.ensure_future(backend.append(name, f"append{n}")))
        elif kind == "post":
            posted = backend.backend.post(reply(name, None, f"post{n}"), deliver=False)
            asked.append(asyncio.ensure_future(posted))
        else:
            ended.add(name)
            asked.append(asyncio.ensure_future(backend.end(name, 1, reply(name, "m", f"end{n}"))))
    await asyncio.gather(*asked)
    for name in names:
        found = await entries_of(backend, name)
        assert [entry.id for entry in found] == expected[name]
        assert [entry.seq for entry in found] == list(range(1, len(found) + 1))


async def test_turns_begin_in_order(backend: Worker) -> None:
    """The turns of one conversation are begun in the order of their seq, however many are asked for at once."""
    await asyncio.gather(*(backend.append(f"c{n % 7}", f"m{n}") for n in range(700)))
    await wait_until(lambda: len(backend.heard.begun) == 700, "all are begun")
    for n in range(7):
        assert backend.heard.seqs(f"c{n}") == list(range(1, 101))


async def test_the_same_id_at_once_is_one_message(backend: Worker) -> None:
    """An id that comes many times at once is kept once, and every repeat is told the first one's seq."""
    outcomes = await asyncio.gather(*(backend.append("c", f"m{n % 2}") for n in range(100)))
    assert sorted({(o.seq, o.duplicate) for o in outcomes}) == [(1, False), (1, True), (2, False), (2, True)]
    assert sum(not o.duplicate for o in outcomes) == 2
    assert [o.opened for o in outcomes].count(True) == 1
    assert not any(o.here and o.duplicate for o in outcomes)
    await wait_until(lambda: backend.heard.seqs("c") == [1, 2], "each is begun once")


async def test_concurrent_repeats_are_one_message_each(backend: Worker) -> None:
    """Each of 300 messages, sent one to five times in any order, is kept once and begun once."""
    drawn = random.Random(7)
    sent = [f"m{n}" for n in range(300) for _ in range(drawn.randint(1, 5))]
    drawn.shuffle(sent)
    outcomes = await asyncio.gather(*(backend.append(f"c{int(id[1:]) % 11}", id) for id in sent))
    seqs: dict[str, set[int]] = {}
    for id, outcome in zip(sent, outcomes, strict=True):
        seqs.setdefault(id, set()).add(outcome.seq)
    assert all(len(found) == 1 for found in seqs.values())
    assert sum(not outcome.duplicate for outcome in outcomes) == 300
    await wait_until(lambda: len(backend.heard.begun) >= 300, "all are begun")
    assert Counter(begun.message.id for begun in backend.heard.begun) == Counter(f"m{n}" for n in range(300))


async def test_a_repeat_says_whether_its_turn_is_open(backend: Worker) -> None:
    """A repeat of a message whose turn runs says so, one whose turn has ended does not; neither is to be run."""
    await backend.append("c", "m1")
    again = await backend.append("c", "m1")
    assert (again.seq, again.duplicate, again.here) == (1, True, False)
    await backend.end("c", 1, reply("c", "m1"))
    assert len(backend.heard.begun) == 1
    after = await backend.append("c", "m1")
    assert (after.seq, after.duplicate, after.open, after.here) == (1, True, False, False)


async def test_an_id_is_known_after_reopening(journal: Journal) -> None:
    """A repeat is found after a stop too; the same id in another conversation is another message."""
    worker = await journal.open()
    await worker.say("c", "m1")
    worker = await journal.open(again=True)
    assert (await worker.append("c", "m1")).duplicate
    other = await worker.append("d", "m1")
    assert (other.seq, other.duplicate) == (1, False)


async def test_an_id_that_the_host_made_is_not_looked_for(backend: Worker) -> None:
    """*given* False spares the look; such a message is numbered and begun like any other."""
    for seq in (1, 2):
        appended = await backend.backend.append(message("c", f"m{seq}"), channel="", locale=None, given=False)
        assert (appended.seq, appended.duplicate) == (seq, False)


async def test_long_ids_and_odd_names_are_kept_as_they_are(journal: Journal) -> None:
    """Ids of 128 characters and conversations of any name are found again, each as itself, after reopening too."""
    worker = await journal.open()
    ids = ["i" * 127 + end for end in "ab"] + ["🙂" * 128, "a b", "{x}"]
    for name in ODD_NAMES:
        for seq, id in enumerate(ids, 1):
            assert (await worker.append(name, id)).seq == seq
    for name in ODD_NAMES:
        await worker.end(name, 1, reply(name, ids[0], "r"), changed=ConversationRecord(name, "", "de", None, (name,)))
    worker = await journal.open(again=True)
    for name in ODD_NAMES:
        assert [entry.id for entry in await entries_of(worker, name)] == [*ids, "r"]
        assert {entry.conversation for entry in await entries_of(worker, name)} == {name}
        assert await worker.backend.record(name) == ConversationRecord(name, "", "de", None, (name,))
        assert worker.heard.seqs(name) == [2, 3, 4, 5]
        assert (await worker.append(name, ids[1])).duplicate


async def test_a_megabyte_is_kept(journal: Journal) -> None:
    """Messages and replies of 1 MB, and a state of 100 KB, come back as they were."""
    text, state = "ü" * 500_000, b'{"a":"' + b"x" * 100_000 + b'"}'
    worker = await journal.open()
    await asyncio.gather(*(worker.append("c", f"m{n}", text) for n in range(3)))
    await worker.end(
        "c", 1, reply("c", "m0", text=text), changed=ConversationRecord("c", "", None, None, (), state)
    )  # fmt: skip
    worker = await journal.open(again=True)
    found = await entries_of(worker, "c")
    assert [entry.text for entry in found] == [text] * 4
    assert [begun.message.text for begun in worker.heard.begun] == [text] * 2
    assert worker.heard.begun[0].record.state == state
    record = await worker.backend.record("c")
    assert record is not None
    assert record.state == state


# -- turns -------------------------------------------------------------------------------------------------------


async def test_a_turn_ends_once(backend: Worker) -> None:
    """The second end of a turn keeps nothing and says so; one turn has one reply."""
    await backend.append("c", "m1")
    first = await backend.end("c", 1, reply("c", "m1", "r1"))
    assert first is not None
    assert first[0].seq == 2
    assert await backend.end("c", 1, reply("c", "m1", "r2")) is None
    assert [entry.id for entry in await entries_of(backend, "c")] == ["m1", "r1"]


async def test_two_ends_at_once_keep_the_first(backend: Worker) -> None:
    """Of many ends of one turn that are asked for together, the first is kept, and just that."""
    await backend.append("c", "m1")
    ends = await asyncio.gather(*(backend.end("c", 1, reply("c", "m1", f"r{n}")) for n in range(10)))
    assert [end is not None for end in ends] == [True] + [False] * 9
    assert [entry.id for entry in await entries_of(backend, "c")] == ["m1", "r0"]


async def test_an_end_may_have_many_replies_or_none(backend: Worker) -> None:
    """The replies of one end are numbered one after the other; an end without any is not taken for none."""
    await backend.append("c", "m1")
    await backend.append("c", "m2")
    ended = await backend.end("c", 1, *(reply("c", "m1", f"r{n}") for n in range(5)))
    assert ended is not None
    assert [(one.id, one.seq) for one in ended] == [(f"r{n}", n + 3) for n in range(5)]
    assert await backend.end("c", 2) == ()
    assert await backend.end("c", 2) is None


async def test_the_outcome_of_a_message_is_found(backend: Worker) -> None:
    """An open turn has no outcome yet; an ended one has its replies; an ended one without reply has none."""
    for id in ("m1", "m2"):
        await backend.append("c", id)
    outcome = backend.backend.outcome
    assert not (await outcome("c", 1, "m1")).ended
    await backend.end("c", 1, reply("c", "m1"))
    await backend.end("c", 2)
    assert [(one.id, one.seq) for one in (await outcome("c", 1, "m1")).replies] == [("r1", 3)]
    assert (await outcome("c", 2, "m2")).ended
    assert (await outcome("c", 2, "m2")).replies == ()


async def test_an_outcome_is_found_behind_many_others(backend: Worker) -> None:
    """A reply that came after 500 other entries of its conversation is found."""
    for n in range(501):
        backend.append("c", f"m{n}")
    await backend.append("c", "last")
    await backend.end("c", 1, reply("c", "m0"))
    assert [one.seq for one in (await backend.backend.outcome("c", 1, "m0")).replies] == [503]


async def test_state_is_kept_with_the_turns_end(journal: Journal) -> None:
    """What a turn changed in its conversation is there after reopening; closing forgets it, and the next opens anew."""
    record = ConversationRecord("c", "web", "de", "ann", ("vip",), b'{"a":1}')
    worker = await journal.open()
    first = await worker.append("c", "m1", channel="web", locale="en")
    assert (first.opened, first.conversation) == (True, ConversationRecord("c", "web", "en"))
    await worker.end("c", 1, changed=record)
    worker = await journal.open(again=True)
    assert await worker.backend.record("c") == record
    again = await worker.append("c", "m2", channel="other")
    assert (again.opened, again.conversation) == (False, record)
    await worker.end("c", 2, changed=record, closed=True)
    assert await worker.backend.record("c") == ConversationRecord("c", "web", "de")
    reopened = await worker.append("c", "m3")
    assert (reopened.opened, reopened.conversation, reopened.seq) == (True, ConversationRecord("c", "web", "de"), 3)
    assert not (await worker.append("c", "m4")).opened


async def test_an_empty_assignee_is_not_none(journal: Journal) -> None:
    """Each field of the record goes back to nothing as it came, and nothing is not the empty text of another."""
    worker = await journal.open()
    await worker.append("c", "m1")
    full = ConversationRecord("c", "", "de", "", ("", "a,b", "ü"), b'{"a":null}')
    await worker.end("c", 1, changed=full)
    worker = await journal.open(again=True)
    assert await worker.backend.record("c") == full
    bare = ConversationRecord("c", "", None, None, (), b"{}")
    await worker.append("c", "m2")
    await worker.end("c", 2, changed=bare)
    assert await worker.backend.record("c") == bare
    worker = await journal.open(again=True)
    assert await worker.backend.record("c") == bare


async def test_a_change_by_a_turn_that_had_ended_is_not_kept(backend: Worker) -> None:
    """The second end of a turn changes nothing in its conversation either."""
    await backend.append("c", "m1")
    await backend.end("c", 1, changed=ConversationRecord("c", state=b'{"n":1}'))
    await backend.end("c", 1, changed=ConversationRecord("c", state=b'{"n":2}'))
    assert (await backend.append("c", "m2")).conversation.state == b'{"n":1}'


# -- recovery ----------------------------------------------------------------------------------------------------


async def test_what_has_no_end_is_unfinished(journal: Journal) -> None:
    """After a stop, exactly the messages without a turn's end are listed, in order, with their conversation."""
    worker = await journal.open()
    for n in range(1, 6):
        await worker.append("c", f"m{n}")
    await worker.end("c", 2)
    await worker.end("c", 4)
    await journal.aclose()
    worker = await journal.open(start=False)
    assert [(m.id, m.seq, record.id) for m, record in await worker.backend.unfinished()] == [
        ("m1", 1, "c"), ("m3", 3, "c"), ("m5", 5, "c"),
    ]  # fmt: skip
    assert worker.heard.begun == []


async def test_what_was_open_is_begun_again_at_the_next_start(journal: Journal) -> None:
    """A start hands out what has no end, in order, as not opened anew and with its record, and says how many."""
    worker = await journal.open()
    for n in range(60):
        await worker.append(f"c{n % 3}", f"m{n}", channel="web")
    for n in range(1, 20, 2):
        await worker.end("c1", n)
    await worker.end("c2", 1, changed=ConversationRecord("c2", "web", state=b'{"n":1}'))
    await journal.aclose()
    worker = await journal.open(start=False)
    assert await worker.start() == 49
    assert worker.heard.seqs("c0") == list(range(1, 21))
    assert worker.heard.seqs("c1") == list(range(2, 21, 2))
    assert worker.heard.seqs("c2") == list(range(2, 21))
    assert {begun.record.state for begun in worker.heard.begun if begun.record.id == "c2"} == {b'{"n":1}'}
    assert {begun.record.channel for begun in worker.heard.begun} == {"web"}
    ended = await worker.end("c0", 1, reply("c0", "m0", "r"))
    assert ended is not None
    assert ended[0].seq == 21
    assert (await worker.append("c0", "next")).seq == 22
    assert (await worker.append("c0", "m3")).duplicate


async def test_what_was_begun_before_a_stop_says_so(journal: Journal) -> None:
    """A turn that was begun by the worker before is its second attempt, and opens nothing."""
    worker = await journal.open()
    await worker.append("c", "m")
    worker = await journal.open(again=True)
    assert [(begun.attempt, begun.opened) for begun in worker.heard.begun] == [(2, False)]


async def test_a_reply_that_is_not_confirmed_is_handed_out_again(journal: Journal) -> None:
    """Replies to be delivered are handed out at each start until their channel has them, in order."""
    worker = await journal.open()
    for n in range(1, 4):
        await worker.append("c", f"m{n}", channel="hook")
    for n in range(1, 4):
        await worker.end("c", n, reply("c", f"m{n}", f"r{n}"), deliver=n != 2)
    await worker.backend.post(reply("c", None, "r4"), deliver=True)
    assert [one.id for one, _ in await worker.backend.undelivered()] == ["r1", "r3", "r4"]
    worker = await journal.open(again=True)
    assert [(one.id, one.seq) for one in worker.heard.redelivered] == [("r1", 4), ("r3", 6), ("r4", 7)]
    await worker.backend.delivered("c", 6)
    await worker.backend.delivered("c", 6)
    worker = await journal.open(again=True)
    assert [one.id for one in worker.heard.redelivered] == ["r1", "r4"]


async def test_a_reply_outside_a_turn_needs_a_conversation(backend: Worker) -> None:
    """Posting into a conversation in which nothing was said keeps nothing."""
    assert await backend.backend.post(reply("c", None), deliver=True) is None
    assert await backend.backend.record("c") is None
    assert await backend.backend.undelivered() == []
    await backend.append("c", "m1")
    posted = await backend.backend.post(reply("c", None), deliver=True)
    assert posted is not None
    assert posted.seq == 2
    assert [(one.id, record.id) for one, record in await backend.backend.undelivered()] == [("r1", "c")]
    await backend.backend.delivered("c", 2)
    assert await backend.backend.undelivered() == []


# -- reading -----------------------------------------------------------------------------------------------------


async def test_reading_an_unknown_conversation_is_none(backend: Worker) -> None:
    """Nothing said is None, and not an empty record."""
    assert await backend.backend.read("never", 0, 10) is None
    assert await backend.backend.read("never", 5, 10) is None
    assert await backend.backend.record("never") is None
    assert await backend.backend.history("never", 5, 10) == []


async def test_reading_goes_on_behind_a_seq(backend: Worker) -> None:
    """A read gives what is behind *after*, at most *limit*, and nothing (not None) at the end."""
    for n in range(1, 11):
        await backend.append("c", f"m{n}")
    for after, limit, expected in ((0, 3, [1, 2, 3]), (3, 3, [4, 5, 6]), (8, 10, [9, 10]), (10, 10, []), (99, 1, [])):
        entries = await backend.backend.read("c", after, limit)
        assert entries is not None
        assert [entry.seq for entry in entries] == expected


async def test_history_is_the_newest_oldest_first(backend: Worker) -> None:
    """History gives the newest entries below a seq, oldest first."""
    for n in range(1, 11):
        await backend.append("c", f"m{n}")
    history = backend.backend.history
    for before, limit, expected in ((8, 3, [5, 6, 7]), (3, 10, [1, 2]), (1, 10, []), (99, 2, [9, 10])):
        assert [entry.seq for entry in await history("c", before, limit)] == expected


async def test_entries_come_back_as_they_were(journal: Journal) -> None:
    """A message and a reply are read as they were written, with their seq."""
    said = Message("m", "c", 0, "hi", metadata={"a": [1, None, {"b": "ü"}]}, at=time.time())
    answered = StoredReply("r", "c", 0, "m", "answer", "faq", 7, {"x": 1.5}, time.time())
    worker = await journal.open()
    appended = await worker.backend.append(said, channel="", locale=None)
    await worker.backend.finish(TurnEnd("c", 1, (answered,), to="m", fence=appended.fence))
    worker = await journal.open(again=True)
    found = await entries_of(worker, "c")
    assert found == [
        Message("m", "c", 1, "hi", metadata=said.metadata, at=said.at),
        StoredReply("r", "c", 2, "m", "answer", "faq", 7, {"x": 1.5}, answered.at),
    ]


async def test_keys_belong_to_their_plugin(journal: Journal) -> None:
    """Keys of one plugin are not another's; a prefix is a prefix and no pattern; None deletes."""
    worker = await journal.open()
    store = worker.backend
    for plugin, key in (("a", "x%1"), ("a", "x_2"), ("a", "x*3"), ("a", "y"), ("b", "x"), ("a}", "z"), ("a", "ü🙂")):
        await store.kv_set(plugin, key, plugin.encode() + b"\0\xff")
    assert await store.kv_keys("a", "x") == ["x%1", "x*3", "x_2"]
    assert await store.kv_keys("a", "x%") == ["x%1"]
    assert await store.kv_keys("a", "x*") == ["x*3"]
    assert await store.kv_keys("a}", "") == ["z"]
    await store.kv_set("a", "y", None)
    await store.kv_set("a", "never", None)
    store = (await journal.open(again=True)).backend
    assert await store.kv_get("a", "y") is None
    assert await store.kv_get("b", "x") == b"b\0\xff"
    assert await store.kv_get("a", "ü🙂") == b"a\0\xff"
    assert await store.kv_keys("a", "") == ["x%1", "x*3", "x_2", "ü🙂"]


# -- faults ------------------------------------------------------------------------------------------------------


async def test_a_bad_write_harms_nobody_elses(backend: Worker) -> None:
    """A write that can't be kept fails alone; those of the same commit are kept."""
    futures = [backend.append("c", f"m{n}") for n in range(5)]
    bad = backend.append("bad", "m", channel="\ud800")
    futures += [backend.append("c", f"m{n}") for n in range(5, 10)]
    assert [(await future).seq for future in futures] == list(range(1, 11))
    with pytest.raises(UnicodeEncodeError):
        await bad
    assert await backend.backend.record("bad") is None


@pytest.mark.parametrize("what", ["assignee", "locale", "key", "key read", "plugin"])
async def test_text_that_utf8_can_not_say_harms_nobody_elses(backend: Worker, what: str) -> None:
    """A lone surrogate in what a plugin left or asked for fails alone, wherever it stands."""
    await backend.append("c", "m0")
    before = backend.append("c", "m1")
    store = backend.backend

    async def go_wrong() -> None:
        if what in ("assignee", "locale"):
            locale, assignee = ("\ud800", None) if what == "locale" else (None, "\ud800")
            await backend.end("c", 1, changed=ConversationRecord("c", "", locale, assignee))
        elif what == "key":
            await store.kv_set("p", "\ud800", b"1")
        elif what == "key read":
            await store.kv_get("p", "\ud800")
        else:
            await store.kv_set("\ud800", "k", b"1")

    bad = asyncio.ensure_future(go_wrong())
    await asyncio.sleep(0)
    after = backend.append("c", "m2")
    async with asyncio.timeout(5):
        assert (await before).seq == 2
        assert (await after).seq == 3
        with pytest.raises(UnicodeEncodeError):
            await bad
    assert (await backend.append("c", "m3")).seq == 4
    assert await backend.end("c", 1) == ()


async def test_closing_keeps_what_was_asked_before(journal: Journal) -> None:
    """What was asked for before the close is on disk after it; what comes after is refused."""
    worker = await journal.open()
    futures = [worker.append("c", f"m{n}") for n in range(100)]
    await journal.aclose()
    assert [(await future).seq for future in futures] == list(range(1, 101))
    with pytest.raises(BackendUnavailable):
        await worker.append("c", "late")
    worker = await journal.open()
    assert len(await entries_of(worker, "c")) == 100


# -- retention ---------------------------------------------------------------------------------------------------


async def test_a_purge_deletes_whole_old_conversations(journal: Journal) -> None:
    """What has been silent since the date goes with all that was said; what spoke since, or has an open turn, stays."""
    worker = await journal.open()
    now = time.time()
    old, fresh = now - 3 * 86400, now
    for name, at, ended in (("old", old, True), ("fresh", fresh, True), ("open", old, False)):
        await worker.append(name, "m", at=at)
        if ended:
            await worker.end(name, 1, StoredReply("r", name, 0, "m", "x", "p", 1, {}, at), deliver=True)
    assert await worker.backend.purge(now - 500) == 1
    assert await worker.backend.read("old", 0, 10) is None
    assert await worker.backend.record("old") is None
    assert await worker.backend.history("old", 9, 9) == []
    assert [record.id for _, record in await worker.backend.undelivered()] == ["fresh"]
    assert await worker.backend.read("fresh", 0, 10)
    assert await worker.backend.read("open", 0, 10)
    assert await worker.backend.purge(now - 500) == 0
    again = await worker.append("old", "m2", at=now)
    assert (again.seq, again.duplicate, again.opened) == (1, False, True)
    worker = await journal.open(again=True)
    assert [(one.conversation, one.id) for one in worker.heard.redelivered] == [("fresh", "r")]


async def test_a_purged_conversation_forgets_its_ids(backend: Worker) -> None:
    """A message of a conversation that was purged is new when it comes again: there is nothing to point at."""
    now = time.time()
    await backend.append("c", "m", at=now - 1000)
    await backend.end("c", 1)
    assert await backend.backend.purge(now - 500) == 1
    again = await backend.append("c", "m", at=now)
    assert (again.seq, again.duplicate, again.opened) == (1, False, True)


async def test_a_reply_is_something_said(backend: Worker) -> None:
    """A conversation in which a turn ended or a reply was posted since the date stays, however old its messages are."""
    now = time.time()
    for name in ("ended", "posted", "silent"):
        await backend.append(name, "m", at=now - 1000)
    await backend.end("ended", 1, reply("ended", "m"))
    await backend.end("posted", 1)
    await backend.end("silent", 1)
    await backend.backend.post(reply("posted", None), deliver=False)
    assert await backend.backend.purge(now - 500) == 1
    assert await backend.backend.record("ended") is not None
    assert await backend.backend.record("posted") is not None


async def test_a_purge_goes_through_many_conversations(backend: Worker) -> None:
    """A purge of more conversations than one step takes deletes them all, also behind many that stay."""
    old = time.time() - 1000
    await asyncio.gather(*(backend.append(f"c{n:04}", "m", at=old + n / 100) for n in range(2400)))
    await wait_until(lambda: len(backend.heard.begun) == 2400, "all are begun")
    await asyncio.gather(*(backend.end(f"c{n:04}", 1) for n in range(2000, 2400)))
    assert await backend.backend.purge(time.time() - 500) == 400
    assert len(await backend.backend.unfinished()) == 2000
