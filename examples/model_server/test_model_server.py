"""Every fault and feature of a script, asked for by a plain HTTP client."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from conftest import nothing_left_behind, wait_until  # noqa: F401

sys.path.insert(0, str(Path(__file__).parent))

from asking import (
    MESSAGES,
    Asking,
    deltas_of,
    events_of,
    make_asking,  # noqa: F401
    texts_of,
)
from model_server import ModelServer, Script

# What is said


async def test_a_stream_has_a_role_words_a_reason_and_an_end(asking: Asking) -> None:
    """The events of an answer are those of the protocol, in its order."""
    async with asking.post(stream=True) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = events_of(await response.read())
    assert deltas_of(events)[0] == {"role": "assistant", "content": ""}
    assert texts_of(events) == ["Hello", " there,", " friend"]
    assert [event["choices"][0]["finish_reason"] for event in events[:-1]] == [None] * 4 + ["stop"]
    assert events[-1] == "[DONE]"
    assert len({event["id"] for event in events[:-1]}) == 1
    assert {event["model"] for event in events[:-1]} == {"m"}
    assert "usage" not in events[0]
    assert (asking.last.sent, asking.last.content, asking.last.finished) == (6, 3, True)


async def test_a_whole_answer_says_the_same(asking: Asking) -> None:
    """Without `stream` the same script comes as one body, with its usage."""
    body = await asking.whole()
    assert body["object"] == "chat.completion"
    [choice] = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello there, friend", "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert body["usage"] == {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13}
    assert asking.last.finished


async def test_every_answer_has_an_id_of_its_own(asking: Asking) -> None:
    """Bytes that were prepared once still carry a new id each time, tool calls too."""
    asking.server.default = Script(tool_calls=[("a", {})])
    first, second = await asking.whole(), await asking.whole()
    assert first["id"] != second["id"]
    ids = [body["choices"][0]["message"]["tool_calls"][0]["id"] for body in (first, second)]
    assert ids[0] != ids[1]


async def test_usage_is_the_last_chunk_where_it_is_asked_for(asking: Asking) -> None:
    """`include_usage` gives null in all chunks and the numbers in one without choices before `[DONE]`."""
    events = await asking.events(Script(text="a b", usage=(7, 2)), stream_options={"include_usage": True})
    assert events[-2]["choices"] == []
    assert events[-2]["usage"] == {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
    assert all(event["usage"] is None for event in events[:-2])


async def test_a_server_can_keep_its_usage_to_itself(asking: Asking) -> None:
    """`usage=False` leaves it out of both kinds of answer."""
    events = await asking.events(Script(usage=False), stream_options={"include_usage": True})
    assert events[-2]["choices"][0]["finish_reason"] == "stop"
    assert "usage" not in await asking.whole(Script(usage=False))


@pytest.mark.parametrize(
    ("script", "texts"),
    [
        (Script(pieces=["He", "llo", " "]), ["He", "llo", " "]),
        (Script(text="abcde", piece_chars=2), ["ab", "cd", "e"]),
        (Script(text="  two  spaces  "), ["  two", "  spaces  "]),
        (Script(text="退款需要三天", piece_chars=1), list("退款需要三天")),
        (Script(text=""), []),
    ],
)
async def test_text_comes_in_the_pieces_that_are_asked_for(asking: Asking, script: Script, texts: list[str]) -> None:
    """Pieces, characters or words; joined they are the text."""
    assert texts_of(await asking.events(script)) == texts


async def test_the_role_can_come_with_null_or_not_at_all(asking: Asking) -> None:
    """Servers differ in their first event."""
    assert deltas_of(await asking.events(Script(role_content=None)))[0] == {"role": "assistant", "content": None}
    assert deltas_of(await asking.events(Script(role_first=False)))[0] == {"content": "Hello"}


@pytest.mark.parametrize("reason", ["length", "content_filter", "tool_calls", "stop"])
async def test_the_finish_reason_is_the_scripts(asking: Asking, reason: str) -> None:
    """Any reason, in both kinds of answer."""
    assert (await asking.events(Script(finish=reason)))[-2]["choices"][0]["finish_reason"] == reason
    assert (await asking.whole(Script(finish=reason)))["choices"][0]["finish_reason"] == reason


async def test_a_refusal_and_reasoning_have_fields_of_their_own(asking: Asking) -> None:
    """Neither is content; reasoning comes before it."""
    script = Script(text="Yes.", reasoning="Let me think.", refusal="I will not.")
    deltas = deltas_of(await asking.events(script))
    assert [next(iter(delta)) for delta in deltas[1:-1]] == ["reasoning_content"] * 3 + ["content"] + ["refusal"] * 3
    message = (await asking.whole(script))["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"], message["refusal"]) == (
        ("Yes.", "Let me think.", "I will not.")
    )


async def test_tool_calls_are_streamed_side_by_side(asking: Asking) -> None:
    """Each begins with its id and name; arguments come in several fragments, by turns, and fit together by index."""
    script = Script(tool_calls=[("first", {"text": "x" * 40}), ("second", '{"number": 12345}')])
    events = await asking.events(script)
    calls = [call for delta in deltas_of(events) for call in delta.get("tool_calls", ())]
    assert [call["function"].get("name") for call in calls[:2]] == ["first", "second"]
    order = [call["index"] for call in calls[2:]]
    assert order[:4] == [0, 1, 0, 1]
    assert min(order.count(0), order.count(1)) >= 3
    joined = ["".join(call["function"]["arguments"] for call in calls if call["index"] == at) for at in (0, 1)]
    assert [json.loads(text) for text in joined] == [{"text": "x" * 40}, {"number": 12345}]
    assert events[-2]["choices"][0]["finish_reason"] == "tool_calls"
    whole = (await asking.whole(script))["choices"][0]["message"]
    assert whole["content"] is None
    assert [call["function"]["arguments"] for call in whole["tool_calls"]] == joined


async def test_noise_changes_nothing_of_what_is_said(asking: Asking) -> None:
    """Events without choices, empty and null deltas, and another choice stand between the words."""
    events = await asking.events(Script(text="one two three", noise=True, other_choices=True))
    assert events[0]["choices"] == []
    assert {} in deltas_of(events)[:-1]
    assert any(delta.get("content", "") is None for delta in deltas_of(events))
    assert texts_of(events) == ["one", " two", " three"]
    assert len(texts_of(events, index=1)) == 3


# When


async def test_waits_are_before_the_headers_the_first_event_and_between_events(asking: Asking) -> None:
    """Each wait is where it says, and no shorter."""
    asking.server.next(Script(text="a b c", delay_s=0.05, first_s=0.2, gap_s=0.1))
    begun = time.monotonic()
    async with asking.post(stream=True) as response:
        headers = time.monotonic() - begun
        assert 0.05 <= headers < 0.2
        times = [time.monotonic() async for line in response.content if b'"content":"' in line]
    role, a, b, c = times
    assert role - begun >= 0.249
    assert a - role < 0.05
    assert b - begun >= 0.349
    assert c - begun >= 0.449


async def test_a_late_timer_does_not_slow_the_stream_down(asking: Asking) -> None:
    """Events are due at times of their own, not so long after the one before."""
    asking.server.next(Script(pieces=["x"] * 301, gap_s=0.001))
    begun = time.monotonic()
    await asking.read()
    assert 0.299 <= time.monotonic() - begun < 0.5


async def test_keep_alives_fill_the_waits(asking: Asking) -> None:
    """Comments come while nothing else does; they are no events."""
    body = await asking.read(Script(text="a b", first_s=0.1, gap_s=0.1, keepalive_s=0.03))
    before, between = body.split(b'"content":"a"')
    assert 1 <= before.count(b": keep-alive\n\n") <= 3
    assert 1 <= between.count(b": keep-alive\n\n") <= 3
    assert texts_of(events_of(body)) == ["a", " b"]
    assert asking.last.sent == 5


async def test_a_whole_answer_waits_and_is_kept_alive_too(asking: Asking) -> None:
    """Blank lines before a JSON body do not hurt it."""
    asking.server.next(Script(delay_s=0.02, first_s=0.1, keepalive_s=0.03))
    async with asking.post() as response:
        raw = await response.read()
    assert raw.startswith(b"\n\n")
    assert json.loads(raw)["choices"][0]["message"]["content"] == "Hello there, friend."


# What goes wrong


@pytest.mark.parametrize("after", [0, 2, 3])
async def test_a_stall_says_nothing_more(asking: Asking, after: int) -> None:
    """So many content events, then silence."""
    asking.server.next(Script(text="one two three", stall_after=after))
    async with asking.post(stream=True) as response:
        got = b""
        while got.count(b'"content":"') < after + 1:  # the role's event has a content, too
            got += await response.content.readany()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(response.content.readany(), 0.05)
        assert len(texts_of(events_of(got))) == after
        assert asking.server.open == 1
        response.close()
    await wait_until(lambda: asking.server.open == 0, "the hang-up")
    assert (asking.last.content, asking.last.finished) == (after, False)


async def test_a_stall_can_be_kept_alive(asking: Asking) -> None:
    """Comments go on for ever where no content does."""
    asking.server.next(Script(stall_after=1, keepalive_s=0.01))
    async with asking.post(stream=True) as response:
        got = b""
        while got.count(b": keep-alive\n\n") < 5:
            got += await response.content.readany()
        response.close()
    assert texts_of(events_of(got)) == ["Hello"]


PHASES = {
    "before the headers": (Script(delay_s=60), 0),
    "before the first event": (Script(first_s=60), 0),
    "between events": (Script(text="a b", gap_s=60), 2),
    "stalled": (Script(stall_after=1), 2),
    "kept alive": (Script(stall_after=0, keepalive_s=60), 1),
    "in a whole answer": (Script(first_s=60), 0),
}


@pytest.mark.parametrize("phase", PHASES)
async def test_a_hang_up_is_seen_at_once(asking: Asking, phase: str) -> None:
    """Also while the script waits and writes nothing; it is not taken for the end of the answer."""
    script, sent = PHASES[phase]
    asking.server.next(script)
    task = asyncio.create_task(asking.whole() if phase == "in a whole answer" else asking.read())
    seen = await wait_until(lambda: asking.server.requests and asking.last, "the request")
    await wait_until(lambda: seen.sent == sent and asking.server.open == 1, "the phase")
    assert seen.hung_up is None
    now = time.monotonic()
    task.cancel()
    await wait_until(lambda: seen.hung_up, "the hang-up")
    assert 0 <= seen.hung_up - now < 0.05
    await wait_until(lambda: asking.server.open == 0, "the end of the answer")
    assert (seen.finished, seen.report()["became"]) == (False, "hung up")


async def test_a_client_that_left_after_the_end_did_not_hang_up(asking: Asking) -> None:
    """A connection that is closed once all is said is nothing to report."""
    async with (
        aiohttp.ClientSession() as http,
        http.post(
            f"{asking.server.base_url}/chat/completions", json={"model": "m", "messages": MESSAGES, "stream": True}
        ) as response,
    ):
        await response.content.readuntil(b"[DONE]")
        response.close()
    await wait_until(lambda: asking.server.connections == 0, "the connection to close")
    assert (asking.last.finished, asking.last.hung_up) == (True, None)


@pytest.mark.parametrize("with_", ["reset", "fin"])
@pytest.mark.parametrize("after", [0, 1, 3])
async def test_a_cut_comes_after_what_was_said(asking: Asking, after: int, with_: Any) -> None:
    """The connection breaks after just so many content events; that is the server's doing."""
    got = await asking.broken(Script(text="one two three", cut_after=after, cut_with=with_))
    assert texts_of(events_of(got)) == ["one", " two", " three"][:after]
    assert bool(got) is (after > 0)
    await wait_until(lambda: asking.server.open == 0, "the end of the answer")
    assert (asking.last.content, asking.last.finished, asking.last.hung_up) == (after, False, None)
    assert asking.last.report()["became"] == "cut"


async def read_raw(server: ModelServer, request: bytes) -> tuple[bytes, Exception | None]:
    """What a bare socket reads, and the error that ended it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(server.base_url.split(":")[2][:-3]))
    got = b""
    try:
        writer.write(request)
        while data := await reader.read(1 << 16):
            got += data
    except ConnectionError as exc:
        return got, exc
    finally:
        writer.close()
    return got, None


def request_of(version: str = "1.1", **more: Any) -> bytes:
    body = json.dumps({"model": "m", "messages": MESSAGES, "stream": True, **more}).encode()
    head = f"POST /v1/chat/completions HTTP/{version}\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


@pytest.mark.parametrize(("with_", "error"), [("reset", ConnectionResetError), ("fin", type(None))])
async def test_a_cut_is_a_reset_or_an_end(asking: Asking, with_: Any, error: type) -> None:
    """Both are seen in the wild: a connection that is reset, and one that just ends."""
    asking.server.next(Script(cut_after=1, cut_with=with_))
    got, exc = await read_raw(asking.server, request_of())
    assert b'"content":"Hello"' in got
    assert not got.endswith(b"0\r\n\r\n")
    assert isinstance(exc, error)


async def test_a_cut_before_the_headers_sends_nothing(asking: Asking) -> None:
    """Not even a status line, in both kinds of answer."""
    for stream in (True, False):
        asking.server.next(Script(cut_before_headers=True))
        assert (await read_raw(asking.server, request_of(stream=stream)))[0] == b""
        assert asking.last.status == 0


async def test_a_cut_can_come_between_the_finish_reason_and_the_end(asking: Asking) -> None:
    """All is said, and yet the connection breaks."""
    got = await asking.broken(Script(cut_before_done=True))
    assert events_of(got)[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("then", ["cut", "end"])
async def test_half_an_event_is_the_last_that_is_sent(asking: Asking, then: Any) -> None:
    """An event stops in its middle; then the connection breaks, or the answer ends as if all were well."""
    script = Script(text="one two three", half_after=1, half_then=then)
    got = await (asking.read(script) if then == "end" else asking.broken(script))
    *whole, half = got.split(b"\n\n")
    assert texts_of(events_of(b"\n\n".join(whole))) == ["one"]
    assert half.startswith(b'data: {"id"')
    with pytest.raises(json.JSONDecodeError):
        json.loads(half[6:])
    assert not asking.last.finished


async def test_a_stream_can_end_without_saying_so(asking: Asking) -> None:
    """Without `[DONE]`, without a finish reason, without both."""
    no_done = await asking.events(Script(end_without_done=True))
    assert no_done[-1]["choices"][0]["finish_reason"] == "stop"
    no_reason = await asking.events(Script(finish=""))
    assert (texts_of(no_reason)[-1], no_reason[-1]) == (" friend.", "[DONE]")
    assert deltas_of(no_reason)[-1] == {"content": " friend."}
    assert (await asking.events(Script(finish="", end_without_done=True)))[-1]["choices"][0]["delta"]["content"]


@pytest.mark.parametrize("stream", [True, False])
async def test_an_error_status_has_its_body_and_headers(asking: Asking, stream: bool) -> None:
    """A dict is put into `error`, bytes go as they are; headers are the script's."""
    error = {"message": "Slow down.", "type": "tokens", "code": "rate_limit_exceeded"}
    headers = {"Retry-After": "2", "retry-after-ms": "1500", "x-should-retry": "true"}
    asking.server.next(
        Script(status=429, error=error, headers=headers),
        Script(status=503, error=b"<html>busy</html>"),
        Script(status=500),
        Script(status=418, error={"error": error, "more": 1}, headers={"Content-Type": "text/plain"}),
    )
    async with asking.post(stream=stream) as response:
        assert (response.status, await response.json()) == (429, {"error": error})
        assert headers.items() <= {name: response.headers[name] for name in headers}.items()
    async with asking.post(stream=stream) as response:
        assert (response.status, response.content_type) == (503, "text/html")
        assert await response.read() == b"<html>busy</html>"
    async with asking.post(stream=stream) as response:
        assert (response.status, (await response.json())["error"]["type"]) == (500, "server_error")
    async with asking.post(stream=stream) as response:
        assert (response.status, response.content_type) == (418, "text/plain")
        assert json.loads(await response.read())["more"] == 1
    assert [seen.status for seen in asking.server.requests] == [429, 503, 500, 418]
    assert all(seen.finished for seen in asking.server.requests)


async def test_an_error_can_come_in_the_stream(asking: Asking) -> None:
    """An event with `error` after some words, as servers send when the model fails under way."""
    events = await asking.events(Script(error_event_after=2, error={"message": "overloaded", "code": 503}))
    assert texts_of(events) == ["Hello", " there,"]
    assert events[-2:] == [{"error": {"message": "overloaded", "code": 503}}, "[DONE]"]


async def test_garbage_is_no_event(asking: Asking) -> None:
    """Neither UTF-8 nor JSON nor anything the protocol knows, under a good status."""
    body = await asking.read(Script(garbage=True))
    with pytest.raises(UnicodeDecodeError):
        body.decode()
    with pytest.raises(json.JSONDecodeError):
        events_of(body)
    asking.server.next(Script(garbage=True))
    async with asking.post() as response:
        assert response.content_type == "application/json"
        with pytest.raises(UnicodeDecodeError):
            (await response.read()).decode()


async def test_one_event_can_be_huge(asking: Asking) -> None:
    """Ten million bytes of text in a line."""
    events = await asking.events(Script(huge_event_bytes=10_000_000))
    assert [len(text) for text in texts_of(events)] == [10_000_000]
    assert asking.last.finished


@pytest.mark.parametrize("stream", [True, False])
async def test_an_endless_line_goes_on_until_the_client_hangs_up(asking: Asking, stream: bool) -> None:
    """Megabytes without a line end, and no more of them once nobody listens."""
    asking.server.next(Script(text="first", endless_line=True))
    async with asking.post(stream=stream) as response:
        got = b""
        while len(got) < 3_000_000:
            got += await response.content.readany()
        response.close()
    assert b"\n" not in got[1000:]
    seen = await wait_until(lambda: asking.last.hung_up and asking.last, "the hang-up")
    assert not seen.finished
    await wait_until(lambda: asking.server.open == 0, "the end of the answer")


async def test_a_client_that_does_not_read_holds_the_script_up(asking: Asking) -> None:
    """Back-pressure counts: `sent` stands still until the client reads on, and nothing is lost."""
    asking.server.next(Script(pieces=["x" * 60_000] * 400))
    async with asking.post(stream=True) as response:
        held = 0

        def stands_still() -> bool:
            nonlocal held
            before, held = held, asking.last.sent
            return before == held and 0 < held < 400

        await wait_until(stands_still, "the script to be held up", 5)
        assert not asking.last.finished
        body = await response.read()
    assert len(texts_of(events_of(body))) == 400
    assert asking.last.finished


# How it is written


def frames_of(script: Script) -> bytes:
    return b"".join(item for item in script.raw or () if isinstance(item, bytes))


async def test_raw_is_a_body_as_it_is(asking: Asking) -> None:
    """Bytes and waits, nothing added, in both kinds of answer."""
    script = Script(raw=[b"data: {}\n", 0.05, b"\ndata: [DO", b"NE]"])
    begun = time.monotonic()
    assert await asking.read(script) == frames_of(script)
    assert time.monotonic() - begun >= 0.05
    assert asking.last.finished
    assert await asking.read(script, stream=False) == frames_of(script)
    assert texts_of(await asking.events()) == ["Hello", " there,", " friend"]


async def test_raw_that_begins_with_a_status_line_is_all_that_is_sent(asking: Asking) -> None:
    """Then the connection is closed; headers are the script's business, too."""
    script = Script(raw=[b"HTTP/1.1 200 OK\r\nContent-Len", 0.01, b"gth: 9\r\n\r\nhalf"])
    asking.server.next(script, script)
    assert await read_raw(asking.server, request_of()) == (frames_of(script), None)
    with pytest.raises(aiohttp.ClientPayloadError):
        async with asking.post() as response:
            await response.read()


async def test_raw_can_be_cut_or_stall_at_its_end(asking: Asking) -> None:
    """What comes after the bytes is the script's choice."""
    assert await asking.broken(Script(raw=[b"data: x"], cut_before_done=True)) == b"data: x"
    asking.server.next(Script(raw=[b"data: y"], stall_after=0))
    async with asking.post(stream=True) as response:
        assert await response.content.readany() == b"data: y"
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(response.content.readany(), 0.03)
        response.close()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100, 4096, 65536])
async def test_writes_cut_anywhere_and_lose_nothing(asking: Asking, size: int) -> None:
    """Each read gets a write of just that size, through the middle of events and of characters."""
    script = Script(text="退款 takes three 天 🙂 " * (2000 if size > 1000 else 5), write_bytes=size, noise=True)
    reads = []
    asking.server.next(script)
    async with asking.post(stream=True) as response:
        async for data, ended in response.content.iter_chunks():
            if ended:
                reads.append(data)
    assert {len(data) for data in reads[:-1]} <= {size}
    assert len(reads[-1]) <= size
    assert "".join(texts_of(events_of(b"".join(reads)))) == script.text
    assert asking.last.finished
    assert asking.last.content == len(texts_of(events_of(b"".join(reads))))


async def test_each_write_is_a_segment_of_its_own(asking: Asking) -> None:
    """A reader that keeps up gets the writes one by one, so that its parser really sees the cuts."""
    script = Script(text="one two", write_bytes=5)
    asking.server.next(script)
    loop = asyncio.get_running_loop()
    reads: list[bytes] = []
    with socket.create_connection(("127.0.0.1", int(asking.server.base_url.split(":")[2][:-3]))) as bare:
        bare.setblocking(False)
        await loop.sock_sendall(bare, request_of())
        while not (reads and reads[-1].endswith(b"0\r\n\r\n")):
            reads.append(await loop.sock_recv(bare, 1 << 16))
    assert reads[0].endswith(b"\r\n\r\n")
    assert set(map(len, reads[1:-1])) == {len(b"5\r\n12345\r\n")}
    assert len(reads) > 100


async def test_waits_stay_where_they_were_when_writes_are_cut(asking: Asking) -> None:
    """Cutting joins no two events that are a wait apart."""
    asking.server.next(Script(text="a b", gap_s=0.1, write_bytes=65536))
    async with asking.post(stream=True) as response:
        first = await response.content.readany()
    assert texts_of(events_of(first)) == ["a"]
    assert texts_of(events_of(await asking.read(Script(text="a b", gap_s=0.01, write_bytes=3)))) == ["a", " b"]


async def test_line_ends_can_be_those_of_windows(asking: Asking) -> None:
    """`\\r\\n` ends each line, comments too."""
    body = await asking.read(Script(text="a", first_s=0.03, keepalive_s=0.02, crlf=True))
    assert body.startswith(b": keep-alive\r\n\r\ndata: ")
    assert body.count(b"\r\n") == body.count(b"\n")
    assert texts_of(events_of(body)) == ["a"]


async def test_a_connection_is_kept_or_closed(asking: Asking) -> None:
    """Requests over one connection have its number; `connection_close` ends it after the answer."""
    await asking.read()
    await asking.whole()
    asking.server.next(Script(status=500))
    async with asking.post() as response:
        await response.read()
    asking.server.next(Script(connection_close=True))
    async with asking.post(stream=True) as response:
        assert response.headers["connection"] == "close"
        await response.read()
    await asking.whole()
    assert [seen.connection for seen in asking.server.requests] == [1, 1, 1, 1, 2]


async def test_a_client_of_http_1_0_gets_its_answer(asking: Asking) -> None:
    """It knows no chunks: the body ends with the connection."""
    got, _ = await read_raw(asking.server, request_of("1.0"))
    head, body = got.split(b"\r\n\r\n", 1)
    assert b"chunked" not in head
    assert texts_of(events_of(body)) == ["Hello", " there,", " friend"]
    assert body.endswith(b"data: [DONE]\n\n")


# Which script


async def test_next_scripts_are_for_one_request_each(asking: Asking) -> None:
    """In their order, then the default again; the default can be changed."""
    asking.server.next(Script(text="one"), lambda body: Script(text=body["model"]))
    asking.server.next("no-done")
    texts = [(await asking.whole(model=f"m{n}"))["choices"][0]["message"]["content"] for n in range(4)]
    assert (texts[0], texts[1], texts[3]) == ("one", "m1", "Hello there, friend")
    assert "“hello”" in texts[2]
    asking.server.default = Script(answers=lambda body: Script(text=f"{len(body['messages'])} so far"))
    assert texts_of(await asking.events()) == ["1", " so", " far"]


async def test_a_request_is_kept_with_all_it_had(asking: Asking) -> None:
    """Its body, decoded and raw, headers, path, query and time."""
    before = time.monotonic()
    async with asking.http.post(
        asking.server.base_url.replace("/v1", "/openai/deployments/d/chat/completions?api-version=1"),
        data=b"no json",
        headers={"X-Api-Key": "secret"},
    ) as response:
        assert response.status == 200
    [seen] = asking.server.requests
    assert (seen.body, seen.raw) == (None, b"no json")
    assert (seen.headers["x-api-key"], seen.query["api-version"]) == ("secret", "1")
    assert seen.path == "/openai/deployments/d/chat/completions"
    assert before <= seen.at <= time.monotonic()


async def test_a_large_body_is_taken(asking: Asking) -> None:
    """A prompt with images has megabytes."""
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "x" * 20_000_000}]}).encode()
    async with asking.http.post(f"{asking.server.base_url}/chat/completions", data=io.BytesIO(body)) as response:
        assert response.status == 200
    assert asking.last.raw == body


async def test_the_models_and_the_log_are_there(asking: Asking) -> None:
    """`/v1/models` names the scripts, `/log` has the last 100 requests, and elsewhere is an error of the protocol."""
    for n in range(101):
        await asking.whole(model=f"m{n}")
    base = asking.server.base_url
    async with asking.http.get(f"{base}/models") as response:
        names = [row["id"] for row in (await response.json())["data"]]
    assert {"model-server", "script:stall", "script:429"} <= set(names)
    async with asking.http.get(base.replace("/v1", "/log")) as response:
        rows = await response.json()
    assert [row["model"] for row in rows] == [f"m{n}" for n in range(1, 101)]
    assert {row["became"] for row in rows} == {"finished"}
    async with asking.http.post(f"{base}/embeddings") as response:
        assert (response.status, (await response.json())["error"]["code"]) == (404, "unknown_url")


async def test_only_so_many_requests_are_kept() -> None:
    """A server that runs for days can be told to forget."""
    async with ModelServer(Script(), keep=2) as server, aiohttp.ClientSession() as http:
        for n in range(4):
            await Asking(server, http).whole(model=f"m{n}")
        assert [seen.body and seen.body["model"] for seen in server.requests] == ["m2", "m3"]


async def test_closing_ends_what_is_under_way() -> None:
    """Streams are broken off at once; that is no hang-up, and the port is free again."""
    async with aiohttp.ClientSession() as http:
        async with ModelServer(Script(stall_after=1)) as server:
            response = await Asking(server, http).post(stream=True)
            await response.content.readuntil(b"Hello")
            begun = time.monotonic()
        assert time.monotonic() - begun < 0.5
        with pytest.raises(aiohttp.ClientError):
            await response.read()
        assert server.requests[0].hung_up is None
        assert server.open == 0
        async with ModelServer(port=int(server.base_url.split(":")[2][:-3])):
            pass
