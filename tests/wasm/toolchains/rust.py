"""Rust for WebAssembly, and wasm-tools: the machine's Rust if it has the target, else Debian's rustc-web."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from . import Unavailable, debian, wasm_tools
from .installing import CACHE, install_once, run

__all__ = ["ensure"]

TARGET = "wasm32-unknown-unknown"
REMEDY = f"run: rustup target add {TARGET}"


def ensure() -> dict[str, str]:
    """What `make` of a Rust plugin needs in its environment; 10 s and 480 MiB the first time.

    With Debian's Rust, the first build also compiles the standard library: half a minute of two cores. It and the
    crates are kept for all builds.
    """
    if not shutil.which("cargo"):
        raise Unavailable(f"there is no cargo; install Rust, then {REMEDY}")
    env = {**wasm_tools.ensure(), "CARGO_BUILD_BUILD_DIR": str(CACHE / "rust-build")}
    if _has_target():
        return env
    usr = install_once("rust-web", _take_debians) / "usr"
    return {
        **env,
        "RUSTC": str(usr / "bin" / "rustc-here"),
        "RUSTC_BOOTSTRAP": "1",
        "CARGO_UNSTABLE_BUILD_STD": "std,panic_abort",
        "CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_LINKER": str(next(usr.glob("lib/llvm-*/bin/wasm-ld"))),
    }


def _has_target() -> bool:
    if not shutil.which("rustc"):
        return False
    libraries = run(["rustc", "--print", "target-libdir", "--target", TARGET], remedy=REMEDY).strip()
    return any(Path(libraries).glob("libstd-*"))


def _take_debians(folder: Path) -> None:
    """The compiler, its standard library for this machine and as source, and the linker of the same LLVM."""
    packages = debian.needed_by("rustc-web", r"libstd-rust-web.*|libllvm\d+", remedy=REMEDY)
    llvm = next((name for name in packages if name.startswith("libllvm")), None)
    if llvm is None:
        raise Unavailable(f"Debian's rustc-web is not to be had; {REMEDY}")
    packages += ["rust-web-src", f"lld-{llvm.removeprefix('libllvm')}"]
    only = ["./usr/bin/*", "./usr/lib/*", "./usr/src/*/library/*"]
    debian.take_apart(packages, folder, only, remedy=REMEDY)
    compiler = folder / "usr" / "bin" / "rustc"
    if not compiler.exists():
        raise Unavailable(f"Debian's rustc-web has no rustc; {REMEDY}")
    libraries = ":".join(sorted({str(path.parent) for path in (folder / "usr" / "lib").glob("*-linux-gnu*/lib*.so*")}))
    here = compiler.with_name("rustc-here")
    here.write_text(f'#!/bin/sh\nLD_LIBRARY_PATH={libraries} exec {compiler} "$@"\n', encoding="utf-8")
    here.chmod(0o755)
    if not re.match(r"rustc \d", run([here, "--version"], remedy=REMEDY)):
        raise Unavailable(f"Debian's rustc does not run here; {REMEDY}")
