"""C: clang with lld, or Zig's C compiler; and wasm-tools."""

from __future__ import annotations

import shutil

from . import Unavailable, debian, wasm_tools, zig

__all__ = ["ensure"]

REMEDY = "install clang and lld"


def ensure() -> dict[str, str]:
    """What `make` of a C plugin needs in its environment; 6 s and 50 MiB of packages the first time."""
    if _has_clang():
        return wasm_tools.ensure()
    try:
        debian.install(["clang", "lld"], remedy=REMEDY)
    except Unavailable:
        if _has_clang():
            return wasm_tools.ensure()
        compiler = zig.ensure()
        return {**compiler, "CLANG": f"{compiler['ZIG']} cc", "LAYOUT": ""}
    return wasm_tools.ensure()


def _has_clang() -> bool:
    return bool(shutil.which("clang") and shutil.which("wasm-ld"))
