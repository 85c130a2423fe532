"""Python as a component: componentize-py from PyPI, in an environment of its own."""

from __future__ import annotations

import sys
from pathlib import Path

from .installing import install_once, run, with_path

__all__ = ["ensure"]

VERSION = "0.25.1"
REMEDY = "install Python's venv module, and let pip reach PyPI; componentize-py has wheels for common machines only"


def ensure() -> dict[str, str]:
    """What `make` of such a plugin needs in its environment; 4 s and 72 MiB the first time."""
    folder = install_once(f"python-wasm-{VERSION}", _install)
    return with_path(folder / "bin")


def _install(folder: Path) -> None:
    run([sys.executable, "-m", "venv", folder], remedy=REMEDY)
    pip: list[str | Path] = [folder / "bin" / "python", "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run([*pip, "install", "--only-binary=:all:", f"componentize-py=={VERSION}"], remedy=REMEDY)
