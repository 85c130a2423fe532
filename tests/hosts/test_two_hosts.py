"""The visitor's socket is on one host and the turn on another: every promise of the doors holds all the same."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.hosts.conftest import Hosts, StartHosts, backend_of, settled
from tests.redis_servers import RedisServer
from tests.web.test_promises import connect, messages_url, next_frame, post
from tests.web.visitors import sse_events

from conftest import Desk, wait_until
from hotdesk.backend import Outcome
from hotdesk.chat import elsewhere


async def open_gate(desk: Desk, name: str = "") -> None:
    async with desk.http.get(f"{desk.url}/p/talker/open/{name}") as response:
        assert response.status == 200, await response.text()


async def turn_runs(desk: Desk, conversation: str, id: str) -> None:
    """Wait until *desk* runs the turn of a message."""

    def runs() -> bool:
        turn = desk.host.turns.find(conversation, id)
        return turn is not None and turn.task is not None

    await wait_until(runs, f"the turn of {id} runs")


async def test_a_reply_comes_wherever_the_turn_ran(hosts: Hosts) -> None:
    """A message given to the host that does not own its conversation is answered by the other, to who waits here."""
    conversation = hosts.owned_by(hosts.a)
    for number in range(1, 6):
        said = await hosts.b.say(f"hello {number}", conversation)
        assert [reply["text"] for reply in said["replies"]] == [f"heard hello {number}"]
        assert (said["seq"], said["replies"][0]["seq"]) == (2 * number - 1, 2 * number)
    assert await hosts.a.record(conversation) == await hosts.b.record(conversation)


async def test_a_websocket_hears_chunks_and_reply_of_another_host(hosts: Hosts) -> None:
    """Over the host that does not own the conversation: accepted, every chunk in order, one reply."""
    conversation = hosts.owned_by(hosts.a)
    async with connect(hosts.b, conversation) as ws:
        for number in range(5):
            await ws.send_json({"type": "message", "id": f"m{number}", "text": "words one two three"})
            frames: list[dict[str, Any]] = []
            while not frames or frames[-1]["type"] != "reply":
                frames.append(await ws.receive_json(timeout=10))
            assert [frame["type"] for frame in frames] == ["accepted", *["chunk"] * (len(frames) - 2), "reply"]
            assert "".join(frame["text"] for frame in frames[1:-1]) == "one two three "
            assert frames[-1]["text"] == "one two three "
            assert frames[-1]["to"] == f"m{number}"


async def test_a_stream_of_its_own_turn_comes_from_another_host(hosts: Hosts) -> None:
    """`Accept: text/event-stream` at the host that does not run the turn: accepted, chunks, reply, done."""
    conversation = hosts.owned_by(hosts.a)
    async with hosts.b.http.post(
        messages_url(hosts.b, conversation), json={"text": "words a b", "id": "m"},
        headers={"Accept": "text/event-stream"},
    ) as response:  # fmt: skip
        events = [event async for event in sse_events(response)]
    kinds = [event.kind for event in events]
    assert kinds[0] == "accepted"
    assert kinds[-2:] == ["reply", "done"]
    assert "".join(event.data["text"] for event in events if event.kind == "chunk") == "a b "
    assert events[-2].data["text"] == "a b "


async def test_readers_of_every_host_hear_everything_once(hosts: Hosts) -> None:
    """What is said over either host reaches a reader of each: every seq once, in order."""
    conversation = hosts.owned_by(hosts.a)
    heard: dict[str, list[int]] = {"a": [], "b": []}

    async def listen(name: str, desk: Desk) -> None:
        url = f"{desk.url}/v1/conversations/{conversation}/events"
        async with desk.http.get(url, params={"after": "0"}) as response:
            async for event in sse_events(response):
                if event.kind in ("message", "reply"):
                    heard[name].append(event.data["seq"])

    listening = [asyncio.ensure_future(listen("a", hosts.a)), asyncio.ensure_future(listen("b", hosts.b))]
    for number in range(20):
        await post((hosts.a, hosts.b)[number % 2], {"text": f"hello {number}"}, conversation)
    await wait_until(lambda: all(len(seqs) >= 40 for seqs in heard.values()), "both heard all")
    for task in listening:
        task.cancel()
    assert heard == {"a": list(range(1, 41)), "b": list(range(1, 41))}


async def test_reconnecting_to_another_host_resumes_exactly(hosts: Hosts) -> None:
    """`after=` on the other host gives exactly the replies that were missed, and then those that come."""
    conversation = hosts.owned_by(hosts.a)
    async with connect(hosts.a, conversation) as ws:
        await ws.send_json({"type": "message", "text": "one"})
        last = (await next_frame(ws, "reply"))["seq"]
    for text in ("two", "three"):
        await hosts.a.say(text, conversation)
    async with connect(hosts.b, conversation, after=last) as ws:
        assert [(await next_frame(ws, "reply"))["text"] for _ in range(2)] == ["heard two", "heard three"]
        await hosts.a.say("four", conversation)
        assert (await next_frame(ws, "reply"))["text"] == "heard four"


async def test_the_same_id_over_both_hosts_is_one_message(hosts: Hosts) -> None:
    """Ten times the same message at once over two hosts: one message, one turn, and everyone gets its reply."""
    conversation = hosts.owned_by(hosts.a)
    answers = await asyncio.gather(
        *((hosts.a, hosts.b)[number % 2].say("count", conversation, id="m") for number in range(10))
    )
    assert {answer["seq"] for answer in answers} == {1}
    assert {answer["replies"][0]["id"] for answer in answers if answer["replies"]} == {
        (await hosts.a.record(conversation))[1]["id"]
    }
    assert all(len(answer["replies"]) == 1 for answer in answers)
    assert [entry["type"] for entry in await hosts.b.record(conversation)] == ["message", "reply"]


async def test_a_repeat_at_the_other_host_waits_for_the_reply(hosts: Hosts) -> None:
    """A message that is sent again at the other host while its turn runs is answered there, too, when it ends."""
    conversation = hosts.owned_by(hosts.a)
    first = asyncio.ensure_future(hosts.a.say("wait x", conversation, id="m"))
    await turn_runs(hosts.a, conversation, "m")
    again = asyncio.ensure_future(hosts.b.say("wait x", conversation, id="m"))
    await wait_until(lambda: hosts.b.host.elsewhere.live, "the other host follows the turn")
    await open_gate(hosts.a, "x")
    assert (await first)["replies"] == (await again)["replies"] != []


async def test_state_is_one_wherever_messages_come_in(hosts: Hosts) -> None:
    """A conversation's state goes with it, whichever host its messages come in at."""
    conversation = hosts.owned_by(hosts.b)
    texts = [await (hosts.a, hosts.b)[number % 2].reply("count", conversation) for number in range(10)]
    assert texts == [str(number) for number in range(1, 11)]


@pytest.mark.parametrize("door", ["http", "websocket"])
async def test_a_turn_is_cancelled_from_the_other_host(hosts: Hosts, door: str) -> None:
    """A cancel at the host that does not run the turn reaches the one that does; one of nothing is `not_found`."""
    conversation = hosts.owned_by(hosts.a)
    waiting = asyncio.ensure_future(hosts.b.say("wait for ever", conversation, id="m"))
    await turn_runs(hosts.a, conversation, "m")
    if door == "http":
        for id, status in (("m", 202), ("other", 404)):
            async with hosts.b.http.post(f"{messages_url(hosts.b, conversation)}/{id}/cancel") as response:
                assert response.status == status
    else:
        async with connect(hosts.b, conversation) as ws:
            await ws.send_json({"type": "cancel", "to": "other"})
            assert (await next_frame(ws, "error"))["code"] == "not_found"
            await ws.send_json({"type": "cancel", "to": "m"})
            await waiting
    assert (await waiting)["error"]["code"] == "cancelled"


@pytest.mark.parametrize("comes_back", [True, False])
async def test_a_record_that_is_older_than_a_message_tells_no_end_of_it(
    hosts: Hosts, redis: RedisServer, monkeypatch: pytest.MonkeyPatch, comes_back: bool
) -> None:
    """A server that was replaced and does not know it yet knows nothing of the newest messages: nobody hears `done`.

    A message that stays unknown was lost, and who waits for its answer is told so.
    """
    monkeypatch.setattr(elsewhere, "OVERDUE_S", 0.1)
    monkeypatch.setattr(elsewhere, "LOOK_S", 0.05)
    if not comes_back:
        monkeypatch.setattr(elsewhere, "LOST_S", 0.5)
    conversation = hosts.owned_by(hosts.a)
    partition = backend_of(hosts.a).partitions.of(conversation)
    keys = [partition.journal_key(conversation), partition.conversation_key(conversation)]
    events: list[Any] = []

    async def listen() -> None:
        async with hosts.b.http.post(
            messages_url(hosts.b, conversation), json={"text": "wait x", "id": "m"},
            headers={"Accept": "text/event-stream"},
        ) as response:  # fmt: skip
            async for event in sse_events(response):
                events.append(event)  # noqa: PERF401 - looked at while they come

    listening = asyncio.ensure_future(listen())
    await turn_runs(hosts.a, conversation, "m")
    for key in keys:
        await redis.command("RENAME", key, f"{key}:newer")
    if comes_back:
        looked_up: Any = hosts.b.host.elsewhere
        await wait_until(lambda: looked_up._lost_since, "it was looked for, and not found")
        assert [event.kind for event in events] == ["accepted"]
        for key in reversed(keys):
            await redis.command("RENAME", f"{key}:newer", key)
        await open_gate(hosts.a, "x")
        await asyncio.wait_for(listening, 10)
        assert [event.kind for event in events] == ["accepted", "reply", "done"]
    else:
        await asyncio.wait_for(listening, 10)
        assert [event.kind for event in events] == ["accepted", "error", "done"]
        assert events[1].data["code"] == "backend_unavailable"
        assert "lost this message; send it again" in events[1].data["message"]
        await open_gate(hosts.a, "x")


@pytest.mark.parametrize("at_owner", [True, False])
async def test_a_message_that_was_lost_and_is_sent_again_is_answered(
    hosts: Hosts, redis: RedisServer, at_owner: bool
) -> None:
    """While the turn of the lost one runs still: its answer can be kept no more, so it is given up for a new one."""
    conversation = hosts.owned_by(hosts.a)
    partition = backend_of(hosts.a).partitions.of(conversation)
    first = asyncio.ensure_future(hosts.b.say("wait x", conversation, id="m"))
    await turn_runs(hosts.a, conversation, "m")
    lost = hosts.a.host.turns.find(conversation, "m")
    for key in (partition.journal_key(conversation), partition.conversation_key(conversation), partition.keys["in"]):
        await redis.command("DEL", key)
    await redis.command("HINCRBY", partition.own, "n", -1)
    await backend_of(hosts.a).partitions.resync(partition)
    again = asyncio.ensure_future((hosts.a if at_owner else hosts.b).say("wait x", conversation, id="m"))
    await wait_until(
        lambda: hosts.a.host.turns.find(conversation, "m") not in (lost, None), "it is run again", timeout_s=30
    )
    await open_gate(hosts.a, "x")
    for said in (await first, await again):
        assert [reply["text"] for reply in said["replies"]] == ["heard wait x"]
    assert [entry["type"] for entry in await hosts.b.record(conversation)] == ["message", "reply"]
    assert hosts.a.host.turns.live == 0
    await wait_until(lambda: not partition.open, "nothing is held open")
    assert await hosts.b.reply("hello", conversation) == "heard hello"


async def test_an_answer_that_comes_before_the_word_that_its_message_was_kept(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The owner is told at once, and may be done before who took the message in hears of it: the stream has it all."""
    conversation = hosts.owned_by(hosts.a)
    backend: Any = hosts.b.host.backend
    append, loop = backend.append, asyncio.get_running_loop()

    def append_late(*args: Any, **options: Any) -> asyncio.Future[Any]:
        late: asyncio.Future[Any] = loop.create_future()
        append(*args, **options).add_done_callback(lambda done: loop.call_later(0.5, late.set_result, done.result()))
        return late

    monkeypatch.setattr(backend, "append", append_late)
    async with hosts.b.http.post(
        messages_url(hosts.b, conversation), json={"text": "hello", "id": "m"}, headers={"Accept": "text/event-stream"}
    ) as response:
        events = [event async for event in sse_events(response)]
    assert [event.kind for event in events] == ["accepted", "reply", "done"]
    assert events[1].data["text"] == "heard hello"


async def test_an_answer_that_was_lost_is_no_end_without_one(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    """One server knows that a message was answered, and the next, which took its place, does not: try again."""
    conversation = hosts.owned_by(hosts.a)
    await hosts.a.say("hello", conversation, id="m")

    async def outcome(conversation: str, seq: int, message_id: str) -> Outcome:
        return Outcome(False, ())

    monkeypatch.setattr(hosts.a.host.backend, "outcome", outcome)
    async with hosts.a.http.post(
        messages_url(hosts.a, conversation), json={"text": "hello", "id": "m"}, headers={"Accept": "text/event-stream"}
    ) as response:
        assert response.status == 503
        assert (await response.json())["error"]["code"] == "backend_unavailable"
    monkeypatch.undo()
    assert (await hosts.a.say("hello", conversation, id="m"))["replies"][0]["text"] == "heard hello"


async def test_a_turn_whose_message_was_lost_says_so(hosts: Hosts, redis: RedisServer) -> None:
    """Its reply can't be kept: who waits is told to send it again, and not that there is no reply."""
    conversation = hosts.owned_by(hosts.a)
    partition = backend_of(hosts.a).partitions.of(conversation)
    async with connect(hosts.a, conversation) as ws:
        await ws.send_json({"type": "message", "id": "m", "text": "wait x"})
        await turn_runs(hosts.a, conversation, "m")
        await redis.command("DEL", partition.conversation_key(conversation), partition.keys["in"])
        await open_gate(hosts.a, "x")
        error = await next_frame(ws, "error")
    assert (error["code"], error["to"]) == ("backend_unavailable", "m")
    assert error["message"] == "the journal lost this message; send it again"


async def test_who_leaves_cancels_a_turn_of_another_host(start_hosts: StartHosts) -> None:
    """With on_leave = "cancel", the last listener's going cancels the turn, also where it runs elsewhere."""
    hosts = await start_hosts(on_leave="cancel")
    conversation = hosts.owned_by(hosts.a)
    async with connect(hosts.b, conversation) as ws:
        await ws.send_json({"type": "message", "id": "m", "text": "wait for ever"})
        await turn_runs(hosts.a, conversation, "m")
    await wait_until(lambda: hosts.a.host.turns.live == 0, "the turn is cancelled")


async def test_who_leaves_one_host_cancels_nothing_that_is_heard_at_another(start_hosts: StartHosts) -> None:
    """With on_leave = "cancel", a turn goes on as long as anybody on any host listens."""
    hosts = await start_hosts(on_leave="cancel")
    conversation = hosts.owned_by(hosts.a)
    async with connect(hosts.b, conversation) as staying:
        async with connect(hosts.a, conversation) as ws:
            await ws.send_json({"type": "message", "id": "m", "text": "wait x"})
            await turn_runs(hosts.a, conversation, "m")
        async with connect(hosts.a, conversation):
            pass
        assert await hosts.a.reply("hello", hosts.owned_by(hosts.a)) == "heard hello"  # time for a cancel to come about
        await open_gate(hosts.a, "x")
        assert (await next_frame(staying, "reply"))["text"] == "heard wait x"


async def test_a_stop_hands_over_and_nobody_notices(start_hosts: StartHosts, start_desk: Any) -> None:
    """A host that stops gives its conversations away: who waits elsewhere gets the reply, and new ones go on."""
    hosts = await start_hosts(stop_timeout_s=0.3)
    conversation = hosts.owned_by(hosts.a)
    waiting = asyncio.ensure_future(hosts.b.say("wait x", conversation, id="m"))
    await turn_runs(hosts.a, conversation, "m")
    stopping = asyncio.ensure_future(backend_of(hosts.a).hand_over(0.2))
    await turn_runs(hosts.b, conversation, "m")
    await stopping
    await open_gate(hosts.b, "x")
    assert [reply["text"] for reply in (await waiting)["replies"]] == ["heard wait x"]
    assert all(partition.mine for partition in backend_of(hosts.b).partitions.all)
    assert await hosts.b.reply("more", conversation) == "heard more"


async def test_a_third_host_gets_its_share(start_hosts: StartHosts, start_desk: Any) -> None:
    """A host that comes takes its share at quiet moments, while messages flow: none is lost, doubled or reordered."""
    hosts = await start_hosts()
    names = [f"k{number}" for number in range(20)]
    over = asyncio.Event()
    sent: dict[str, list[str]] = {name: [] for name in names}

    async def speak(number: int, name: str) -> None:
        while not over.is_set():
            id = f"{name}-{len(sent[name])}"
            sent[name].append(id)
            await (hosts.a, hosts.b)[(number + len(sent[name])) % 2].say("count", name, id=id)

    speaking = [asyncio.ensure_future(speak(number, name)) for number, name in enumerate(names)]
    await wait_until(lambda: all(len(ids) > 5 for ids in sent.values()), "traffic flows")
    third = await start_desk(backend=hosts.a.host.config.backend, folder=hosts.a.folder)
    await settled(hosts.a, hosts.b, third)
    assert any(partition.mine for partition in backend_of(third).partitions.all)
    target = {name: len(ids) + 5 for name, ids in sent.items()}
    await wait_until(lambda: all(len(sent[name]) > target[name] for name in names), "traffic goes on")
    over.set()
    await asyncio.gather(*speaking)
    for name in names:
        record = await third.record(name)
        assert [entry["id"] for entry in record if entry["type"] == "message"] == sent[name]
        assert [entry["to"] for entry in record if entry["type"] == "reply"] == sent[name]
        assert [entry["text"] for entry in record if entry["type"] == "reply"] == [
            str(number) for number in range(1, len(sent[name]) + 1)
        ]
