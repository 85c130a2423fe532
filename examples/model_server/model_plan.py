"""The way from a `Script` to bytes: a `Plan` is every write of an answer, and the waits between them.

A plan is made once for a script and a kind of request, so that an event that is sent ten thousand times a second is
encoded once. Nothing here touches a socket.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Literal, NamedTuple

import msgspec
from model_script import MARK, Script, content_deltas, error_of, finish_of, tool_calls_of, usage_of

GARBAGE = b'\x00\xff\xfe<html>\xc3(\n\ndata {no colon}\n\ndata: {"choices": [\n\ndata: ]]\n\nevent\xf0\x9f: oh\n\n'
ENDLESS_BLOCK = b"on and on " * 1638  # nearly 16 KiB
WRITE_AT_MOST = 32 * 1024  # bytes that are joined into one write

End = Literal["done", "close", "torn", "cut", "stall", "endless"]
"""Ended as HTTP wants it; by closing; like done, but in the middle of what was to be said; broken off; never."""


class Step(NamedTuple):
    """After *wait_s*, write *data*; with it so many events and content events are out."""

    wait_s: float
    data: bytes
    events: int = 0
    content: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """All that is written for one request. *alive* and *more* are written again and again where there is a wait, or
    no end. *paced*: the event loop has its turn after each write, so that a reader can take it."""

    steps: tuple[Step, ...]
    end: End
    status: int = 200
    keep_alive: bool = True
    alive_s: float | None = None
    alive: bytes = b""
    more: bytes = b""
    more_s: float = 0
    paced: bool = False
    reset: bool = True


def plan_for(script: Script, model: str, *, stream: bool, usage: bool, chunked: bool) -> Plan:
    """What to write for a request of this kind; made once, then kept. *usage*: the stream is to tell it."""
    key = (model, stream, usage, chunked)
    found: Plan | None = script.plans.get(key)
    if found is None:
        if len(script.plans) >= 64:  # model names come from clients
            script.plans.clear()
        found = script.plans[key] = make_plan(script, model, stream=stream, usage=usage, chunked=chunked)
    return found


def head(script: Script, *, content_type: str, length: int | None, chunked: bool) -> bytes:
    """Status line and headers. *length* None: the body's length is not known."""
    headers = {"content-type": content_type, "x-request-id": f"req_{MARK}"}
    if length is not None:
        headers["content-length"] = str(length)
    elif chunked:
        headers["transfer-encoding"] = "chunked"
        headers["cache-control"] = "no-cache"
    if script.connection_close or (length is None and not chunked):
        headers["connection"] = "close"
    headers |= {name.lower(): value for name, value in script.headers.items()}
    try:
        phrase = HTTPStatus(script.status).phrase
    except ValueError:
        phrase = "Unknown"
    lines = [f"HTTP/1.1 {script.status} {phrase}", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode()


def make_plan(script: Script, model: str, *, stream: bool, usage: bool, chunked: bool) -> Plan:
    keep_alive = not script.connection_close
    if script.cut_before_headers:
        return Plan((Step(script.delay_s, b""),), "cut", reset=script.cut_with == "reset")
    if script.raw and isinstance(script.raw[0], bytes) and script.raw[0].startswith(b"HTTP/"):
        return Plan(tuple(raw_steps(script)), raw_end(script, "close"), keep_alive=False)
    if script.status != 200 or (script.error is not None and script.error_event_after is None):
        body = error_of(script)
        kind = "text/html" if body.lstrip().startswith(b"<") else "application/json"
        top = head(script, content_type=kind, length=len(body), chunked=chunked)
        return Plan((Step(script.delay_s, top + body),), "done", status=script.status, keep_alive=keep_alive)
    if script.raw is not None:
        kind = "text/event-stream; charset=utf-8" if stream else "application/json"
        top = head(script, content_type=kind, length=None, chunked=chunked)
        alive = b": keep-alive\n\n" if stream else b"\n"
        return frame(
            script, top, raw_steps(script), raw_end(script, "done"), alive=alive, keep_alive=keep_alive, chunked=chunked
        )
    if not stream:
        return whole_plan(script, model, keep_alive=keep_alive, chunked=chunked)
    return stream_plan(script, Events(script, model, usage), keep_alive=keep_alive, chunked=chunked)


def whole_plan(script: Script, model: str, *, keep_alive: bool, chunked: bool) -> Plan:
    """One JSON body, or what is left of it."""
    message: dict[str, Any] = {
        "role": "assistant",
        "content": "".join(delta.get("content", "") for delta in content_deltas(script)) or None,
        "refusal": script.refusal,
    }
    if script.reasoning:
        message["reasoning_content"] = script.reasoning
    if script.tool_calls:
        message["tool_calls"] = tool_calls_of(script)
    answer = {
        "id": f"chatcmpl-{MARK}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": finish_of(script) or None}],
    }
    if told := usage_of(script, len(content_deltas(script))):
        answer["usage"] = told
    body = GARBAGE if script.garbage else msgspec.json.encode(answer)
    half = body[: len(body) // 2]
    end: End = "done"
    if script.cut_after is not None or script.cut_before_done:
        body, end = (b"" if script.cut_after == 0 else half), "cut"
    elif script.half_after is not None:
        body, end = half, ("cut" if script.half_then == "cut" else "torn")
    elif script.stall_after is not None:
        body, end = half, "stall"
    elif script.endless_line:
        body, end = half, "endless"
    length = len(body) if end in ("done", "torn") and not script.keepalive_s else None
    top = head(script, content_type="application/json", length=length, chunked=chunked)
    steps = [Step(script.first_s, body, 1, 1)] if body else []
    return frame(
        script, top, steps, end, alive=b"\n", keep_alive=keep_alive, chunked=chunked and length is None, length=length
    )


def raw_steps(script: Script) -> list[Step]:
    steps, wait = [], 0.0
    for item in script.raw or ():
        if isinstance(item, bytes):
            steps.append(Step(wait, item, 1))
            wait = 0.0
        else:
            wait += item
    return [*steps, Step(wait, b"")] if wait else steps


def raw_end(script: Script, end: End) -> End:
    return "cut" if script.cut_before_done else "stall" if script.stall_after is not None else end


class Events:
    """Encodes the events of one stream."""

    def __init__(self, script: Script, model: str, usage: bool) -> None:
        self.line_end = b"\r\n" if script.crlf else b"\n"
        fields = {"id": f"chatcmpl-{MARK}", "object": "chat.completion.chunk", "created": int(time.time())}
        self.before = msgspec.json.encode(fields | {"model": model})[:-1]
        self.after = b',"usage":null}' if usage else b"}"
        self.told = usage

    def data(self, body: bytes) -> bytes:
        return b"data: " + body + self.line_end * 2

    def delta(self, delta: Mapping[str, Any], finish: str | None = None, index: int = 0) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
        return self.data(self.before + b',"choices":[' + msgspec.json.encode(choice) + b"]" + self.after)

    def no_choices(self, fields: Mapping[str, Any]) -> bytes:
        more = msgspec.json.encode({"choices": [], **fields})[1:]
        return self.data(self.before + b"," + more)


def stream_plan(script: Script, events: Events, *, keep_alive: bool, chunked: bool) -> Plan:
    top = head(script, content_type="text/event-stream; charset=utf-8", length=None, chunked=chunked)
    steps, end = stream_steps(script, events)
    alive = b": keep-alive" + events.line_end * 2
    return frame(script, top, steps, end, alive=alive, keep_alive=keep_alive, chunked=chunked)


def stream_steps(script: Script, events: Events) -> tuple[list[Step], End]:
    """The events and how the stream ends."""
    steps: list[Step] = []
    wait = script.first_s

    def add(data: bytes, count: int = 1, content: int = 0) -> None:
        nonlocal wait
        steps.append(Step(wait, data, count, content))
        wait = 0.0

    deltas = content_deltas(script)
    if script.cut_after != 0:
        if script.noise:
            add(events.no_choices({"prompt_filter_results": [{"prompt_index": 0, "content_filter_results": {}}]}))
        if script.role_first:
            add(events.delta({"role": "assistant", "content": script.role_content}))
    for n in range(len(deltas) + 1):
        data = events.delta(deltas[n]) if n < len(deltas) else b""
        if n and data:
            wait += script.gap_s
        if n == script.cut_after:
            return [*steps, Step(wait, b"")], "cut"
        if n == script.stall_after:
            return steps, "stall"
        if n == script.half_after:
            whole = data or events.delta({}, finish_of(script))
            add(whole[: len(whole) // 2], 0)
            return steps, ("torn" if script.half_then == "end" else "cut")
        if n == script.error_event_after:
            add(events.data(error_of(script)))
            break
        if data:
            add(data, 1, 1)
            if script.other_choices:
                add(events.delta({"content": "[another choice]"}, index=1))
            if script.noise:
                add(events.delta({}) if n % 2 else events.delta({"content": None, "vendor_field": {"n": n}}))
    else:
        if script.garbage:
            add(GARBAGE)
            return steps, "done"
        if script.endless_line:
            whole = events.delta({"content": ""})
            add(whole[: whole.index(b'"content":"') + len(b'"content":"')], 0)
            return steps, "endless"
        if finish := finish_of(script):
            add(events.delta({}, finish))
        if events.told and (usage := usage_of(script, len(deltas))):
            add(events.no_choices({"usage": usage}))
    if script.cut_before_done:
        return steps, "cut"
    if not script.end_without_done:
        add(events.data(b"[DONE]"))
    return steps, "done"


def frame(
    script: Script,
    top: bytes,
    steps: list[Step],
    end: End,
    *,
    alive: bytes,
    keep_alive: bool,
    chunked: bool,
    length: int | None = None,
) -> Plan:
    """Cut and join the body's steps into writes, put them into HTTP chunks, and put the headers before them."""

    def chunk(data: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(data), data) if chunked and data else data

    paced = bool(script.write_bytes)
    if script.write_bytes:
        steps = cut_writes(steps, script.write_bytes)
    writes = [Step(script.delay_s, top)]
    writes += [step._replace(data=chunk(step.data)) for step in steps]
    if chunked and end in ("done", "torn"):
        # In one write with the last event: a client that hangs up at [DONE] has had the whole answer.
        writes[-1] = writes[-1]._replace(data=writes[-1].data + b"0\r\n\r\n")
    return Plan(
        tuple(writes) if paced else tuple(join_writes(writes)),
        end,
        keep_alive=keep_alive and (chunked or length is not None),
        alive_s=script.keepalive_s,
        alive=chunk(alive),
        more=chunk(ENDLESS_BLOCK) if end == "endless" else b"",
        more_s=script.gap_s,
        paced=paced,
        reset=script.cut_with == "reset",
    )


def join_writes(steps: list[Step]) -> list[Step]:
    """Steps without a wait between them, joined: the reader sees the same bytes at the same time for fewer calls."""
    joined: list[Step] = []
    for step in steps:
        if joined and not step.wait_s and len(joined[-1].data) + len(step.data) <= WRITE_AT_MOST:
            last = joined[-1]
            joined[-1] = Step(
                last.wait_s, last.data + step.data, last.events + step.events, last.content + step.content
            )
        else:
            joined.append(step)
    return joined


def cut_writes(steps: list[Step], size: int) -> list[Step]:
    """The same bytes at the same times in pieces of *size*, wherever that cuts; an event counts with its last byte."""
    cut: list[Step] = []
    at = 0
    while at < len(steps):
        until = at + 1
        while until < len(steps) and not steps[until].wait_s:
            until += 1
        run = steps[at:until]
        # Ids are put in here: a mark that is cut in two would not be found later.
        body = b"".join(step.data for step in run).replace(MARK.encode(), f"{time.time_ns():016x}"[-16:].encode())
        ends, total = [], 0
        for step in run:
            total += len(step.data)
            ends.append(total)
        counted = 0
        for start in range(0, max(len(body), 1), size):
            out = counted
            while out < len(run) and ends[out] <= start + size:
                out += 1
            done = run[counted:out]
            counts = sum(step.events for step in done), sum(step.content for step in done)
            cut.append(Step(run[0].wait_s if start == 0 else 0.0, body[start : start + size], *counts))
            counted = out
        at = until
    return cut
