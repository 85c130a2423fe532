"""The commands as people run them, and what they talk to."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.cli.stand_in import Hotdesk, Ran, StandIn, stand_in_desk


@pytest.fixture
def hotdesk(tmp_path: Path) -> Hotdesk:
    """Run `hotdesk ARGS…` in a folder of its own, with pipes."""

    async def run(*args: str, stdin: str = "", env: dict[str, str] | None = None, cwd: Path | None = None) -> Ran:
        clean = {key: value for key, value in os.environ.items() if not key.startswith("HOTDESK_")}
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "hotdesk",
            *args,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=clean | (env or {}),
            cwd=cwd or tmp_path,
        )
        try:
            out, err = await asyncio.wait_for(process.communicate(stdin.encode()), 30)
        except TimeoutError:
            process.kill()
            out, err = await process.communicate()
            raise AssertionError(f"hotdesk {args} did not end: {out.decode()} {err.decode()}") from None
        assert process.returncode is not None
        return Ran(process.returncode, out.decode(), err.decode())

    return run


@pytest.fixture
async def stand_in() -> AsyncIterator[StandIn]:
    async with stand_in_desk() as desk:
        yield desk
