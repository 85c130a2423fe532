"""Installs the toolchains and builds the examples ahead of the tests that want them: `python -m tests.wasm.prepare`.

Beside the other tests, on the second core, this is done by the time somebody waits for it. What can't be had is left to
the test that says so.
"""

from __future__ import annotations

import contextlib
import os

from tests.wasm.built import LANGUAGES, built
from tests.wasm.toolchains import Unavailable

__all__ = ["main"]


def main() -> None:
    os.nice(10)
    for language in LANGUAGES:
        with contextlib.suppress(Unavailable, AssertionError):
            built(language)


if __name__ == "__main__":
    main()
