"""JavaScript: Node, and componentize-qjs from npm."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from . import Unavailable
from .installing import install_once, run, with_path

__all__ = ["ensure"]

VERSION = "0.4.5"
OLDEST_NODE = 18
REMEDY = f"install Node {OLDEST_NODE} or newer with npm, and let npm reach its registry"


def ensure() -> dict[str, str]:
    """What `make` of a JavaScript plugin needs in its environment; 2 s and 38 MiB the first time."""
    if not shutil.which("npm"):
        raise Unavailable(f"there is no npm; {REMEDY}")
    version = run(["node", "--version"], remedy=REMEDY).strip()
    if int((re.match(r"v(\d+)", version) or [0, 0])[1]) < OLDEST_NODE:
        raise Unavailable(f"Node is {version}; {REMEDY}")
    folder = install_once(f"js-{VERSION}", _install)
    return with_path(folder / "node_modules" / ".bin")


def _install(folder: Path) -> None:
    quiet = ["--no-audit", "--no-fund", "--no-save", "--no-package-lock", "--loglevel=error"]
    run(["npm", "install", *quiet, "--prefix", folder, f"componentize-qjs@{VERSION}"], remedy=REMEDY, cwd=folder)
