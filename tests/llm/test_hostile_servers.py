"""Providers that say what no provider should: the request ends, its place is free, and the next one is answered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest
from tests.llm.asking import ASKED, OpenModels, failure_of, sample, text_of
from tests.llm.raw_server import DONE, END, HEAD, STOP, event, piece, read_request, said, serving, whole

from conftest import wait_until
from hotdesk.llm.client import Llm
from hotdesk.llm.connection import HIGH_WATER_BYTES, MAX_HEAD_BYTES, WireError
from hotdesk.llm.events import EventParser
from hotdesk.llm.request import Asked
from hotdesk.llm.wire import Wire
from hotdesk_sdk import LlmError

ANSWER = {"choices": [{"message": {"content": "yes"}, "finish_reason": "stop"}]}


async def pushed(llm: Llm, heard: Callable[[str], Any] = lambda text: None) -> str:
    """The text of an answer that is pushed; *heard* is told each piece, and says whether that is enough for now."""
    stream, texts = llm.stream(ASKED), []

    def tell(batch: list[str]) -> bool:
        texts.extend(batch)
        enough = [heard(text) for text in batch]
        return any(enough)

    async with asyncio.timeout(8):
        while not await stream.push(tell):
            pass
    return "".join(texts)


async def pulled(llm: Llm, heard: Callable[[str], Any] = lambda text: None) -> str:
    """The same, pulled."""
    texts = []
    async with asyncio.timeout(8):
        async for text in llm.stream(ASKED):
            texts.append(text)
            heard(text)
    return "".join(texts)


WAYS = {"pushed": pushed, "pulled": pulled}


class Speaks:
    """Answers each request with a first text, and when that was heard with *rest*."""

    def __init__(self, *rest: bytes) -> None:
        self.rest = b"".join(rest)
        self.heard = asyncio.Event()
        self.requests = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_request(reader)
            self.requests += 1
            self.heard.clear()
            writer.write(HEAD + said("first"))
            await self.heard.wait()
            writer.write(self.rest)
            await writer.drain()

    def hear(self, text: str) -> bool:
        if text == "first":
            self.heard.set()
        return text == "full"


# -- connections that are used again -----------------------------------------------------------------------------------


async def test_a_connection_goes_back_to_the_others_able_to_read(open_models: OpenModels) -> None:
    """Nobody could take more in the moment in which the answer ended: the next request over it is answered."""
    speaks = Speaks(said("full"), STOP, DONE, END)
    async with serving(speaks) as url:
        llm = await open_models(url, first_token_s=3, retries=0)
        for _ in range(3):
            assert await pushed(llm, speaks.hear) == "firstfull"
        assert speaks.requests == 3
        assert len(llm.models["default"].wire.connections) == 1


async def test_an_answer_over_the_high_water_mark_leaves_a_connection_that_reads() -> None:
    """All of it came before anybody read, and the mark had the reading paused; the next answer comes all the same."""
    body = b"x" * (HIGH_WATER_BYTES + 50_000)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_request(reader)
            writer.write(whole(body))
            await writer.drain()

    async with serving(answer) as url:
        wire = Wire(url, [], connect_s=2.0)
        for _ in range(3):
            async with asyncio.timeout(3):
                response = await wire.post(b"")
            await wait_until(lambda: response.ended, "all of it has come")  # noqa: B023
            assert await response.read() == body
        assert len(wire.connections) == 1
        await wire.aclose()


async def test_a_server_that_answers_before_it_has_read_is_not_asked_over_that_connection(
    open_models: OpenModels,
) -> None:
    """The rest of the large request would stand before the next one, and nobody reads it."""
    connections = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        if connections == 1:
            await reader.readuntil(b"\r\n\r\n")
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            writer.write(whole({"error": {"message": "slower"}}, b"429 Too Many Requests"))
            await asyncio.sleep(60)
        while True:
            await read_request(reader)
            writer.write(whole(ANSWER))

    async with serving(answer) as url:
        llm = await open_models(url, first_token_s=3, total_s=3, retries=0)
        large = Asked([{"role": "user", "content": "x" * 20_000_000}])
        with pytest.raises(LlmError, match="slower"):
            await llm.complete(large)
        assert (await llm.complete(ASKED)).text == "yes"
        assert connections == 2


async def test_who_gives_up_in_the_moment_of_the_answer_takes_nobody_elses_connection() -> None:
    """The connection is back among the others by then, and another request is on it: that one is answered."""
    loop = asyncio.get_running_loop()
    other: list[asyncio.Task[Any]] = []
    requests = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal requests
        while True:
            await read_request(reader)
            requests += 1
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
            if requests == 1:
                loop.call_soon(meanwhile)

    def meanwhile() -> None:  # runs in the tick in which the answer is read, before who asked hears of it
        other.append(loop.create_task(wire.post(b"other")))
        loop.call_soon(asking.cancel)

    async with serving(answer) as url:
        wire = Wire(url, [], connect_s=2.0)
        asking = loop.create_task(wire.post(b"first"))
        await asyncio.wait([asking])
        assert asking.cancelled()
        async with asyncio.timeout(3):
            response = await other[0]
            assert await response.read() == b"ok"
        assert (requests, len(wire.connections)) == (2, 1)
        await wire.aclose()


# -- what has no end ---------------------------------------------------------------------------------------------------


async def test_trailers_without_end_are_given_up() -> None:
    """What comes after a body is bounded as the head is, and not by a clock alone."""
    sent = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await read_request(reader)
        writer.write(HEAD + piece(b"x") + b"0\r\n")
        while sent < 64 * MAX_HEAD_BYTES:
            lines = b"".join(b"x%d: %b\r\n" % (sent + n, b"y" * 1000) for n in range(16))
            writer.write(lines)
            await writer.drain()
            sent += len(lines)
        await asyncio.sleep(60)

    async with serving(answer) as url:
        wire = Wire(url, [], connect_s=2.0)
        response = await wire.post(b"")

        async def read_on() -> None:
            while await response.read():
                pass

        with pytest.raises(WireError, match="over"):
            await asyncio.wait_for(read_on(), 4)
        assert len(wire.connections) == 0
        await wire.aclose()


def test_a_line_in_single_bytes_costs_in_proportion_to_its_length() -> None:
    """Four times the bytes are about four times the time, and not sixteen times."""

    def seconds(count: int) -> float:
        best = float("inf")
        for _ in range(3):
            parser, began = EventParser(), time.process_time()
            for _ in range(count):
                parser.feed(b"x")
            best = min(best, time.process_time() - began)
        return best

    assert seconds(200_000) < 9 * seconds(50_000)


async def test_an_answer_that_is_all_there_needs_no_end(open_models: OpenModels) -> None:
    """After its finish reason neither `[DONE]` nor the end of the body comes: it is whole after a second, not cut."""
    speaks = Speaks(said(" and last"), STOP)
    async with serving(speaks) as url:
        llm = await open_models(url, first_token_s=20, gap_s=20, total_s=20, retries=0)
        for count, way in enumerate(WAYS.values(), 1):
            began = time.monotonic()
            assert await way(llm, speaks.hear) == "first and last"
            assert 0.5 < time.monotonic() - began < 3
            assert sample(llm, "hotdesk_llm_requests_total", model="default", outcome="answered") == count
        assert sample(llm, "hotdesk_llm_requests_total", model="default", outcome="cut") == 0
        assert llm.models["default"].running == 0


# -- what can't be read ------------------------------------------------------------------------------------------------

USAGE = {
    "less than nothing": (b'{"prompt_tokens":-1,"completion_tokens":5}', 0),
    "four hundred digits": (b'{"prompt_tokens":1' + b"0" * 400 + b',"completion_tokens":5}', None),
    "over any number": (b'{"prompt_tokens":1e300,"completion_tokens":5}', 0),
    "with a point": (b'{"prompt_tokens":3.0,"completion_tokens":5}', 3),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("usage", USAGE)
async def test_counts_that_are_none_end_the_request(open_models: OpenModels, usage: str, way: str) -> None:
    """Whatever is said of the tokens, the answer ends, its place is free, and no counter goes backwards."""
    data, tokens = USAGE[usage]
    speaks = Speaks(said(" last"), STOP, event(b'{"choices":[],"usage":' + data + b"}"), DONE, END)
    async with serving(speaks) as url:
        llm = await open_models(url, first_token_s=20, gap_s=20, total_s=20, retries=0, concurrency=1)
        for count in (1, 2):
            if tokens is None:  # no number at all; the answer is told to be cut
                with pytest.raises(LlmError):
                    await WAYS[way](llm, speaks.hear)
            else:
                assert await WAYS[way](llm, speaks.hear) == "first last"
                assert sample(llm, "hotdesk_llm_tokens_total", model="default", direction="in") == tokens * count
            assert llm.models["default"].running == 0


@pytest.mark.parametrize("way", WAYS)
async def test_an_event_that_nests_too_deeply_ends_the_request(open_models: OpenModels, way: str) -> None:
    """It can't be read, which is the provider's failure and told as such."""
    deep = b'{"error":' + b"[" * 20_000 + b"]" * 20_000 + b"}"
    speaks = Speaks(event(deep), END)
    async with serving(speaks) as url:
        llm = await open_models(url, first_token_s=3, gap_s=3, retries=0, concurrency=1)
        with pytest.raises(LlmError, match="can't be read"):
            await WAYS[way](llm, speaks.hear)
        assert llm.models["default"].running == 0


async def test_a_whole_answer_that_nests_too_deeply_ends_the_request(open_models: OpenModels) -> None:
    """The same, asked for in one piece."""
    deep = b'{"error":' + b"[" * 20_000 + b"]" * 20_000 + b"}"

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(whole(deep))

    async with serving(answer) as url:
        llm = await open_models(url, retries=0)
        with pytest.raises(LlmError, match="can't be read"):
            await llm.complete(ASKED)
        assert llm.models["default"].running == 0


@pytest.mark.parametrize("asks", ["stream", "complete"])
async def test_a_switch_of_protocols_is_no_answer(open_models: OpenModels, asks: str) -> None:
    """Status 101 is a failure of the provider, as any other that is no answer, and nothing is left to the loop."""
    unhandled: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: unhandled.append(context))

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        await asyncio.sleep(60)

    async with serving(answer) as url:
        llm = await open_models(url, first_token_s=3, total_s=3, retries=0)
        with pytest.raises(LlmError):
            await (text_of(llm) if asks == "stream" else llm.complete(ASKED))
        assert llm.models["default"].running == 0
    assert unhandled == []


async def test_a_name_that_is_no_name_of_a_host_is_the_models_failure(open_models: OpenModels) -> None:
    """`a..b` can't be looked up at all."""
    llm = await open_models("http://a..b/v1", first_token_s=3, retries=0)
    _, exc = await failure_of(llm)
    assert "a..b" in str(exc)


@pytest.mark.parametrize("line", [b"HTTP/1.1", b"HTTP/1.1 ", b"HTTP/1.1 " + b"9" * 5000])
async def test_a_proxy_that_says_nonsense_is_the_models_failure(open_models: OpenModels, line: bytes) -> None:
    """Told with its status, as far as that is one."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(line + b"\r\n\r\n")
        await asyncio.sleep(60)

    async with serving(answer) as url:
        llm = await open_models("https://m.example/v1", first_token_s=3, retries=0, proxy=url.removesuffix("/v1"))
        _, exc = await failure_of(llm)
        assert "the proxy answered with status" in str(exc)
        assert len(str(exc)) < 300


# -- what is said of a failure -----------------------------------------------------------------------------------------


async def test_a_key_in_a_header_is_hidden_without_the_word_before_it(open_models: OpenModels) -> None:
    """The provider repeats the token alone, and not `Bearer` with it."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_request(reader)
            writer.write(whole({"error": {"message": "bad token sk-in-a-header sent"}}, b"401 Unauthorized"))

    async with serving(answer) as url:
        llm = await open_models(url, retries=0, headers={"Authorization": "Bearer sk-in-a-header"})
        _, exc = await failure_of(llm)
        assert "bad token … sent" in str(exc)
        assert "sk-in-a-header" not in f"{exc!r} {exc} {exc.public}"


@pytest.mark.parametrize("retries", [0, 1])
async def test_each_failed_try_is_counted_once(open_models: OpenModels, retries: int) -> None:
    """And the request that gives up after them is not one more."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_request(reader)
            refusal = whole({"error": {"message": "later"}}, b"503 Service Unavailable")
            writer.write(refusal.replace(b"\r\n", b"\r\nretry-after-ms: 10\r\n", 1))

    async with serving(answer) as url:
        llm = await open_models(url, retries=retries)
        for count, way in enumerate(WAYS.values(), 1):
            with pytest.raises(LlmError):
                await way(llm)
            failed = sample(llm, "hotdesk_llm_requests_total", model="default", outcome="failed")
            assert failed == count * (1 + retries)
        await wait_until(lambda: llm.models["default"].running == 0, "the place is free")
