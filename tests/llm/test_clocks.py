"""The three clocks of a request: each fires in its phase, only what the model says moves it, and none is a plugin's."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
from model_server import ModelServer, Script
from tests.llm.asking import ASKED, OpenModels, failure_of, text_of, texts_of

from conftest import wait_until
from hotdesk_sdk import LlmTimeout
from hotdesk_sdk.testing import Desk

ALIVE = b": keep-alive\n\n"


def event(delta: str, more: str = "") -> bytes:
    return f'data: {{"choices":[{{"index":0,"delta":{delta},"finish_reason":null}}]{more}}}\n\n'.encode()


ROLE = event('{"role":"assistant","content":""}')
NOISE = {
    "comments": ALIVE,
    "empty content": event('{"content":""}'),
    "null content": event('{"content":null,"refusal":null,"tool_calls":[]}'),
    "roles": ROLE,
    "usage": b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":1}}\n\n',
    "usage beside an empty delta": event("{}", ',"usage":{"prompt_tokens":1,"completion_tokens":1}'),
    "another choice": event('{"content":"x"}').replace(b'"index":0', b'"index":1'),
    "empty events": b"data:\n\n",
}


def again(*items: bytes, every_s: float = 0.03, times: int = 40) -> list[bytes | float]:
    """*items* one at a time, for longer than any clock of these tests."""
    return [part for _ in range(times) for item in items for part in (item, every_s)]


@pytest.mark.parametrize("script", [Script(delay_s=60), Script(first_s=60), Script(stall_after=0, keepalive_s=0.02)])
async def test_the_first_token_has_a_clock(model_server: ModelServer, open_models: OpenModels, script: Script) -> None:
    """From the request on, before the headers and after them; nothing was shown, and nothing is tried again."""
    llm = await open_models(model_server.base_url, first_token_s=0.2, gap_s=60, total_s=60)
    model_server.next(script)
    began = time.monotonic()
    said, exc = await failure_of(llm)
    assert isinstance(exc, LlmTimeout)
    assert (said, exc.phase, exc.seconds, exc.shown) == ("", "first token", 0.2, False)
    assert 0.19 < time.monotonic() - began < 0.6
    assert str(exc) == "language model 'default': first token: nothing within 0.2 s"
    await wait_until(lambda: model_server.open == 0, "the model's connection is closed")
    assert len(model_server.requests) == 1


async def test_the_gap_between_tokens_has_a_clock(model_server: ModelServer, open_models: OpenModels) -> None:
    """What came before it is shown; the failure says so."""
    llm = await open_models(model_server.base_url, first_token_s=60, gap_s=0.2, total_s=60)
    model_server.next(Script(text="one two three", stall_after=2))
    said, exc = await failure_of(llm)
    assert isinstance(exc, LlmTimeout)
    assert (said, exc.phase, exc.seconds, exc.shown) == ("one two", "gap", 0.2, True)
    await wait_until(lambda: model_server.open == 0, "the model's connection is closed")


async def test_the_whole_answer_has_a_clock(model_server: ModelServer, open_models: OpenModels) -> None:
    """However lively the model is."""
    llm = await open_models(model_server.base_url, first_token_s=60, gap_s=60, total_s=0.3)
    model_server.next(Script(text="word " * 1000, gap_s=0.02))
    said, exc = await failure_of(llm)
    assert isinstance(exc, LlmTimeout)
    assert (exc.phase, exc.seconds, exc.shown) == ("total", 0.3, True)
    assert 3 <= len(said.split()) <= 16


@pytest.mark.parametrize("script", [Script(delay_s=60), Script(first_s=60), Script(stall_after=1)])
async def test_an_answer_in_one_piece_has_one_clock(
    model_server: ModelServer, open_models: OpenModels, script: Script
) -> None:
    """The total, wherever it stands still: there is no first token, and no gap."""
    llm = await open_models(model_server.base_url, first_token_s=0.01, gap_s=0.01, total_s=0.3)
    model_server.next(script)
    with pytest.raises(LlmTimeout) as caught:
        await llm.complete(ASKED)
    assert (caught.value.phase, caught.value.seconds) == ("total", 0.3)
    await wait_until(lambda: model_server.open == 0, "the model's connection is closed")


@pytest.mark.parametrize("noise", NOISE)
async def test_noise_is_no_first_token(model_server: ModelServer, open_models: OpenModels, noise: str) -> None:
    """A provider that keeps the connection alive does not keep the visitor waiting."""
    llm = await open_models(model_server.base_url, first_token_s=0.15, gap_s=60, total_s=60)
    model_server.next(Script(raw=[ROLE, *again(NOISE[noise])]))
    said, exc = await failure_of(llm)
    assert isinstance(exc, LlmTimeout)
    assert (said, exc.phase) == ("", "first token")


@pytest.mark.parametrize("noise", NOISE)
async def test_noise_fills_no_gap(model_server: ModelServer, open_models: OpenModels, noise: str) -> None:
    """Nor does it keep a stream alive in which nothing is said."""
    llm = await open_models(model_server.base_url, first_token_s=60, gap_s=0.15, total_s=60)
    model_server.next(Script(raw=[ROLE, event('{"content":"one"}'), *again(NOISE[noise])]))
    said, exc = await failure_of(llm)
    assert isinstance(exc, LlmTimeout)
    assert (said, exc.phase) == ("one", "gap")


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "tool_calls"])
async def test_a_model_that_thinks_is_not_silent(
    model_server: ModelServer, open_models: OpenModels, field: str
) -> None:
    """Reasoning, and the pieces of a tool call, are what the model says though nobody is shown them."""
    llm = await open_models(model_server.base_url, first_token_s=0.2, gap_s=0.2, total_s=60)
    value = '[{"index":0,"function":{"arguments":"1"}}]' if field == "tool_calls" else '"hm"'
    thinking = again(event(f'{{"{field}":{value}}}'), every_s=0.05, times=8)
    done = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
    model_server.next(Script(raw=[*thinking, event('{"content":"So: yes."}'), done]))
    assert await text_of(llm) == "So: yes."


async def test_a_model_that_falls_silent_while_it_thinks_is_given_up(
    model_server: ModelServer, open_models: OpenModels
) -> None:
    """After its first word of reasoning the clock of the gap runs; nothing was shown."""
    llm = await open_models(model_server.base_url, first_token_s=60, gap_s=0.15, total_s=60)
    model_server.next(Script(text="never", reasoning="hm", stall_after=1))
    said, exc = await failure_of(llm)
    assert isinstance(exc, LlmTimeout)
    assert (said, exc.phase, exc.shown) == ("", "gap", False)


async def test_the_clocks_stand_still_while_nobody_pulls(model_server: ModelServer, open_models: OpenModels) -> None:
    """A slow reader is not the model's fault: neither gap nor total fire, before the first pull or between pulls."""
    llm = await open_models(model_server.base_url, first_token_s=0.2, gap_s=0.2, total_s=0.4)
    model_server.next(Script(text="one two three four", gap_s=0.05))
    stream = llm.stream(ASKED)
    await asyncio.sleep(0.5)
    assert await anext(stream) == "one"
    await asyncio.sleep(0.5)
    assert await texts_of(stream) == [" two", " three", " four"]


async def test_the_time_that_the_reader_took_is_not_given_to_the_model(
    model_server: ModelServer, open_models: OpenModels
) -> None:
    """After a pause the gap begins anew with the pull, and the model has no more than that."""
    llm = await open_models(model_server.base_url, first_token_s=0.3, gap_s=0.3, total_s=60)
    model_server.next(Script(text="one two", stall_after=1))
    stream = llm.stream(ASKED)
    assert await anext(stream) == "one"
    await asyncio.sleep(0.4)
    began = time.monotonic()
    with pytest.raises(LlmTimeout, match="gap"):
        await anext(stream)
    assert 0.25 < time.monotonic() - began < 0.7


async def test_a_wait_in_the_queue_is_part_of_the_first_token(
    model_server: ModelServer, open_models: OpenModels
) -> None:
    """Who gets no place in that time is told which clock it was."""
    llm = await open_models(model_server.base_url, concurrency=1, first_token_s=0.2)
    model_server.next(Script(text="one two", stall_after=1))
    held = llm.stream(ASKED)
    await anext(held)
    said, exc = await failure_of(llm)
    assert isinstance(exc, LlmTimeout)
    assert (said, exc.phase, exc.seconds) == ("", "queue", 0.2)
    held.close()
    assert llm.models["default"].running == llm.models["default"].waiting == 0


async def test_a_server_that_can_not_be_reached_has_a_clock(open_models: OpenModels) -> None:
    """An address from which no answer comes: `connect_s`, told as such."""
    llm = await open_models("http://192.0.2.1:9/v1", connect_s=0.1, first_token_s=5, retries=0)
    said, exc = await failure_of(llm)
    if isinstance(exc, LlmTimeout):
        assert (said, exc.phase, exc.seconds) == ("", "connect", 0.1)
    else:  # where the network refuses it at once
        assert said == ""


# -- the plugin's own clock ----------------------------------------------------------------------------------------

SHAPES = {
    "complete": "    return (await ctx.llm.complete(turn.text)).text\n",
    "stream, returned": "    return ctx.llm.stream(turn.text)\n",
    "stream, chunk by chunk": "    async for text in ctx.llm.stream(turn.text):\n        yield text\n",
    "stream, by turn.stream": "    async for text in ctx.llm.stream(turn.text):\n        await turn.stream(text)\n",
    "reply": "    return await ctx.llm.reply(turn)\n",
}


def plugin(tmp_path: Path, body: str) -> Path:
    path = tmp_path / "asks.py"
    path.write_text(
        f"import asyncio\nfrom hotdesk_sdk import hookimpl\n\n\n@hookimpl\nasync def respond(ctx, turn):\n{body}"
    )
    path.with_suffix(".toml").write_text('name = "asks"\ntimeout_ms = 200\ncapabilities = ["llm"]\n')
    return path


@pytest.mark.parametrize("shape", SHAPES)
async def test_the_models_time_is_not_the_plugins(tmp_path: Path, model_server: ModelServer, shape: str) -> None:
    """A plugin with 200 ms shows an answer that takes five times as long, before the first token and between them."""
    model_server.next(Script(text="one two three", first_s=0.5, gap_s=0.25))
    async with Desk.with_plugin(plugin(tmp_path, SHAPES[shape]), llm=model_server.base_url) as desk:
        said = await desk.say("hello")
        assert (said.text, said.error) == ("one two three", None)


OWN = {
    "before": "    await asyncio.sleep(30)\n    return await ctx.llm.reply(turn)\n",
    "after": "    await ctx.llm.complete('x')\n    await asyncio.sleep(30)\n    return 'never'\n",
    "both, together over it": "    await asyncio.sleep(0.14)\n    await ctx.llm.complete('x')\n"
    "    await asyncio.sleep(0.14)\n    return 'never'\n",
}


@pytest.mark.parametrize("where", OWN)
async def test_the_plugins_own_time_is_its_own(tmp_path: Path, model_server: ModelServer, where: str) -> None:
    """A sleep beside the model's answer counts, and what came before the wait is not forgotten."""
    async with Desk.with_plugin(plugin(tmp_path, OWN[where]), llm=model_server.base_url) as desk:
        began = time.monotonic()
        said: Any = await desk.say("hello")
        assert not said
        assert time.monotonic() - began < 3
        assert desk.host.plugins.entry("asks").current is not None
        failures = desk.host.metrics.registry.get_sample_value(
            "hotdesk_call_failures_total", {"plugin": "asks", "hook": "respond", "kind": "timeout"}
        )
        assert failures == 1


async def test_a_clock_that_runs_out_is_told_to_the_visitor_in_few_words(
    tmp_path: Path, model_server: ModelServer
) -> None:
    """Nobody answered, for that reason; the plugin is not blamed for it."""
    model_server.next(Script(stall_after=0))
    settings = {"base_url": model_server.base_url, "first_token_s": 0.1}
    async with Desk.with_plugin(plugin(tmp_path, SHAPES["reply"]), llm=settings) as desk:
        said = await desk.say("hello")
        assert said.error == ("llm_timeout", "the language model took too long")
        assert not said
        assert (await desk.say("again")).text == "Hello there, friend"
