"""The CPU that a host spends on a turn, at a fixed rate: the same batches and the same idle work for all compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

from tests.load.client import open_loop
from tests.load.hosts import Server
from tests.load.http_rate import is_answered_nth

__all__ = ["compare_costs"]


async def compare_costs(
    requests: Sequence[tuple[Server, Callable[[int], bytes]]], *, rate: float, seconds: float, rounds: int
) -> tuple[list[float], int]:
    """The CPU microseconds of a turn on each server (median of the rounds, which alternate), and failed turns."""
    costs: list[list[float]] = [[] for _ in requests]
    failed = 0
    for number in range(rounds + 1):
        for (server, request), found in zip(requests, costs, strict=True):
            before = server.usage().cpu_s
            load = await open_loop(server.port, request, is_answered_nth, rate=rate, seconds=seconds if number else 1.0)
            failed += load.failed
            if number:  # the first round warms up
                found.append((server.usage().cpu_s - before) / load.answered * 1e6)
    return [median(found) for found in costs], failed
