"""One guest on a machine, without a host: what a call gives, how long it took, and by how much it overran."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from wasmtime.component import Component

from hotdesk.runtime.wasm import Code, Instance, Machine
from hotdesk.runtime.wasm_calls import FAILED, OPERATION, STOP, GuestCall
from hotdesk.runtime.wasm_imports import LOG_BURST, LOG_RATE, Budget
from hotdesk.runtime.wit_inspect import inspect_component

__all__ = ["TURN", "Alone", "Outcome", "alone", "code_of", "owner"]

TURN = ("m1", "c1", "hello", "{}")


@dataclass
class Outcome:
    """Of one call: what it gave (an exception where it failed), the seconds that it took, and those over its time."""

    value: Any
    seconds: float
    overrun: float


class _Call(GuestCall):
    """A call that notes on the guest's own thread when it ended."""

    __slots__ = ("ended",)

    def say(self, message: tuple[str, Any]) -> bool:
        self.ended = time.monotonic()
        return super().say(message)


def owner() -> Any:
    """What a machine's host functions need of a generation."""
    lines: list[str] = []
    log = SimpleNamespace(**{level: lambda event, **_: lines.append(event) for level in ("debug", "info", "warning")})
    log.error = log.info
    return SimpleNamespace(log=log, lines=lines, log_budget=Budget(LOG_RATE, LOG_BURST), config_text="{}")


def code_of(machine: Machine, data: bytes) -> Code:
    """*data* inspected, compiled in this process, and loaded."""
    inspected = inspect_component("guest", data, file="guest.wasm", max_bytes=1 << 26)
    return machine.load("guest", bytes(Component(machine.engine, data).serialize()), inspected, "guest.wasm")


class Alone:
    """One instance."""

    def __init__(self, machine: Machine, code: Code, answer: Callable[..., Any] | None) -> None:
        self.owner = owner()
        self._loop = asyncio.get_running_loop()
        self._answer = answer
        self.instance = Instance(machine, code, "alone", self._loop, self.owner)

    async def call(self, name: str, *arguments: Any, timeout_s: float = 1.0) -> Outcome:
        """Make a call; the empty name makes the instance. What it asks for is answered by `answer`."""
        started = time.monotonic()
        call = _Call(self._loop, name, arguments, started + timeout_s, None)
        self.instance.submit(call)
        while True:
            kind, value = await call.take()
            if kind is not OPERATION:
                break
            if self._answer is not None:
                self.instance.answer(self._answer(*value))
        if kind is FAILED:
            assert isinstance(value, BaseException)
        return Outcome(value, call.ended - started, call.ended - call.deadline)

    async def end(self) -> None:
        if self.instance.call is not None:
            self.instance.call.cancelled = True
            self.instance.answer(STOP)
        self.instance.submit(None)
        async with asyncio.timeout(10):
            await self.instance.ended


@asynccontextmanager
async def alone(
    machine: Machine, data: bytes | Code, *, answer: Callable[..., Any] | None = None
) -> AsyncIterator[Alone]:
    """An instance of the component, made; it has ended, and its Store with it, when the context is left."""
    code = data if isinstance(data, Code) else code_of(machine, data)
    one = Alone(machine, code, answer)
    try:
        yield one
    finally:
        await one.end()
    assert one.instance not in machine.instances
