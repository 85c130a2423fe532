"""From a component's bytes to native code: from the cache, or from the process that compiles."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import secrets
import sys
from pathlib import Path
from typing import Any

import msgspec

from ..errors import LoadFailed
from .guards import host_task
from .wasm_cache import CodeCache
from .wit_compile import UNKEPT

__all__ = ["CompileTimeout", "Compiler"]

GONE_S = 1.0
"""How long a process that has closed its output may take to end."""

SHARED_MEMORY = Path("/dev/shm")
"""Where native code goes when the cache's disk is full."""

IDLE_S = 120.0
"""How long the process waits for another component before it goes; starting one takes a tenth of a second."""


class CompileTimeout(LoadFailed):
    """Compiling took longer than it may."""


class NotTaken(EOFError):
    """The process ended before it had the component, so not because of it."""


class Compiler:
    """Compiles one component at a time. The process is started when it is first needed."""

    def __init__(self, cache: CodeCache, *, key: str, max_mb: int, timeout_s: float, niceness: int) -> None:
        self._cache = cache
        self._key = key
        self._max_mb = max_mb
        self._timeout_s = timeout_s
        self._niceness = niceness
        self._process: asyncio.subprocess.Process | None = None
        self._lock = asyncio.Lock()
        self._idle: asyncio.TimerHandle | None = None
        self._closing: set[asyncio.Task[Any]] = set()

    def key_of(self, digest: str) -> str:
        """The name that native code is kept by."""
        return hashlib.sha256(f"{digest} {self._key}".encode()).hexdigest()

    async def cached(self, digest: str) -> bytes | None:
        """Native code of the component with the hash *digest*, if it was compiled before."""
        return await asyncio.to_thread(self._cache.read, self.key_of(digest))

    async def compile(self, plugin: str, data: bytes, digest: str, *, baseline: bool = False) -> bytes:
        """Native code of *data*. Raises `LoadFailed`; after `wasm_compile_timeout_s`, `CompileTimeout`.

        *baseline* compiles in half the time, to slower code, which is not kept.
        """
        target, answer = await self._compiled(plugin, data, baseline, self._cache.new_file())
        if answer is not None and answer.startswith(UNKEPT) and SHARED_MEMORY.is_dir():  # a full disk
            spare = SHARED_MEMORY / f"hotdesk-{secrets.token_hex(16)}"
            target, answer = await self._compiled(plugin, data, baseline, spare)
        if answer is not None:
            target.unlink(missing_ok=True)
            raise LoadFailed(plugin, "compile", _short(answer))
        try:
            if baseline:
                return await asyncio.to_thread(_take_file, target)
            return await asyncio.to_thread(self._cache.keep, self.key_of(digest), target)
        except OSError as exc:
            raise LoadFailed(plugin, "compile", f"its native code can't be read back: {exc.strerror}") from exc

    async def _compiled(self, plugin: str, data: bytes, baseline: bool, target: Path) -> tuple[Path, str | None]:
        """Have the process compile *data* to *target*; what it says of an error."""
        async with self._lock:
            if self._idle is not None:
                self._idle.cancel()
            try:
                async with asyncio.timeout(self._timeout_s):
                    waited = self._process
                    try:
                        return target, await self._ask(data, target, baseline)
                    except (NotTaken, ConnectionError):
                        if waited is None:
                            raise
                        await self._end()  # it was gone before it was asked: a new one is
                        return target, await self._ask(data, target, baseline)
            except TimeoutError:
                await self._end()
                raise CompileTimeout(
                    plugin, "compile", f"compiling it took over {self._timeout_s:g} s (`wasm_compile_timeout_s`)"
                ) from None
            except (EOFError, ConnectionError, ValueError):  # also a line that is too long, and what is no JSON
                code = await self._end(by_itself=True)
                problem = f"compiling it ended the compiler ({_ended(code)}): it may take over {self._max_mb} MB"
                raise LoadFailed(plugin, "compile", f"{problem} (`wasm_compile_mb`)") from None
            except OSError as exc:
                await self._end()
                problem = f"the process that compiles can't be started: {exc.strerror or exc}"
                raise LoadFailed(plugin, "compile", problem) from exc
            except asyncio.CancelledError:
                await self._end()
                raise
            finally:
                if self._process is None:
                    target.unlink(missing_ok=True)
                else:
                    self._idle = asyncio.get_running_loop().call_later(IDLE_S, self._let_go)

    async def _ask(self, data: bytes, target: Path, baseline: bool) -> str | None:
        if self._process is None or self._process.returncode is not None:
            await self._start()
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        head = msgspec.json.encode({"size": len(data), "target": str(target), "baseline": baseline})
        process.stdin.write(head + b"\n" + data)
        await process.stdin.drain()
        if not await process.stdout.readline():  # it says so before it compiles
            raise NotTaken
        return _read_line(await process.stdout.readline()).get("error")

    async def _start(self) -> None:
        # in a context and task of the host's own: the process is on no plugin's account
        self._process = await host_task(
            asyncio.create_subprocess_exec(
                sys.executable,
                "-P",
                "-m",
                "hotdesk.runtime.wit_compile",
                str(self._max_mb),
                str(self._niceness),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                env=_environment(),
            )
        )
        assert self._process is not None
        assert self._process.stdout is not None
        _read_line(await self._process.stdout.readline())

    def _let_go(self) -> None:
        self._idle = None
        process, self._process = self._process, None  # now: a compilation that begins next must not be given it
        task = host_task(self._end(process))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _end(self, process: asyncio.subprocess.Process | None = None, *, by_itself: bool = False) -> int | None:
        if process is None:
            process, self._process = self._process, None
        if process is None:
            return None
        if by_itself:  # it is gone, or about to be; to kill it now would lose how it ended
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(GONE_S):
                    await process.wait()
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        code = await process.wait()
        if process.stdin is not None:
            process.stdin.close()
            with contextlib.suppress(ConnectionError):
                await process.stdin.wait_closed()
        return code

    async def aclose(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
        await self._end()
        await asyncio.gather(*self._closing, return_exceptions=True)


def _environment() -> dict[str, str]:
    """What the process that compiles is told: nothing that is secret."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR", "VIRTUAL_ENV") if name in os.environ}
    return {**kept, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def _take_file(path: Path) -> bytes:
    native = path.read_bytes()
    path.unlink()
    return native


def _read_line(line: bytes) -> dict[str, Any]:
    if not line.endswith(b"\n"):
        raise EOFError
    return msgspec.json.decode(line, type=dict[str, Any])


def _ended(code: int | None) -> str:
    return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"


def _short(error: str) -> str:
    lines = [line.strip() for line in error.splitlines() if line.strip() and line.strip() != "Caused by:"]
    return "; ".join(lines)[:500]
