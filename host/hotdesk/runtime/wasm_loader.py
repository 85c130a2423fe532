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
from .scope import Context

if TYPE_CHECKING:
    from .wasm import Machine
    from .wasm_compiler import Compiler

__all__ = ["WasmLoader"]


class WasmLoader:
    """The components of one host."""

    def __init__(self, config: Config, log: Logger) -> None:
        self._config = config
        self._log = log
        self._lock = asyncio.Lock()
        self._opened: tuple[Machine, Compiler] | None = None

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
        machine, compiler = await self._open(generation.plugin, file)
        from .wasm_guest import Guest
        from .wasm_hooks import bind_guest

        native = await compiler.cached(bundle.wasm_digest)
        if native is None:
            data = bundle.files[Path(file).name]
            try:
                native = await compiler.compile(generation.plugin, data, bundle.wasm_digest)
            except LoadFailed as exc:
                exc.file = exc.file or file
                raise
        code = await asyncio.to_thread(machine.load, generation.plugin, native, inspected, file)
        guest = generation.guest = Guest(machine, code, generation, ctx, most=self._config.wasm_instances)
        return bind_guest(generation, guest, ctx, stats)

    async def _open(self, plugin: str, file: str) -> tuple[Machine, Compiler]:
        async with self._lock:
            if self._opened is None:
                try:
                    self._opened = await asyncio.to_thread(self._make)
                except (OSError, RuntimeError, ImportError) as exc:
                    problem = f"WebAssembly can't be run here: {describe(exc)}"
                    raise LoadFailed(plugin, "open", problem, file=file) from exc
            return self._opened

    def _make(self) -> tuple[Machine, Compiler]:
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
        compiler = Compiler(
            cache, key=machine.key, max_mb=config.wasm_compile_mb, timeout_s=config.wasm_compile_timeout_s
        )
        return machine, compiler

    async def aclose(self) -> None:
        """When no generation is left."""
        if self._opened is not None:
            machine, compiler = self._opened
            await compiler.aclose()
            await asyncio.to_thread(machine.close)
