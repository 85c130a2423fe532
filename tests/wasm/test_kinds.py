"""A plugin that changes its kind, Python to WebAssembly and back, is one plugin: versions, restarts and rollbacks."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tests.wasm.components import answering
from tests.web.visitors import open_desk

from conftest import echo

PYTHON = echo(1).encode()
FILES = {"python": "echo.py", "wasm": "echo.wasm"}
FOLDERS = {"python": "echo/__init__.py", "wasm": "echo/plugin.wasm"}


def put(folder: Path, at: dict[str, str], kind: str, data: bytes) -> None:
    """Make *kind* the only form in which `echo` is in the folder."""
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / at[kind]).parent.mkdir(exist_ok=True)
    (folder / at[kind]).write_bytes(data)


@pytest.mark.parametrize("at", [FILES, FOLDERS], ids=["files", "folders"])
async def test_over_restarts(tmp_path: Path, at: dict[str, str]) -> None:
    """Each start loads what lies there, whatever kind the version before it had."""
    steps = [("python", PYTHON, "1: hello"), ("wasm", answering("one"), "one"), ("python", PYTHON, "1: hello")]
    steps += [("wasm", answering("two"), "two"), ("wasm", answering("three"), "three")]
    for number, (kind, source, says) in enumerate(steps, 1):
        put(tmp_path / "plugins", at, kind, source)
        async with open_desk(tmp_path) as desk:
            assert await desk.reply() == says
            assert (await desk.plugin("echo"))["generation"] == number


@pytest.mark.parametrize("at", [FILES, FOLDERS], ids=["files", "folders"])
@pytest.mark.parametrize("kinds", [("python", "wasm"), ("wasm", "python")])
async def test_rolled_back_by_command(tmp_path: Path, at: dict[str, str], kinds: tuple[str, str]) -> None:
    """The version before, of the other kind and of an earlier run, serves again."""
    folder = tmp_path / "plugins"
    sources = {"python": PYTHON, "wasm": answering("wasm")}
    says = {"python": "1: hello", "wasm": "wasm"}
    put(folder, at, kinds[0], sources[kinds[0]])
    async with open_desk(tmp_path) as desk:
        assert await desk.reply() == says[kinds[0]]
    put(folder, at, kinds[1], sources[kinds[1]])
    async with open_desk(tmp_path) as desk:
        assert await desk.reply() == says[kinds[1]]
        await desk.admin("POST", "plugins/echo/rollback")
        assert await desk.reply() == says[kinds[0]]
