"""What became of plugins, put down: the entry, the metrics and the events say the same."""

from __future__ import annotations

import time
from collections.abc import Callable

from hotdesk_sdk import HotdeskError

from ..config import Config
from ..metrics import Metrics
from .active import Breaker, Generation
from .entries import Entry, Kept, Problem, Receipt
from .events import Events
from .generations import Prepared

__all__ = ["Ledger"]


class Ledger:
    """The books of one host. Everything here is plain `def`, and decides nothing."""

    def __init__(
        self, config: Config, metrics: Metrics, events: Events, keep_versions: Callable[[Entry], None]
    ) -> None:
        self._config = config
        self._metrics = metrics
        self._keep_versions = keep_versions
        self.events = events

    def breaker(self, name: str) -> Breaker:
        """A closed breaker whose changes are told."""

        def on_change(state: str) -> None:
            self._metrics.breaker_open.labels(name).set(state == "open")
            self.events.tell("breaker_opened" if state == "open" else "breaker_closed", plugin=name)

        return Breaker(self._config.breaker_failures, self._config.breaker_cooldown_s, on_change)

    def note_swapped(self, entry: Entry, made: Prepared, since: float, steps: dict[str, float]) -> None:
        """*made* serves from now on: the entry, its receipt, the version kept."""
        generation = made.generation
        before = entry.current.number if entry.current else None
        entry.current, entry.slot, entry.last_number = generation, made.slot, generation.number
        if entry.problem is not None and entry.problem.step != "find":
            entry.problem = None
        entry.refused = None
        keep = self._config.keep_generations
        if entry.kept and entry.kept[-1].bundle.digest == generation.bundle.digest:
            entry.kept.pop()  # the same version loaded again, after a restart say
        entry.kept = type(entry.kept)(
            [*entry.kept, Kept(generation.number, generation.bundle, time.time())][-keep:],
        )
        self._keep_versions(entry)
        receipt = Receipt(entry.name, str(generation.bundle.source.path), before, generation.number, dict(steps), since)
        entry.receipt = receipt

        def first_answer() -> None:
            generation.first_answer = None
            receipt.first_answer_ms = (time.monotonic() - since) * 1000
            self.events.tell("plugin_receipt", plugin=entry.name, receipt=receipt.public())

        generation.first_answer = first_answer
        self._metrics.generation.labels(entry.name).set(generation.number)
        self._metrics.breaker_open.labels(entry.name).set(0)
        self._metrics.swaps.labels(entry.name, "swapped" if before else "loaded").inc()
        for step, value in steps.items():
            self._metrics.swap_steps.labels(step.removesuffix("_ms")).observe(value / 1000)
        self.events.tell(
            "plugin_swapped" if before else "plugin_loaded",
            plugin=entry.name,
            generation=generation.number,
            receipt=receipt.public(),
        )

    def note_failed(self, entry: Entry, exc: HotdeskError) -> None:
        """The newest version does not serve, and why; a name clash is told once."""
        problem = Problem.of(exc)
        if entry.problem is not None and entry.problem.message == problem.message and problem.step == "find":
            return
        entry.problem = problem
        self._metrics.swaps.labels(entry.name, "failed").inc()
        self.events.tell(
            "plugin_failed",
            plugin=entry.name,
            step=problem.step,
            message=problem.message,
            file=problem.file,
            line=problem.line,
            serving=entry.current.number if entry.current else None,
        )

    def note_unloaded(self, entry: Entry, generation: Generation) -> None:
        """Nothing serves under this name now."""
        self._metrics.generation.labels(entry.name).set(0)
        self.events.tell("plugin_unloaded", plugin=entry.name, generation=generation.number)

    def note_failed_probation(self, entry: Entry, failed: Generation, to: int, why: str) -> None:
        """A rollback by probation; *failed* is not kept, for it is no version to go back to."""
        entry.kept = type(entry.kept)(kept for kept in entry.kept if kept.generation != failed.number)
        entry.problem = Problem(f"generation {failed.number} was rolled back: {why}", "probation")
        self.note_rolled_back(entry, failed, to, why)

    def note_rolled_back(self, entry: Entry, failed: Generation, to: int, why: str) -> None:
        """A rollback; what was left stays refused to the watch until its bytes change."""
        entry.refused = failed.bundle.digest
        self._keep_versions(entry)
        self._metrics.generation.labels(entry.name).set(to)
        self._metrics.swaps.labels(entry.name, "rolled_back").inc()
        self.events.tell("plugin_rolled_back", plugin=entry.name, **{"from": failed.number, "to": to}, message=why)

    def note_still_refused(self, entry: Entry, refused: str) -> None:
        """After a start the file still has what was rolled back from; the version before it serves."""
        serving = entry.current.number if entry.current else None
        problem = Problem(
            f"its file still has the version that was rolled back, so the one before serves;"
            f" mend the file, or take it all the same with `hotdesk plugins reload {entry.name}`",
            "probation",
        )
        entry.problem, entry.refused = problem, refused
        self._keep_versions(entry)
        self.events.tell("plugin_failed", plugin=entry.name, serving=serving, **problem.public())

    def note_leftovers(self, entry: Entry, number: int, leftovers: list[str]) -> None:
        """What a generation left behind, freed or not. The first word of each is its kind."""
        for what in leftovers:
            self._metrics.leftovers.labels(entry.name, what.split(" ", 1)[0]).inc()
        self.events.tell("plugin_leftover", plugin=entry.name, generation=number, leftovers=leftovers)
