"""The short form of each correctness run; the long ones are `make bench`."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import msgspec
import pytest

TIMES = ("ms", "s", "KiB", "MiB", "%", "turns/s", "µs", "times", "cores", "requests/s")
"""Units of figures that say how fast or how large: the machine's affair, and not asserted here."""


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("run", ["tests.load.swaps", "tests.chaos.kill", "tests.load.leak"])
async def test_nothing_is_lost_doubled_reordered_mixed_or_left(run: str) -> None:
    """Under traffic, swaps and kills break no promise, as the offline checker judges it, and leave nothing behind."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", run, "--short", "--json"),
        cwd=Path(__file__).parents[2],
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert out, err.decode()
    result = msgspec.json.decode(out)
    counted = [figure for figure in result["figures"] if figure["unit"] not in TIMES and "seen" not in figure["name"]]
    assert len(counted) > 3, result
    assert [figure for figure in counted if not figure["met"]] == [], result
