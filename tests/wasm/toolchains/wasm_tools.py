"""wasm-tools: what makes components of core modules, shows their WIT, and compares versions of a contract."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from . import Unavailable
from .installing import install_once, run, with_path

__all__ = ["ensure", "program"]

VERSION = "1.263.0"
OLDEST = (1, 220)
REMEDY = "install wasm-tools (cargo install wasm-tools), or a Rust of 1.88 or newer that it can be built with here"


def ensure() -> dict[str, str]:
    """wasm-tools on the path; half a minute of two cores and 35 MiB the first time.

    Built from source because nothing precompiled that the registries have can compare versions of a contract. Without
    optimisation: that takes a third of the time, and what it works on here is small.
    """
    return with_path(program().parent)


def program() -> Path:
    found = shutil.which("wasm-tools")
    if found and _is_new_enough(found):
        return Path(found)
    if not shutil.which("cargo"):
        raise Unavailable(f"there is neither wasm-tools nor cargo; {REMEDY}")
    return install_once(f"wasm-tools-{VERSION}", _install) / "bin" / "wasm-tools"


def _is_new_enough(found: str) -> bool:
    version = re.search(r"(\d+)\.(\d+)", run([found, "--version"], remedy=REMEDY))
    return version is not None and (int(version[1]), int(version[2])) >= OLDEST


def _install(folder: Path) -> None:
    args: list[str | Path] = ["cargo", "install", "--quiet", "--locked", "--debug", "--root", folder]
    args += ["--no-default-features", "--features", "component,validate", f"wasm-tools@{VERSION}"]
    run(args, env={"CARGO_PROFILE_DEV_DEBUG": "0"}, remedy=REMEDY, timeout_s=600)
