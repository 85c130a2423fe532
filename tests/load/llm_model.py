"""A model server that costs next to nothing: canned answers at once, or tokens at a pace with their time in them.

    python tests/load/llm_model.py PORT

What it answers is in the path of `base_url`: `/TOKENS/RATE/v1` gives so many tokens, RATE a second, 0 for as fast as
the socket takes them. Token n is ` n` in a burst, and ` n:NANOSECONDS` at a pace, of the clock that all processes of a
machine share, taken as it is written; the first one, ` 0:NANOSECONDS:NANOSECONDS`, says too when the request was in.
A request that asks for no stream gets the same text whole. `/stats` counts requests and the messages in them.
"""

from __future__ import annotations

import asyncio
import functools
import heapq
import itertools
import sys
import time

import uvloop

FIRST_S = 0.2
"""How long the first token takes at a pace."""

_HEAD = '"id":"chatcmpl-load","object":"chat.completion.chunk","created":1790000000,"model":"gpt-4.1-mini"'
_BEFORE = f'data: {{{_HEAD},"system_fingerprint":"fp_load","choices":[{{"index":0,"delta":{{"content":"'.encode()
_AFTER = b'"},"logprobs":null,"finish_reason":null}]}\n\n'
_ROLE = b'","role":"assistant'
_LAST = f'data: {{{_HEAD},"choices":[{{"index":0,"delta":{{}},"logprobs":null,"finish_reason":"stop"}}]}}\n\n'.encode()
_USAGE = (
    f'data: {{{_HEAD},"choices":[],"usage":{{"prompt_tokens":200,"completion_tokens":20,"total_tokens":220}}}}\n\n'
).encode()
_DONE = b"data: [DONE]\n\n"
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n"
    b"Cache-Control: no-cache\r\n\r\n"
)


def piece(event: bytes) -> bytes:
    """One piece of HTTP/1.1's chunked coding."""
    return b"%x\r\n%b\r\n" % (len(event), event)


def token(text: bytes) -> bytes:
    return piece(_BEFORE + text + _AFTER)


def canned_events(tokens: int) -> bytes:
    """The events of a streamed answer, outside of any coding."""
    said = (_ROLE, *(b" %d" % n for n in range(tokens)))
    return b"".join(_BEFORE + text + _AFTER for text in said) + _LAST + _USAGE + _DONE


FIRST = piece(_BEFORE + _ROLE + _AFTER)
END = piece(_LAST) + piece(_USAGE) + piece(_DONE) + b"0\r\n\r\n"


def whole_answer(text: str) -> bytes:
    """The JSON of an answer that is not streamed."""
    return (
        f'{{"id":"chatcmpl-load","object":"chat.completion","created":1790000000,"model":"gpt-4.1-mini","choices":'
        f'[{{"index":0,"message":{{"role":"assistant","content":"{text}","refusal":null}},"logprobs":null,'
        f'"finish_reason":"stop"}}],"usage":{{"prompt_tokens":200,"completion_tokens":20,"total_tokens":220}}}}'
    ).encode()


def canned_text(tokens: int) -> str:
    """The text of an answer in a burst."""
    return "".join(f" {n}" for n in range(tokens))


@functools.cache
def canned_stream(tokens: int) -> bytes:
    return STREAM_HEAD + FIRST + b"".join(token(b" %d" % n) for n in range(tokens)) + END


@functools.cache
def canned_whole(tokens: int) -> bytes:
    body = whole_answer(canned_text(tokens))
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body


class Pace:
    """All streams that have a pace: one heap of what is due, one timer."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._due: list[tuple[float, int, Stream]] = []
        self._order = itertools.count()
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, stream: Stream, at: float) -> None:
        heapq.heappush(self._due, (at, next(self._order), stream))
        if self._timer is None or at < self._timer.when():
            if self._timer is not None:
                self._timer.cancel()
            self._arm()

    def _arm(self) -> None:
        # uvloop's timers tick in milliseconds; what is due within one leaves in one go, each token stamped for itself.
        self._timer = self._loop.call_at(max(self._due[0][0], self._loop.time() + 0.001), self._tick)

    def _tick(self) -> None:
        self._timer = None
        due = self._due
        now = self._loop.time()
        while due and due[0][0] <= now:
            at, order, stream = due[0]
            if stream.go_on():
                heapq.heapreplace(due, (at + stream.gap_s, order, stream))
            else:
                heapq.heappop(due)
        if due:
            self._arm()


class Stream:
    """One answer at a pace."""

    __slots__ = ("_came", "_next", "_tokens", "_transport", "gap_s")

    def __init__(self, transport: asyncio.Transport, tokens: int, rate: float) -> None:
        self._transport = transport
        self._tokens = tokens
        self._next = 0
        self._came = time.monotonic_ns()
        self.gap_s = 1 / rate

    def go_on(self) -> bool:
        """Write the next token; False after the last, or when nobody reads any more."""
        n, transport = self._next, self._transport
        if transport.is_closing():
            return False
        if n == self._tokens:
            transport.write(END)
            return False
        self._next = n + 1
        if n:
            transport.write(token(b" %d:%d" % (n, time.monotonic_ns())))
        else:
            transport.write(token(b" 0:%d:%d" % (time.monotonic_ns(), self._came)))
        return True


class ModelProtocol(asyncio.Protocol):
    """One connection; a request at a time."""

    def __init__(self, pace: Pace, stats: dict[str, int]) -> None:
        self._pace = pace
        self._stats = stats
        self._buffer = b""
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer + data if self._buffer else data
        head = buffer.find(b"\r\n\r\n") + 4
        if head >= 4:
            lower = buffer[:head].lower()
            at = lower.find(b"\r\ncontent-length:")
            size = int(lower[at + 17 : lower.index(b"\r", at + 2)]) if at >= 0 else 0
            if len(buffer) >= head + size:
                self._answer(buffer[: buffer.index(b"\r")].split(b" ")[1].decode(), buffer[head : head + size])
                buffer = buffer[head + size :]
        self._buffer = buffer

    def _answer(self, path: str, body: bytes) -> None:
        stats = self._stats
        if not path.endswith("/chat/completions"):
            text = b'{"requests":%d,"messages":%d}' % (stats["requests"], stats["messages"])
            self._transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(text) + text)
            return
        stats["requests"] += 1
        stats["messages"] += body.count(b'"role":')
        _, tokens, rate, _ = path.split("/", 3)
        if b'"stream":true' not in body and b'"stream": true' not in body:
            self._transport.write(canned_whole(int(tokens)))
        elif rate == "0":
            self._transport.write(canned_stream(int(tokens)))
        else:
            self._transport.write(STREAM_HEAD + FIRST)
            stream = Stream(self._transport, int(tokens), float(rate))
            self._pace.begin(stream, asyncio.get_running_loop().time() + FIRST_S)


async def serve(port: int) -> None:
    """Serve until stopped."""
    loop, pace, stats = asyncio.get_running_loop(), Pace(), {"requests": 0, "messages": 0}
    server = await loop.create_server(lambda: ModelProtocol(pace, stats), "127.0.0.1", port, backlog=4096)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))
