"""A generation of a component: its instances, and who gets which."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from hotdesk_sdk import ScopeClosed

from .active import Generation
from .call import CLOCK
from .scope import Context
from .wasm import Code, Instance, Machine
from .wasm_calls import DONE, FAILED, STOP, GuestCall, GuestError, GuestFault
from .wasm_imports import LOG_BURST, LOG_RATE, Budget
from .wasm_operations import Operations

__all__ = ["Guest"]

END_S = 2.0
"""How long an instance may take to end; one that computes is stopped within a tick."""

FAR = 3600.0
"""The deadline of a call that has none of its own, in seconds."""

QUICK_S = 0.0005
"""A function whose calls are done by then is waited for: such a call costs half, for it needs no future and no wake-up
of the loop through the kernel."""

STILL_S = 0.001
"""How long the loop stands still for a call's answer at most. Not `QUICK_S`: a timer due before the kernel's own tick
has to be set in the processor and taken back, which cost 10 to 25 us a call on a virtual machine."""

PASSES = 31
"""After one that was not quick, some calls of that function are not waited for, then one is tried again: 1, 3, 7, at
most so many, each time that it was not quick again. One late call says little: others had the interpreter."""


class Guest:
    """The guest of one generation. Calls wait for a free instance, of which there are at most *most*.

    A plugin that keeps state in memory (its `export-state` gives some right after `setup`) gets one.
    """

    def __init__(self, machine: Machine, code: Code, generation: Generation, ctx: Context, *, most: int) -> None:
        self.code = code
        self.log = ctx.log
        self.log_budget = Budget(LOG_RATE, LOG_BURST)
        self.config_text = msgspec.json.encode(ctx.config).decode()
        self._machine = machine
        self._generation = generation
        self._operations = Operations(ctx)
        self._most = most
        self._settings = 1
        self._state: tuple[str, str] | None = None
        """What was imported: given again to an instance that takes a dead one's place."""

        self._loop = asyncio.get_running_loop()
        self._idle: list[Instance] = []
        self._instances: set[Instance] = set()
        self._ending: set[Instance] = set()
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._closed = False
        self._quick: dict[str, int] = {}
        """Functions that were not quick, and how many more of their calls nobody waits for at once."""

        self._passes: dict[str, int] = {}
        """How many those were the last time, of functions that have not been quick since."""

        self.keeps_state = False

    def has(self, name: str) -> bool:
        """Whether it exports "interface.function"."""
        return name in self.code.functions

    @property
    def instances(self) -> int:
        """How many Stores it has."""
        return len(self._instances) + len(self._ending)

    # -- life ------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Make the first instance, with `setup`. Raises what the guest does."""
        instance = await self._start()
        if self.has("lifecycle.export-state"):
            state = await self._made(instance, "lifecycle.export-state")
            if state is not None:
                self.keeps_state, self._most = True, 1
        self._give_back(instance)

    async def import_state(self, state: str, version: str) -> None:
        """Raises `GuestError` when it can't be imported."""
        await self.call("lifecycle.import-state", state, version)
        self._state = state, version

    async def configure(self, config: dict[str, Any]) -> bool:
        """Offer the config to one instance; the others get it before their next call."""
        text = msgspec.json.encode(config).decode()
        instance = await self._take()
        before, self.config_text = self.config_text, text
        try:
            taken = bool(_good(await self._made(instance, "lifecycle.configure", text)))
        except BaseException:
            self.config_text = before
            raise
        finally:
            self._give_back(instance)
        if taken:
            self._settings += 1
            instance.settings = self._settings
        else:
            self.config_text = before
        return taken

    async def aclose(self) -> list[str]:
        """End every instance; those that compute are stopped. Returns what could not be ended, in words."""
        self._closed = True
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(None)
        for instance in [*self._instances]:
            self._retire(instance)
        if self._ending:
            await asyncio.wait([one.ended for one in self._ending], timeout=END_S)
        return [f"wasm store of instance {one._number}" for one in self._ending if not one.ended.done()]

    async def upgrade(self, code: Code) -> None:
        """Run on *code*, another compilation of the same component, from the next calls on.

        An instance that keeps state hands it to the one that takes its place, between two calls.
        """
        if self._closed:
            return
        if not self.keeps_state:
            self.code = code
            idle, self._idle = self._idle, []
            for instance in idle:
                self._retire(instance)
            return
        old = await self._take()
        before, self.code = self.code, code  # not earlier: one that is given back on other code is thrown away
        try:
            state = await self._made(old, "lifecycle.export-state")
            if state is not None:
                self._state = state, self._generation.manifest.version
            new = await self._start()
        except BaseException:
            self.code = before
            self._give_back(old)
            raise
        self._retire(old)
        self._give_back(new)

    def _retire(self, instance: Instance) -> None:
        self._instances.discard(instance)
        if not instance.ended.done():
            self._ending.add(instance)
            instance.ended.add_done_callback(lambda _: self._ending.discard(instance))
        call = instance.call
        if call is not None:
            call.cancelled = True
            instance.answer(STOP)
        instance.submit(None)

    # -- calls -----------------------------------------------------------------------------------------------

    async def call(
        self, name: str, *arguments: Any, turn: Any = None, emit: Callable[[str], Awaitable[None]] | None = None
    ) -> Any:
        """Call the exported function; its result, unwrapped.

        Raises `GuestError` (it said so), `GuestFault` (it trapped), `GuestTimeout`; and `CapabilityDenied` where it
        said so after it was refused something.
        """
        instance = await self._take()
        try:
            return _good(await self._made(instance, name, *arguments, turn=turn, emit=emit))
        finally:
            self._give_back(instance)

    async def _take(self) -> Instance:
        while True:
            if self._closed:
                raise ScopeClosed(self._generation.plugin, self._generation.number, "a call into it")
            while self._idle:
                instance = self._idle.pop()
                if instance.dead:
                    self._retire(instance)
                    continue
                if instance.settings == self._settings or await self._brought_up_to_date(instance):
                    return instance
            if len(self._instances) < self._most:
                return await self._start()
            waiting: asyncio.Future[None] = self._loop.create_future()
            self._waiting.append(waiting)
            try:
                await waiting
            except BaseException:
                if waiting.done() and not waiting.cancelled():
                    self._wake()  # it was our turn, and it is somebody else's now
                raise
            finally:
                if waiting in self._waiting:
                    self._waiting.remove(waiting)

    def _give_back(self, instance: Instance) -> None:
        if instance.dead or instance.doomed or self._closed or instance.code is not self.code:
            self._retire(instance)
        else:
            self._idle.append(instance)
        self._wake()

    def _wake(self) -> None:
        while self._waiting:
            waiting = self._waiting.popleft()
            if not waiting.done():
                waiting.set_result(None)
                return

    async def _start(self) -> Instance:
        """A new instance, set up: its own `setup`, and the state that the generation began with."""
        name = f"{self._generation.plugin}-{self._generation.number}"
        instance = Instance(self._machine, self.code, name, self._loop, self)
        instance.settings = self._settings
        self._instances.add(instance)
        try:
            await self._made(instance, "")
            if self.has("lifecycle.setup"):
                _good(await self._made(instance, "lifecycle.setup", self.config_text))
            if self._state is not None:
                _good(await self._made(instance, "lifecycle.import-state", *self._state))
        except BaseException:
            self._retire(instance)
            self._wake()
            raise
        return instance

    async def _brought_up_to_date(self, instance: Instance) -> bool:
        """Give an instance the config that another took. False: it would not have it, and is gone."""
        try:
            taken = bool(_good(await self._made(instance, "lifecycle.configure", self.config_text)))
        except (GuestError, GuestFault):
            taken = False
        except BaseException:
            self._retire(instance)
            raise
        if taken:
            instance.settings = self._settings
        else:
            self._retire(instance)
        return taken

    async def _made(
        self,
        instance: Instance,
        name: str,
        *arguments: Any,
        turn: Any = None,
        emit: Callable[[str], Awaitable[None]] | None = None,
    ) -> Any:
        """Have *instance* make one call, and do on the loop what it asks for meanwhile."""
        clock = CLOCK.get()
        call = GuestCall(self._loop, name, arguments, _deadline(clock), turn, emit)
        quick, nearness, held, done = self._quick, instance.nearness, time.monotonic(), False
        if nearness is not None:
            nearness.leave() if quick.get(name) else nearness.stay()
        instance.submit(call)
        try:
            while True:
                said = None
                if (passes := quick.get(name, 0)) == 0:
                    began = time.monotonic()
                    said = call.take_quickly(STILL_S)
                    if said is not None and time.monotonic() - began <= QUICK_S:
                        self._passes.pop(name, None)
                    else:
                        quick[name] = self._passes[name] = min(PASSES, 2 * self._passes.get(name, 0) + 1)
                        if nearness is not None:
                            nearness.leave()
                else:
                    quick[name] = passes - 1
                kind, value = said or await call.take()
                if kind is DONE:
                    done = True
                    if call.denied is not None and type(value) is tuple and value[0] is False:
                        raise call.denied
                    return value
                if kind is FAILED:
                    instance.dead = True
                    call.forget()
                    try:
                        raise value
                    finally:
                        del said, value  # else the exception holds this frame, and this frame the exception
                operation, given = value
                instance.answer(await self._operations.serve(call, operation, given))
                if time.monotonic() - held > STILL_S:  # a guest that asks and asks must not keep the loop to itself
                    await asyncio.sleep(0)
                    held = time.monotonic()
        except BaseException:
            if not instance.dead and not done:
                call.cancelled = instance.doomed = True
                instance.answer(STOP)
            raise


def _deadline(clock: Any) -> float:
    now = time.monotonic()
    return min(clock.deadline, now + FAR) if clock is not None else now + FAR


def _good(result: Any) -> Any:
    """A `result`'s value. Raises `GuestError` with its error. What is no result is given as it is."""
    if type(result) is tuple and len(result) == 2 and type(result[0]) is bool:
        fine, payload = result
        if not fine:
            raise GuestError(str(payload)[:2000] or "it failed, and did not say why")
        return payload
    return result
