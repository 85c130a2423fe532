"""Native code is the host's own: made by its compiler, kept in its folder, checked when it is read."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.metadata
import os
import platform
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.wasm.components import NEXT, answering, component
from tests.wasm.conftest import StartGuests
from tests.wasm.test_bad_loads import phis

from conftest import wait_until
from hotdesk.errors import LoadFailed
from hotdesk.runtime.wasm_cache import MAGIC, STALE_S, SUFFIX, CodeCache
from hotdesk.runtime.wasm_compiler import Compiler
from hotdesk.runtime.wit_engine import build_key

SMALL = answering("from the cache")
SLOW = component({"respond": phis(90_000) + NEXT})


class Log:
    """The lines that were logged."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def warning(self, event: str, **_: Any) -> None:
        self.events.append(event)


@pytest.fixture
def log() -> Log:
    return Log()


def open_cache(root: Path, log: Any, max_bytes: int = 1 << 24) -> CodeCache:
    cache = CodeCache(root, max_bytes, log)
    cache.open()
    return cache


def keep(cache: CodeCache, key: str, native: bytes) -> bytes:
    part = cache.new_file()
    part.write_bytes(native)
    return cache.keep(key, part)


def test_what_was_kept_is_read_again(tmp_path: Path, log: Log) -> None:
    """Also by the next host; and of the way there nothing is left."""
    cache = open_cache(tmp_path / "c", log)
    assert cache.read("k") is None
    assert keep(cache, "k", b"native" * 1000) == b"native" * 1000
    assert open_cache(tmp_path / "c", log).read("k") == b"native" * 1000
    assert [path.name for path in cache.root.iterdir()] == [f"k{SUFFIX}"]
    assert not log.events


@pytest.mark.parametrize("at", [0, len(MAGIC), len(MAGIC) + 31, len(MAGIC) + 32, 500, -1])
def test_a_damaged_entry_is_thrown_away(tmp_path: Path, log: Log, at: int) -> None:
    """One bit anywhere, and it is compiled again: native code that is not as it was is never run."""
    cache = open_cache(tmp_path, log)
    keep(cache, "k", b"native" * 100)
    path = tmp_path / f"k{SUFFIX}"
    raw = bytearray(path.read_bytes())
    raw[at] ^= 4
    path.write_bytes(raw)
    assert cache.read("k") is None
    assert not path.exists()
    assert log.events == ["native_code_damaged"]


@pytest.mark.parametrize("size", [0, 5, len(MAGIC), len(MAGIC) + 20, len(MAGIC) + 32, len(MAGIC) + 100])
def test_a_cut_off_entry_is_thrown_away(tmp_path: Path, log: Log, size: int) -> None:
    """A disk that was full, a host that was killed: what is shorter than it was is not used."""
    cache = open_cache(tmp_path, log)
    keep(cache, "k", b"native" * 100)
    path = tmp_path / f"k{SUFFIX}"
    path.write_bytes(path.read_bytes()[:size])
    assert cache.read("k") is None
    assert not path.exists()


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o722])
def test_a_folder_that_others_can_write_is_refused(tmp_path: Path, log: Log, mode: int) -> None:
    """Who can write there can run anything: the host says so, and does not use it."""
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(PermissionError, match="delete it"):
        open_cache(folder, log)


async def test_a_host_with_such_a_folder_serves_its_other_plugins(start_guests: StartGuests, tmp_path: Path) -> None:
    """Components are refused with the reason; Python goes on."""
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    source = "from hotdesk_sdk import hookimpl\n@hookimpl\nasync def respond(turn): return 'python'\n"
    desk = await start_guests({"bot.wasm": SMALL, "py.py": source}, wasm_cache=str(folder))
    assert await desk.reply() == "python"
    assert "delete it" in (await desk.plugin("bot"))["error"]["message"]


def test_a_new_folder_is_the_hosts_alone(tmp_path: Path, log: Log) -> None:
    """Made with no rights for others, also in folders that are yet to be made."""
    cache = open_cache(tmp_path / "a" / "b", log)
    assert cache.root.stat().st_mode & 0o777 == 0o700


def test_the_folder_is_bounded(tmp_path: Path, log: Log) -> None:
    """What was not used for longest goes first; reading is using; more than all of it is not kept at all."""
    cache = open_cache(tmp_path, log, max_bytes=3500)
    for number, key in enumerate("abc"):
        keep(cache, key, bytes(1000))
        os.utime(tmp_path / f"{key}{SUFFIX}", (number, number))
    assert cache.read("a") == bytes(1000)
    keep(cache, "d", bytes(1000))
    assert {path.stem for path in tmp_path.iterdir()} == {"a", "c", "d"}
    assert keep(cache, "huge", bytes(4000)) == bytes(4000)
    assert cache.read("huge") is None
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 3500


def test_what_a_killed_host_left_is_cleared(tmp_path: Path, log: Log) -> None:
    """Half-written files of long ago go at the next start; those of just now may be another host's."""
    for name, age in (("old", 2 * STALE_S), ("new", 0.0)):
        (tmp_path / f"{name}.part").write_bytes(b"half")
        os.utime(tmp_path / f"{name}.part", (time.time() - age,) * 2)
    open_cache(tmp_path, log)
    assert [path.stem for path in tmp_path.iterdir()] == ["new"]


def test_a_full_disk_is_no_failure(tmp_path: Path, log: Log) -> None:
    """Native code that can't be kept is used all the same, and the operator is told."""
    cache = open_cache(tmp_path, log)
    part = cache.new_file()
    part.write_bytes(b"native")
    (tmp_path / f"k{SUFFIX}").mkdir()  # nothing can be renamed over a folder
    assert cache.keep("k", part) == b"native"
    assert log.events == ["native_code_not_kept"]
    assert not list(tmp_path.glob("*.part"))


# ---- the compiler ---------------------------------------------------------------------------------------------------


@pytest.fixture
async def compiler(tmp_path: Path, log: Log) -> AsyncIterator[Compiler]:
    made = Compiler(open_cache(tmp_path / "c", log), key="key", max_mb=1024, timeout_s=20.0, niceness=5)
    yield made
    await made.aclose()


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


async def test_the_key_has_all_that_native_code_depends_on(compiler: Compiler, tmp_path: Path, log: Log) -> None:
    """Another component, or another key of the machine: another entry."""
    other = Compiler(open_cache(tmp_path / "c", log), key="another", max_mb=1024, timeout_s=20.0, niceness=5)
    assert len({compiler.key_of("a"), compiler.key_of("b"), other.key_of("a"), other.key_of("b")}) == 4
    await compiler.compile("p", SMALL, digest_of(SMALL))
    assert await compiler.cached(digest_of(SMALL)) is not None
    assert await other.cached(digest_of(SMALL)) is None
    assert await compiler.cached(digest_of(b"other bytes")) is None
    await other.aclose()


def test_another_wasmtime_settings_or_processor_is_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each alone, for code that was made for another crashes or is wrong; the same again is the same."""
    keys = {build_key()}
    assert build_key() in keys
    for module, name in ((importlib.metadata, "version"), (platform, "machine")):
        with monkeypatch.context() as other:
            other.setattr(module, name, lambda *_: "another")
            keys.add(build_key())
    read = Path.read_bytes
    for changed in ("cpuinfo", "wit_engine.py", "wit_names.py", "wit_binary.py", "wit_compile.py"):
        with monkeypatch.context() as other:
            other.setattr(Path, "read_bytes", lambda path, c=changed: b"flags\n" * (path.name == c) + read(path))
            keys.add(build_key())
    assert len(keys) == 1 + 2 + 5


async def begin_compiling(compiler: Compiler) -> tuple[asyncio.Task[bytes], asyncio.subprocess.Process]:
    """Compile `SLOW`: the task, and the process that is in the middle of it."""
    await compiler.compile("p", SMALL, digest_of(SMALL))  # it runs
    process = compiler._process
    assert process is not None
    seen = psutil.Process(process.pid)
    before = seen.cpu_times().user
    compiling = asyncio.create_task(compiler.compile("p", SLOW, digest_of(SLOW)))
    await wait_until(lambda: seen.cpu_times().user >= before + 0.1, "it compiles")
    return compiling, process


async def test_code_that_was_made_in_a_hurry_is_not_kept(compiler: Compiler) -> None:
    """The baseline compiler's code serves until the other's is there, and is never found in the cache."""
    assert await compiler.compile("p", SMALL, digest_of(SMALL), baseline=True)
    assert await compiler.cached(digest_of(SMALL)) is None


async def test_a_compiler_that_is_killed_is_a_failed_compile(compiler: Compiler, tmp_path: Path) -> None:
    """Killed in the middle: the reason is told, no half file is left, and the next component compiles."""
    compiling, process = await begin_compiling(compiler)
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(LoadFailed, match="ended the compiler \\(signal 9\\)"):
        await compiling
    assert not list((tmp_path / "c").glob("*.part"))
    assert await compiler.cached(digest_of(SLOW)) is None
    other = answering("after the kill")
    assert await compiler.compile("p", other, digest_of(other))


async def test_a_compile_that_nobody_waits_for_ends(compiler: Compiler, tmp_path: Path) -> None:
    """A cancelled compile ends its process at once: it does not use up a core for nothing."""
    compiling, process = await begin_compiling(compiler)
    compiling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await compiling
    assert process.returncode is not None
    assert not list((tmp_path / "c").glob("*.part"))


async def test_a_compiler_that_takes_too_long_is_ended(tmp_path: Path, log: Log) -> None:
    """The limit is a setting, which the message names."""
    compiler = Compiler(open_cache(tmp_path / "c", log), key="key", max_mb=1024, timeout_s=0.3, niceness=5)
    started = time.monotonic()
    with pytest.raises(LoadFailed, match="wasm_compile_timeout_s"):
        await compiler.compile("p", SLOW, digest_of(SLOW))
    assert time.monotonic() - started < 3
    await compiler.aclose()
    assert not list((tmp_path / "c").glob("*.part"))


async def test_garbage_is_an_error_and_not_the_end_of_the_compiler(compiler: Compiler) -> None:
    """What is no component is said in words, and the same process goes on."""
    for data in (b"\0asm\x0d\0\x01\0\x07\x05hello", b"\0asm\x0d\0\x01\0" + bytes(100)):
        with pytest.raises(LoadFailed) as failed:
            await compiler.compile("p", data, digest_of(data))
        assert failed.value.step == "compile"
    process = compiler._process
    assert await compiler.compile("p", SMALL, digest_of(SMALL))
    assert compiler._process is process


async def test_nothing_native_is_read_from_the_plugin_folder(start_guests: StartGuests, tmp_path: Path) -> None:
    """Native code beside a plugin, under any name that a cache might have, is never loaded."""
    other = await start_guests({"bot.wasm": answering("planted")}, wasm_cache=str(tmp_path / "other"))
    assert await other.reply() == "planted"
    [entry] = (tmp_path / "other").glob(f"*{SUFFIX}")
    planted = entry.read_bytes()
    names = [f"plugin{suffix}" for suffix in (SUFFIX, ".cwasm", ".wasm.native", ".so", ".compiled")]
    files: dict[str, Any] = {f"bot/{name}": planted for name in (*names, entry.name)}
    desk = await start_guests({"bot/plugin.wasm": SMALL, **files})
    assert await desk.reply() == "from the cache"
    desk.write("bot/plugin.wasm", planted)
    failed = await desk.wait_event("plugin_failed", plugin="bot")
    assert "it is not WebAssembly" in failed["message"]
    desk.write("bot/plugin.wasm", planted[len(MAGIC) + 32 :])
    await wait_until(lambda: sum(e["kind"] == "plugin_failed" for e in desk.events) == 2, "it is refused too")
    assert await desk.reply() == "from the cache"


async def test_a_damaged_cache_is_compiled_around(start_guests: StartGuests, tmp_path: Path) -> None:
    """A host whose cache is damaged serves as if it were empty, and mends it."""
    folder = tmp_path / "cache"
    first = await start_guests({"bot.wasm": SMALL}, wasm_cache=str(folder))
    assert await first.reply() == "from the cache"
    [entry] = folder.glob(f"*{SUFFIX}")
    whole = entry.read_bytes()
    entry.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    second = await start_guests({"bot.wasm": SMALL}, wasm_cache=str(folder))
    assert await second.reply() == "from the cache"
    mended = entry.read_bytes()
    assert mended[: len(MAGIC)] == MAGIC
    assert mended[len(MAGIC) : len(MAGIC) + 32] == hashlib.sha256(mended[len(MAGIC) + 32 :]).digest()


async def test_a_compiler_that_was_killed_while_it_waited_is_started_again(compiler: Compiler) -> None:
    """The next component compiles, also when the host has not heard of the end yet."""
    await compiler.compile("p", SMALL, digest_of(SMALL))
    process = compiler._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    other = answering("after it was killed")
    assert await compiler.compile("p", other, digest_of(other))
    assert compiler._process is not process


async def test_a_compiler_that_is_let_go_is_not_given_another_component(compiler: Compiler) -> None:
    """Its time to wait is over in the moment that the next compilation begins: that one gets a process of its own."""
    await compiler.compile("p", SMALL, digest_of(SMALL))
    process = compiler._process
    assert compiler._idle is not None
    compiler._idle.cancel()
    compiler._let_go()
    other = answering("after it was let go")
    assert await compiler.compile("p", other, digest_of(other))
    assert compiler._process is not process


async def test_the_compiler_knows_no_secret(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads what others wrote: its environment has what Python needs, and nothing of the host's."""
    monkeypatch.setenv("HOTDESK_ADMIN_TOKEN", "a secret")
    monkeypatch.setenv("SOME_API_KEY", "another secret")
    await compiler.compile("p", SMALL, digest_of(SMALL))
    assert compiler._process is not None
    told = Path(f"/proc/{compiler._process.pid}/environ").read_bytes()
    assert b"PATH=" in told
    assert b"HOTDESK_" not in told
    assert b"secret" not in told


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_an_entry_that_others_can_write_is_not_used(tmp_path: Path, log: Log, mode: int) -> None:
    """Its hash is right, but whoever wrote it could have written that too."""
    cache = open_cache(tmp_path, log)
    keep(cache, "k", b"native" * 100)
    (tmp_path / f"k{SUFFIX}").chmod(mode)
    assert cache.read("k") is None
    assert log.events == ["native_code_not_ours"]


def test_an_entry_of_another_user_is_not_used(tmp_path: Path, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it would be in a folder that was open to others once."""
    cache = open_cache(tmp_path, log)
    keep(cache, "k", b"native" * 100)
    monkeypatch.setattr(os, "geteuid", lambda: (tmp_path / f"k{SUFFIX}").stat().st_uid + 1)
    assert cache.read("k") is None
    assert log.events == ["native_code_not_ours"]
