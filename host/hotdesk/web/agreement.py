"""What several workers say of their plugins, as one answer: this worker's, and below `workers` where each stands."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .siblings import Told

__all__ = ["merge_plugin", "merge_plugins"]

_BREAKERS = ("closed", "half_open", "open")


def merge_plugins(worker: int, pid: int, own: list[dict[str, Any]], told: Iterable[Told]) -> list[dict[str, Any]]:
    """All plugins that any worker knows, in the order of this worker's, then what only others know."""
    answers = list(told)
    known: dict[int, dict[str, dict[str, Any]]] = {
        answer.row.worker: {plugin["name"]: plugin for plugin in (answer.data or {}).get("plugins", ())}
        for answer in answers
    }
    mine = {plugin["name"]: plugin for plugin in own}
    names = dict.fromkeys([*mine, *(name for plugins in known.values() for name in plugins)])
    merged = []
    for name in names:
        rows = [_row(worker, pid, mine.get(name), answered=True)]
        for answer in answers:
            plugin = known[answer.row.worker].get(name)
            rows.append(_row(answer.row.worker, answer.row.pid, plugin, answered=answer.status == 200))
        plugins = [plugin for plugin in (mine.get(name), *(p.get(name) for p in known.values())) if plugin is not None]
        merged.append(_merged(plugins, rows))
    return merged


def merge_plugin(worker: int, pid: int, own: dict[str, Any], told: Iterable[Told]) -> dict[str, Any]:
    """One plugin, which this worker knows."""
    rows = [_row(worker, pid, own, answered=True)]
    plugins = [own]
    for answer in told:
        plugin = answer.data if answer.status == 200 else None
        rows.append(_row(answer.row.worker, answer.row.pid, plugin, answered=answer.status in (200, 404)))
        if plugin is not None:
            plugins.append(plugin)
    return _merged(plugins, rows)


def _row(worker: int, pid: int, plugin: dict[str, Any] | None, *, answered: bool) -> dict[str, Any]:
    if plugin is None:
        problem = "it does not have this plugin" if answered else "it does not answer"
        return {
            "worker": worker, "pid": pid, "generation": None, "state": None, "error": {"message": problem},
        }  # fmt: skip
    return {
        "worker": worker,
        "pid": pid,
        "generation": plugin["generation"],
        "state": plugin["state"],
        "error": plugin["error"],
        "pending": plugin["pending"],
        "breaker": plugin["breaker"],
        "calls": plugin["calls"],
        "failures": plugin["failures"],
    }


def _merged(plugins: list[dict[str, Any]], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The first of *plugins*; what is counted is added up, and what went wrong is told wherever it went wrong."""
    merged = dict(plugins[0])
    merged["calls"] = sum(plugin["calls"] for plugin in plugins)
    merged["failures"] = sum(plugin["failures"] for plugin in plugins)
    merged["breaker"] = max((plugin["breaker"] for plugin in plugins), key=_BREAKERS.index)
    failures = [plugin["last_failure"] for plugin in plugins if plugin["last_failure"]]
    merged["last_failure"] = max(failures, key=lambda failure: failure["at"]) if failures else None
    merged["leftovers"] = list(dict.fromkeys(left for plugin in plugins for left in plugin["leftovers"]))
    merged["workers"] = sorted(rows, key=lambda row: row["worker"])
    if merged["error"] is None:
        failed = next((row for row in merged["workers"] if row["error"] and row["state"] is not None), None)
        merged["error"] = failed["error"] | {"worker": failed["worker"]} if failed else None
    return merged
