"""What the server answers of its own accord, and the scripts that have names."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from conftest import nothing_left_behind, wait_until  # noqa: F401

sys.path.insert(0, str(Path(__file__).parent))

from asking import (
    CALL,
    MESSAGES,
    ORDER_TOOL,
    Asking,
    make_asking,  # noqa: F401
    texts_of,
)
from model_answers import SCRIPTS, UnknownScript, answer, parse_script, problem_of
from model_script import Script as ScriptFields
from model_server import ModelServer, Script

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
            await asking.read(model=model)
        assert min(asking.last.content, 9) == BREAKING[name]
    elif name in STOPPING:
        task = asyncio.create_task(asking.read(model=model))
        await wait_until(lambda: asking.server.requests and min(asking.last.content, 9) == STOPPING[name], "the stop")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(task, 0.05)
        await wait_until(lambda: asking.last.hung_up, "the hang-up")
    else:
        assert SAYING[name] in await asking.read(model=model)
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
