"""The commands against a real host: an author's and an operator's day."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from tests.cli.stand_in import Hotdesk

TOKEN = "an-admin-token"


class RunningHost:
    """`hotdesk run` in a folder, on a port that it keeps over restarts."""

    def __init__(self, folder: Path) -> None:
        self.url = "http://127.0.0.1:0"
        self._folder = folder
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._said = ""
        self._more = asyncio.Event()

    async def start(self) -> None:
        port = self.url.rpartition(":")[2]
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "hotdesk", "run", "--port", port, "--plugins", "plugins", "--data", "data"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            cwd=self._folder,
            env=os.environ | {"HOTDESK_ADMIN_TOKEN": TOKEN},
        )
        self._said = ""
        self._reading = asyncio.create_task(self._read(self._process))
        await self.wait_said("at  ")
        found = re.search(r"at +(http://\S+)", self._said)
        assert found is not None
        self.url = found[1]

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        while line := await process.stdout.readline():
            self._said += line.decode()
            self._more.set()

    async def wait_said(self, words: str) -> None:
        """Wait until a line that the host printed has *words*."""
        async with asyncio.timeout(20):
            while not any(words in line for line in self._said.splitlines()):
                self._more.clear()
                await self._more.wait()

    async def stop(self, number: int = signal.SIGTERM) -> None:
        if self._process is None or self._reading is None:
            return
        self._process.send_signal(number)
        await self._process.wait()
        await self._reading
        self._process = None

    @property
    def env(self) -> dict[str, str]:
        return {"HOTDESK_URL": self.url, "HOTDESK_ADMIN_TOKEN": TOKEN}


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[RunningHost]:
    (tmp_path / "plugins").mkdir()
    host = RunningHost(tmp_path)
    await host.start()
    yield host
    await host.stop()


async def wait_until(condition: Callable[[], Awaitable[bool]], *, what: str) -> None:
    async with asyncio.timeout(20):
        while not await condition():  # noqa: ASYNC110 - another process has no event for this
            await asyncio.sleep(0.05)


async def test_written_broken_mended_and_rolled_back(hotdesk: Hotdesk, host: RunningHost, tmp_path: Path) -> None:
    """Who answered, and in which generation, can be seen at every step."""
    file = tmp_path / "plugins" / "hello" / "__init__.py"

    async def ask() -> str:
        return (await hotdesk("chat", stdin="hello\n", env=host.env)).out

    assert (await hotdesk("new", "hello", env=host.env)).code == 0
    await host.wait_said("hello 1 live")
    assert await ask() == "This is hello.  [hello 1]\n"

    whole = file.read_text()
    file.write_text(whole + "\ndef broken(:\n")
    await host.wait_said("goes on serving")
    listed = await hotdesk("plugins", env=host.env)
    assert "failed at parse" in listed.out
    assert "generation 1 goes on serving" in listed.out
    refused = await hotdesk("plugins", "reload", "hello", env=host.env)
    assert refused.code == 1
    assert "SyntaxError" in refused.err
    assert await ask() == "This is hello.  [hello 1]\n"

    file.write_text(whole.replace('str(ctx.config["answer"])', '"mended"'))

    async def mended() -> bool:
        return await ask() == "mended  [hello 2]\n"

    await wait_until(mended, what="the mended code answers")

    rolled = await hotdesk("plugins", "rollback", "hello", env=host.env)
    assert "✓ hello 2 → 3 live" in rolled.out
    assert await ask() == "This is hello.  [hello 3]\n"
    shown = json.loads((await hotdesk("plugins", "show", "hello", "--json", env=host.env)).out)
    assert (shown["generation"], shown["config"]) == (3, {"answer": "This is hello."})


async def test_disabled_and_enabled_again(hotdesk: Hotdesk, host: RunningHost) -> None:
    assert (await hotdesk("new", "hello", env=host.env)).code == 0
    await host.wait_said("hello 1 live")
    assert "hello is disabled" in (await hotdesk("plugins", "disable", "hello", env=host.env)).out
    silent = await hotdesk("chat", stdin="hello\n", env=host.env)
    assert (silent.code, silent.out) == (1, "")
    assert "no plugin answered" in silent.err
    assert "disabled" in (await hotdesk("plugins", env=host.env)).out
    assert "✓ hello 2 live" in (await hotdesk("plugins", "enable", "hello", env=host.env)).out


async def test_a_real_host_refuses_in_words(hotdesk: Hotdesk, host: RunningHost) -> None:
    assert (await hotdesk("new", "hello", env=host.env)).code == 0
    await host.wait_said("hello 1 live")
    unknown = await hotdesk("plugins", "reload", "helo", env=host.env)
    assert unknown.code == 1
    assert "Did you mean hello?" in unknown.err
    assert "wants its admin token" in (await hotdesk("plugins", "--url", host.url)).err
    nothing = await hotdesk("plugins", "rollback", "hello", env=host.env)
    assert nothing.code == 1
    assert "no earlier version" in nothing.err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_a_chat_outlives_its_host(hotdesk: Hotdesk, host: RunningHost, tmp_path: Path, number: int) -> None:
    """Stopped or killed in the middle, the host comes back on the same journal and the chat goes on by itself."""
    assert (await hotdesk("new", "hello", env=host.env)).code == 0
    await host.wait_said("hello 1 live")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "hotdesk", "chat", "--conversation", "c"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env=os.environ | host.env,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"hello\n")
    assert await process.stdout.readline() == b"This is hello.  [hello 1]\n"
    await host.stop(number)
    process.stdin.write(b"hello again\n")
    await host.start()
    assert await process.stdout.readline() == b"This is hello.  [hello 2]\n"
    process.stdin.close()
    assert await asyncio.wait_for(process.wait(), 10) == 0
