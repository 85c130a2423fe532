"""A host with components in its folder, and native code that all these tests share, so that each is compiled once."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from conftest import Desk, StartDesk
from hotdesk.runtime.wasm import Machine
from hotdesk.runtime.wasm_imports import IMPORTED

__all__ = ["StartGuests"]

ROOT = Path(__file__).parents[2]

WANT_TOOLCHAINS = ("test_conformance.py", "test_scaffolds.py")

_preparing: list[subprocess.Popen[bytes]] = []


def pytest_collection_finish(session: pytest.Session) -> None:
    """Install the toolchains beside the tests that come first, where enough of those that want them are to run."""
    wanting = sum(item.path.name in WANT_TOOLCHAINS for item in session.items)
    if wanting > 30 and not session.config.option.collectonly:
        command = [sys.executable, "-m", "tests.wasm.prepare"]
        quiet = subprocess.DEVNULL
        started = subprocess.Popen(command, cwd=ROOT, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True)
        _preparing.append(started)


def pytest_sessionfinish() -> None:
    for process in _preparing:
        with contextlib.suppress(ProcessLookupError):  # with all that it has started: installers, compilers
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


StartGuests = Callable[..., Awaitable[Desk]]


@pytest.fixture(scope="session")
def native_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of native code that the hosts of one run share."""
    return tmp_path_factory.mktemp("native")


@pytest.fixture
def start_guests(start_desk: StartDesk, tmp_path: Path, native_folder: Path) -> StartGuests:
    """Like `start_desk`, and files may be bytes: `desk = await start_guests({"bot.wasm": component(...)})`."""

    async def start(files: Mapping[str, str | bytes], **config: Any) -> Desk:
        folder = tmp_path / f"guests{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        return await start_desk(folder=folder, **{"wasm_cache": str(native_folder), **config})

    return start


@pytest.fixture(scope="session")
def machine() -> Iterator[Machine]:
    """One machine, without a host."""
    made = Machine(IMPORTED, memory_bytes=64 * 1024 * 1024, output_bytes=4 * 1024 * 1024)
    yield made
    made.close()
