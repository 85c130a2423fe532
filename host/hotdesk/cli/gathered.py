"""The events of several workers as if they were one: told once where they agree, and where not, by whom."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from .receipts import event_line

__all__ = ["Gathered"]

WAIT_S = 2.0
"""How long an event of one worker waits for the same of the others. A swap takes them some 20 ms."""

SHARED = {
    "plugin_loaded", "plugin_swapped", "plugin_failed", "plugin_rolled_back", "plugin_unloaded", "plugin_disabled",
    "plugin_configured", "plugin_pending", "plugin_waiting", "settings_failed", "llm_configured",
    "push_taken", "push_removed", "push_refused",
}  # fmt: skip
"""Events of what is done in every worker: a saved file, a changed setting, a command."""

MAX_TOLD = 1000


class Gathered:
    """Prints by *say* what is heard of *workers* workers. Until `begin` nothing is given up on: they start slowly."""

    def __init__(self, say: Callable[[str], None], workers: int) -> None:
        self._say = say
        self._workers = workers
        self._open: dict[tuple[Any, ...], dict[int, Mapping[str, Any]]] = {}
        self._timers: dict[tuple[Any, ...], asyncio.TimerHandle] = {}
        self._told: dict[tuple[Any, ...], None] = {}
        self._begun = False

    def begin(self) -> None:
        """All workers serve: say what is known, and wait no longer than usual from now on."""
        self._begun = True
        self.flush()

    def hear(self, event: Mapping[str, Any]) -> None:
        """An event with the field `worker`."""
        worker, kind = event["worker"], event["kind"]
        if kind == "plugin_receipt":
            self._hear_receipt(event)
        elif kind not in SHARED:
            self._say(_of(event_line(event), [worker]))
        else:
            key = (kind, event.get("plugin"), event.get("generation", event.get("to")), event.get("message"))
            rows = self._open.setdefault(key, {})
            if worker in rows:  # the same once more, so the others are not to be waited for
                self._finish(key)
                rows = self._open.setdefault(key, {})
            rows[worker] = event
            if len(rows) == self._workers:
                self._finish(key)
            elif self._begun and key not in self._timers:
                self._timers[key] = asyncio.get_running_loop().call_later(WAIT_S, self._finish, key)

    def flush(self) -> None:
        """Say all that is waiting for others."""
        for key in list(self._open):
            self._finish(key)

    def _hear_receipt(self, event: Mapping[str, Any]) -> None:
        """The first answer of a new generation, wherever it was."""
        receipt = event["receipt"]
        key = (receipt["plugin"], receipt["to"])
        if receipt["from"] is None or key in self._told:
            return  # how long a new desk waited for its first visitor is nobody's news
        self._told[key] = None
        if len(self._told) > MAX_TOLD:
            del self._told[next(iter(self._told))]
        self._say(event_line(event))

    def _finish(self, key: tuple[Any, ...]) -> None:
        if (timer := self._timers.pop(key, None)) is not None:
            timer.cancel()
        rows = self._open.pop(key)
        line = event_line(max(rows.values(), key=_total_ms))
        self._say(line if len(rows) == self._workers else _of(line, sorted(rows)))


def _total_ms(event: Mapping[str, Any]) -> float:
    """How long it took, where it says so: of the same swap in several workers the slowest is told."""
    receipt = event.get("receipt") or {}
    return float((receipt.get("steps") or {}).get("total_ms") or 0.0)


def _of(line: str, workers: list[int]) -> str:
    return f"{line}  [worker{'s' if len(workers) > 1 else ''} {', '.join(map(str, workers))}]"
