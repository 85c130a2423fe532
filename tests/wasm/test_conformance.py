"""The reference plugin in every language, built as its README says, keeps every claim of the conformance suite."""

from __future__ import annotations

import ast
import asyncio
import gc
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.wasm.built import EXAMPLES, LANGUAGES, ROOT, built, source_of
from tests.wasm.toolchains import Unavailable

from hotdesk.runtime.wasm_calls import GuestError
from hotdesk.runtime.wasm_guest import Guest
from hotdesk_sdk.conformance import CASES, Case, run_case
from hotdesk_sdk.testing import Desk

sys.path.insert(0, str(EXAMPLES / "model_server"))

from model_server import ModelServer, Script

MOST_LINES = 59
AT_ONCE = 5
"""Desks side by side."""

pytestmark = pytest.mark.timeout(600)  # the first test of a language installs its tools and builds its plugin


@pytest.fixture(scope="session", params=LANGUAGES)
def plugin(request: pytest.FixtureRequest) -> Path:
    """The plugin of one language, as `make` left it."""
    try:
        return built(request.param)
    except Unavailable as exc:
        pytest.skip(str(exc))


def test_every_example_is_tried() -> None:
    """No `examples/orders_LANGUAGE` is left out."""
    assert {path.name for path in EXAMPLES.glob("orders_*")} == {f"orders_{language}" for language in LANGUAGES}


async def test_every_claim_is_kept(plugin: Path) -> None:
    """All claims of the suite, in one language; some at once, for a claim mostly waits for swaps and their like."""
    room = asyncio.Semaphore(AT_ONCE)

    async def outcome(case: Case) -> str | None:
        async with room:
            gc.freeze()  # the desk that ended last let all loose, and the next would look through it
            try:
                await run_case(case, plugin)
            except Exception as exc:  # each claim is tried, and what is wrong with any is told at the end
                return f"{case}: {type(exc).__name__}: {exc}"
        return None

    first, *others = CASES
    found = [await outcome(first), *await asyncio.gather(*map(outcome, others))]  # the first has it compiled
    assert [problem for problem in found if problem is not None] == []


async def test_the_language_model_calls_its_tool(plugin: Path) -> None:
    """It is offered with its schema; what the model asks for is answered, and the visitor reads the model's words."""
    asks = Script(tool_calls=[("order_status", {"number": "1001"})])

    def answers(body: dict[str, object]) -> Script:
        messages = body["messages"]
        assert isinstance(messages, list)
        return Script(text="It was shipped.") if messages[-1]["role"] == "tool" else asks

    async with (
        ModelServer(Script(answers=answers)) as server,
        Desk.with_plugin(plugin, ROOT / "plugins/chatgpt.py", llm=server.base_url) as desk,
    ):
        assert (await desk.say("what of my parcel?")).text == "It was shipped."
        first, second = [seen.body or {} for seen in server.requests]
        offered = {one["function"]["name"]: one["function"] for one in first["tools"]}
        assert offered["order_status"]["parameters"]["required"] == ["number"]
        assert json.loads(second["messages"][-1]["content"]) == {"number": "1001", "status": "shipped"}


@pytest.mark.parametrize("plugin", [language for language in LANGUAGES if language != "python"], indirect=True)
async def test_an_answer_that_is_refused_its_stream_fails(plugin: Path) -> None:
    """What `emit` is refused fails the call, with the host's reason: no trap, so the count is kept."""
    async with Desk.with_plugin(plugin) as desk:
        guest: Guest = desk.host.plugins.entry("orders").current.guest  # type: ignore[attr-defined]
        with pytest.raises(GuestError, match="emit works while a bot responds"):
            await guest.call("bot.respond", ("m1", "c1", "order 1001", "{}"))  # here nobody takes chunks
        assert (await desk.say("count")).text == "Answered 1."


def test_check_passes(plugin: Path) -> None:
    """`hotdesk check` says that it would serve, with all that it is."""
    command = [sys.executable, "-m", "hotdesk", "check", "--json", str(plugin)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert (found["plugin"], found["version"], found["tools"]) == ("orders", "1.0.0", ["order_status"])
    assert found["capabilities"] == []
    assert {"middleware", "respond", "tools", "setup", "configure"} <= {*found["hooks"]}


@pytest.mark.parametrize("language", LANGUAGES)
def test_it_is_small(language: str) -> None:
    """What the author wrote is under 60 lines, comments and empty lines aside."""
    assert len(own_lines(source_of(language).read_text(), language)) <= MOST_LINES


def own_lines(source: str, language: str) -> list[str]:
    if language.startswith("python"):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node, clean=False)
                source = source if text is None else source.replace(f'"""{text}"""', "", 1)
        comment = r"#"
    else:
        source = re.sub(r"/\*.*?\*/", "", source, flags=re.DOTALL)
        comment = r"//"
    return [line for line in source.splitlines() if line.strip() and not line.strip().startswith(comment)]
