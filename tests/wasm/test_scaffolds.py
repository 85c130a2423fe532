"""What `hotdesk new NAME --lang LANG --kind KIND` writes is built by its one command, and works as generated."""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner
from tests.wasm.toolchains import Unavailable
from tests.wasm.toolchains.installing import install_once

from hotdesk.cli.scaffold import new
from hotdesk_sdk.testing import Desk

LANGUAGES = ("c", "go", "js", "python-wasm", "rust", "zig")
BOT = """
from hotdesk_sdk import hookimpl

@hookimpl
async def respond(turn):
    return f"<{turn.text}>"
"""

pytestmark = pytest.mark.timeout(600)  # the first test of a language installs its toolchain


async def made(tmp_path: Path, lang: str, kind: str) -> Path:
    """The folder that `hotdesk new` wrote, with what `make` there built. Skips where there is no toolchain."""
    try:
        toolchain = importlib.import_module(f"tests.wasm.toolchains.{lang.replace('-', '_')}")
        environment = await asyncio.to_thread(toolchain.ensure)
    except Unavailable as exc:
        pytest.skip(str(exc))
    ran = CliRunner().invoke(new, ["Shop", "--lang", lang, "--kind", kind, "--dir", str(tmp_path)])
    assert ran.exit_code == 0, ran.output
    written = tmp_path / "Shop"
    digest = hashlib.sha256()
    for path in sorted(path for path in written.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(written)}\n".encode() + path.read_bytes())

    def build(folder: Path) -> None:
        work = folder / "work"
        shutil.copytree(written, work)
        made = subprocess.run(
            ["make", "--silent"],
            cwd=work,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert made.returncode == 0, f"make of a {kind} in {lang}:\n{made.stdout}{made.stderr}"
        shutil.copy(work / "plugin.wasm", folder)
        shutil.rmtree(work)

    name = f"scaffold-{lang}-{kind}-{digest.hexdigest()[:16]}"
    folder = await asyncio.to_thread(install_once, name, build)
    ready = tmp_path / "ready" / "Shop"
    ready.mkdir(parents=True)
    shutil.copy(folder / "plugin.wasm", ready)
    shutil.copy(written / "plugin.toml", ready)
    return ready


@pytest.mark.parametrize("lang", LANGUAGES)
async def test_a_bot_answers(tmp_path: Path, lang: str) -> None:
    """To its name, with what its config says; to anything else it leaves the word to others."""
    async with Desk.with_plugin(await made(tmp_path, lang, "bot"), config={"answer": "Open."}) as desk:
        said = await desk.say("is the shOP open?")
        assert (said.text, said.plugin) == ("Open.", "Shop")
        assert not await desk.say("hello")


@pytest.mark.parametrize("lang", LANGUAGES)
async def test_a_middleware_stands_around_every_turn(tmp_path: Path, lang: str) -> None:
    """It trims what goes in and signs what comes out."""
    (tmp_path / "bot.py").write_text(BOT)
    async with Desk.with_plugin(await made(tmp_path, lang, "middleware"), tmp_path / "bot.py") as desk:
        assert (await desk.say("  hello ")).text == "<hello> (by way of Shop)"


@pytest.mark.parametrize("lang", LANGUAGES)
async def test_an_intake_takes_a_webhook(tmp_path: Path, lang: str) -> None:
    """A message comes out of it; what is none is answered with what is wrong."""
    async with Desk.with_plugin(await made(tmp_path, lang, "intake")) as desk:
        taken = await desk.webhook("Shop", json.dumps({"conversation": "c", "text": "hello", "id": "1"}))
        assert [(one.conversation, one.text, one.id) for one in taken.messages] == [("c", "hello", "1")]
        assert taken.answer.status == 202
        empty, deep = '{"conversation": "c", "text": "", "id": "1"}', "[" * 100_000
        for wrong in ("no JSON", "[]", '{"conversation": "c", "text": 7, "id": "1"}', empty, deep):
            refused = await desk.webhook("Shop", wrong)
            assert (list(refused.messages), refused.answer.status) == ([], 400)
