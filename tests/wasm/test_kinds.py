"""A plugin that changes its kind, Python to WebAssembly and back, is one plugin: versions, restarts and rollbacks."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from tests.wasm.components import answering

from conftest import ADMIN_TOKEN, Desk, echo
from hotdesk.app import open_host
from hotdesk.config import Config

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


@asynccontextmanager
async def desk_on(folder: Path, data: Path) -> AsyncIterator[Desk]:
    """One run of a host on *folder* and *data*."""
    config = Config(plugins=(str(folder),), data=str(data), port=0, admin_token=ADMIN_TOKEN, standby_s=0.05)
    async with open_host(config) as host, aiohttp.ClientSession() as http:
        yield Desk(host, folder, http)


@pytest.mark.parametrize("at", [FILES, FOLDERS], ids=["files", "folders"])
async def test_over_restarts(tmp_path: Path, at: dict[str, str]) -> None:
    """Each start loads what lies there, whatever kind the version before it had."""
    folder, data = tmp_path / "plugins", tmp_path / "data"
    steps = [("python", PYTHON, "1: hello"), ("wasm", answering("one"), "one"), ("python", PYTHON, "1: hello")]
    steps += [("wasm", answering("two"), "two"), ("wasm", answering("three"), "three")]
    for number, (kind, source, says) in enumerate(steps, 1):
        put(folder, at, kind, source)
        async with desk_on(folder, data) as desk:
            assert await desk.reply() == says
            assert (await desk.plugin("echo"))["generation"] == number


@pytest.mark.parametrize("at", [FILES, FOLDERS], ids=["files", "folders"])
@pytest.mark.parametrize("kinds", [("python", "wasm"), ("wasm", "python")])
async def test_rolled_back_by_command(tmp_path: Path, at: dict[str, str], kinds: tuple[str, str]) -> None:
    """The version before, of the other kind and of an earlier run, serves again."""
    folder, data = tmp_path / "plugins", tmp_path / "data"
    sources = {"python": PYTHON, "wasm": answering("wasm")}
    says = {"python": "1: hello", "wasm": "wasm"}
    put(folder, at, kinds[0], sources[kinds[0]])
    async with desk_on(folder, data) as desk:
        assert await desk.reply() == says[kinds[0]]
    put(folder, at, kinds[1], sources[kinds[1]])
    async with desk_on(folder, data) as desk:
        assert await desk.reply() == says[kinds[1]]
        await desk.admin("POST", "plugins/echo/rollback")
        assert await desk.reply() == says[kinds[0]]
