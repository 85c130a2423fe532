"""The short form of each correctness run; the long ones are `make bench`."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.load.nginx import find_nginx
from tests.load.report import Figure
from tests.load.wasm_cores import CALL_S

TIMES = ("ms", "s", "bytes", "KiB", "MiB", "%", "turns/s", "µs", "times", "cores", "requests/s", "messages/s")
"""Units of figures that say how fast or how large: the machine's affair, and not asserted here."""


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "run",
    [
        "tests.load.swaps",
        "tests.chaos.kill",
        "tests.chaos.hosts",
        "tests.chaos.hosts --topology sentinel",
        "tests.chaos.once",
        "tests.load.leak",
        "tests.load.wasm_swaps",
        "tests.load.wasm_leak",
        "tests.load.redis_reconnect",
        "tests.load.push",
    ],
)
async def test_nothing_is_lost_doubled_reordered_mixed_or_left(run: str) -> None:
    """Under traffic, swaps and kills break no promise, as the offline checker judges it, and leave nothing behind."""
    result = await short_form(run)
    counted = [figure for figure in result["figures"] if figure["unit"] not in TIMES]
    assert len(counted) > 3, result
    assert [figure for figure in counted if not figure["met"]] == [], result


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("run", ["llm_cost", "llm_chunk", "llm_latency", "llm_rows", "llm_context"])
async def test_answers_of_the_model_arrive_whole_and_are_not_ten_times_too_dear(run: str) -> None:
    """Under load no answer is lost, doubled, reordered or cut, and no figure is ten times off its target."""
    if run == "llm_rows":
        try:
            await asyncio.to_thread(find_nginx)
        except RuntimeError as exc:
            pytest.skip(str(exc))
    figures = [msgspec.convert(row, Figure) for row in (await short_form(f"tests.load.{run}"))["figures"]]
    counted = [figure for figure in figures if figure.target and not figure.unit]
    speeds = [figure for figure in figures if figure.target and figure.unit]
    assert counted
    assert speeds
    assert [figure for figure in counted if not figure.met] == [], figures
    assert [figure for figure in speeds if not nearly(figure).met] == [], figures


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("run", ["wasm_call", "wasm_cores"])
async def test_a_component_is_not_ten_times_too_dear(run: str) -> None:
    """Calls into components give what they should, and no figure is ten times off its target."""
    figures = [msgspec.convert(row, Figure) for row in (await short_form(f"tests.load.{run}"))["figures"]]
    speeds = [figure for figure in figures if figure.target]
    assert len(speeds) > 1
    assert [figure for figure in speeds if not nearly(figure).met] == [], figures
    if run == "wasm_cores":  # one after the other is once, and a guest on the loop holds it for a whole call
        named = {figure.name: figure.value for figure in figures}
        assert named["two beside one"] > 0.6 * named["two bare processes beside one"]
        assert named["beside two, p99"] < CALL_S * 1000 / 2


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("run", ["redis_context", "redis_ceiling"])
async def test_what_redis_keeps_is_what_was_written(run: str) -> None:
    """Contexts read back as they were written, and a worker's commands said again do what they did at first."""
    figures = [msgspec.convert(row, Figure) for row in (await short_form(f"tests.load.{run}"))["figures"]]
    counted = [figure for figure in figures if figure.target and not figure.unit]
    assert counted
    assert [figure for figure in counted if not figure.met] == [], figures


def nearly(figure: Figure) -> Figure:
    """*figure* with its bounds ten times wider: a busy machine's, beyond which something is broken."""
    low, high = figure.at_least, figure.at_most
    return Figure(
        figure.name, figure.value, figure.unit, None if low is None else low / 10, None if high is None else high * 10
    )


async def short_form(run: str) -> dict[str, Any]:
    """What the short form of a run found."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", *run.split(), "--short", "--json"),
        cwd=Path(__file__).parents[2],
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert out, err.decode()
    result: dict[str, Any] = msgspec.json.decode(out)
    return result
