"""Every script, asked for by a plain HTTP client; what matters most also by the official client."""

from __future__ import annotations

import asyncio
import gc
import io
import json
import re
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from conftest import wait_until

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from model_answers import SCRIPTS, UnknownScript, answer, parse_script, problem_of  # noqa: E402
from model_script import Script as ScriptFields  # noqa: E402
from model_server import ModelServer, Script, Seen  # noqa: E402

MESSAGES: list[Any] = [{"role": "user", "content": "hello"}]
ORDER_TOOL = {
    "type": "function",
    "function": {
        "name": "order_status",
        "parameters": {"type": "object", "properties": {"order": {"type": "string"}}, "required": ["order"]},
    },
}


class Asking:
    """A server, and a plain client that asks it."""

    def __init__(self, server: ModelServer, http: aiohttp.ClientSession) -> None:
        self.server = server
        self.http = http

    def post(self, model: str = "m", messages: list[Any] = MESSAGES, **more: Any) -> Any:
        body = {"model": model, "messages": messages, **more}
        return self.http.post(f"{self.server.base_url}/chat/completions", json=body)

    async def bytes(self, script: Script | None = None, **more: Any) -> bytes:
        """The whole body of a streamed answer."""
        if script is not None:
            self.server.next(script)
        async with self.post(**{"stream": True, **more}) as response:
            return await response.read()

    async def events(self, script: Script | None = None, **more: Any) -> list[Any]:
        """The events of a streamed answer, the last as text."""
        return events_of(await self.bytes(script, **more))

    async def broken(self, script: Script, **more: Any) -> bytes:
        """What came of an answer that breaks off."""
        self.server.next(script)
        got = b""
        with pytest.raises((aiohttp.ClientPayloadError, aiohttp.ClientOSError)):
            async with self.post(**{"stream": True, **more}) as response:
                async for data in response.content.iter_any():
                    got += data
        return got

    async def whole(self, script: Script | None = None, **more: Any) -> dict[str, Any]:
        if script is not None:
            self.server.next(script)
        async with self.post(**more) as response:
            return await response.json()  # type: ignore[no-any-return]

    @property
    def last(self) -> Seen:
        return self.server.requests[-1]


def events_of(body: bytes) -> list[Any]:
    datas = [line[6:] for line in body.replace(b"\r\n", b"\n").split(b"\n") if line.startswith(b"data: ")]
    return [data.decode() if data == b"[DONE]" else json.loads(data) for data in datas]


def deltas_of(events: list[Any], index: int = 0) -> list[dict[str, Any]]:
    chunks = [event for event in events if isinstance(event, dict) and "choices" in event]
    return [choice["delta"] for event in chunks for choice in event["choices"] if choice["index"] == index]


def texts_of(events: list[Any], key: str = "content", index: int = 0) -> list[str]:
    return [delta[key] for delta in deltas_of(events, index) if delta.get(key)]


@pytest.fixture
async def asking() -> AsyncIterator[Asking]:
    async with (
        ModelServer(Script(text="Hello there, friend"), tokens_per_second=0) as server,
        aiohttp.ClientSession() as http,
    ):
        yield Asking(server, http)


@pytest.fixture
async def client(asking: Asking) -> AsyncIterator[openai.AsyncOpenAI]:
    """The official client, without retries of its own."""
    async with openai.AsyncOpenAI(base_url=asking.server.base_url, api_key="key", max_retries=0) as made:
        yield made
    await asyncio.sleep(0)
    gc.collect()


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
    await asking.bytes()
    assert 0.299 <= time.monotonic() - begun < 0.5


async def test_keep_alives_fill_the_waits(asking: Asking) -> None:
    """Comments come while nothing else does; they are no events."""
    body = await asking.bytes(Script(text="a b", first_s=0.1, gap_s=0.1, keepalive_s=0.03))
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
    task = asyncio.create_task(asking.whole() if phase == "in a whole answer" else asking.bytes())
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


async def read_raw(
    server: ModelServer, request: bytes, *, at_most: int | None = None
) -> tuple[bytes, Exception | None]:
    """What a bare socket reads, and the error that ended it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(server.base_url.split(":")[2][:-3]))
    got = b""
    try:
        writer.write(request)
        while data := await reader.read(1 << 16):
            got += data
            if at_most is not None and len(got) >= at_most:
                break
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
    got = await (asking.bytes(script) if then == "end" else asking.broken(script))
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
    body = await asking.bytes(Script(garbage=True))
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
    assert await asking.bytes(script) == frames_of(script)
    assert time.monotonic() - begun >= 0.05
    assert asking.last.finished
    assert await asking.bytes(script, stream=False) == frames_of(script)
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
    assert texts_of(events_of(await asking.bytes(Script(text="a b", gap_s=0.01, write_bytes=3)))) == ["a", " b"]


async def test_line_ends_can_be_those_of_windows(asking: Asking) -> None:
    """`\\r\\n` ends each line, comments too."""
    body = await asking.bytes(Script(text="a", first_s=0.03, keepalive_s=0.02, crlf=True))
    assert body.startswith(b": keep-alive\r\n\r\ndata: ")
    assert body.count(b"\r\n") == body.count(b"\n")
    assert texts_of(events_of(body)) == ["a"]


async def test_a_connection_is_kept_or_closed(asking: Asking) -> None:
    """Requests over one connection have its number; `connection_close` ends it after the answer."""
    await asking.bytes()
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
    """`/v1/models` names the scripts; `/log` has the last 100 requests; other addresses are an error of the protocol."""
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


# What it answers of its own accord


@pytest.fixture
async def answering(asking: Asking) -> Asking:
    asking.server.default = "answer"
    return asking


async def test_it_quotes_the_question_word_by_word(answering: Asking) -> None:
    """Each word is an event, questions get different answers, the same question the same one."""
    events = await answering.events(messages=[*MESSAGES, {"role": "user", "content": "where is my\n parcel?"}])
    assert "“where is my parcel?”" in "".join(texts_of(events))
    assert len(texts_of(events)) == len("".join(texts_of(events)).split())

    async def opening(question: str) -> str:
        body = await answering.whole(messages=[{"role": "user", "content": question}])
        text: str = body["choices"][0]["message"]["content"]
        return text.replace(question, "…")

    openings = [await opening(f"question {n}") for n in range(12)]
    assert len(set(openings)) > 1
    assert openings == [await opening(f"question {n}") for n in range(12)]


async def test_it_streams_at_the_speed_that_is_set() -> None:
    """So many tokens a second."""
    async with ModelServer(tokens_per_second=100) as server, aiohttp.ClientSession() as http:
        begun = time.monotonic()
        words = len(texts_of(await Asking(server, http).events()))
        assert (words - 1) / 100 <= time.monotonic() - begun < (words - 1) / 100 + 0.3


async def test_it_calls_a_tool_that_fits_and_says_what_it_found(answering: Asking) -> None:
    """An order's number in the question and an order tool make a call; its result makes the answer."""
    asked = {"role": "user", "content": "where is order 1234?"}
    message = (await answering.whole(messages=[asked], tools=[ORDER_TOOL]))["choices"][0]["message"]
    [call] = message["tool_calls"]
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("order_status", {"order": "1234"})
    told = {"role": "tool", "tool_call_id": call["id"], "content": "on its way"}
    events = await answering.events(messages=[asked, message, told], tools=[ORDER_TOOL])
    assert "".join(texts_of(events)) == "order_status says: on its way"


@pytest.mark.parametrize(
    ("question", "more", "calls"),
    [
        ("order 1 and order #2", {"tools": [ORDER_TOOL]}, ['{"order":"1"}', '{"order":"2"}']),
        ("订单 A17 在哪", {"tools": [ORDER_TOOL]}, ['{"order":"A17"}']),
        ("order 1", {"tools": [ORDER_TOOL], "tool_choice": "none"}, []),
        ("order 1", {}, []),
        ("how do I order?", {"tools": [ORDER_TOOL]}, []),
        ("订单号12到哪了", {"tools": [ORDER_TOOL]}, ['{"order":"12"}']),
        ("my order number 99-B, please", {"tools": [ORDER_TOOL]}, ['{"order":"99-B"}']),
        ("order 5", {"tools": [{"type": "function", "function": {"name": "orders"}}]}, ["{}"]),
        (
            "order 5",
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {"name": "order", "parameters": {"properties": {"n": {"type": "integer"}}}},
                    }
                ]
            },
            ['{"n":5}'],
        ),
        ("a human, please", {"tools": [{"type": "function", "function": {"name": "hand_over"}}]}, ["{}"]),
    ],
)
def test_tools_are_chosen_by_what_is_said(question: str, more: dict[str, Any], calls: list[str]) -> None:
    """One call for each number, none where none is offered or allowed."""
    script = answer({"model": "m", "messages": [{"role": "user", "content": question}], **more})
    assert [arguments for _, arguments in script.tool_calls] == calls


async def test_it_counts_images(answering: Asking) -> None:
    """Those of the whole conversation, for it remembers what it saw."""
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "what are these?"}, image, image]}]
    body = await answering.whole(messages=messages)
    assert body["choices"][0]["message"]["content"].startswith("I see 2 images. ")
    assert "“what are these?”" in body["choices"][0]["message"]["content"]
    assert body["usage"]["prompt_tokens"] > 2 * 85


async def test_it_stops_at_the_tokens_that_are_allowed(answering: Asking) -> None:
    """`max_tokens`, by either name, cuts the answer and says so."""
    for name in ("max_tokens", "max_completion_tokens"):
        events = await answering.events(**{name: 2})
        assert len(texts_of(events)) == 2
        assert events[-2]["choices"][0]["finish_reason"] == "length"


CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
BAD: dict[str, tuple[Any, str]] = {
    "no messages": ([], "messages"),
    "an unknown role": ([{"role": "bot", "content": "x"}], "messages[0].role"),
    "no content": ([{"role": "user"}], "messages[0].content"),
    "a part without its text": ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content"),
    "an image that is none": (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}],
        "messages[0].content",
    ),
    "a result of no call": (
        [{"role": "tool", "tool_call_id": "c", "content": "x"}],
        "messages[0].tool_call_id",
    ),
    "a call without its result": (
        [{"role": "assistant", "tool_calls": [CALL]}, {"role": "user", "content": "x"}],
        "messages[1]",
    ),
    "a call without its result, last": ([{"role": "assistant", "tool_calls": [CALL]}], "messages"),
    "a call without arguments": (
        [{"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f"}}]}],
        "messages[0].tool_calls",
    ),
}


@pytest.mark.parametrize("case", BAD)
async def test_a_prompt_that_no_provider_takes_is_refused(answering: Asking, case: str) -> None:
    """400, with the parameter at fault: who builds prompts wrongly hears of it here first."""
    messages, param = BAD[case]
    async with answering.post(messages=messages) as response:
        assert response.status == 400
        error = (await response.json())["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


async def test_a_body_that_is_none_is_refused(answering: Asking) -> None:
    """No JSON, JSON that is no object, no model."""
    for data in (b"{", b"[]", b'{"messages": [{"role": "user", "content": "x"}]}'):
        async with answering.http.post(f"{answering.server.base_url}/chat/completions", data=data) as response:
            assert response.status == 400


def test_a_good_prompt_has_no_problem() -> None:
    """Calls, results, refusals and parts of other kinds are in order."""
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL, {**CALL, "id": "d"}]},
        {"role": "tool", "tool_call_id": "d", "content": "x"},
        {"role": "tool", "tool_call_id": "c", "content": "x"},
        {"role": "assistant", "refusal": "no"},
    ]
    assert problem_of({"model": "m", "messages": messages}) is None


# Scripts by name


async def test_a_script_is_chosen_by_the_models_name(asking: Asking) -> None:
    """With fields after a question mark; the model that answers goes by the name it was asked under."""
    model = "script:no-done?text=one two&finish=length"
    events = await asking.events(model=model)
    assert (texts_of(events), events[-1]["choices"][0]["finish_reason"]) == (["one", " two"], "length")
    assert events[0]["model"] == model
    assert asking.last.report()["script"] == "no-done?text=one two&finish=length"


@pytest.mark.parametrize(
    "model", ["script:nothing", "script:stall?stall_after=x", "script:cut?raw=x", "script:cut?_=1"]
)
async def test_a_wrong_name_says_what_there_is(asking: Asking, model: str) -> None:
    """404 like an unknown model, with the names or fields that would do."""
    async with asking.post(model=model) as response:
        assert response.status == 404
        error = (await response.json())["error"]
    assert error["code"] == "model_not_found"
    assert model.split(":")[1].split("?")[-1].split("=")[0] in error["message"]


REFUSING = {"400": 400, "401": 401, "429": 429, "500": 500, "503": 503}
BREAKING = {"cut-before-headers": 0, "cut": 3, "cut-before-done": 9, "half": 3}
STOPPING = {"silent": 0, "stall": 3, "endless": 9}
SAYING = {
    "answer": b"hello",
    "slow": b"hello",
    "fast": b"hello",
    "keepalive": b": keep-alive\n\n",
    "no-done": b'"finish_reason":"stop"',
    "no-finish": b"hello",
    "length": b'"finish_reason":"length"',
    "filter": b'"finish_reason":"content_filter"',
    "refusal": b'"refusal":"I"',
    "error-event": b'data: {"error":{"message":',
    "reasoning": b'"reasoning_content":"The"',
    "noise": b'"choices":[],',
    "crlf": b"data: [DONE]\r\n",
    "bytes": b"data: [DONE]",
    "huge": b"x" * 10_000_000,
    "garbage": b"\xff\xfe",
    "no-usage": b"data: [DONE]",
    "close": b"data: [DONE]",
}


@pytest.mark.parametrize("name", SCRIPTS)
async def test_a_named_script_does_what_its_name_says(asking: Asking, name: str) -> None:
    """Each can be asked for by hand, on top of the answer to the question."""
    quick = {"slow": "?delay_s=0&first_s=0.01&gap_s=0.001", "keepalive": "?first_s=0.1&keepalive_s=0.02"}
    model = f"script:{name}{quick.get(name, '')}"
    if name in REFUSING:
        async with asking.post(model) as response:
            assert response.status == REFUSING[name]
            assert (await response.json())["error"]["message"]
    elif name in BREAKING:
        with pytest.raises((aiohttp.ClientPayloadError, aiohttp.ClientOSError, aiohttp.ServerDisconnectedError)):
            await asking.bytes(model=model)
        assert min(asking.last.content, 9) == BREAKING[name]
    elif name in STOPPING:
        task = asyncio.create_task(asking.bytes(model=model))
        await wait_until(lambda: asking.server.requests and min(asking.last.content, 9) == STOPPING[name], "the stop")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(task, 0.05)
        await wait_until(lambda: asking.last.hung_up, "the hang-up")
    else:
        assert SAYING[name] in await asking.bytes(model=model)
        assert asking.last.finished


def test_every_plain_field_can_be_set_in_a_name() -> None:
    """Numbers, words and switches; what is no plain value says so."""
    script = parse_script("answer?cut_after=2&gap_s=0.5&crlf=true&cut_with=fin&finish=length&noise=0", Script())
    assert (script.cut_after, script.gap_s, script.crlf, script.cut_with, script.finish, script.noise) == (
        *(2, 0.5, True, "fin", "length", False),
    )
    for field in fields(ScriptFields):
        if field.name in ("pieces", "tool_calls", "usage", "error", "headers", "raw", "answers", "plans"):
            with pytest.raises(UnknownScript, match=field.name):
                parse_script(f"answer?{field.name}=1", Script())
        else:
            value = {"bool": "1", "Literal": "fin"}.get(str(field.type).split("[")[0], "3")
            assert parse_script(f"answer?{field.name}={value}", Script())


# The official client


async def test_the_official_client_reads_a_whole_answer(asking: Asking, client: openai.AsyncOpenAI) -> None:
    """Text, reason, usage and tool calls, as its types have them."""
    asking.server.next(Script(text="Hello there", usage=(3, 2), tool_calls=[("look", {"for": "it"})]))
    answer = await client.chat.completions.create(model="m", messages=MESSAGES)
    message = answer.choices[0].message
    assert (answer.model, message.content, answer.choices[0].finish_reason) == ("m", "Hello there", "tool_calls")
    assert answer.usage is not None
    assert answer.usage.total_tokens == 5
    [call] = message.tool_calls or []
    assert call.type == "function"
    assert (call.function.name, call.function.arguments) == ("look", '{"for":"it"}')
    assert asking.last.headers["authorization"] == "Bearer key"
    assert asking.last.body == {"model": "m", "messages": MESSAGES}


async def said(client: openai.AsyncOpenAI, **more: Any) -> tuple[str, Any]:
    """The text of a streamed answer by the official client, and its last chunk."""
    text, chunk = "", None
    stream = await client.chat.completions.create(model="m", messages=MESSAGES, stream=True, **more)
    async with stream:
        async for chunk in stream:
            for choice in chunk.choices:
                if choice.index == 0:
                    text += choice.delta.content or ""
    return text, chunk


@pytest.mark.parametrize(
    "script",
    [
        Script(text="退款 takes three 天 🙂", gap_s=0.001),
        Script(text="退款 takes three 天 🙂", write_bytes=1),
        Script(text="退款 takes three 天 🙂", crlf=True, write_bytes=3),
        Script(text="退款 takes three 天 🙂", noise=True, other_choices=True, role_content=None),
        Script(text="退款 takes three 天 🙂", first_s=0.05, keepalive_s=0.01),
        Script(text="退款 takes three 天 🙂", end_without_done=True, connection_close=True),
        Script(text="退款 takes three 天 🙂", piece_chars=1, reasoning="hm"),
    ],
)
async def test_the_official_client_reads_a_stream(asking: Asking, client: openai.AsyncOpenAI, script: Script) -> None:
    """However it is paced, cut and padded, the text and the usage arrive."""
    asking.server.next(script)
    text, last = await said(client, stream_options={"include_usage": True})
    assert text == script.text
    assert last.usage.prompt_tokens == 10


async def test_the_official_client_puts_tool_calls_together(asking: Asking, client: openai.AsyncOpenAI) -> None:
    """Its own accumulator takes the fragments that come by turns."""
    asking.server.next(Script(tool_calls=[("first", {"text": "x" * 40}), ("second", {"n": 1})]))
    async with client.chat.completions.stream(model="m", messages=MESSAGES) as stream:
        final = await stream.get_final_completion()
    calls = final.choices[0].message.tool_calls or []
    assert [(call.function.name, json.loads(call.function.arguments)) for call in calls] == [
        ("first", {"text": "x" * 40}),
        ("second", {"n": 1}),
    ]


@pytest.mark.parametrize(
    ("script", "error"),
    [
        (Script(status=400), openai.BadRequestError),
        (Script(status=401), openai.AuthenticationError),
        (Script(status=429, headers={"retry-after": "1"}), openai.RateLimitError),
        (Script(status=503), openai.InternalServerError),
        (Script(cut_before_headers=True), openai.APIConnectionError),
        (Script(cut_after=0), openai.APIConnectionError),
        (Script(cut_after=2, cut_with="fin"), openai.APIConnectionError),
        (Script(half_after=1), openai.APIConnectionError),
        (Script(error_event_after=1), openai.APIError),
        (Script(delay_s=60), openai.APITimeoutError),
        (Script(stall_after=1), openai.APITimeoutError),
        (Script(half_after=1, half_then="end"), json.JSONDecodeError),
        (Script(garbage=True), ValueError),
    ],
)
async def test_the_official_client_sees_each_fault_as_its_own(
    asking: Asking, client: openai.AsyncOpenAI, script: Script, error: type[Exception]
) -> None:
    """A fault is what it says to a client that knows nothing of scripts."""
    asking.server.next(script)
    with pytest.raises(error) as caught:
        await said(client, timeout=0.2 if error is openai.APITimeoutError else 10)
    assert type(caught.value) in (error, UnicodeDecodeError, json.JSONDecodeError)


async def test_the_official_client_tries_again_as_it_is_told(asking: Asking, client: openai.AsyncOpenAI) -> None:
    """`retry-after-ms` and `x-should-retry` are obeyed: the headers arrive."""
    told = {"retry-after-ms": "50"}
    asking.server.next(Script(status=503, headers=told), Script(status=400, headers={**told, "x-should-retry": "true"}))
    text, _ = await said(client.with_options(max_retries=2))
    assert text == "Hello there, friend"
    first, second, third = asking.server.requests
    assert min(second.at - first.at, third.at - second.at) >= 0.05


async def test_the_official_client_hangs_up_by_closing_its_stream(asking: Asking, client: openai.AsyncOpenAI) -> None:
    """The server sees it at once."""
    asking.server.next(Script(text="one two", gap_s=60))
    stream = await client.chat.completions.create(model="m", messages=MESSAGES, stream=True)
    async for chunk in stream:
        if chunk.choices[0].delta.content:
            break
    now = time.monotonic()
    await stream.close()
    await wait_until(lambda: asking.last.hung_up, "the hang-up")
    assert asking.last.hung_up is not None
    assert asking.last.hung_up - now < 0.1


async def test_the_official_client_lists_the_models(client: openai.AsyncOpenAI) -> None:
    """Fit for a menu to choose from."""
    assert "script:stall" in [model.id async for model in client.models.list()]


# The command and the page


async def run(command: str, cwd: Path) -> str:
    process = await asyncio.create_subprocess_shell(
        command, cwd=cwd, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    out, _ = await process.communicate()
    return out.decode()


README = (HERE / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.S | re.M)


async def test_the_command_serves_and_says_where() -> None:
    """Started as the README says, it prints the address to use, answers there at its speed, and stops at Ctrl-C."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, HERE / "model_server.py", "--port", "0", "--script", "answer?text=one two", "--speed", "0"),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        url = (await process.stdout.readline()).decode().split()[-1]
        assert (await process.stdout.readline()).decode().strip() == f"HOTDESK_LLM_BASE_URL={url} make run"
        async with aiohttp.ClientSession() as http:
            body = {"model": "m", "messages": MESSAGES, "stream": True}
            async with http.post(f"{url}/chat/completions", json=body) as response:
                assert texts_of(events_of(await response.read())) == ["one", " two"]
            async with http.post(
                f"{url}/chat/completions", json=body | {"model": "script:stall?stall_after=2&text=one two three"}
            ) as response:
                await response.content.readuntil(b" two")
                response.close()

            async def became() -> list[str]:
                async with http.get(url.replace("/v1", "/log")) as response:
                    return [row["became"] for row in await response.json()]

            async def both_ended() -> bool:
                return await became() == ["finished", "hung up"]

            await wait_until(both_ended, "both to be in the log")
    finally:
        process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(process.wait(), 5) == 0


async def test_a_wrong_script_or_a_taken_port_stops_the_start() -> None:
    """With the reason, and no traceback."""
    command = f"{sys.executable} {HERE / 'model_server.py'}"
    assert "There is no script 'nothing'" in await run(f"{command} --script nothing", HERE)
    async with ModelServer() as server:
        out = await run(f"{command} --port {server.base_url.split(':')[2][:-3]}", HERE)
    assert "choose another with --port" in out
    assert "Traceback" not in out


async def test_the_readme_runs() -> None:
    """Who types what the page says sees what it shows; its program passes."""
    async with ModelServer() as server:
        for language, block in BLOCKS:
            if language == "console":
                await assert_session(block.replace("http://127.0.0.1:9100/v1", server.base_url), server)
            elif language == "python":
                assert await run(f"{sys.executable} -W error - <<'END'\n{block}END", HERE) == ""
            else:
                assert language == "sh"


async def assert_session(block: str, server: ModelServer) -> None:
    """Each `$` line of *block* prints what stands under it, `…` being anything."""
    for step in re.split(r"^\$ ", block, flags=re.M)[1:]:
        command, shown = step.split("\n", 1)
        out = await run(command.replace("http://127.0.0.1:9100", server.base_url.removesuffix("/v1")), HERE)
        pattern = ".*".join(re.escape(part) for part in shown.strip().split("…"))
        assert re.fullmatch(pattern, out.strip(), re.S), f"$ {command}\n{out}\n-- the README shows:\n{shown}"
        await wait_until(lambda: server.open == 0, "the request to be over")


def test_the_readme_says_how_to_start_it_and_names_every_script() -> None:
    """The commands are those that the server takes and prints; the table is complete."""
    shell = [block for language, block in BLOCKS if language == "sh"]
    assert shell == [
        ".venv/bin/python examples/model_server/model_server.py\n",
        "HOTDESK_LLM_BASE_URL=http://127.0.0.1:9100/v1 make run\n",
    ]
    table = README[README.index("|---|") : README.index("## In tests")]
    assert set(re.findall(r"`([\w-]+)`", table)) == set(SCRIPTS)
