"""The official client against scripts: the server speaks the protocol as a stranger understands it."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import openai
import pytest

from conftest import nothing_left_behind, wait_until  # noqa: F401

sys.path.insert(0, str(Path(__file__).parent))

from asking import (
    MESSAGES,
    Asking,
    make_asking,  # noqa: F401
    make_client,  # noqa: F401
)
from model_server import Script


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
    assert type(caught.value) is error or error is ValueError  # bytes that are no text or no JSON are both


async def test_the_official_client_takes_a_torn_answer_for_a_whole_one(
    asking: Asking, client: openai.AsyncOpenAI
) -> None:
    """Half an event and a clean end raise nothing: only the missing finish reason tells."""
    asking.server.next(Script(text="one two three", half_after=1, half_then="end"))
    text, last = await said(client)
    assert (text, last.choices[0].finish_reason) == ("one", None)
    assert not asking.last.finished


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
