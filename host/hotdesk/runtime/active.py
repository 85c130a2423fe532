"""The current snapshot, the generations in it, and who still uses an older one.

A snapshot never changes after it was built. A turn acquires the current one, keeps it to its end and
releases it; a generation is drained once no snapshot that holds it is current or in use.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pluggy

from hotdesk_sdk import Hooks, Manifest

from ..metrics import CallStats

if TYPE_CHECKING:
    from .scope import Scope
    from .sources import Bundle
    from .tools import LoadedTool
    from .wasm_guest import Guest

__all__ = ["Active", "BoundHook", "Breaker", "Generation", "PluginState", "Slot", "Snapshot"]


class PluginState(enum.Enum):
    """Where a generation stands; a plugin shows the state of the generation that serves, or why none does."""

    PENDING = "PENDING"
    LOADING = "LOADING"
    ACTIVE = "ACTIVE"
    DRAINING = "DRAINING"
    CLOSED = "CLOSED"
    FAILED = "FAILED"


_MOVES = {
    PluginState.PENDING: {PluginState.LOADING},
    PluginState.LOADING: {PluginState.ACTIVE, PluginState.FAILED},
    PluginState.ACTIVE: {PluginState.DRAINING},
    PluginState.DRAINING: {PluginState.CLOSED, PluginState.ACTIVE},
    PluginState.FAILED: {PluginState.CLOSED},
    PluginState.CLOSED: set(),
}


class Generation:
    """The n-th load of a plugin. Everything that is the plugin's hangs here, or in `scope`."""

    __slots__ = (
        "__weakref__",
        "bundle",
        "first_answer",
        "guest",
        "hooks",
        "last_failure",
        "loaded_at",
        "manifest",
        "module_name",
        "number",
        "plugin",
        "probation_left",
        "routes",
        "scope",
        "seen_at",
        "snapshots",
        "state",
        "stray_tasks",
        "stray_timers",
        "strays",
        "tools",
    )

    def __init__(self, plugin: str, number: int, bundle: Bundle, manifest: Manifest) -> None:
        self.plugin = plugin
        self.number = number
        self.bundle = bundle
        self.manifest = manifest
        self.module_name = ""
        self.state = PluginState.PENDING
        self.hooks: dict[str, BoundHook] = {}
        self.scope: Scope
        self.tools: list[LoadedTool] = []
        self.guest: Guest | None = None
        """A component's instances; None for Python."""
        self.routes: Any = None
        self.snapshots: set[Snapshot] = set()
        self.probation_left = 0
        self.loaded_at = time.time()
        self.seen_at = 0.0
        self.last_failure: tuple[float, str] | None = None
        """When a call failed last (Unix seconds), and why."""
        self.first_answer: Callable[[], None] | None = None
        self.stray_tasks: Any = None
        self.stray_timers: Any = None
        self.strays: list[tuple[str, Any]] = []

    def move(self, to: PluginState) -> None:
        """The one way from state to state. Raises `ValueError` on a move that makes no sense."""
        if to not in _MOVES[self.state]:
            raise ValueError(f"{self} can't go from {self.state.value} to {to.value}")
        self.state = to

    def __repr__(self) -> str:
        return f"<{self.plugin} generation {self.number} {self.state.value}>"


@dataclass(slots=True)
class BoundHook:
    """One implementation, ready to be called with the spec's arguments, of which it gets those that it takes."""

    name: str
    call: Callable[..., Any]
    streams: bool
    stats: CallStats


class Breaker:
    """Keeps calls from a plugin that fails: opens on *limit* failures in the last 20 calls, then tries one at a time.

    `opened` and `closed` are told by `on_change`; the wait doubles with each failed try, up to a minute.
    """

    __slots__ = ("bits", "cooldown_s", "limit", "on_change", "retry_at", "state", "wait_s")

    def __init__(self, limit: int, cooldown_s: float, on_change: Callable[[str], None]) -> None:
        self.limit = limit
        self.cooldown_s = self.wait_s = cooldown_s
        self.on_change = on_change
        self.bits = 0
        self.state = "closed"
        self.retry_at = 0.0

    def allows(self, now: float) -> bool:
        """Whether a call may go through; in half-open just one may, until its outcome is known."""
        if self.state == "closed":
            return True
        if self.state == "open" and now >= self.retry_at:
            self.state = "half_open"
            self.retry_at = now + self.wait_s
            return True
        if self.state == "half_open" and now >= self.retry_at:
            self.retry_at = now + self.wait_s
            return True
        return False

    def succeeded(self) -> None:
        if self.state != "closed":
            self.state, self.bits, self.wait_s = "closed", 0, self.cooldown_s
            self.on_change("closed")
        elif self.bits:
            self.bits = (self.bits << 1) & 0xFFFFF

    def failed(self, now: float) -> None:
        self.bits = ((self.bits << 1) | 1) & 0xFFFFF
        if self.state == "half_open":
            self.wait_s = min(60.0, self.wait_s * 2)
        elif self.state != "closed" or self.bits.bit_count() < self.limit:
            return
        self.state, self.retry_at = "open", now + self.wait_s
        self.on_change("open")


@dataclass(slots=True)
class Slot:
    """A generation's place in one snapshot, with the operator's settings for it."""

    generation: Generation
    order: int
    order_from: str
    timeout_s: float
    on_failure: str
    breaker: Breaker


class Snapshot:
    """The plugins that serve together, in order. `run` is the onion, compiled once."""

    __slots__ = ("__weakref__", "by_name", "number", "observers", "retired", "run", "slots", "tools", "users")

    def __init__(self, number: int, slots: tuple[Slot, ...]) -> None:
        self.number = number
        self.slots = slots
        self.by_name = {slot.generation.plugin: slot for slot in slots}
        self.users = 0
        self.retired = False
        self.run: Any = None
        self.tools: Any = None
        self.observers: dict[str, tuple[tuple[Slot, BoundHook], ...]] = {}

    def implementations(self, hook: str) -> tuple[tuple[Slot, BoundHook], ...]:
        """Who implements *hook*, outermost first."""
        return tuple((slot, slot.generation.hooks[hook]) for slot in self.slots if hook in slot.generation.hooks)


OBSERVERS = ("on_message", "on_reply", "on_conversation_opened", "on_conversation_closed", "on_assigned")


def new_plugin_manager() -> pluggy.PluginManager:
    """A pluggy manager that knows hotdesk's hooks."""
    manager = pluggy.PluginManager("hotdesk")
    manager.add_hookspecs(Hooks)
    return manager


@dataclass(slots=True)
class Active:
    """Which snapshot is current. `compile` makes the onion of a snapshot; it belongs to the chat room."""

    compile: Callable[[Snapshot], Any]
    current: Snapshot = field(default_factory=lambda: Snapshot(0, ()))
    drained: Callable[[Generation], None] = lambda generation: None

    def __post_init__(self) -> None:
        self.current.run = self.compile(self.current)

    def build(self, slots: Iterable[Slot]) -> Snapshot:
        """A snapshot of *slots*, sorted by order and then by name, with its onion compiled. Touches nothing."""
        ordered = tuple(sorted(slots, key=lambda slot: (slot.order, slot.generation.plugin)))
        snapshot = Snapshot(self.current.number + 1, ordered)
        snapshot.observers = {hook: found for hook in OBSERVERS if (found := snapshot.implementations(hook))}
        snapshot.run = self.compile(snapshot)
        return snapshot

    def swap(self, snapshot: Snapshot) -> Snapshot:
        """Let *snapshot* serve from the next turn on; return the one it replaces.

        Turns under way keep the snapshot they began with. Plain `def` on purpose: nobody can see half a swap.
        """
        before, self.current = self.current, snapshot
        for slot in snapshot.slots:
            slot.generation.snapshots.add(snapshot)
        before.retired = True
        if not before.users:
            self._let_go(before)
        return before

    def acquire(self) -> Snapshot:
        """The current snapshot, held until `release`."""
        snapshot = self.current
        snapshot.users += 1
        return snapshot

    def release(self, snapshot: Snapshot) -> None:
        snapshot.users -= 1
        if snapshot.retired and not snapshot.users:
            self._let_go(snapshot)

    def _let_go(self, snapshot: Snapshot) -> None:
        for slot in snapshot.slots:
            holders = slot.generation.snapshots
            holders.discard(snapshot)
            if not holders:
                self.drained(slot.generation)
        snapshot.slots = ()
        snapshot.by_name = {}
        snapshot.observers = {}
        snapshot.run = None


def users_of(generation: Generation) -> int:
    """How many turns and calls still run on *generation*."""
    return sum(snapshot.users for snapshot in generation.snapshots)


async def wait_drained(generation: Generation, timeout_s: float | None, wake: asyncio.Event) -> bool:
    """Wait until nobody uses *generation*; False when *timeout_s*, if there is one, went by first."""
    try:
        async with asyncio.timeout(timeout_s):
            while generation.snapshots:
                wake.clear()
                await wake.wait()
    except TimeoutError:
        return False
    return True
