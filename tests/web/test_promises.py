"""What every door promises: on disk before `accepted`, one message an id, in order, and nothing missed."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import aiohttp
from tests.web.visitors import open_desk, sse_events

from conftest import Desk, StartDesk, echo, wait_until

GATED = """
import asyncio
from hotdesk_sdk import hookimpl

OPEN = asyncio.Event()

@hookimpl
async def routes():
    async def open_gate(request):
        OPEN.set()
        return "open"
    return [("GET", "/open", open_gate)]

@hookimpl
async def respond(turn):
    if turn.text.startswith("wait"):
        await OPEN.wait()
    return f"heard {turn.text}"
"""

STREAM = """
from hotdesk_sdk import hookimpl

@hookimpl
async def respond(turn):
    for word in turn.text.split():
        yield word + " "
"""


def rows(desk: Desk, query: str) -> list[tuple[Any, ...]]:
    """What another program sees in the journal's file."""
    with closing(sqlite3.connect(f"file:{desk.host.config.data}/hotdesk.db?mode=ro", uri=True)) as db:
        return db.execute(query).fetchall()


def messages_url(desk: Desk, conversation: str = "c") -> str:
    return f"{desk.url}/v1/conversations/{conversation}/messages"


async def post(desk: Desk, body: dict[str, Any], conversation: str = "c", **query: str) -> tuple[int, dict[str, Any]]:
    async with desk.http.post(messages_url(desk, conversation), json=body, params=query) as response:
        return response.status, await response.json()


def connect(desk: Desk, conversation: str = "c", **query: Any) -> Any:
    parameters = {"conversation": conversation, **{name: str(value) for name, value in query.items()}}
    return desk.http.ws_connect(f"{desk.url}/v1/ws", params=parameters)


async def next_frame(ws: aiohttp.ClientWebSocketResponse, kind: str) -> dict[str, Any]:
    """The next frame of *kind*; others before it are let go."""
    while True:
        frame: dict[str, Any] = await ws.receive_json(timeout=10)
        if frame["type"] == kind:
            return frame


async def open_gate(desk: Desk) -> None:
    async with desk.http.get(f"{desk.url}/p/gated/open") as response:
        assert response.status == 200


# -- accepted means on disk ------------------------------------------------------------------------------------


async def test_accepted_over_http_is_on_disk(start_desk: StartDesk) -> None:
    """When a POST is answered 202, another connection to the file already reads the message."""
    desk = await start_desk({"gated.py": GATED})
    for number in range(20):
        status, answer = await post(desk, {"text": "wait", "id": f"m{number}"}, f"c{number}")
        assert (status, answer["status"]) == (202, "accepted")
        assert rows(desk, f"SELECT seq FROM journal WHERE id = 'm{number}' AND kind = 0") == [(1,)]
    await open_gate(desk)


async def test_accepted_over_a_websocket_is_on_disk(start_desk: StartDesk) -> None:
    """When `accepted` comes over a WebSocket, another connection to the file already reads the message."""
    desk = await start_desk({"gated.py": GATED})
    async with connect(desk) as ws:
        for number in range(20):
            await ws.send_json({"type": "message", "id": f"m{number}", "text": "wait"})
            accepted = await next_frame(ws, "accepted")
            assert accepted == {"type": "accepted", "id": f"m{number}", "seq": number + 1}
            assert rows(desk, f"SELECT seq FROM journal WHERE id = 'm{number}'") == [(number + 1,)]
        await open_gate(desk)


async def test_accepted_over_events_is_on_disk(start_desk: StartDesk) -> None:
    """When the event `accepted` comes, another connection to the file already reads the message."""
    desk = await start_desk({"gated.py": GATED})
    async with desk.http.post(
        messages_url(desk), json={"text": "wait", "id": "m"}, headers={"Accept": "text/event-stream"}
    ) as response:
        events = sse_events(response)
        first = await anext(events)
        assert (first.kind, first.data["seq"]) == ("accepted", 1)
        assert rows(desk, "SELECT seq FROM journal WHERE id = 'm'") == [(1,)]
        await open_gate(desk)
        assert [event.kind async for event in events] == ["reply", "done"]


async def test_a_reply_is_on_disk_before_anyone_hears_it(desk: Desk) -> None:
    """When a reply is heard, another connection reads it, and its turn is no longer open."""
    async with connect(desk) as ws:
        for number in range(20):
            await ws.send_json({"type": "message", "text": "hi"})
            reply = await next_frame(ws, "reply")
            assert rows(desk, f"SELECT seq FROM journal WHERE id = '{reply['id']}'") == [(2 * number + 2,)]
            assert rows(desk, "SELECT count(*) FROM open_turns") == [(0,)]


# -- the same id twice is one message ----------------------------------------------------------------------------


async def test_the_same_id_through_every_door_is_one_message(desk: Desk) -> None:
    """A repeat through HTTP, events or WebSocket gets the first one's seq and reply; the bot is asked once."""
    first = await desk.say("one", id="m")
    again = await desk.say("another text", id="m")
    assert (again["seq"], again["replies"]) == (first["seq"], first["replies"])
    async with desk.http.post(
        messages_url(desk), json={"text": "x", "id": "m"}, headers={"Accept": "text/event-stream"}
    ) as response:
        events = [event async for event in sse_events(response)]
    assert [event.kind for event in events] == ["accepted", "reply", "done"]
    assert (events[0].data["seq"], events[1].data) == (1, first["replies"][0])
    async with connect(desk) as ws:
        await ws.send_json({"type": "message", "text": "y", "id": "m"})
        assert await ws.receive_json() == {"type": "accepted", "id": "m", "seq": 1}
        assert await ws.receive_json() == first["replies"][0]
    assert len(await desk.record()) == 2
    assert desk.host.metrics.registry.get_sample_value("hotdesk_duplicates_total") == 3


async def test_the_same_id_after_a_restart_is_one_message(tmp_path: Path) -> None:
    """An id that was answered before the restart gets that answer after it, from the journal."""
    async with open_desk(tmp_path, {"echo.py": echo(1)}) as desk:
        first = await desk.say("one", id="m")
    async with open_desk(tmp_path, {"echo.py": echo(2)}) as desk:
        again = await desk.say("one", id="m")
        assert (again["seq"], again["replies"]) == (first["seq"], first["replies"])
        assert await desk.reply("two") == "2: two"


async def test_the_same_id_fifty_times_at_once_is_one_message(desk: Desk) -> None:
    """Fifty at once with one id, through three doors: one message, one reply, and everyone hears it."""

    async def over_http() -> Any:
        return (await desk.say("hi", id="m"))["replies"]

    async def over_events() -> Any:
        async with desk.http.post(
            messages_url(desk), json={"text": "hi", "id": "m"}, headers={"Accept": "text/event-stream"}
        ) as response:
            return [event.data async for event in sse_events(response) if event.kind == "reply"]

    async def over_websocket() -> Any:
        async with connect(desk) as ws:
            await ws.send_json({"type": "message", "text": "hi", "id": "m"})
            return [await next_frame(ws, "reply")]

    heard = await asyncio.gather(*([over_http() for _ in range(20)] + [over_events() for _ in range(15)]),
                                 *[over_websocket() for _ in range(15)])  # fmt: skip
    message, reply = await desk.record()
    assert (message["id"], reply["to"]) == ("m", "m")
    assert all(replies == [reply] for replies in heard)


async def test_the_same_id_in_another_conversation_is_another_message(desk: Desk) -> None:
    """Ids count within their conversation."""
    assert await desk.reply("a", "one", id="m") == "1: a"
    assert await desk.reply("b", "two", id="m") == "1: b"


async def test_a_repeat_while_the_turn_runs_waits_for_the_same_reply(start_desk: StartDesk) -> None:
    """A repeat that comes before the end waits for the first one's turn, and there is one reply."""
    desk = await start_desk({"gated.py": GATED})
    await post(desk, {"text": "wait", "id": "m"})
    waiting = [asyncio.ensure_future(desk.say("wait", id="m")) for _ in range(5)]
    await wait_until(
        lambda: desk.host.metrics.registry.get_sample_value("hotdesk_duplicates_total") == 5, "five repeats are taken"
    )
    await open_gate(desk)
    answers = await asyncio.gather(*waiting)
    assert len({answer["replies"][0]["id"] for answer in answers}) == 1


# -- order, seq and paging ---------------------------------------------------------------------------------------


async def test_one_conversation_is_in_order(desk: Desk) -> None:
    """Two hundred messages sent without waiting are numbered, answered and told in the order they were sent."""
    async with connect(desk) as ws:
        for number in range(200):
            await ws.send_json({"type": "message", "id": f"m{number}", "text": str(number)})
        replies = [await next_frame(ws, "reply") for _ in range(200)]
    assert [reply["text"] for reply in replies] == [f"1: {number}" for number in range(200)]
    record = await desk.record()
    assert [entry["id"] for entry in record if entry["type"] == "message"] == [f"m{number}" for number in range(200)]


async def test_seq_is_shared_and_has_no_gap(desk: Desk) -> None:
    """In every conversation, messages and replies together count 1, 2, 3 …"""
    await asyncio.gather(*(desk.say(str(number), f"c{number % 5}") for number in range(200)))
    for number in range(5):
        record = await desk.record(f"c{number}")
        assert [entry["seq"] for entry in record] == list(range(1, 81))
        assert [entry["type"] for entry in record].count("reply") == 40


async def test_next_pages_through_the_record(desk: Desk) -> None:
    """`next` goes into `after` until it is null; together the pages are the record, each entry once."""
    for number in range(10):
        await desk.say(str(number))
    pages, after = [], 0
    while after is not None:
        async with desk.http.get(messages_url(desk), params={"after": str(after), "limit": "7"}) as response:
            page = await response.json()
        pages.append([entry["seq"] for entry in page["messages"]])
        after = page["next"]
    assert pages == [[1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [15, 16, 17, 18, 19, 20]]
    async with desk.http.get(messages_url(desk), params={"after": "20"}) as response:
        assert await response.json() == {"messages": [], "next": None}
    async with desk.http.get(messages_url(desk), params={"limit": "20"}) as response:
        assert (await response.json())["next"] is None


async def test_what_came_with_a_message_is_kept(desk: Desk) -> None:
    """Sender, attachments and metadata come back from the record as they were sent."""
    sent = {
        "text": "",
        "id": "m",
        "sender": {"id": "u1", "name": "Ann"},
        "attachments": [
            {"type": "image", "url": "https://x/y"},
            {"type": "image", "url": "http://shop.example.com:8080/a.png?b=c", "mime": "image/png"},
        ],
        "metadata": {"a": [1, 2.5, None, {"b": "\0"}], "big": 2**60},
    }
    await post(desk, sent, wait="5")
    message = (await desk.record())[0]
    assert {name: message[name] for name in sent} == sent
    assert message["type"] == "message"


# -- waiting -----------------------------------------------------------------------------------------------------


async def test_wait_gives_202_when_the_time_is_up(start_desk: StartDesk) -> None:
    """`?wait` with a slow bot answers 202 when the time is up; the turn goes on, and its reply is in the record."""
    desk = await start_desk({"gated.py": GATED})
    status, answer = await post(desk, {"text": "wait", "id": "m"}, wait="0.05")
    assert status == 202
    assert answer == {"id": "m", "conversation": "c", "seq": 1, "status": "accepted"}
    assert desk.host.turns.live == 1
    await open_gate(desk)
    await wait_until(lambda: desk.host.turns.live == 0, "the turn ended")
    assert (await desk.record())[1]["text"] == "heard wait"
    assert (await desk.say("wait", id="m"))["replies"][0]["text"] == "heard wait"


async def test_wait_without_a_bot_has_no_replies(start_desk: StartDesk) -> None:
    """When no plugin answers, `?wait` is 200 with an empty list, and so is a repeat of it."""
    desk = await start_desk()
    assert (await desk.say("hi", id="m"))["replies"] == []
    assert (await desk.say("hi", id="m"))["replies"] == []


# -- events ------------------------------------------------------------------------------------------------------


async def test_a_post_can_stream_its_turn(start_desk: StartDesk) -> None:
    """`Accept: text/event-stream` gives accepted, each chunk with its index, the reply with its seq as id, and done."""
    desk = await start_desk({"stream.py": STREAM})
    async with desk.http.post(
        messages_url(desk), json={"text": "a b c", "id": 'm"\\1'}, headers={"Accept": "text/event-stream"}
    ) as response:
        assert response.headers["Content-Type"] == "text/event-stream"
        events = [event async for event in sse_events(response)]
    assert [event.kind for event in events] == ["accepted", "chunk", "chunk", "chunk", "reply", "done"]
    assert [event.data["index"] for event in events[1:4]] == [0, 1, 2]
    assert all(event.data["to"] == 'm"\\1' for event in events[1:4])
    assert "".join(event.data["text"] for event in events[1:4]) == events[4].data["text"] == "a b c "
    assert (events[4].id, events[4].data["seq"]) == (2, 2)
    assert events[5].data == {"id": 'm"\\1'}


async def test_a_turn_that_fails_is_an_error_event(start_desk: StartDesk) -> None:
    """A refused turn is the event `error` with its code, then `done`; the wait shows the same error."""
    source = "from hotdesk_sdk import hookimpl\n@hookimpl\nasync def respond(turn):\n    raise ValueError('no')\n"
    desk = await start_desk({"bad.py": source, "bad.toml": 'on_failure = "refuse"\n'}, probation_calls=0)
    async with desk.http.post(
        messages_url(desk), json={"text": "x", "id": "m"}, headers={"Accept": "text/event-stream"}
    ) as response:
        events = [event async for event in sse_events(response)]
    assert [event.kind for event in events] == ["accepted", "error", "done"]
    assert (events[1].data["code"], events[1].data["to"]) == ("turn_refused", "m")
    answer = await desk.say("y")
    assert (answer["replies"], answer["error"]["code"]) == ([], "turn_refused")
    async with connect(desk) as ws:
        await ws.send_json({"type": "message", "id": "w", "text": "z"})
        error = await next_frame(ws, "error")
        assert (error["code"], error["to"]) == ("turn_refused", "w")


async def test_events_give_the_record_and_go_on(desk: Desk) -> None:
    """`GET …/events?after=0` gives what was said, then what is said, with the seq as id."""
    await desk.say("one")
    async with desk.http.get(f"{desk.url}/v1/conversations/c/events", params={"after": "0"}) as response:
        events = sse_events(response)
        old = [await anext(events) for _ in range(2)]
        await desk.say("two")
        new = [await anext(events) for _ in range(2)]
    assert [(event.id, event.kind) for event in old + new] == [
        (1, "message"),
        (2, "reply"),
        (3, "message"),
        (4, "reply"),
    ]
    assert [event.data for event in old + new] == await desk.record()


async def test_last_event_id_resumes(desk: Desk) -> None:
    """A reconnecting EventSource sends Last-Event-ID, which goes before `after`, and gets what came later."""
    for text in ("one", "two", "three"):
        await desk.say(text)
    async with desk.http.get(
        f"{desk.url}/v1/conversations/c/events", params={"after": "0"}, headers={"Last-Event-ID": "4"}
    ) as response:
        events = sse_events(response)
        assert [(await anext(events)).id for _ in range(2)] == [5, 6]


async def test_events_without_after_begin_now(desk: Desk) -> None:
    """Without `after` a reader hears only what is said from then on."""
    await desk.say("before")
    async with desk.http.get(f"{desk.url}/v1/conversations/c/events") as response:
        events = sse_events(response)
        await desk.say("now")
        assert [(await anext(events)).id for _ in range(2)] == [3, 4]


# -- the WebSocket -----------------------------------------------------------------------------------------------


async def test_a_ping_is_a_pong(desk: Desk) -> None:
    """The frame `ping` is answered by `pong`."""
    async with connect(desk) as ws:
        await ws.send_json({"type": "ping"})
        assert await ws.receive_json() == {"type": "pong"}


async def test_a_websocket_streams_chunks(start_desk: StartDesk) -> None:
    """Accepted, then chunks with their index, then the reply, which has their whole text."""
    desk = await start_desk({"stream.py": STREAM})
    async with connect(desk) as ws:
        await ws.send_json({"type": "message", "id": "m", "text": "a b"})
        frames = [await ws.receive_json() for _ in range(4)]
    assert frames[:3] == [
        {"type": "accepted", "id": "m", "seq": 1},
        {"type": "chunk", "to": "m", "index": 0, "text": "a "},
        {"type": "chunk", "to": "m", "index": 1, "text": "b "},
    ]
    assert (frames[3]["type"], frames[3]["text"], frames[3]["seq"]) == ("reply", "a b ", 2)


async def test_a_websocket_resumes_with_exactly_what_was_missed(desk: Desk) -> None:
    """Reconnecting with `after=` gives the replies above it, in order and once, and then what is new."""
    for number in range(6):
        await desk.say(str(number))
    async with connect(desk, after=4) as ws:
        missed = [await ws.receive_json() for _ in range(4)]
        await desk.say("new")
        fresh = await ws.receive_json()
    assert [frame["seq"] for frame in missed] == [6, 8, 10, 12]
    assert fresh["seq"] == 14
    async with connect(desk, after=14) as ws:
        await ws.send_json({"type": "ping"})
        assert await ws.receive_json() == {"type": "pong"}


async def test_everyone_in_a_conversation_hears_its_replies(desk: Desk) -> None:
    """A reply reaches every socket of its conversation, and none of another."""
    async with connect(desk) as one, connect(desk) as two, connect(desk, "other") as other:
        await desk.say("hi")
        assert (await one.receive_json())["text"] == (await two.receive_json())["text"] == "1: hi"
        await other.send_json({"type": "ping"})
        assert (await other.receive_json())["type"] == "pong"


async def test_a_reader_that_reconnects_misses_nothing(desk: Desk) -> None:
    """A socket and an event stream that reconnect again and again while 500 messages flow see each entry once."""
    total = 500

    async def speak() -> None:
        for number in range(total):
            await post(desk, {"text": str(number), "id": f"m{number}"})

    async def listen_on_sockets() -> list[int]:
        seen: list[int] = []
        while len(seen) < total:
            async with connect(desk, after=seen[-1] if seen else 0) as ws:
                seen += [(await next_frame(ws, "reply"))["seq"] for _ in range(min(37, total - len(seen)))]
        return seen

    async def listen_to_events() -> list[int]:
        seen: list[int] = []
        while len(seen) < 2 * total:
            headers = {"Last-Event-ID": str(seen[-1])} if seen else {}
            async with desk.http.get(
                f"{desk.url}/v1/conversations/c/events", params={"after": "0"}, headers=headers
            ) as response:
                events = sse_events(response)
                for _ in range(min(61, 2 * total - len(seen))):
                    event = await anext(events)
                    while event.id is None:
                        event = await anext(events)
                    seen.append(event.id)
        return seen

    async with asyncio.timeout(50):
        _, replies, events = await asyncio.gather(speak(), listen_on_sockets(), listen_to_events())
    record = await desk.host.backend.read("c", 0, 2000)
    assert record is not None
    assert events == list(range(1, 2 * total + 1))
    assert replies == [entry.seq for entry in record if hasattr(entry, "to")]


async def test_an_error_reaches_a_reader_that_is_catching_up(start_desk: StartDesk) -> None:
    """An error is in no journal, so a socket that still reads what it missed is told at once."""
    source = (
        "from hotdesk_sdk import hookimpl\n"
        "@hookimpl\nasync def respond(turn):\n"
        "    if turn.text == 'bad':\n        raise ValueError\n"
        "    return 'x' * 2000\n"
    )
    desk = await start_desk({"bad.py": source, "bad.toml": 'on_failure = "refuse"\n'}, probation_calls=0)
    await asyncio.gather(*(desk.say(str(number)) for number in range(400)))
    async with connect(desk, after=0) as ws:
        await ws.send_json({"type": "message", "id": "m", "text": "bad"})
        assert (await next_frame(ws, "error"))["to"] == "m"
