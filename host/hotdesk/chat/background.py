"""Hooks after the fact, and the delivery of replies to the channels they belong to."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from ..backend import Backend, ConversationRecord, StoredReply
from ..errors import BackendError, CallFailed, StaleOwner
from ..logs import Logger
from ..metrics import Metrics
from ..runtime.active import Active, BoundHook, Slot
from ..runtime.call import Calls, Clock
from ..runtime.guards import host_task
from .turn import ConversationView

__all__ = ["Background"]

DELIVERY_WAITS_S = (0.2, 1.0, 5.0, 30.0, 120.0)
"""The waits between tries of one delivery; after the last it stays in the journal until the next start."""


class Background:
    """Runs `on_*` and `deliver`, outside of any turn. Deliveries of one conversation are in order."""

    def __init__(self, active: Active, calls: Calls, backend: Backend, metrics: Metrics, log: Logger) -> None:
        self._active = active
        self._calls = calls
        self._backend = backend
        self._metrics = metrics
        self._log = log
        self._tasks: set[asyncio.Task[Any]] = set()
        self._lanes: dict[str, deque[tuple[StoredReply, ConversationRecord]]] = {}

    def observe(self, hook: str, subject: Any) -> None:
        """Call *hook* of everyone who has it, in the background."""
        if hook in self._active.current.observers:
            self._spawn(self._observe(hook, subject))

    def observe_conversation(self, hook: str, record: ConversationRecord) -> None:
        if hook in self._active.current.observers:
            self._spawn(self._observe(hook, ConversationView(record)))

    def _spawn(self, coro: Any) -> None:
        task = host_task(coro)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _observe(self, hook: str, subject: Any) -> None:
        snapshot = self._active.acquire()
        try:
            for slot, bound in snapshot.observers.get(hook, ()):
                try:
                    await self._call(slot, bound, subject)
                except CallFailed:
                    continue
        finally:
            self._active.release(snapshot)

    async def _call(self, slot: Slot, hook: BoundHook, *args: Any) -> Any:
        clock = Clock(asyncio.current_task())
        self._calls.start(clock)
        try:
            return await self._calls.call(slot, hook, clock, hook.call, *args)
        finally:
            self._calls.stop(clock)

    async def call_plugin(self, plugin: str, hook: str, *args: Any) -> Any:
        """Call one hook of one plugin that serves now. `LookupError` when it does not or has none; `CallFailed`."""
        snapshot = self._active.acquire()
        try:
            slot = snapshot.by_name[plugin]
            return await self._call(slot, slot.generation.hooks[hook], *args)
        finally:
            self._active.release(snapshot)

    def delivers(self, channel: str) -> bool:
        """Whether the plugin behind *channel* takes replies."""
        slot = self._active.current.by_name.get(channel) if channel else None
        return slot is not None and "deliver" in slot.generation.hooks

    def deliver(self, reply: StoredReply, record: ConversationRecord) -> None:
        """Hand *reply* to its channel, after those before it in its conversation."""
        lane = self._lanes.get(record.id)
        if lane is None:
            self._lanes[record.id] = deque([(reply, record)])
            self._spawn(self._deliver_lane(record.id))
        else:
            lane.append((reply, record))

    def forget(self, belongs: Callable[[str], bool]) -> None:
        """Hand out nothing more of the conversations that *belongs* is true of: another worker does."""
        for conversation, lane in self._lanes.items():
            if belongs(conversation):
                while len(lane) > 1:
                    lane.pop()

    async def _deliver_lane(self, conversation: str) -> None:
        lane = self._lanes[conversation]
        try:
            while lane:
                await self._deliver_one(*lane[0])
                lane.popleft()
        except StaleOwner:
            lane.clear()  # who owns the conversation now hands the rest out
        finally:
            del self._lanes[conversation]

    async def _deliver_one(self, reply: StoredReply, record: ConversationRecord) -> None:
        for wait_s in (*DELIVERY_WAITS_S, None):
            try:
                await self.call_plugin(record.channel, "deliver", ConversationView(record), reply)
                await self._backend.delivered(record.id, reply.seq)
            except StaleOwner:
                raise
            except (CallFailed, LookupError, BackendError) as exc:
                self._metrics.deliveries.labels(record.channel, "failed").inc()
                self._log.warning(
                    "delivery_failed", plugin=record.channel, conversation=record.id, seq=reply.seq, problem=str(exc)
                )
                if wait_s is not None:
                    await asyncio.sleep(wait_s)
            else:
                self._metrics.deliveries.labels(record.channel, "delivered").inc()
                return

    async def aclose(self, timeout_s: float) -> None:
        """Wait for what is under way, at most *timeout_s*; the rest is cancelled."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
