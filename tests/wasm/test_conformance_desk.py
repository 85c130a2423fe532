"""What the conformance suite needs of a `Desk`, and any author's test may use."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.wasm.components import answering

from hotdesk.errors import LoadFailed
from hotdesk_sdk.testing import Desk

BOT = "from hotdesk_sdk import hookimpl\n@hookimpl\nasync def respond(turn):\n    return {!r}\n"
TOOLS = """
from hotdesk_sdk import Tool, hookimpl

@hookimpl
async def tools():
    return [Tool("double", "Doubles.", double, SCHEMA), Tool("fail", "Fails.", fail)]

@hookimpl
async def respond(ctx, turn):
    await ctx.kv.get("a key")

async def double(n):
    return {"twice": 2 * n}

async def fail():
    raise ValueError("told to")

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
"""


def put(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


async def test_a_plugin_is_replaced_by_one_of_any_kind(tmp_path: Path) -> None:
    """Python, a component, a folder of either: each takes the place of the one before, and nothing of that is left."""
    versions = [
        put(tmp_path / "a" / "shop.py", BOT.format("py")),
        put(tmp_path / "b" / "shop.wasm", answering("wasm")),
        put(tmp_path / "c" / "shop" / "__init__.py", BOT.format("package")).parent,
        put(tmp_path / "d" / "shop" / "plugin.wasm", answering("wasm in a folder")).parent,
        put(tmp_path / "e" / "shop.py", BOT.format("py again")),
    ]
    said = []
    async with Desk.with_plugin(versions[0]) as desk:
        said.append((await desk.say("hello")).text)
        for number, path in enumerate(versions[1:], 2):
            entry = await desk.replace(path)
            assert entry.problem is None
            answer = await desk.say("hello")
            said.append(answer.text)
            assert answer.generation == number
        assert [path.name for path in desk.folder.iterdir()] == ["shop.py"]  # type: ignore[attr-defined]
    assert said == ["py", "wasm", "package", "wasm in a folder", "py again"]


async def test_what_is_refused_leaves_the_one_before(tmp_path: Path) -> None:
    """The entry says why, and the old one answers."""
    async with Desk.with_plugin(put(tmp_path / "a" / "shop.py", BOT.format("py"))) as desk:
        entry = await desk.replace(put(tmp_path / "b" / "shop.wasm", b"no component"))
        assert "shop.wasm" in entry.problem.file
        assert (await desk.say("hello")).text == "py"


async def test_a_components_bytes_are_written(tmp_path: Path) -> None:
    """`write` takes a `.wasm` as it takes source."""
    async with Desk.with_plugin(put(tmp_path / "shop.wasm", answering("one"))) as desk:
        await desk.write("shop.wasm", answering("two"))
        assert (await desk.say("hello")).text == "two"


async def test_a_component_is_named_by_its_file(tmp_path: Path) -> None:
    """`plugin.wasm` stands for its folder, as `__init__.py` does; what else is there is not copied."""
    path = put(tmp_path / "shop" / "plugin.wasm", answering("one"))
    put(tmp_path / "shop" / "target" / "large.o", b"x")
    async with Desk.with_plugin(path, config={"a": 1}) as desk:
        assert (await desk.say("hello")).text == "one"
        assert [one.name for one in (desk.folder / "shop").iterdir()] == ["plugin.wasm"]  # type: ignore[attr-defined]


async def test_tools_are_called_as_the_model_calls_them(tmp_path: Path) -> None:
    """Arguments are checked against the schema; results and errors are the texts that a model reads."""
    async with Desk.with_plugin(put(tmp_path / "shop.py", TOOLS)) as desk:
        assert [(name, tool.description) for name, tool in desk.tools.items()] == [
            ("double", "Doubles."),
            ("fail", "Fails."),
        ]
        assert await desk.call_tool("double", {"n": 4}) == '{"twice":8}'
        assert "do not fit" in await desk.call_tool("double", {"n": "four"})
        assert "told to" in await desk.call_tool("fail", {})
        assert "there is no tool 'triple'" in await desk.call_tool("triple", {})


async def test_the_operator_and_the_metrics_are_asked(tmp_path: Path) -> None:
    """A refused capability is among the events, and the call that failed of it is counted."""
    async with Desk.with_plugin(put(tmp_path / "shop.py", TOOLS)) as desk:
        await desk.say("hello")
        told = [event for event in desk.events if event["kind"] == "capability_denied"]
        assert [(event["plugin"], event["capability"]) for event in told] == [("shop", "kv")]
        assert desk.metric("hotdesk_call_failures_total", plugin="shop", hook="respond", kind="denied") == 1
        assert desk.metric("hotdesk_nothing_total") == 0


async def test_a_component_that_does_not_load_says_so(tmp_path: Path) -> None:
    """As for Python: the desk does not open."""
    with pytest.raises(LoadFailed, match="shop"):
        async with Desk.with_plugin(put(tmp_path / "shop.wasm", b"\0asm")):
            pass
