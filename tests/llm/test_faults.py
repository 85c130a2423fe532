"""Whatever a provider does: a reply, a cut one or an error, in bounded time and memory; no key, no traceback."""

from __future__ import annotations

import asyncio
import gc
import json
import os
from pathlib import Path
from typing import Any

import pytest
from model_answers import SCRIPTS
from model_server import ModelServer, Script
from tests.llm.asking import ASKED, OpenModels, settings_of, text_of

from conftest import StartDesk, wait_until
from hotdesk.config import LlmSettings
from hotdesk_sdk import LlmError
from hotdesk_sdk.testing import Desk

ROOT = Path(__file__).parents[2]
CHATGPT = ROOT / "plugins/chatgpt.py"
KEY = "sk-marked-0123456789-never-to-be-seen"
TEXT = "one two three"
QUICK: dict[str, Any] = {"first_token_s": 0.3, "gap_s": 0.3, "total_s": 3.0, "retries": 0}


def event(content: str, more: str = "null") -> bytes:
    return f'data: {{"choices":[{{"index":0,"delta":{{"content":"{content}"}},"finish_reason":{more}}}]}}\n\n'.encode()


DONE = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
WHOLE = b'{"choices":[{"index":0,"message":{"role":"assistant","content":"whole"},"finish_reason":"stop"}]}'
HTTP = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\nconnection: close\r\n\r\n%b"

NAMED = {name: f"{name}{'?delay_s=0&first_s=0.05&gap_s=0.01' if name == 'slow' else ''}" for name in SCRIPTS}
PHASES: dict[str, Any] = {
    **{f"cut after {n}": Script(text=TEXT, cut_after=n) for n in range(4)},
    **{f"closed after {n}": Script(text=TEXT, cut_after=n, cut_with="fin") for n in range(4)},
    **{f"half of event {n}, then cut": Script(text=TEXT, half_after=n) for n in range(4)},
    **{f"half of event {n}, then the end": Script(text=TEXT, half_after=n, half_then="end") for n in range(4)},
    **{f"stall after {n}": Script(text=TEXT, stall_after=n, keepalive_s=0.02) for n in range(4)},
    **{f"error event after {n}": Script(text=TEXT, error_event_after=n) for n in range(4)},
    **{f"endless line after {n}": Script(pieces=["a "] * n, endless_line=True) for n in range(3)},
    **{f"garbage after {n}": Script(pieces=["a "] * n, garbage=True) for n in range(3)},
    "10 MB in one event": Script(huge_event_bytes=10_000_000),
    "no end and no [DONE]": Script(text=TEXT, finish="", end_without_done=True),
    "a web page": Script(status=200, error=b"<html>Sign in</html>"),
    "a web page with 502": Script(status=502, error=b"<html><h1>Bad Gateway</h1></html>"),
    "an answer in one piece to a stream": Script(raw=[HTTP % (b"application/json", WHOLE)]),
    "an error in one piece to a stream": Script(
        raw=[HTTP % (b"application/json", b'{"error":{"message":"no, sorry"}}')]
    ),
    "half an answer in one piece": Script(raw=[HTTP % (b"application/json", WHOLE[:40])]),
    "a stream of no known type": Script(raw=[HTTP % (b"text/plain", event("one") + DONE)]),
    "a redirect": Script(status=307, headers={"location": "http://127.0.0.1:9/"}),
    "204": Script(status=204, error=b""),
    "an empty stream": Script(raw=[b""]),
    "only [DONE]": Script(raw=[b"data: [DONE]\n\n"]),
    "no HTTP at all": Script(raw=[b"HTTP/1.1 garbage\r\n\r\n"]),
    "headers without end": Script(raw=[b"HTTP/1.1 200 OK\r\nx: " + b"y" * 200_000]),
    "only tool calls": Script(tool_calls=[("nothing_like_it", {})]),
    "tool arguments without end": Script(
        raw=[b'data: {"choices":[{"delta":{"tool_calls":[{"index":0,"function":{"arguments":"'
             + b"x" * 1_000_000 + b'"}}]}}]}\n\n'] * 20
    ),
    "a thousand tool calls": Script(
        raw=[b'data: {"choices":[{"delta":{"tool_calls":[{"index":1000,"id":"c"}]}}]}\n\n', DONE]
    ),
    "a tool call below zero": Script(raw=[b'data: {"choices":[{"delta":{"tool_calls":[{"index":-1}]}}]}\n\n', DONE]),
    "numbers for text": Script(raw=[b'data: {"choices":[{"delta":{"content":7}}]}\n\n', DONE]),
    "a list for an event": Script(raw=[b"data: [1,2]\n\n", DONE]),
    "a lone surrogate": Script(raw=[event("a\\ud800b"), DONE]),
    "UTF-8 that is none": Script(raw=[b'data: {"choices":[{"delta":{"content":"\xff\xfe"}}]}\n\n', DONE]),
    "deeply nested": Script(raw=[b"data: " + b"[" * 100_000 + b"\n\n", DONE]),
    "null for all": Script(raw=[b'data: {"choices":null,"usage":null,"error":null}\n\n', event("one"), DONE]),
    "errors that are none": Script(raw=[b'data: {"choices":[],"error":{}}\n\n', event("one"), DONE]),
}  # fmt: skip


async def outcome_of(desk: Any) -> Any:
    async with asyncio.timeout(8):
        return await desk.say("hello")


def check(said: Any, name: str) -> None:
    """A reply, a cut one, an error, or silence, and nothing of the inside."""
    if said.error is not None:
        code, words = said.error
        assert code in ("stream_cut", "llm_unavailable", "llm_refused", "llm_timeout"), name
        assert words in (
            "the language model broke off", "the language model can't be reached now",
            "the language model refused this", "the language model took too long",
        ), name  # fmt: skip
        assert bool(said) == (code == "stream_cut"), name
    if said:
        assert bool(said.metadata.get("cut")) == (said.error is not None), name
        assert "".join(said.chunks) == said.text, name
    assert "Traceback" not in said.text


async def test_every_named_script_comes_to_an_end(model_server: ModelServer, capfd: pytest.CaptureFixture[str]) -> None:
    """Whole or streamed, it is a reply, a cut or an error within the clocks, and the next question is answered."""
    async with Desk.with_plugin(CHATGPT, llm={"base_url": model_server.base_url, **QUICK}) as desk:
        for name, script in NAMED.items():
            model_server.next(script)
            check(await outcome_of(desk), name)
            await wait_until(lambda: model_server.open == 0, f"{name}: nothing is being answered", 3)
        assert (await desk.say("and now?")).text == "Hello there, friend"
        assert desk.host.plugins.entry("chatgpt").current.number == 1
    assert "Traceback" not in "".join(capfd.readouterr())


async def test_every_phase_comes_to_an_end(model_server: ModelServer, capfd: pytest.CaptureFixture[str]) -> None:
    """Wherever it breaks off, and whatever is sent in place of an answer; no connection is left."""
    async with Desk.with_plugin(CHATGPT, llm={"base_url": model_server.base_url, **QUICK}) as desk:
        for name, script in PHASES.items():
            model_server.next(script)
            check(await outcome_of(desk), name)
            await wait_until(lambda: model_server.open == 0, f"{name}: nothing is being answered", 3)
        assert (await desk.say("and now?")).text == "Hello there, friend"
        models = desk.host.metrics.registry
        assert models.get_sample_value("hotdesk_llm_open") == models.get_sample_value("hotdesk_llm_waiting") == 0
        assert model_server.connections <= 1
    assert "Traceback" not in "".join(capfd.readouterr())


async def test_every_phase_of_a_whole_answer_comes_to_an_end(
    model_server: ModelServer, open_models: OpenModels
) -> None:
    """`complete` gives an answer, or raises an `LlmError`, and nothing else."""
    llm = await open_models(model_server.base_url, **{**QUICK, "total_s": 0.5})
    for name, script in {**NAMED, **PHASES}.items():
        model_server.next(script)
        try:
            async with asyncio.timeout(5):
                await llm.complete(ASKED)
        except LlmError:
            pass
        except Exception as exc:
            raise AssertionError(f"{name}: {exc!r}") from exc
        await wait_until(lambda: model_server.open == 0, f"{name}: nothing is being answered", 3)
    model = llm.models["default"]
    assert (model.running, model.waiting) == (0, 0)


SAYS = {
    "an answer in one piece to a stream": "whole",
    "a stream of no known type": "one",
    "null for all": "one",
    "errors that are none": "one",
}


@pytest.mark.parametrize("name", SAYS)
async def test_what_can_be_understood_is(model_server: ModelServer, name: str) -> None:
    """Odd, but an answer."""
    model_server.next(PHASES[name])
    async with Desk.with_plugin(CHATGPT, llm={"base_url": model_server.base_url, **QUICK}) as desk:
        said = await outcome_of(desk)
        assert (said.text, said.error) == (SAYS[name], None)


async def test_an_answer_cut_at_any_byte_is_the_same_answer(model_server: ModelServer, open_models: OpenModels) -> None:
    """In two writes at each place, and in one a byte."""
    llm = await open_models(model_server.base_url)
    body = event("退款 🙂") + DONE
    scripts = [Script(raw=[body[:at], 0.0005, body[at:]]) for at in range(1, len(body), 2)]
    for script in [*scripts, Script(text="退款 🙂", write_bytes=1)]:
        model_server.next(script)
        assert "".join([text async for text in llm.stream(ASKED)]) == "退款 🙂"


def resident() -> int:
    gc.collect()  # failures leave circles of frames and errors; what holds after that is held
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to see its own memory")
async def test_memory_stays_bounded(model_server: ModelServer, open_models: OpenModels) -> None:
    """Endless lines, huge events and huge arguments later it is where it was, give or take a few of their size."""
    llm = await open_models(model_server.base_url, **QUICK)
    names = ["endless line after 0", "10 MB in one event", "tool arguments without end"]
    before = 0
    for number in range(8):
        if number == 2:
            before = resident()
        for name in names:
            model_server.next(PHASES[name])
            with pytest.raises(LlmError):
                [text async for text in llm.stream(ASKED)]
            await wait_until(lambda: model_server.open == 0, "nothing is being answered")
    assert resident() - before < 64 * 1024 * 1024


ECHOES = {
    "in a refusal": Script(status=401, error={"message": f"Incorrect API key provided: {KEY}.", "type": "t"}),
    "in a body of text": Script(status=400, error=f"Authorization: Bearer {KEY} is wrong".encode()),
    "in an unknown shape": Script(status=500, error={"error": {"detail": [KEY]}}),
    "in an error event": Script(text=TEXT, error_event_after=0, error={"message": f"key {KEY} expired", "type": "t"}),
    "in a late error event": Script(text=TEXT, error_event_after=2, error={"message": f"key {KEY} expired"}),
    "in an error of one piece": Script(
        raw=[HTTP % (b"application/json", json.dumps({"error": {"message": f"bad {KEY}"}}).encode())]
    ),
    "in what can't be read": Script(raw=[f'data: {{"choices": "{KEY}"}}\n\n'.encode(), DONE]),
    "in a redirect": Script(status=302, headers={"location": f"http://a.test/?key={KEY}"}),
    "in the status line": Script(raw=[f"HTTP/1.1 200 {KEY}\r\nx\r\n\r\n".encode()]),
}


async def test_the_key_is_nowhere_to_be_seen(
    model_server: ModelServer, start_desk: StartDesk, capfd: pytest.CaptureFixture[str]
) -> None:
    """Not in a log, a reply, an event, a metric, the admin API or a setting's text, though the provider echoes it."""
    settings = settings_of(model_server.base_url, api_key=KEY, headers={"X-Also": f"second {KEY}"}, **QUICK)
    files = {name: (ROOT / "plugins" / name).read_text() for name in ("chatgpt.py", "chatgpt.toml")}
    desk = await start_desk(files, llm=LlmSettings(models={"default": settings}), log_level="debug")
    seen: list[str] = [repr(settings), repr(desk.host.config) if hasattr(desk.host, "config") else ""]
    for name, script in ECHOES.items():
        model_server.next(script)
        seen.append(json.dumps(await desk.say(name)))
        assert model_server.requests[-1].headers["authorization"] == f"Bearer {KEY}", name
    assert len(model_server.requests) == len(ECHOES)
    for path in ("metrics", "readyz", "healthz"):
        async with desk.http.get(f"{desk.url}/{path}") as response:
            seen.append(await response.text())
    seen += [json.dumps(await desk.admin("GET", path)) for path in ("plugins", "plugins/chatgpt")]
    seen += [json.dumps(await desk.record()), json.dumps(desk.events, default=repr), *capfd.readouterr()]
    assert any("call_failed" in text for text in seen)
    for text in seen:
        assert KEY not in text
    assert any("Incorrect API key provided: …" in text for text in seen)


async def test_the_key_is_in_no_error_that_a_plugin_sees(model_server: ModelServer, open_models: OpenModels) -> None:
    """Plugins log what they catch."""
    llm = await open_models(model_server.base_url, api_key=KEY, **QUICK)
    for name, script in ECHOES.items():
        for whole in (True, False):
            model_server.next(script)
            asking = llm.complete(ASKED) if whole else text_of(llm)
            [exc] = await asyncio.gather(asking, return_exceptions=True)
            assert KEY not in f"{exc} {exc!r} {vars(exc) if isinstance(exc, LlmError) else ''}", name
