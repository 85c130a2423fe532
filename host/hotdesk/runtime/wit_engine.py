"""How wasmtime is set up: the same for the process that compiles and for the one that runs what was compiled."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from pathlib import Path

import wasmtime
from wasmtime import _ffi as ffi

__all__ = ["MAX_STACK", "TICK_S", "build_key", "new_engine"]

TICK_S = 0.005
"""How often the epoch moves while a guest runs: a deadline is kept to about this."""

MAX_STACK = 512 * 1024
"""Bytes of stack for a guest; a call deeper than that traps."""

SHAPES_CODE = ("wit_engine.py", "wit_names.py", "wit_binary.py", "wit_compile.py")
"""The sources that decide what is made of a component."""

SINGLE_PASS = 1
"""Cranelift's quick register allocator. The package has a name for neither allocator (bytecodealliance/wasmtime-py)."""


def new_engine(*, baseline: bool = False) -> wasmtime.Engine:
    """An engine whose guests can be stopped, and have nothing to wait on but the host.

    *baseline*: one that compiles in half the time, to code that is half as fast. It is the same compiler, and not
    Winch: that has no tail calls, which QuickJS wants, and had a way out of the sandbox (CVE-2026-34987).
    """
    config = wasmtime.Config()
    config.epoch_interruption = True
    config.max_wasm_stack = MAX_STACK
    config.wasm_threads = False  # `memory.atomic.wait` blocks, and no epoch ends that
    config.shared_memory = False
    config.wasm_memory64 = False
    config.wasm_stack_switching = False
    config.parallel_compilation = True
    ffi.wasmtime_config_concurrency_support_set(config.ptr(), False)  # nothing here is async to the guest
    if baseline:
        config.cranelift_opt_level = "none"
        ffi.wasmtime_config_cranelift_regalloc_algorithm_set(config.ptr(), SINGLE_PASS)
        # with that allocator they can crash the process: bytecodealliance/wasmtime#11850
        config.wasm_exceptions = False
    return wasmtime.Engine(config)


def build_key() -> str:
    """What, beside the component itself, decides whether native code fits: wasmtime, its settings, the processor."""
    settings = b"".join(Path(__file__).with_name(name).read_bytes() for name in SHAPES_CODE)
    parts = [importlib.metadata.version("wasmtime").encode(), settings, platform.machine().encode(), _processor()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def _processor() -> bytes:
    """The features of the processor, where Linux tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return platform.processor().encode()
    return next((line for line in lines if line.startswith((b"flags", b"Features"))), b"")
