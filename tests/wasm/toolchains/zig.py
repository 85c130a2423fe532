"""Zig, from PyPI in an environment of its own; and wasm-tools."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from . import wasm_tools
from .installing import CACHE, install_once, run

__all__ = ["ensure"]

VERSION = "0.17.1"
REMEDY = f"install Zig {VERSION}, or let pip reach PyPI; ziglang has wheels for common machines only"


def ensure() -> dict[str, str]:
    """What `make` of a Zig plugin needs in its environment; 10 s and 440 MiB the first time."""
    env = {**wasm_tools.ensure(), "ZIG_GLOBAL_CACHE_DIR": str(CACHE / "zig-cache")}
    found = shutil.which("zig")
    if found and run([found, "version"], remedy=REMEDY).strip() == VERSION:
        return {**env, "ZIG": found}
    folder = install_once(f"zig-{VERSION}", _install)
    return {**env, "ZIG": f"{folder / 'bin' / 'python'} -m ziglang"}


def _install(folder: Path) -> None:
    run([sys.executable, "-m", "venv", folder], remedy=REMEDY)
    pip: list[str | Path] = [folder / "bin" / "python", "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run([*pip, "install", "--only-binary=:all:", "--no-cache-dir", f"ziglang=={VERSION}"], remedy=REMEDY)
