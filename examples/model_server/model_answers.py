"""What the server says of its own accord, and the scripts that can be asked for by name.

`answer` reads a request the way a model would, as far as a model that knows nothing can: it quotes the last question,
calls a tool that fits, says what the tool found, counts images. The same request always gets the same answer.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any
from urllib.parse import parse_qsl

import msgspec
from model_script import Script, content_deltas, words_of

TOKENS_PER_SECOND = 20.0
IMAGE_TOKENS = 85  # what an image counts in `usage`

ORDER = re.compile(r"(?:order|订单)(?:\s+(?:number|no\.?)|号)?\W{0,3}([A-Z0-9-]*\d[A-Z0-9-]*)", re.IGNORECASE)

OPENINGS = (
    "You said: “{}”. That is all I know about it, for I am a script and not a model.",
    "Let me repeat that: “{}”. A real model would now have an opinion.",
    "“{}”, you say. I would help if I could think; I can only stream.",
    "Thank you for “{}”. Every word of it came back to you one at a time.",
)

SCRIPTS: Mapping[str, Mapping[str, Any]] = {
    "answer": {},
    "slow": {"delay_s": 1.0, "first_s": 2.0, "gap_s": 0.5},
    "fast": {"gap_s": 0.0},
    "silent": {"stall_after": 0, "keepalive_s": 1.0},
    "stall": {"stall_after": 3, "keepalive_s": 1.0},
    "keepalive": {"first_s": 5.0, "keepalive_s": 0.5},
    "cut": {"cut_after": 3},
    "cut-before-headers": {"cut_before_headers": True},
    "cut-before-done": {"cut_before_done": True},
    "half": {"half_after": 3},
    "no-done": {"end_without_done": True},
    "no-finish": {"end_without_done": True, "finish": ""},
    "400": {"status": 400},
    "401": {"status": 401},
    "429": {"status": 429, "headers": {"retry-after": "1"}},
    "500": {"status": 500},
    "503": {"status": 503, "headers": {"retry-after-ms": "200"}},
    "error-event": {"error_event_after": 3},
    "length": {"finish": "length"},
    "filter": {"finish": "content_filter"},
    "refusal": {"pieces": (), "refusal": "I cannot help with that."},
    "reasoning": {"reasoning": "The question is short. So let the answer be short."},
    "noise": {"noise": True, "other_choices": True},
    "crlf": {"crlf": True},
    "bytes": {"write_bytes": 1},
    "garbage": {"garbage": True},
    "endless": {"endless_line": True},
    "huge": {"huge_event_bytes": 10_000_000},
    "no-usage": {"usage": False},
    "close": {"connection_close": True},
}


class UnknownScript(ValueError):
    """No script of that name, or a value that does not fit; says which there are."""


def parse_script(spec: str, said: Script) -> Script:
    """The script of *spec*, `NAME` or `NAME?field=value&…`, laid over *said*. Raises `UnknownScript`."""
    name, _, query = spec.partition("?")
    if name not in SCRIPTS:
        raise UnknownScript(f"There is no script {name!r}. There are: {', '.join(SCRIPTS)}.")
    values = {key: parse_value(key, value) for key, value in parse_qsl(query, keep_blank_values=True)}
    if "text" in values:
        values["pieces"] = None
    return replace(said, **{**SCRIPTS[name], **values, "name": spec})


def parse_value(key: str, value: str) -> Any:
    """A field's value as its type wants it; only fields of plain types can be written in a name."""
    kinds = {found.name: str(found.type) for found in fields(Script) if found.init}
    kind = kinds.get(key, "")
    try:
        if kind.startswith("bool"):
            return {"1": True, "true": True, "0": False, "false": False}[value.lower()]
        for begin, convert in (("int", int), ("float", float), ("str", str), ("Literal", str)):
            if kind.startswith(begin):
                return convert(value)
    except (KeyError, ValueError):
        raise UnknownScript(f"{key}={value} does not fit: {key} is {kind}.") from None
    plain = [name for name, kind in kinds.items() if kind.startswith(("bool", "int", "float", "str", "Literal"))]
    raise UnknownScript(f"{key!r} can't be set here. These can: {', '.join(plain)}.")


def problem_of(body: Any) -> tuple[str, str] | None:
    """What the protocol forbids in a request, as (message, parameter); None if it is a good one.

    Checked is what clients get wrong when they build prompts: the shape of messages, and that each tool call has its
    result right after it.
    """
    if not isinstance(body, dict):
        return "The body is not a JSON object.", "body"
    if not isinstance(body.get("model"), str) or not body["model"]:
        return "You must provide a model parameter.", "model"
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        return "'messages' must be an array with at least one message.", "messages"
    waiting: set[str] = set()
    for at, message in enumerate(messages):
        where = f"messages[{at}]"
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("system", "developer", "user", "assistant", "tool"):
            return f"Invalid value for 'role': {role!r}.", f"{where}.role"
        if role == "tool":
            if message.get("tool_call_id") not in waiting:
                return "A 'tool' message must follow the 'tool_calls' that it answers.", f"{where}.tool_call_id"
            waiting.discard(message["tool_call_id"])
        elif waiting:
            return f"'tool_calls' without an answer: {', '.join(sorted(waiting))}.", where
        calls = (message.get("tool_calls") if role == "assistant" else None) or []
        content = message.get("content")
        if isinstance(content, list):
            if not all(isinstance(part, dict) and is_part(part) for part in content):
                return "A part has a 'type' and what belongs to it.", f"{where}.content"
        elif not isinstance(content, str) and not calls and not message.get("refusal"):
            return "'content' must be a string or an array of parts.", f"{where}.content"
        if not all(isinstance(call, dict) and is_call(call) for call in calls):
            return "A tool call has an 'id' and a 'function' with a 'name' and 'arguments'.", f"{where}.tool_calls"
        waiting |= {call["id"] for call in calls}
    if waiting:
        return f"'tool_calls' without an answer: {', '.join(sorted(waiting))}.", "messages"
    return None


def is_part(part: Mapping[str, Any]) -> bool:
    if part.get("type") == "image_url":
        image = part.get("image_url")
        return isinstance(image, dict) and str(image.get("url")).startswith(("http://", "https://", "data:image/"))
    return part.get("type") != "text" or isinstance(part.get("text"), str)


def is_call(call: Mapping[str, Any]) -> bool:
    function = call.get("function")
    return (
        isinstance(call.get("id"), str)
        and isinstance(function, dict)
        and isinstance(function.get("name"), str)
        and isinstance(function.get("arguments"), str)
    )


def text_of(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        return " ".join(part.get("text", "") for part in content if part.get("type") == "text")
    return content or ""


def count_images(message: Mapping[str, Any]) -> int:
    content = message.get("content")
    return sum(part.get("type") == "image_url" for part in content) if isinstance(content, list) else 0


def answer(body: Mapping[str, Any], *, tokens_per_second: float = TOKENS_PER_SECOND) -> Script:
    """A short answer that quotes the last user message, or the call of an offered tool that it asks for.

    *body* has no `problem_of`. 0 tokens a second is all at once.
    """
    messages = body["messages"]
    question: Mapping[str, Any] = next((said for said in reversed(messages) if said["role"] == "user"), {})
    asked = " ".join(text_of(question).split())
    calls: tuple[tuple[str, str], ...] = ()
    text = ""
    if messages[-1]["role"] == "tool":
        text = tell_results(messages)
    elif not (calls := choose_tools(asked, body)):
        text = OPENINGS[zlib.crc32(asked.encode()) % len(OPENINGS)].format(asked) if asked else "You said nothing."
        if images := sum(count_images(message) for message in messages if message["role"] == "user"):
            text = f"I see {images} image{'s' * (images > 1)}. {text}"
    pieces = words_of(text)
    limit = body.get("max_completion_tokens") or body.get("max_tokens")
    limit = limit if isinstance(limit, int) and limit > 0 else len(pieces)
    script = Script(
        name="answer",
        pieces=pieces[:limit],
        tool_calls=calls,
        gap_s=1 / tokens_per_second if tokens_per_second else 0.0,
        finish="length" if limit < len(pieces) else None,
    )
    prompt = sum(4 + len(words_of(text_of(message))) + IMAGE_TOKENS * count_images(message) for message in messages)
    return replace(script, usage=(prompt, len(content_deltas(script))))


def tell_results(messages: list[Mapping[str, Any]]) -> str:
    """What the tools said, after the names that they were called by."""
    names = {call["id"]: call["function"]["name"] for message in messages for call in message.get("tool_calls") or ()}
    last: list[str] = []
    for message in reversed(messages):
        if message["role"] != "tool":
            break
        last.insert(0, f"{names.get(message['tool_call_id'], 'The tool')} says: {text_of(message)}")
    return " ".join(last)


def choose_tools(asked: str, body: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Calls for what is asked: an order tool for each "order 1234", one that hands over for "human" or "人工"."""
    if body.get("tool_choice") == "none":
        return ()
    tools = [tool["function"] for tool in body.get("tools") or () if tool.get("type") == "function"]
    calls = []
    for tool in tools:
        name = tool["name"].lower()
        if "order" in name:
            calls += [(tool["name"], arguments_for(tool, number)) for number in dict.fromkeys(ORDER.findall(asked))]
        elif re.search("human|hand|agent", name) and re.search(r"\bhuman\b|\bagent\b|人工", asked, re.IGNORECASE):
            calls.append((tool["name"], arguments_for(tool, asked)))
    return tuple(calls)


def arguments_for(tool: Mapping[str, Any], value: str) -> str:
    """*value* as the first argument that the tool requires, or else has; nothing if it has none."""
    schema = tool.get("parameters") or {}
    properties = schema.get("properties") or {}
    name = next(iter([*(schema.get("required") or ()), *properties]), None)
    if name is None:
        return "{}"
    number = properties.get(name, {}).get("type") in ("integer", "number") and value.isdecimal()
    return msgspec.json.encode({name: int(value) if number else value}).decode()
