"""The tools of a snapshot as a model is offered them, and the calls that it makes."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from hotdesk_sdk import ToolCall

from ..errors import CallFailed, CallTimeout, describe
from ..metrics import Metrics
from ..runtime.active import BoundHook, Slot, Snapshot
from ..runtime.call import ABANDON_S, Calls, Clock
from ..runtime.guards import host_task
from ..runtime.tools import LoadedTool
from .turn import TurnRun

__all__ = ["MAX_CALLS", "MAX_RESULT_CHARS", "ToolCalls", "Toolbox"]

MAX_CALLS = 16
"""How many calls of one answer are made; the model is told of those that were not."""

MAX_RESULT_CHARS = 32 * 1024
"""How much of a tool's result the model is told."""

_encode = msgspec.json.Encoder().encode


class Toolbox:
    """All tools of one snapshot, by the names that a model knows. Built at the swap, so that a turn only reads it.

    Of two plugins with a tool of the same name the outer one has it; the other's is offered as `PLUGIN_NAME`.
    """

    __slots__ = ("_offered", "by_name")

    def __init__(self, snapshot: Snapshot) -> None:
        self.by_name: dict[str, tuple[Slot, BoundHook, LoadedTool]] = {}
        for slot in snapshot.slots:
            for tool in slot.generation.tools:
                name = tool.name if tool.name not in self.by_name else f"{slot.generation.plugin}_{tool.name}"[:64]
                self.by_name[name] = (slot, slot.generation.hooks["tools"], tool)
        self._offered: dict[str, dict[str, Any]] = {
            name: {
                "type": "function",
                "function": {
                    "name": name,
                    "description": loaded.tool.description,
                    "parameters": loaded.tool.parameters,
                },
            }
            for name, (_, _, loaded) in self.by_name.items()
        }

    def offer(self, wanted: bool | Sequence[str]) -> tuple[dict[str, Any], ...]:
        """The tools as a request has them: all, none, or those named (whether they are there or not)."""
        if wanted is True:
            return tuple(self._offered.values())
        if not wanted:
            return ()
        return tuple(self._offered[name] for name in wanted if name in self._offered)


class ToolCalls:
    """Makes the calls that a model asks for. Every failure is a text for the model, and none is raised."""

    def __init__(self, calls: Calls, metrics: Metrics) -> None:
        self._calls = calls
        self._metrics = metrics

    async def run(
        self, turn: TurnRun, toolbox: Toolbox, offered: frozenset[str], asked: Sequence[ToolCall]
    ) -> list[str]:
        """The results of *asked*, in its order, all called at once; each within its plugin's `timeout_ms`."""
        loop = asyncio.get_running_loop()
        told: list[asyncio.Future[str]] = [loop.create_future() for _ in asked]
        tasks = []
        for index, (call, result) in enumerate(zip(asked, told, strict=True)):
            if index < MAX_CALLS:
                tasks.append(host_task(self._tell(result, turn, toolbox, offered, call)))
            else:
                result.set_result(f"not called: at most {MAX_CALLS} calls at once")
        try:
            await asyncio.wait(told)
        except asyncio.CancelledError:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=ABANDON_S)
            raise
        return [result.result() for result in told]

    async def _tell(
        self,
        told: asyncio.Future[str],
        turn: TurnRun,
        toolbox: Toolbox,
        offered: frozenset[str],
        call: ToolCall,
    ) -> None:
        """Have *told* know what came of *call*; at once, when its function ignores that its time is over."""

        def abandon() -> None:
            if not told.done():
                told.set_result(f"error: '{call.name}' did not stop when its time was over")

        text = "error: it was cancelled"
        try:
            text = await self._one(turn, toolbox, offered, call, abandon)
            text = text.encode("utf-8", "replace").decode()  # half a character can't be said, of an error neither
        finally:
            if not told.done():
                told.set_result(text)

    async def _one(
        self, turn: TurnRun, toolbox: Toolbox, offered: frozenset[str], call: ToolCall, abandon: Callable[[], None]
    ) -> str:
        found = toolbox.by_name.get(call.name) if call.name in offered else None
        if found is None:
            self._metrics.tool_calls.labels("", "unknown").inc()
            return f"error: there is no tool '{call.name}'; there are {', '.join(sorted(offered)) or 'none'}"
        slot, hook, loaded = found
        try:
            arguments = msgspec.json.decode(call.arguments or "{}")
            problem = loaded.problem(arguments)
        except (ValueError, RecursionError) as exc:
            problem = f"they are not JSON: {exc}"
        if problem is not None:
            self._metrics.tool_calls.labels(call.name, "refused").inc()
            return f"error: the arguments of '{call.name}' do not fit: {problem}"
        if loaded.takes_turn:
            arguments["turn"] = turn
        text, outcome = await self._call(
            slot, hook, functools.partial(loaded.tool.call, **arguments), call.name, abandon
        )
        self._metrics.tool_calls.labels(call.name, outcome).inc()
        return text

    async def _call(
        self, slot: Slot, hook: BoundHook, function: Any, name: str, abandon: Callable[[], None]
    ) -> tuple[str, str]:
        clock = Clock(asyncio.current_task(), abandon)
        self._calls.start(clock)
        try:
            result = await self._calls.call(slot, hook, clock, function)
            text = result if isinstance(result, str) else _encode(result).decode()
        except CallTimeout as failure:
            return f"error: '{name}' took over {failure.timeout_ms} ms", "timeout"
        except CallFailed as failure:
            cause = failure.__cause__
            return f"error: '{name}' failed: {describe(cause) if cause else 'it is not called just now'}", "failed"
        except (TypeError, ValueError, OverflowError, RecursionError) as exc:  # a result that JSON can't say
            return f"error: '{name}' gave what can't be said: {exc}", "failed"
        finally:
            self._calls.stop(clock)
        if len(text) > MAX_RESULT_CHARS:
            text = f"{text[:MAX_RESULT_CHARS]}… (cut: {len(text)} characters)"
        return text, "answered"
