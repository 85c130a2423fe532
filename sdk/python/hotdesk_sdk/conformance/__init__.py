"""The conformance suite: what the reference plugin `orders` does, one claim a case, on the real runtime.

    python -m hotdesk_sdk.conformance path/to/plugin.wasm

Or from pytest:

    @pytest.mark.parametrize("case", CASES, ids=str)
    async def test_conformance(case: Case) -> None:
        await run_case(case, "path/to/plugin.wasm")

What `orders` is, is in the README of `sdk/wit`. Needs the package `hotdesk` installed, as `hotdesk_sdk.testing` does.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from .cases import CASES, Case
from .subject import ClaimFailed, Subject

__all__ = ["CASES", "Case", "ClaimFailed", "run_case"]


async def run_case(case: Case, path: str | Path) -> None:
    """Try one claim on the plugin at *path*: a `.wasm` or `.py` file, or the folder of either.

    Its own manifest is not used: a case brings the one that it needs. Raises `ClaimFailed` with the reason, or what
    loading the plugin raised.
    """
    with tempfile.TemporaryDirectory(prefix="hotdesk-conformance-") as folder:
        await case.check(Subject(Path(path), Path(folder)))
