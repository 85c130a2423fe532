"""Tools that don't stop and models that call strangely: the turn goes on, and each call has its own result."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from model_server import ModelServer, Script
from tests.llm.asking import settings_of

from conftest import StartDesk, wait_until
from hotdesk.config import LlmSettings, PluginSettings
from hotdesk_sdk.testing import Desk

ROOT = Path(__file__).parents[2]
CHATGPT = ROOT / "plugins/chatgpt.py"
ANY = '{"type": "object", "properties": {"s": {"type": "string"}}}'


def tool(body: str) -> str:
    """The source of a plugin with the tool `look`, which takes a text `s`."""
    lines = "".join(f"        {line}\n" for line in body.splitlines())
    return (
        f"import asyncio, pathlib\nfrom hotdesk_sdk import Tool, hookimpl\n\n@hookimpl\nasync def tools(ctx):\n"
        f"    async def look(s=''):\n{lines}    return [Tool('look', 'Looks.', look, {ANY})]\n"
    )


def answered_by(first: Script) -> Script:
    """*first* to the question, and an answer once a tool has said something."""
    return Script(answers=lambda body: Script(text="Here it is.") if body["messages"][-1]["role"] == "tool" else first)


def calling(*deltas: dict[str, Any]) -> Script:
    """An answer whose pieces of tool calls are just these."""
    events = [{"choices": [{"index": 0, "delta": {"tool_calls": [delta]}}]} for delta in deltas]
    events.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]})  # type: ignore[dict-item]
    return Script(raw=[*(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events), b"data: [DONE]\n\n"])


def asked_and_told(server: ModelServer) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """The calls as the model is reminded of them in its last request, and the results with their ids."""
    messages = (server.requests[-1].body or {})["messages"]
    asked = [call for message in messages for call in message.get("tool_calls") or ()]
    return asked, [(m["tool_call_id"], m["content"]) for m in messages if m["role"] == "tool"]


async def say(tmp_path: Path, server: ModelServer, source: str) -> Any:
    (tmp_path / "t.py").write_text(source)
    async with Desk.with_plugin(CHATGPT, tmp_path / "t.py", llm=server.base_url) as desk:
        return await desk.say("go", timeout=5)


# -- tools that don't stop ---------------------------------------------------------------------------------------------


@pytest.fixture
def release(tmp_path: Path) -> Iterator[Path]:
    """A file; a deaf tool goes on until it is there."""
    path = tmp_path / "release"
    yield path
    path.touch()


def deaf(release: Path) -> str:
    return tool(
        f"pathlib.Path({str(called(release))!r}).touch()\n"
        f"while not pathlib.Path({str(release)!r}).exists():\n"
        "    try:\n        await asyncio.sleep(0.02)\n    except asyncio.CancelledError:\n        pass\n"
        f"pathlib.Path({str(left(release))!r}).touch()\nreturn 'too late'"
    )


def called(release: Path) -> Path:
    return release.with_suffix(".called")


def left(release: Path) -> Path:
    return release.with_suffix(".left")


async def let_go(release: Path) -> None:
    """Let the deaf tool end while its host is there."""
    release.touch()
    await wait_until(left(release).exists, "the tool has ended")


async def test_a_tool_that_ignores_its_cancellation_is_left_behind(
    release: Path, model_server: ModelServer, start_desk: StartDesk
) -> None:
    """The model is told that it did not stop, the visitor gets the answer, and the next turn is not held up."""
    model_server.default = answered_by(Script(tool_calls=[("look", {})]))
    llm = LlmSettings(models={"default": settings_of(model_server.base_url)})
    plugins = {"t.py": deaf(release), "chatgpt.py": CHATGPT.read_text(), "chatgpt.toml": toml()}
    desk = await start_desk(plugins, llm=llm, settings={"t": PluginSettings(timeout_ms=100)})
    async with asyncio.timeout(6):
        assert await desk.reply("go") == "Here it is."
    assert [text for _, text in asked_and_told(model_server)[1]] == [
        "error: 'look' did not stop when its time was over"
    ]
    assert desk.host.turns.live == 0
    await let_go(release)


async def test_a_turn_is_given_up_though_its_tool_ignores_it(
    release: Path, model_server: ModelServer, start_desk: StartDesk
) -> None:
    """A visitor's `cancel` ends the turn, and the conversation goes on."""
    model_server.default = answered_by(Script(tool_calls=[("look", {})]))
    llm = LlmSettings(models={"default": settings_of(model_server.base_url)})
    plugins = {"t.py": deaf(release), "chatgpt.py": CHATGPT.read_text(), "chatgpt.toml": toml()}
    desk = await start_desk(plugins, llm=llm, settings={"t": PluginSettings(timeout_ms=60_000)})
    async with desk.http.post(f"{desk.url}/v1/conversations/c/messages", json={"text": "go", "id": "m"}) as response:
        assert response.status == 202
    await wait_until(called(release).exists, "the tool is called")
    assert desk.host.turns.cancel("c", "m")
    await wait_until(lambda: desk.host.turns.live == 0, "the turn has ended", timeout_s=5)
    model_server.default = Script(text="and on")
    assert await desk.reply("next") == "and on"
    await let_go(release)


def toml() -> str:
    return CHATGPT.with_suffix(".toml").read_text()


# -- what can't be said ------------------------------------------------------------------------------------------------


async def test_arguments_that_nest_too_deeply_are_told_to_the_model(tmp_path: Path, model_server: ModelServer) -> None:
    """As any others that are no arguments; the turn is not broken."""
    model_server.default = answered_by(Script(tool_calls=[("look", "[" * 5000 + "]" * 5000)]))
    said = await say(tmp_path, model_server, tool("return 'called'"))
    assert (said.text, said.error) == ("Here it is.", None)
    [(_, result)] = asked_and_told(model_server)[1]
    assert result.startswith("error: the arguments of 'look' do not fit")


async def test_half_a_character_in_arguments_breaks_no_turn(tmp_path: Path, model_server: ModelServer) -> None:
    """The model wrote it as an escape; it is told that this is no JSON."""
    model_server.default = answered_by(Script(tool_calls=[("look", '{"s": "a\\ud800b"}')]))
    said = await say(tmp_path, model_server, tool("return 'called'"))
    assert (said.text, said.error) == ("Here it is.", None)
    [(_, result)] = asked_and_told(model_server)[1]
    assert result.startswith("error: the arguments of 'look' do not fit")


# -- strange calls -----------------------------------------------------------------------------------------------------

ECHO = tool("return f'looked at {s}'")


def begun(index: int | None, id: str | None, s: str, name: str | None = "look") -> dict[str, Any]:
    call = {"index": index, "id": id, "type": "function", "function": {"name": name, "arguments": json.dumps({"s": s})}}
    return {key: value for key, value in call.items() if value is not None}


TWO = {
    "one index for all": [begun(0, "a", "1"), begun(0, "b", "2")],
    "one id for all": [begun(0, "same", "1"), begun(1, "same", "2")],
    "no ids": [begun(0, None, "1"), begun(1, None, "2")],
    "an index far off": [begun(20, "a", "1"), begun(7, "b", "2")],
    "one without a name": [begun(0, "a", "1"), begun(1, "x", "3", name=None), begun(2, "b", "2")],
}


@pytest.mark.parametrize("kind", TWO)
async def test_each_call_is_made_with_its_own_arguments(tmp_path: Path, model_server: ModelServer, kind: str) -> None:
    """Two calls, however the server numbers them; the model is told both results, each under an id of its own."""
    model_server.default = answered_by(calling(*TWO[kind]))
    said = await say(tmp_path, model_server, ECHO)
    assert (said.text, said.error) == ("Here it is.", None)
    asked, told = asked_and_told(model_server)
    assert [text for _, text in told] == ["looked at 1", "looked at 2"]
    assert [call["id"] for call in asked] == [id for id, _ in told]
    assert len({call["id"] for call in asked}) == 2
    assert all(call["id"] and call["function"]["name"] == "look" for call in asked)


async def test_an_answer_with_nothing_but_a_nameless_call_is_an_answer(
    tmp_path: Path, model_server: ModelServer
) -> None:
    """Nothing is called, and the model is not asked anew."""
    model_server.default = calling(begun(0, "x", "1", name=None))
    said = await say(tmp_path, model_server, ECHO)
    assert said.error is None
    assert len(model_server.requests) == 1
