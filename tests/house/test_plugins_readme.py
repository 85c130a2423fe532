"""plugins/README.md tells the truth: every hook with its exact signature, and every block of it runs."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from hotdesk_sdk import HOOKS, Hooks
from hotdesk_sdk.testing import Desk

ROOT = Path(__file__).parents[2]
README = (ROOT / "plugins" / "README.md").read_text()
BLOCKS = dict(re.findall(r"^```(?:python|toml)\n# (\S+)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE))
"""The blocks that name their file in the first line."""

PLUGINS = [name for name in BLOCKS if name.endswith(".py") and not name.startswith("test_")]
TESTS = [name for name in BLOCKS if name.startswith("test_")]


def signature(hook: str) -> str:
    takes = list(inspect.signature(getattr(Hooks, hook)).parameters)[1:]
    return f"{hook}({', '.join(takes)})"


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_in_the_table_with_its_signature(hook: str) -> None:
    """One row for each hook, which begins with the signature as the SDK has it."""
    rows = re.findall(rf"^\| `({hook}\(.*?\))` \|", README, re.MULTILINE)
    assert rows == [signature(hook)]


def test_no_other_hook_is_in_the_table() -> None:
    """A hook that is gone from the SDK is gone from the page."""
    rows = re.findall(r"^\| `(\w+)\(.*?\)` \|.*\|.*\| (?:setup|`timeout_ms`)", README, re.MULTILINE)
    assert tuple(rows) == HOOKS


def test_every_python_block_names_its_file() -> None:
    """So that none escapes being run."""
    assert README.count("```python\n") == len(PLUGINS) + len(TESTS) > 0
    assert TESTS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with every file of the page."""
    for name, source in BLOCKS.items():
        (tmp_path / name).write_text(source)
    return tmp_path


@pytest.mark.parametrize("name", PLUGINS)
async def test_every_plugin_of_the_page_loads_and_answers(name: str, folder: Path) -> None:
    """It loads as it stands there, and a turn with it ends without an error."""
    async with Desk.with_plugin(folder / name) as desk:
        for text in ("hello", "repeat after me", "  "):
            assert (await desk.say(text)).error is None
        entry = desk.host.plugins.entry(name.removesuffix(".py"))  # type: ignore[attr-defined]
        assert entry.problem is None


@pytest.mark.parametrize("name", TESTS)
async def test_every_test_of_the_page_passes(name: str, folder: Path) -> None:
    """It runs as it stands there, beside the plugins of the page."""
    path = folder / name
    names: dict[str, Any] = {"__name__": path.stem, "__file__": str(path)}
    exec(compile(path.read_text(), str(path), "exec"), names)
    tests = [value for key, value in names.items() if key.startswith("test_")]
    assert tests
    for test in tests:
        await test()


def test_every_hook_has_a_test() -> None:
    """For each hook there is a test of its name somewhere under tests/."""
    found = {
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert [hook for hook in HOOKS if f"test_hook_{hook}" not in found] == []
