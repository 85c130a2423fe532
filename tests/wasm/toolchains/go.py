"""Go: the compiler of this machine, and wasm-tools."""

from __future__ import annotations

import re
import shutil

from . import Unavailable, wasm_tools
from .installing import run

__all__ = ["ensure"]

OLDEST = (1, 24)
REMEDY = f"install Go {OLDEST[0]}.{OLDEST[1]} or newer"


def ensure() -> dict[str, str]:
    """What `make` of a Go plugin needs in its environment. The first build compiles Go's library for `wasip1`."""
    if not shutil.which("go"):
        raise Unavailable(f"there is no go; {REMEDY}")
    version = run(["go", "env", "GOVERSION"], remedy=REMEDY).strip()
    found = re.match(r"go(\d+)\.(\d+)", version)
    if not found or (int(found[1]), int(found[2])) < OLDEST:
        raise Unavailable(f"Go is {version or 'of no known version'}; {REMEDY}")
    return wasm_tools.ensure()
