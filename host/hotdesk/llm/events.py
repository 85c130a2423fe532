"""A provider's stream of server-sent events, and the completions in it, read for what is needed of them.

Written for its cost: the official client spends 300 us a chunk, this under 2. The shapes are those of
`openai.types.chat`, of which a test says when a field that is read here changes there.
"""

from __future__ import annotations

from typing import Any

import msgspec

from hotdesk_sdk import Usage

__all__ = ["MAX_EVENT_BYTES", "Answer", "Chunk", "EventParser", "ToolDelta", "decode_answer", "decode_chunk"]

MAX_EVENT_BYTES = 2 * 1024 * 1024
"""An event, or a line, over this is no token of an answer: the stream is given up before it fills the memory."""

MAX_TOKENS = 2**53

LINE_BYTES = 64
"""What a line of data costs beside its text; an event in millions of empty lines is over the bound, too."""


class Counted(msgspec.Struct, frozen=True):
    """Usage as it comes; some servers know one of the two, or none."""

    prompt_tokens: float | None = None
    completion_tokens: float | None = None

    def usage(self) -> Usage:
        return Usage(_tokens(self.prompt_tokens), _tokens(self.completion_tokens))


def _tokens(count: float | None) -> int:
    """A count as far as it can be one: some servers say -1 for what they do not know."""
    return int(count) if count is not None and 0 <= count <= MAX_TOKENS else 0


class _Function(msgspec.Struct, frozen=True):
    name: str | None = None
    arguments: str | None = None


class ToolDelta(msgspec.Struct, frozen=True):
    """A piece of a tool call; the pieces of one call share their `index`."""

    index: int | None = None
    id: str | None = None
    function: _Function | None = None


class _Delta(msgspec.Struct, frozen=True):
    content: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolDelta] | None = None


class _Choice(msgspec.Struct, frozen=True):
    delta: _Delta | None = None
    index: int | None = None
    finish_reason: str | None = None


class Chunk(msgspec.Struct, frozen=True):
    """One event of a streamed completion."""

    choices: list[_Choice] | None = None
    usage: Counted | None = None
    error: Any = None
    message: Any = None


class _Message(msgspec.Struct, frozen=True):
    content: str | None = None
    refusal: str | None = None
    tool_calls: list[ToolDelta] | None = None


class _Said(msgspec.Struct, frozen=True):
    message: _Message | None = None
    finish_reason: str | None = None


class Answer(msgspec.Struct, frozen=True):
    """A completion that came whole."""

    choices: list[_Said] | None = None
    usage: Counted | None = None
    error: Any = None
    message: Any = None


decode_chunk = msgspec.json.Decoder(Chunk).decode
decode_answer = msgspec.json.Decoder(Answer).decode


class EventParser:
    """Takes bytes as they come off the wire, however they are cut, and gives the data of whole events.

    After the WHATWG's event stream interpretation: lines end in LF, CRLF or CR, comments and other fields are passed
    over, several data lines are one event. An event that the end of the stream cuts is not given.
    """

    __slots__ = ("_data", "_parts", "_size")

    def __init__(self) -> None:
        self._parts: list[bytes] = []  # of a line whose end has not come; joined once, however many they are
        self._size = 0
        self._data: list[bytes] = []

    def feed(self, data: bytes) -> list[bytes]:
        """The data of the events that *data* completes. Raises `ValueError` on one over `MAX_EVENT_BYTES`."""
        if self._parts:
            if b"\n" not in data and b"\r" not in data and not self._parts[-1].endswith(b"\r"):
                self._parts.append(data)
                self._size += len(data)
                if self._size > MAX_EVENT_BYTES:
                    raise ValueError(f"an event is over {MAX_EVENT_BYTES} bytes")
                return []
            data = b"".join(self._parts) + data
            self._parts.clear()
        elif (
            data.startswith(b"data: ")
            and data.endswith(b"\n\n")
            and data.count(b"\n") == 2
            and not self._data
            and b"\r" not in data
            and len(data) > len(b"data: \n\n")
        ):
            return [data[6:-2]]  # one event that came alone, as most do
        held = b""
        if b"\r" in data:
            if data.endswith(b"\r"):  # its LF may be on its way
                data, held = data[:-1], b"\r"
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        end = data.rfind(b"\n") + 1
        self._keep(data[end:] + held)
        return self._events(data[:end]) if end else []

    def _keep(self, tail: bytes) -> None:
        self._size = len(tail)
        if self._size > MAX_EVENT_BYTES:
            raise ValueError(f"an event is over {MAX_EVENT_BYTES} bytes")
        if tail:
            self._parts.append(tail)

    def _events(self, lines: bytes) -> list[bytes]:
        found: list[bytes] = []
        data = self._data
        for line in lines.split(b"\n")[:-1]:
            if line.startswith(b"data:"):
                data.append(line[6:] if line[5:6] == b" " else line[5:])
            elif not line and data:
                event = data[0] if len(data) == 1 else b"\n".join(data)
                if event:  # one without data is no event, by the same interpretation
                    found.append(event)
                data.clear()
        if len(data) > 1 and sum(map(len, data)) + LINE_BYTES * len(data) > MAX_EVENT_BYTES:
            raise ValueError(f"an event is over {MAX_EVENT_BYTES} bytes")
        return found
