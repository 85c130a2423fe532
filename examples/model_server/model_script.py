"""`Script`: how one request is answered and what goes wrong, and what that means as deltas, tool calls and usage.

Nothing here knows bytes on a wire; that is `model_plan.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Literal

import msgspec

MARK = "~model-answer-id"
"""Stands for the answer's id in what is prepared; an id has the same length, so that HTTP chunk sizes stay true."""

DEFAULT_TEXT = "Hello there, friend."
Answers = Callable[[dict[str, Any]], "Script | str"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """How one request is answered, and what goes wrong. Every field may be left out.

    Counts (`…_after=N`) are of *content events*: those with text, reasoning, a refusal or a piece of a tool call. The
    role event, noise, the finish reason, usage and `[DONE]` are not counted. An N beyond the last one never happens; N
    equal to their number is after the last and before the finish reason.

    Without `stream` in the request the same script gives one JSON body, after `delay_s`, the headers and `first_s`.
    Whatever would break the stream off then breaks the body off in its middle.
    """

    name: str = ""  # for the log

    # what is said
    text: str | None = None  # in words, unless:
    piece_chars: int | None = None  # … in pieces of so many characters
    pieces: Sequence[str] | None = None  # … in just these
    reasoning: str | None = None  # `reasoning_content`, before the text
    refusal: str | None = None
    tool_calls: Sequence[tuple[str, str | Mapping[str, Any]]] = ()  # (name, arguments), streamed side by side
    huge_event_bytes: int | None = None  # one more event with so many bytes of text
    finish: str | None = None  # None: "tool_calls" or "stop", as fits; "": no finish reason is sent at all
    usage: tuple[int, int] | Literal[False] | None = None  # prompt, completion; None: 10 and the content events
    role_first: bool = True  # begin with an event that has only the role
    role_content: str | None = ""  # what that event has as content
    noise: bool = False  # events without choices, with empty and null deltas, with fields that nobody knows
    other_choices: bool = False  # after each content event one for choice 1

    # when
    delay_s: float = 0  # before the headers
    first_s: float = 0  # after the headers, before the first event
    gap_s: float = 0  # between content events
    keepalive_s: float | None = None  # comment lines at this interval while nothing else is sent

    # what goes wrong
    status: int = 200
    error: Mapping[str, Any] | bytes | None = None  # the body with `status`; the error of `error_event_after`
    headers: Mapping[str, str] = field(default_factory=dict)  # over ours
    connection_close: bool = False
    cut_before_headers: bool = False
    cut_after: int | None = None  # 0: right after the headers, not even the role event is sent
    cut_before_done: bool = False  # all is said, the finish reason too; then the connection breaks
    cut_with: Literal["reset", "fin"] = "reset"
    stall_after: int | None = None  # nothing more but keep-alives, for ever
    half_after: int | None = None  # half of the next event
    half_then: Literal["cut", "end"] = "cut"
    error_event_after: int | None = None
    end_without_done: bool = False
    garbage: bool = False  # bytes that are no events
    endless_line: bool = False  # a data line that does not end, until the client hangs up

    # how it is written
    crlf: bool = False
    write_bytes: int | None = None  # the body in writes of so many bytes, each in a TCP segment of its own
    raw: Sequence[bytes | float] | None = None
    """Written as it is, numbers being seconds to wait. If it begins with `HTTP/` it is all that is sent, and the
    connection is closed after it; if not it is the body of an answer, which ends with it. After it also
    `cut_before_done`, and `stall_after` whatever its number."""

    answers: Answers | None = None
    """Gives the script for a request's body; the other fields of this one then count for nothing."""

    plans: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)  # kept by `model_plan`


def words_of(text: str) -> list[str]:
    """*text* cut before each space, the way that tokens begin with theirs; joined they are *text* again."""
    return re.findall(r"\s*\S+(?:\s+$)?|\s+$", text)


def content_deltas(script: Script) -> list[dict[str, Any]]:
    """The deltas of the content events, in order."""
    texts = list(script.pieces or ())
    if script.pieces is None:
        alone = script.tool_calls or script.huge_event_bytes or script.refusal or script.garbage or script.endless_line
        text = script.text if script.text is not None else "" if alone else DEFAULT_TEXT
        size = script.piece_chars
        texts = [text[at : at + size] for at in range(0, len(text), size)] if size else words_of(text)
    deltas = [{"reasoning_content": piece} for piece in words_of(script.reasoning or "")]
    deltas += [{"content": piece} for piece in texts]
    if script.huge_event_bytes:
        deltas.append({"content": "x" * script.huge_event_bytes})
    deltas += [{"refusal": piece} for piece in words_of(script.refusal or "")]
    return deltas + tool_deltas(script)


def arguments_of(arguments: str | Mapping[str, Any]) -> str:
    return arguments if isinstance(arguments, str) else msgspec.json.encode(arguments).decode()


def tool_calls_of(script: Script) -> list[dict[str, Any]]:
    return [
        {
            "id": f"call_{index}{MARK}",
            "type": "function",
            "function": {"name": name, "arguments": arguments_of(arguments)},
        }
        for index, (name, arguments) in enumerate(script.tool_calls)
    ]


def tool_deltas(script: Script) -> list[dict[str, Any]]:
    """The calls as they are streamed: each begins with its name, then their arguments come in turns, in fragments."""
    begun, turns = [], []
    for index, call in enumerate(tool_calls_of(script)):
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        begun.append({"index": index, **call, "function": {"name": name, "arguments": ""}})
        size = max(1, min(12, -(-len(arguments) // 3)))
        for turn, at in enumerate(range(0, len(arguments), size)):
            turns.append((turn, index, {"index": index, "function": {"arguments": arguments[at : at + size]}}))
    fragments = [fragment for _, _, fragment in sorted(turns, key=lambda turn: turn[:2])]
    return [{"tool_calls": [call]} for call in begun + fragments]


def usage_of(script: Script, events: int) -> dict[str, int] | None:
    if script.usage is False:
        return None
    prompt, completion = script.usage or (10, events)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def finish_of(script: Script) -> str | None:
    return script.finish if script.finish is not None else "tool_calls" if script.tool_calls else "stop"


def error_of(script: Script) -> bytes:
    """The error as bytes; a dict without `error` is put into one, as the protocol has it."""
    error = script.error
    if isinstance(error, bytes):
        return error
    if error is None:
        status = script.status if script.status >= 400 else 500
        kind = {400: "invalid_request_error", 401: "invalid_request_error", 429: "rate_limit_exceeded"}
        message = f"The script answers {status}: {HTTPStatus(status).phrase}."
        error = {"message": message, "type": kind.get(status, "server_error"), "param": None, "code": None}
    return msgspec.json.encode(error if "error" in error else {"error": error})
