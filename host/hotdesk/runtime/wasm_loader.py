"""Loads components: inspected, compiled or found in the cache, instantiated, bound to hooks.

Nothing of wasmtime is imported before the first component comes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import Config
from ..errors import LoadFailed, describe
from ..logs import Logger
from ..metrics import CallStats
from .active import BoundHook, Generation
from .guards import host_task
from .scope import Context
from .sources import Bundle

if TYPE_CHECKING:
    from .wasm import Machine
    from .wasm_compiler import Compiler
    from .wasm_guest import Guest

__all__ = ["WasmLoader"]


SMALL = 48 * 1024
"""Bytes of a component that is compiled thoroughly in less time than anybody waits for."""

AWAITED_NICE, BACKGROUND_NICE = 0, 19
"""How far behind the host's own work a compilation stands that a swap waits for, and one that nothing does."""


class WasmLoader:
    """The components of one host."""

    def __init__(self, config: Config, log: Logger) -> None:
        self._config = config
        self._log = log
        self._lock = asyncio.Lock()
        self._opened: tuple[Machine, Compiler, Compiler] | None = None
        self._optimising: set[asyncio.Task[None]] = set()

    @property
    def instances(self) -> int:
        """Stores that are alive."""
        return len(self._opened[0].instances) if self._opened is not None else 0

    async def load(
        self, generation: Generation, ctx: Context, stats: Callable[[str, str], CallStats]
    ) -> dict[str, BoundHook]:
        """Give *generation* its guest, which has no instance yet; return its hooks. Raises `LoadFailed`."""
        bundle = generation.bundle
        inspected = bundle.component
        assert inspected is not None
        file = next(iter(bundle.paths))
        generation.module_name = f"hotdesk_wasm_{generation.plugin}_{generation.number}"
        machine, compiler, _ = await self._open(generation.plugin, file)
        from .wasm_compiler import CompileTimeout
        from .wasm_guest import Guest
        from .wasm_hooks import bind_guest

        native = await compiler.cached(bundle.wasm_digest)
        data = bundle.files[Path(file).name]
        quickly = native is None and self._config.wasm_baseline and len(data) > SMALL
        if native is None:
            try:
                native = await compiler.compile(generation.plugin, data, bundle.wasm_digest, baseline=quickly)
            except LoadFailed as exc:
                if not quickly or isinstance(exc, CompileTimeout):  # the thorough way takes longer still
                    raise _at(exc, file) from None
                quickly = False  # what the quick way does not take, such as exceptions
                try:
                    native = await compiler.compile(generation.plugin, data, bundle.wasm_digest)
                except LoadFailed as last:
                    raise _at(last, file) from None
        code = await asyncio.to_thread(machine.load, generation.plugin, native, inspected, file)
        guest = generation.guest = Guest(machine, code, generation, ctx, most=self._config.wasm_instances)
        if quickly:
            task = host_task(self._optimise(guest, generation.plugin, data, bundle, file))
            self._optimising.add(task)
            task.add_done_callback(self._optimising.discard)
        return bind_guest(generation, guest, ctx, stats)

    async def _optimise(self, guest: Guest, plugin: str, data: bytes, bundle: Bundle, file: str) -> None:
        """Compile it again, thoroughly, beside what serves, and have it run on that."""
        assert self._opened is not None
        assert bundle.component is not None
        machine, _, optimiser = self._opened
        try:
            native = await optimiser.compile(plugin, data, bundle.wasm_digest)
            code = await asyncio.to_thread(machine.load, plugin, native, bundle.component, file)
            async with asyncio.timeout(self._config.setup_timeout_s):
                await guest.upgrade(code)
        except Exception as exc:  # it goes on as it is, only slower
            self._log.warning("plugin_not_optimised", plugin=plugin, problem=describe(exc))
        else:
            self._log.info("plugin_optimised", plugin=plugin, file=file)

    async def _open(self, plugin: str, file: str) -> tuple[Machine, Compiler, Compiler]:
        async with self._lock:
            if self._opened is None:
                try:
                    self._opened = await asyncio.to_thread(self._make)
                except (OSError, RuntimeError, ImportError) as exc:
                    problem = f"WebAssembly can't be run here: {describe(exc)}"
                    raise LoadFailed(plugin, "open", problem, file=file) from exc
            return self._opened

    def _make(self) -> tuple[Machine, Compiler, Compiler]:
        """The machine, the compiler that loads wait for, and the one that works in the background."""
        from .wasm import Machine
        from .wasm_cache import CodeCache
        from .wasm_compiler import Compiler
        from .wasm_imports import IMPORTED

        config = self._config
        folder = Path(config.wasm_cache) if config.wasm_cache else Path(config.data) / "wasm"
        cache = CodeCache(folder, config.wasm_cache_mb * 1024 * 1024, self._log)
        cache.open()
        machine = Machine(
            IMPORTED, memory_bytes=config.wasm_memory_mb * 1024 * 1024, output_bytes=config.wasm_output_bytes
        )
        compiler, optimiser = (
            Compiler(
                cache,
                key=machine.key,
                max_mb=config.wasm_compile_mb,
                timeout_s=config.wasm_compile_timeout_s,
                niceness=niceness,
            )
            for niceness in (AWAITED_NICE, BACKGROUND_NICE)
        )
        return machine, compiler, optimiser

    async def aclose(self) -> None:
        """When no generation is left."""
        if self._opened is not None:
            machine, compiler, optimiser = self._opened
            for task in self._optimising:
                task.cancel()
            await asyncio.gather(*self._optimising, return_exceptions=True)
            await compiler.aclose()
            await optimiser.aclose()
            await asyncio.to_thread(machine.close)


def _at(exc: LoadFailed, file: str) -> LoadFailed:
    """The same failure, with the file that it is about."""
    return LoadFailed(exc.plugin, exc.step, exc.problem, file=exc.file or file)
