"""The functions that plugins lend the model: checked, called side by side, bounded; failures are told to it alone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from model_server import ModelServer, Script

from conftest import wait_until
from hotdesk.chat.assistant import MAX_ROUNDS
from hotdesk.chat.tools import MAX_CALLS, MAX_RESULT_CHARS
from hotdesk.errors import LoadFailed
from hotdesk_sdk.testing import Desk

ROOT = Path(__file__).parents[2]
CHATGPT = ROOT / "plugins/chatgpt.py"
HEAD = "import asyncio, json\nfrom hotdesk_sdk import Tool, hookimpl\nCALLS = []\n"
ANY = '{"type": "object", "properties": {"n": {"type": "integer"}, "s": {"type": "string"}}}'


def tool(body: str, *, name: str = "look", arguments: str = "n=0, s=''", schema: str = ANY) -> str:
    lines = "".join(f"        {line}\n" for line in body.splitlines())
    return (
        f"{HEAD}@hookimpl\nasync def tools(ctx):\n"
        f"    async def function({arguments}):\n{lines}"
        f"    return [Tool({name!r}, 'Looks.', function, {schema})]\n"
    )


def answered_by(first: Script, then: str = "Here it is.") -> Script:
    """*first* to the question, *then* once a tool has said something."""
    return Script(answers=lambda body: Script(text=then) if body["messages"][-1]["role"] == "tool" else first)


@asynccontextmanager
async def desk_of(tmp_path: Path, server: ModelServer, **plugins: str) -> AsyncIterator[Any]:
    paths = [CHATGPT]
    for name, source in plugins.items():
        path = tmp_path / f"{name}.py"
        path.write_text(source)
        paths.append(path)
    async with Desk.with_plugin(*paths, llm=server.base_url) as desk:
        yield desk


def told(server: ModelServer, at: int = -1) -> list[str]:
    """What the model was told by its tools in a request."""
    body = server.requests[at].body or {}
    return [message["content"] for message in body["messages"] if message["role"] == "tool"]


def counted(desk: Any, tool: str, outcome: str) -> float:
    registry = desk.host.metrics.registry
    return registry.get_sample_value("hotdesk_tool_calls_total", {"tool": tool, "outcome": outcome}) or 0.0


async def test_a_tool_is_offered_called_and_its_result_told(model_server: ModelServer) -> None:
    """The bundled example, from the question to the answer; the visitor sees the answer alone."""
    model_server.default = "fast"
    async with Desk.with_plugin(CHATGPT, ROOT / "plugins/order_status.py", llm=model_server.base_url) as desk:
        said = await desk.say("where is order 1001?")
        assert "shipped on Monday" in said.text
        first, second = [seen.body or {} for seen in model_server.requests]
        assert sorted(one["function"]["name"] for one in first["tools"]) == ["hand_over", "order_status"]
        assert first["tools"] == second["tools"]
        assert second["messages"][:-2] == first["messages"]
        call, result = second["messages"][-2:]
        assert call["tool_calls"][0]["function"] == {"name": "order_status", "arguments": '{"order":"1001"}'}
        assert result["tool_call_id"] == call["tool_calls"][0]["id"]
        assert json.loads(result["content"]) == {
            "order": "1001",
            "status": "shipped on Monday, arrives within two days",
        }
        assert counted(desk, "order_status", "answered") == 1


async def test_usage_is_of_all_rounds_together(tmp_path: Path, model_server: ModelServer) -> None:
    """The reply says what it cost."""
    model_server.default = Script(
        answers=lambda body: (
            Script(text="so", usage=(30, 3))
            if body["messages"][-1]["role"] == "tool"
            else Script(tool_calls=[("look", {})], usage=(20, 2))
        )
    )
    async with desk_of(tmp_path, model_server, t=tool("return 'x'")) as desk:
        assert (await desk.say("go")).metadata["usage"] == {"in": 50, "out": 5}


async def test_what_the_model_said_before_it_called_is_kept_and_told_to_it(
    tmp_path: Path, model_server: ModelServer
) -> None:
    """The visitor saw it, so it is part of the reply, and the model knows that it said it."""
    model_server.default = answered_by(Script(text="One moment. ", tool_calls=[("look", {})]))
    async with desk_of(tmp_path, model_server, t=tool("return 'x'")) as desk:
        assert (await desk.say("go")).text == "One moment. Here it is."
    [call] = [m for m in (model_server.requests[-1].body or {})["messages"] if m.get("tool_calls")]
    assert call["content"] == "One moment. "


async def test_calls_of_one_answer_are_made_side_by_side(tmp_path: Path, model_server: ModelServer) -> None:
    """Each waits for the other to have begun; results come back in the order of the calls."""
    meet = "CALLS.append(n)\nwhile len(CALLS) < 3:\n    await asyncio.sleep(0.005)\nreturn f'result {n}'"
    model_server.default = answered_by(Script(tool_calls=[("look", {"n": n}) for n in (3, 1, 2)]))
    async with desk_of(tmp_path, model_server, t=tool(meet)) as desk:
        assert (await desk.say("go")).text == "Here it is."
    assert told(model_server) == ["result 3", "result 1", "result 2"]


BAD_ARGUMENTS = {
    '{"n": "seven"}': '"seven" is not of type "integer"',
    '{"n": 1': "they are not JSON",
    "[1]": 'is not of type "object"',
    "null": 'is not of type "object"',
    '{"m": 1}': "there is no argument 'm'",
    '{"n": 1, "s": 2}': "s: 2 is not of type",
}


@pytest.mark.parametrize("arguments", BAD_ARGUMENTS)
async def test_arguments_that_do_not_fit_are_told_to_the_model(
    tmp_path: Path, model_server: ModelServer, arguments: str
) -> None:
    """With what is wrong; the function is not called, and its plugin is not blamed."""
    model_server.default = answered_by(Script(tool_calls=[("look", arguments)]))
    async with desk_of(tmp_path, model_server, t=tool("CALLS.append(n)\nreturn 'called'")) as desk:
        assert (await desk.say("go")).text == "Here it is."
        assert counted(desk, "look", "refused") == 1
        assert desk.host.plugins.entry("t").current.hooks["tools"].stats.failures == 0
    [result] = told(model_server)
    assert result.startswith("error: the arguments of 'look' do not fit: ")
    assert BAD_ARGUMENTS[arguments] in result


async def test_no_arguments_at_all_are_an_empty_object(tmp_path: Path, model_server: ModelServer) -> None:
    """Some models leave them out."""
    model_server.default = answered_by(Script(tool_calls=[("look", "")]))
    async with desk_of(tmp_path, model_server, t=tool("return f'{n}{s}!'")) as desk:
        await desk.say("go")
    assert told(model_server) == ["0!"]


async def test_a_tool_that_is_not_there_is_told_with_those_that_are(tmp_path: Path, model_server: ModelServer) -> None:
    """Also one that is there, and was not offered."""
    model_server.default = answered_by(Script(tool_calls=[("loook", {}), ("__init__", {}), ("hand_over", {})]))
    plugin = tool("return 'x'")
    async with desk_of(tmp_path, model_server, t=plugin) as desk:
        desk.folder.joinpath("chatgpt.toml")
        await desk.write(
            "chatgpt.toml",
            desk.folder.joinpath("chatgpt.toml").read_text().replace("tools = true", 'tools = ["look", "gone"]'),
        )
        assert (await desk.say("go")).text == "Here it is."
        assert counted(desk, "", "unknown") == 3
    offered = [one["function"]["name"] for one in (model_server.requests[0].body or {})["tools"]]
    assert offered == ["look"]
    assert told(model_server)[0] == "error: there is no tool 'loook'; there are look"
    assert told(model_server)[2] == "error: there is no tool 'hand_over'; there are look"


FAILING = {
    "raise ValueError('no such thing')": "error: 'look' failed: ValueError: no such thing",
    "raise SystemExit(3)": "error: 'look' failed: SystemExit",
    "raise asyncio.CancelledError": "error: 'look' failed",
    "return object()": "error: 'look' gave what can't be said",
    "return {1j: 2}": "error: 'look' gave what can't be said",
    "x = []\nx.append(x)\nreturn x": "error: 'look' gave what can't be said",
    "return {'key': 'a\\ud800b'}": "error: 'look' gave what can't be said",
    "raise ValueError('a\\ud800b')": "error: 'look' failed: ValueError: a?b",
    "raise ExceptionGroup('a\\ud800b', [ValueError('x')])": "error: 'look' failed",
    "return 'a\\ud800b'": "a?b",
    "return float('nan')": "null",
    "return None": "null",
    "return {'a': '退款'}": '{"a":"退款"}',
}


@pytest.mark.parametrize("body", FAILING)
async def test_a_tools_failure_is_the_models_to_deal_with(tmp_path: Path, model_server: ModelServer, body: str) -> None:
    """What it raised, or gave that is not JSON, is told to the model; the visitor sees the model's answer alone."""
    model_server.default = answered_by(Script(tool_calls=[("look", {})]))
    async with desk_of(tmp_path, model_server, t=tool(body)) as desk:
        said = await desk.say("go")
        assert (said.text, said.error) == ("Here it is.", None)
    [result] = told(model_server)
    assert result.startswith(FAILING[body])


async def test_a_result_without_end_is_cut(tmp_path: Path, model_server: ModelServer) -> None:
    """The model is told how long it was."""
    model_server.default = answered_by(Script(tool_calls=[("look", {})]))
    async with desk_of(tmp_path, model_server, t=tool("return 'x' * 1_000_000")) as desk:
        assert (await desk.say("go")).text == "Here it is."
    [result] = told(model_server)
    assert result == "x" * MAX_RESULT_CHARS + "… (cut: 1000000 characters)"


async def test_a_tool_that_takes_too_long_is_given_up(tmp_path: Path, model_server: ModelServer) -> None:
    """After its own plugin's `timeout_ms`, while the others' results stand; the turn goes on."""
    model_server.default = answered_by(Script(tool_calls=[("look", {"n": 1}), ("quick", {})]))
    slow = tool("await asyncio.sleep(60)")
    (tmp_path / "slow.toml").write_text('name = "slow"\ntimeout_ms = 100\n')
    async with desk_of(tmp_path, model_server, slow=slow, quick=tool("return 'q'", name="quick")) as desk:
        assert (await desk.say("go")).text == "Here it is."
        assert counted(desk, "look", "timeout") == 1
    assert told(model_server) == ["error: 'look' took over 100 ms", "q"]


async def test_a_model_that_always_calls_is_stopped(tmp_path: Path, model_server: ModelServer) -> None:
    """After so many rounds it is told to answer with what it knows; if it calls all the same, that is the end."""
    stubborn = Script(text="again ", tool_calls=[("look", {})])
    model_server.default = stubborn
    async with desk_of(tmp_path, model_server, t=tool("return 'x'")) as desk:
        assert (await desk.say("go")).text == "again " * (MAX_ROUNDS + 1)
    choices = [(seen.body or {}).get("tool_choice") for seen in model_server.requests]
    assert choices == [None] * MAX_ROUNDS + ["none"]


async def test_so_many_calls_are_made_and_no_more(tmp_path: Path, model_server: ModelServer) -> None:
    """The model is told of those that were not; every call has its result, as the protocol wants."""
    model_server.default = answered_by(Script(tool_calls=[("look", {"n": n}) for n in range(MAX_CALLS + 4)]))
    async with desk_of(tmp_path, model_server, t=tool("return n")) as desk:
        await desk.say("go")
    results = told(model_server)
    assert results[:MAX_CALLS] == [str(n) for n in range(MAX_CALLS)]
    assert results[MAX_CALLS:] == [f"not called: at most {MAX_CALLS} calls at once"] * 4


async def test_a_tool_may_take_the_turn(tmp_path: Path, model_server: ModelServer) -> None:
    """As an argument that the model does not see and can't give."""
    body = "turn.conversation.tags.append('seen')\nreturn f'{turn.text} {n}'"
    model_server.default = answered_by(Script(tool_calls=[("look", {"n": 4}), ("look", {"n": 5, "turn": "mine"})]))
    async with desk_of(tmp_path, model_server, t=tool(body, arguments="turn, n=0")) as desk:
        await desk.say("the question")
        record = await desk.host.backend.record("test")
        assert record.tags == ("seen", "seen")
    assert told(model_server) == ["the question 4", "the question 5"]


async def test_two_plugins_may_have_a_tool_of_one_name(tmp_path: Path, model_server: ModelServer) -> None:
    """The outer one has it, the other's is offered with its plugin's name."""
    model_server.default = answered_by(Script(tool_calls=[("look", {}), ("b_look", {})]))
    async with desk_of(tmp_path, model_server, a=tool("return 'of a'"), b=tool("return 'of b'")) as desk:
        await desk.say("go")
    assert told(model_server) == ["of a", "of b"]


WRONG_TOOLS = {
    "Tool('look', 'd', f, {'type': 'array'})": 'parameters is a JSON Schema with "type": "object"',
    "Tool('look', 'd', f, {'type': 'object', 'properties': {'a': {'type': 'sting'}}})": "parameters is no JSON Schema",
    "Tool('look', 'd', f, {'type': 'object', '$ref': 'http://x.test/s'})": "parameters is no JSON Schema",
    "Tool('look', 'd', f, {'type': 'object', 'x': object()})": "parameters is no JSON Schema",
    "Tool('look me', 'd', f, {'type': 'object'})": "a name is 1 to 64 of A-Z a-z 0-9 _ -",
    "Tool('look', 'd', 7, {'type': 'object'})": "call is a int; it is an async function",
    "Tool('a', 'd', f, {'type': 'object'}), Tool('a', 'd', f, {'type': 'object'})": "two tools are named 'a'",
    "'look'": "tools must return a list of hotdesk_sdk.Tool",
}


@pytest.mark.parametrize("given", WRONG_TOOLS)
async def test_a_wrong_tool_refuses_the_load_with_the_reason(
    tmp_path: Path, model_server: ModelServer, given: str
) -> None:
    """At the load, where its author sees it, and not when a visitor asks."""
    source = f"{HEAD}async def f(): return 1\n\n\n@hookimpl\nasync def tools(ctx):\n    return [{given}]\n"
    with pytest.raises(LoadFailed) as caught:
        async with desk_of(tmp_path, model_server, t=source):
            raise AssertionError("it was loaded")
    assert WRONG_TOOLS[given] in str(caught.value)


async def test_a_swap_while_an_answer_is_under_way_calls_the_old_tool(
    tmp_path: Path, model_server: ModelServer
) -> None:
    """The turn keeps the snapshot that it began with, its tools too; the next turn has the new one."""
    release = asyncio.Event()
    model_server.default = answered_by(Script(text="a ", tool_calls=[("look", {})], first_s=0.3))
    async with desk_of(tmp_path, model_server, t=tool("return 'old'")) as desk:
        turn = asyncio.create_task(desk.say("go"))
        await wait_until(lambda: model_server.requests, "the model is asked")
        await desk.write("t.py", tool("return 'new'"))
        assert desk.host.plugins.entry("t").current.number == 2
        assert (await turn).text == "a Here it is."
        assert told(model_server) == ["old"]
        await desk.say("again")
        assert told(model_server) == ["new"]
        release.set()


async def test_an_answer_that_does_not_fit_a_question_rolls_nothing_back(model_server: ModelServer) -> None:
    """An order that is not there is an answer for the model, and no failure of the plugin, new as it may be."""
    model_server.default = "fast"
    async with Desk.with_plugin(CHATGPT, ROOT / "plugins/order_status.py", llm=model_server.base_url) as desk:
        folder = desk.folder
        source = (folder / "order_status.py").read_text()
        await desk.write("order_status.py", source + "\n# changed\n")
        for number in range(12):
            assert "there is no order 9999" in (await desk.say(f"{number}: order 9999?")).text
        current = desk.host.plugins.entry("order_status").current
        assert (current.number, current.hooks["tools"].stats.failures) == (2, 0)
