"""How each host stands to what was pushed: what a worker reports of its plugins, and what that comes to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import msgspec

from .shelf import Record

__all__ = ["HostStand", "Report", "Stand", "Word", "judge", "read_reports", "stands_of"]

Word = Literal["serves", "gone", "disabled", "pending", "frozen", "waiting", "behind", "loading", "refused", "silent"]
"""`serves` what was pushed, or it is `gone` as it should be; `disabled` there; the change is `pending`, or waits as all
changes do on a `frozen` host; it is `waiting` for a plugin that it requires; the host serves another version by a
command there (`behind`); it is `loading`, which ends by itself; it was `refused`; the host has not said."""

_GOOD = ("serves", "gone")
_ORDER: tuple[Word, ...] = (
    "serves", "gone", "disabled", "pending", "frozen", "waiting", "behind", "loading", "silent", "refused",
)  # fmt: skip
"""What several workers of a host come to is the last of these that any of them says."""


class Stand(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One plugin in one worker."""

    state: str = ""
    generation: int | None = None
    version: str | None = None
    hash: str = ""
    """Of the files that serve, packed as for a push, wherever they came from."""
    source: str | None = None
    own: bool = False
    """It is loaded from a folder of the host's own."""
    newest: str = ""
    """The hash of the pushed version that lies on this host's disk."""
    since: float = 0.0
    """When that came (Unix seconds, by this host's clock)."""
    pushed_at: float = 0.0
    """Which push the worker has dealt with, by the time in its record."""
    enabled: bool = True
    pending: bool = False
    refused: bool = False
    """The newest was left by a rollback."""
    waiting_for: str | None = None
    error: dict[str, Any] | None = None
    receipt: dict[str, Any] | None = None


class Report(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What one worker says of itself. `host` tells hosts apart, `worker` is its place there, None if there is one."""

    host: str
    pid: int
    worker: int | None = None
    watch: str = ""
    plugins: dict[str, Stand] = {}


class HostStand(msgspec.Struct, frozen=True, kw_only=True):
    """One plugin on one host, of whose workers the one that is least far is told."""

    host: str
    workers: int
    """How many it has."""
    stand: Word | None
    """None where nothing was pushed."""
    why: str
    state: str
    generation: int | None
    version: str | None
    hash: str
    error: dict[str, Any] | None
    receipt: dict[str, Any] | None

    @property
    def lags(self) -> bool:
        """Whether it should serve something else."""
        return self.stand is not None and self.stand not in _GOOD

    def public(self) -> dict[str, Any]:
        """As the admin API and scripts have it."""
        return {**msgspec.to_builtins(self), "lags": self.lags}


_decode = msgspec.json.Decoder(Report).decode


def read_reports(raws: Mapping[str, bytes | None]) -> list[Report]:
    """The reports of all workers; one that made none, or one that can't be read, is a host of its own."""
    reports = []
    for worker, raw in raws.items():
        try:
            reports.append(_decode(raw) if raw is not None else Report(host=f"worker {worker}", pid=0))
        except msgspec.DecodeError:
            reports.append(Report(host=f"worker {worker}", pid=0))
    return sorted(reports, key=lambda report: (report.host, report.worker or 0))


def judge(report: Report, name: str, record: Record) -> tuple[Word, str]:
    """How a worker stands to what was pushed as *name*, and why in words where there is more to say."""
    if not report.pid:
        return "silent", "it does not say how its plugins stand"
    found = report.plugins.get(name)
    if record.removed:
        return _judge_removed(report, found)
    if found is None:
        return "loading", "it has not seen it yet"
    if found.generation is not None and found.hash == record.hash:
        return "serves", ""
    error = found.error
    if found.pushed_at != record.at:
        return "loading", "it has not taken it yet"
    if not found.enabled:
        return "disabled", "it is disabled there"
    if error is not None and (error.get("step") == "find" or error.get("at", 0.0) >= found.since):
        return "refused", str(error.get("message", ""))
    if found.pending:
        return "pending", "it waits for `hotdesk plugins reload` there"
    if report.watch == "frozen":
        return "frozen", "it takes changes by `hotdesk plugins reload` only"
    if found.waiting_for is not None:
        return "waiting", f"it waits for {found.waiting_for}, which it requires"
    if found.refused:
        return "behind", "it was rolled back there"
    return "loading", "it is being loaded"


def _judge_removed(report: Report, found: Stand | None) -> tuple[Word, str]:
    if found is None or (found.generation is None and not found.newest):
        return "gone", ""
    if found.own:
        return "gone", f"it serves its own, {found.source}"
    if found.pending:
        return "pending", "its removal waits for `hotdesk plugins reload` there"
    if report.watch == "frozen":
        return "frozen", "it takes changes by `hotdesk plugins reload` only"
    return "loading", "it is being unloaded"


def stands_of(reports: Iterable[Report], name: str, record: Record | None) -> list[HostStand]:
    """How every host stands to plugin *name*, by host; without a *record* only those that have it."""
    hosts: dict[str, list[Report]] = {}
    for report in reports:
        hosts.setdefault(report.host, []).append(report)
    stands = []
    for host, workers in sorted(hosts.items()):
        if record is None and not any(name in report.plugins for report in workers):
            continue
        stands.append(_stand_of(host, workers, name, record))
    return stands


def _stand_of(host: str, workers: list[Report], name: str, record: Record | None) -> HostStand:
    judged = [(report, *(judge(report, name, record) if record is not None else (None, ""))) for report in workers]
    judged.sort(key=lambda one: (-1 if one[1] is None else _ORDER.index(one[1]), _total_ms(one[0], name)))
    report, word, why = judged[-1]
    if word is not None and word != judged[0][1] and report.worker is not None:
        why = f"worker {report.worker}: {why}"
    found = report.plugins.get(name, Stand())
    return HostStand(
        host=host,
        workers=len(workers),
        stand=word,
        why=why,
        state=found.state,
        generation=found.generation,
        version=found.version,
        hash=found.hash,
        error=found.error,
        receipt=found.receipt,
    )


def _total_ms(report: Report, name: str) -> float:
    """How long the last swap took: of several workers that are as far, the slowest is told."""
    found = report.plugins.get(name)
    receipt = (found.receipt if found is not None else None) or {}
    return float((receipt.get("steps") or {}).get("total_ms") or 0.0)
