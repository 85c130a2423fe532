"""What a run gives: figures with their targets; printed as a table, and plain data for `tests.bench`."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import msgspec
import psutil
import uvloop
from rich.console import Console
from rich.table import Table
from tests.load.checker import KINDS, Verdict

__all__ = ["Figure", "Measure", "judged", "print_table", "ratio", "result_of", "run_main"]


class Figure(msgspec.Struct, frozen=True):
    """One number, and what it should be; one without a target is there to read the others by."""

    name: str
    value: float
    unit: str = ""
    at_least: float | None = None
    at_most: float | None = None

    @property
    def met(self) -> bool:
        """Whether the target is reached; a value that is not a number never is."""
        if math.isnan(self.value):
            return False
        low = self.at_least is None or self.value >= self.at_least
        return low and (self.at_most is None or self.value <= self.at_most)

    @property
    def target(self) -> str:
        if self.at_least is not None:
            return f"≥ {self.at_least:,g}"
        return f"≤ {self.at_most:,g}" if self.at_most is not None else ""


Measure = Callable[[bool], Awaitable[list[Figure]]]
"""A run: takes whether to do the short form."""


def judged(verdict: Verdict) -> list[Figure]:
    """The checker's counts as figures, each of which must be 0."""
    return [Figure(kind, verdict.count(kind), at_most=0) for kind in KINDS]


def ratio(rounds: Mapping[str, list[float]], one: str, other: str) -> float:
    """*one* by *other*, the median over the rounds: both of a round had the same machine."""
    return median(a / b for a, b in zip(rounds[one], rounds[other], strict=True))


def result_of(name: str, figures: list[Figure]) -> dict[str, Any]:
    """A run's outcome as plain data, for JSON."""
    rows = [{**msgspec.to_builtins(figure), "met": figure.met} for figure in figures]
    return {"run": name, "met": all(figure.met for figure in figures), "figures": rows}


def print_table(title: str, rows: list[tuple[str, Figure]]) -> None:
    """Print figures, each with the run it is from where that is said."""
    table = Table(title=title, title_justify="left")
    several = any(run for run, _ in rows)
    for column in ("run",) * several + ("figure",):
        table.add_column(column)
    for column in ("value", "target"):
        table.add_column(column, justify="right")
    table.add_column("unit")
    table.add_column("")
    for run, figure in rows:
        outcome = "" if not figure.target else "[green]met[/]" if figure.met else "[red]missed[/]"
        cells = (run,) * several + (figure.name, readable(figure.value), figure.target, figure.unit, outcome)
        table.add_row(*cells)
    Console().print(table)


def readable(value: float) -> str:
    """A number with about four digits that mean something."""
    if value == round(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.2f}"


def run_main(measure: Callable[..., Awaitable[list[Figure]]], own: argparse.ArgumentParser | None = None) -> None:
    """The command line of the run whose module was started. Exit code 1 when a target is missed.

    The options of its *own* parser, which has no help of its own, go to *measure* by keyword.
    """
    module = sys.modules["__main__"]
    name = module.__spec__.name if module.__spec__ else str(module.__file__)
    parser = argparse.ArgumentParser(prog=f"python -m {name}", description=module.__doc__, parents=[own] if own else [])
    parser.add_argument("--short", action="store_true", help="a few seconds, to see that it works; no fair figures")
    parser.add_argument("--json", action="store_true", help="print the result as JSON instead of a table")
    options = parser.parse_args()
    given = {key: value for key, value in vars(options).items() if key not in ("short", "json")}
    figures = uvloop.run(_measured(partial(measure, **given), options.short))
    if options.json:
        print(msgspec.json.encode(result_of(name, figures)).decode())
    else:
        print_table(f"{name}{' --short' if options.short else ''}", [("", figure) for figure in figures])
    sys.exit(not all(figure.met for figure in figures))


async def _measured(measure: Measure, short: bool) -> list[Figure]:
    """The run's figures, and how busy everybody else kept the machine: the figures of a crowded one are not fair."""
    before, others = perf_counter(), _others_cpu_s()
    figures = await measure(short)
    cores = (_others_cpu_s() - others) / (perf_counter() - before)
    return [*figures, Figure("the machine's other work", max(0.0, cores), "cores")]


def _others_cpu_s() -> float:
    """CPU that the machine has spent, without this process and its children that have ended."""
    machine, own = psutil.cpu_times(), os.times()
    busy: float = machine.user + machine.nice + machine.system
    return busy - own.user - own.system - own.children_user - own.children_system
