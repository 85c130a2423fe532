"""A short form of the fuzz: see `tests/wasm/fuzz.py`."""

from __future__ import annotations

import asyncio

from tests.wasm.fuzz import run_child, seeds

from hotdesk.runtime.wit_inspect import inspect_component

RUNS = 700


async def test_some_hundred_changed_components_do_no_harm() -> None:
    """None ends the process, overruns its deadline by more than 20 ms, or leaves a Store; many get as far as to run."""
    found = await asyncio.to_thread(run_child, 4, 0, RUNS, lambda what: None)
    assert found["findings"] == []
    counts = found["counts"]
    assert sum(counts.values()) == RUNS
    assert counts["answered"] > RUNS / 20, counts
    assert counts["trapped"] + counts["refused what it gave"] + counts["timed out"] > 0, counts
    assert counts["not compiled"] > RUNS / 10, counts


def test_the_seeds_are_good() -> None:
    """What is changed was whole: every seed passes the inspection."""
    for seed in seeds():
        assert inspect_component("seed", seed, file="seed.wasm", max_bytes=1 << 20).exports
