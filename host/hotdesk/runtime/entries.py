"""What the host knows of each plugin by name: its source, what serves, what is kept, what went wrong."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from hotdesk_sdk import HotdeskError

from ..config import PluginSettings
from ..errors import LoadFailed
from .active import Breaker, Generation, PluginState, Slot
from .sources import Bundle, Signature, SignatureRow, Source

__all__ = ["Entry", "Kept", "Problem", "Receipt"]


@dataclass(frozen=True, slots=True)
class Kept:
    """A version that served once, kept for `rollback`."""

    generation: int
    bundle: Bundle
    at: float

    def public(self) -> dict[str, Any]:
        return {
            "generation": self.generation,
            "version": self.bundle.manifest.version,
            "hash": self.bundle.digest[:12],
            "at": self.at,
        }


@dataclass(frozen=True, slots=True)
class Problem:
    """Why the newest version does not serve."""

    message: str
    step: str
    file: str | None = None
    line: int | None = None
    at: float = field(default_factory=time.time)

    @classmethod
    def of(cls, exc: HotdeskError) -> Problem:
        if isinstance(exc, LoadFailed):
            return cls(str(exc), exc.step, exc.file, exc.line)
        return cls(str(exc), "manifest")

    def public(self) -> dict[str, Any]:
        return {"message": self.message, "step": self.step, "file": self.file, "line": self.line, "at": self.at}


@dataclass(slots=True)
class Receipt:
    """What a swap did and how long each step took. `drained` and `first_answer_ms` are filled in as they come."""

    plugin: str
    source: str
    before: int | None
    after: int
    steps: dict[str, float]
    started: float
    """Monotonic seconds, at the first sight of the change."""
    drained: int | None = None
    first_answer_ms: float | None = None

    def public(self) -> dict[str, Any]:
        return {
            "plugin": self.plugin,
            "from": self.before,
            "to": self.after,
            "source": self.source,
            "steps": {name: round(value, 3) for name, value in self.steps.items()},
            "drained": self.drained,
            "first_answer_ms": None if self.first_answer_ms is None else round(self.first_answer_ms, 3),
        }


@dataclass(slots=True, eq=False)
class Entry:
    """One plugin by name; itself and no other, so that a name which was forgotten and came back is told apart."""

    name: str
    source: Source | None = None
    current: Generation | None = None
    slot: Slot | None = None
    standby: Generation | None = None
    last_number: int = 0
    loading: bool = False
    waiting_for: str | None = None
    wants: tuple[str, ...] = ()
    """What the newest version requires, also where it does not serve."""
    problem: Problem | None = None
    receipt: Receipt | None = None
    pending: bool = False
    """A change that was seen and waits for a command (`watch = "pending"`)."""
    disabled: bool = False
    seen: Signature | None = None
    """What stat said of all its sources when it was last looked at."""
    read: dict[str, SignatureRow] = field(default_factory=dict)
    """What stat said of each file when it was last read as a version."""
    whole: set[SignatureRow] = field(default_factory=set)
    """Files that came by rename since, so that nobody is still writing them."""
    refused: str | None = None
    """The digest of what was rolled back from: the same bytes are not loaded again by the watch."""
    kept: deque[Kept] = field(default_factory=deque)
    recalled: bool = False
    """Whether what was kept before the start has been read."""
    leftovers: list[str] = field(default_factory=list)
    retiring: set[asyncio.Task[None]] = field(default_factory=set)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    queued: bool = False

    def state(self) -> PluginState:
        if self.current is not None:
            return self.current.state
        if self.loading:
            return PluginState.LOADING
        if self.problem is not None:
            return PluginState.FAILED
        return PluginState.CLOSED if self.disabled else PluginState.PENDING


def slot_for(generation: Generation, settings: PluginSettings, breaker: Breaker) -> Slot:
    """A generation's slot: the operator's settings over the manifest's over the defaults."""
    manifest = generation.manifest
    timeout_ms = settings.timeout_ms or manifest.timeout_ms
    if settings.order is not None:
        order, order_from = settings.order, "operator"
    else:
        order, order_from = manifest.order, "default" if manifest.order == 50 else "manifest"
    return Slot(generation, order, order_from, timeout_ms / 1000, settings.on_failure or manifest.on_failure, breaker)


def merged(defaults: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """The operator's config over the manifest's: tables are merged, everything else is replaced."""
    result = dict(defaults)
    for key, value in over.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result
