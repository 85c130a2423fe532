"""Every call into a plugin: deadline, fault wall, breaker, metric, and the account it runs on.

A task has one `Clock`, whose deadline is that of the innermost call; while a middleware waits for what is
further in, its own time stands still. One ticker looks at all clocks, so a call that is quick costs no timer.
"""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from hotdesk_sdk import CapabilityDenied, LlmError

from ..errors import CallFailed, CallTimeout, TurnAborted, describe
from ..logs import Logger
from ..metrics import Metrics
from .active import BoundHook, Generation, Slot
from .guards import CURRENT
from .wasm_calls import GuestTimeout

__all__ = ["CLOCK", "Calls", "Clock", "blame"]

TICK_S = 0.02
"""How often clocks are looked at: a deadline is kept to this, and a thousand turns under way cost 0.5 % of a core."""

HELD_S = 0.05
"""A tick that comes this late says that the loop was held; the lateness is added to every deadline."""

ABANDON_S = 1.0
"""How long a call may ignore its cancellation before its turn goes on without it."""

monotonic, current_task = time.monotonic, asyncio.current_task
INFINITE = float("inf")


class Clock:
    """The running deadline of one task. `abandon` is called once if a call ignores being cancelled."""

    __slots__ = (
        "_owed",
        "_rests",
        "abandon",
        "about",
        "call",
        "cancelled",
        "deadline",
        "expired",
        "expired_at",
        "hit",
        "task",
    )

    def __init__(self, task: asyncio.Task[Any] | None, abandon: Callable[[], None] | None = None) -> None:
        self.task = task
        self.deadline = INFINITE
        self.call: object = None
        self.expired: object = None
        self.expired_at = 0.0
        self.hit = False
        """The task was cancelled from here, and that cancellation has not been dealt with."""
        self.cancelled = False
        """Its turn was given up: what its calls raise or return from now on is nobody's failure or answer."""
        self.abandon = abandon
        self.about: dict[str, str] = {}
        """What a log line of its calls says beside the plugin: conversation and message."""
        self._rests: dict[object, list[Any]] = {}
        """Calls that rest: how often, and how much time each has left."""
        self._owed: dict[object, float] = {}

    def rest(self) -> object:
        """Let the running call's deadline stand still until `go_on`: it waits for something with a deadline of its own.

        Returns what `go_on` takes. Rests of one call may overlap, and others may begin and end meanwhile.
        """
        call = self.call
        resting = self._rests.get(call)
        if resting is None:
            self._rests[call] = [1, self.deadline - monotonic()]
            self.deadline = INFINITE
        else:
            resting[0] += 1
        return call

    def go_on(self, call: object) -> None:
        resting = self._rests.get(call)
        if resting is None:
            return  # the call has ended without waiting for what it began
        resting[0] -= 1
        if resting[0]:
            return
        del self._rests[call]
        if self.call is call:
            self.deadline = monotonic() + resting[1]
        else:
            self._owed[call] = resting[1]  # a call further in runs; it is given back when that has ended

    def end(self, call: object, outer: object, deadline: float) -> None:
        """*call* has ended, and *outer*, which had *deadline*, goes on."""
        self.call = outer
        if self._rests:
            self._rests.pop(call, None)
        if self._owed:
            self._owed.pop(call, None)
            if outer in self._owed:
                deadline = monotonic() + self._owed.pop(outer)
        self.deadline = deadline


CLOCK: ContextVar[Clock | None] = ContextVar("hotdesk_clock", default=None)
"""The clock of the turn or background call that runs."""


def blame(exc: BaseException, generation: Generation) -> tuple[str, str | None, int | None]:
    """What went wrong in words, and the file and line in the plugin's own source where it did."""
    file, line = None, None
    for frame in traceback.extract_tb(exc.__traceback__):
        if frame.filename in generation.bundle.paths:
            file, line = frame.filename, frame.lineno
    if isinstance(exc, SyntaxError) and exc.filename in generation.bundle.paths:
        file, line = exc.filename, exc.lineno
    return describe(exc), file, line


def _aborted(exc: BaseException) -> bool:
    """Whether *exc* is only what unwinds an onion, in the groups that a plugin's task groups make of it."""
    if isinstance(exc, BaseExceptionGroup):
        return all(_aborted(one) for one in exc.exceptions)
    return isinstance(exc, TurnAborted | asyncio.CancelledError)


class Calls:
    """Makes the calls of one host."""

    def __init__(self, metrics: Metrics, log: Logger) -> None:
        self._metrics = metrics
        self._log = log
        self._loop = asyncio.get_running_loop()
        self._clocks: set[Clock] = set()
        self._tick_at = 0.0
        self._ticking: asyncio.TimerHandle | None = None
        self.on_failure: Callable[[Generation, CallFailed], Any] = lambda generation, exc: None
        self.on_probation_over: Callable[[Generation], None] = lambda generation: None

    def start(self, clock: Clock) -> None:
        """Watch *clock* until `stop`; it is the current one of this task and of what it begins."""
        CLOCK.set(clock)
        self._clocks.add(clock)
        if self._ticking is None:
            self._tick_at = monotonic() + TICK_S
            self._ticking = self._loop.call_later(TICK_S, self._tick)

    def stop(self, clock: Clock) -> None:
        self._clocks.discard(clock)
        clock.abandon = None  # contexts that a plugin's timers keep have the clock, and must not hold the turn by it

    def _tick(self) -> None:
        now = monotonic()
        late = now - self._tick_at
        for clock in list(self._clocks):
            if late > HELD_S:  # the loop was held, or the process stopped: nobody else's time ran meanwhile
                clock.deadline += late
            if now >= clock.deadline:
                self._expire(clock, now)
        self._tick_at = now + TICK_S
        self._ticking = self._loop.call_later(TICK_S, self._tick) if self._clocks else None

    def _expire(self, clock: Clock, now: float) -> None:
        if clock.expired is not clock.call:
            clock.expired, clock.expired_at = clock.call, now
        elif now - clock.expired_at > ABANDON_S and clock.abandon is not None:
            abandon, clock.abandon = clock.abandon, None
            abandon()
        if clock.task is not None:
            clock.hit = True
            clock.task.cancel()

    async def call(self, slot: Slot, hook: BoundHook, clock: Clock, function: Callable[..., Any], *args: Any) -> Any:
        """Await *function* with *args*, on the account of *hook*, within the slot's `timeout_ms` of its own time.

        Raises `CallFailed` (its subclass `CallTimeout` when late) whatever went wrong, and `TurnAborted`
        and cancellation as they are. Time spent in calls further in, on the same clock, does not count.
        """
        start = monotonic()
        breaker = slot.breaker
        if breaker.state != "closed" and not breaker.allows(start):
            raise CallFailed(
                slot.generation.plugin,
                slot.generation.number,
                hook.name,
                "was not called: its breaker is open",
            )
        me = object()
        outer_deadline, outer_call, outer_task = clock.deadline, clock.call, clock.task
        generation = slot.generation
        # a middleware may await what is further in from a task of its own; the loop given saves a system call
        clock.call, clock.task = me, current_task(self._loop)
        clock.deadline = start + slot.timeout_s
        token = CURRENT.set(generation)
        try:
            result = await function(*args)
        except (TurnAborted, CallFailed):
            raise
        except asyncio.CancelledError as exc:
            if clock.cancelled:
                raise
            if clock.expired is me or clock.hit:
                self._uncancel(clock)
                raise self._late(slot, hook, start) from None
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise  # from outside: the host stops, or the visitor's turn is given up
            raise self._failed(slot, hook, exc) from None  # nobody cancelled us: it is the plugin's own
        except BaseException as exc:  # the fault wall: SystemExit of a plugin must not end the host either
            if isinstance(exc, GeneratorExit):
                raise
            if clock.cancelled:
                raise TurnAborted from None
            if isinstance(exc, BaseExceptionGroup) and _aborted(exc):
                raise TurnAborted from None
            if clock.expired is me or isinstance(exc, GuestTimeout):
                self._uncancel(clock)
                raise self._late(slot, hook, start) from None
            raise self._failed(slot, hook, exc) from exc
        finally:
            CURRENT.reset(token)
            now = monotonic()
            clock.task = outer_task
            left = clock.deadline - now
            # what further calls took was added back; of one that rests for ever nobody knows its own time
            hook.stats.observe(slot.timeout_s - left if left != INFINITE else now - start)
            clock.end(me, outer_call, outer_deadline + (now - start))
        if clock.cancelled:
            raise TurnAborted
        if clock.expired is me:
            self._uncancel(clock)
            raise self._late(slot, hook, start)
        if breaker.bits or breaker.state != "closed":
            breaker.succeeded()
        if generation.probation_left:
            generation.probation_left -= 1
            if not generation.probation_left:
                self.on_probation_over(generation)
        return result

    def refuse(self, slot: Slot, hook: BoundHook, problem: str) -> CallFailed:
        """Count a call that came back with something its hook may not give."""
        return self._note(
            slot,
            hook,
            CallFailed(slot.generation.plugin, slot.generation.number, hook.name, problem),
            "value",
        )

    @staticmethod
    def _uncancel(clock: Clock) -> None:
        clock.expired = None
        task = asyncio.current_task()
        while task is not None and task.cancelling():
            task.uncancel()
        if task is clock.task:  # else a middleware awaits this call in a task of its own, and is yet to hear of it
            clock.hit = False

    def _late(self, slot: Slot, hook: BoundHook, start: float) -> CallFailed:
        generation = slot.generation
        timeout_ms = round(slot.timeout_s * 1000)
        return self._note(
            slot, hook, CallTimeout(generation.plugin, generation.number, hook.name, timeout_ms), "timeout"
        )

    def _failed(self, slot: Slot, hook: BoundHook, exc: BaseException) -> CallFailed:
        generation = slot.generation
        text, file, line = blame(exc, generation)
        where = f" ({file}:{line})" if file else ""
        failure = CallFailed(generation.plugin, generation.number, hook.name, f"raised {text}{where}")
        if isinstance(exc, LlmError):  # the model's fault and not the plugin's: another generation fares no better
            failure.public = exc.public
            return self._note(slot, hook, failure, "llm", blameless=True)
        if isinstance(exc, CapabilityDenied):  # as little: it is the operator's to mend
            return self._note(slot, hook, failure, "denied", blameless=True)
        return self._note(slot, hook, failure, "exception")

    def _note(
        self, slot: Slot, hook: BoundHook, failure: CallFailed, kind: str, *, blameless: bool = False
    ) -> CallFailed:
        generation = slot.generation
        hook.stats.failures += 1
        if not blameless:
            slot.breaker.failed(monotonic())
        self._metrics.failures.labels(generation.plugin, hook.name, kind).inc()
        generation.last_failure = (time.time(), f"{hook.name} {failure.problem.removeprefix(hook.name).strip()}")
        about = clock.about if (clock := CLOCK.get()) is not None else {}
        self._log.warning(
            "call_failed",
            plugin=generation.plugin,
            generation=generation.number,
            hook=hook.name,
            problem=failure.problem,
            **about,
        )
        if generation.probation_left and not blameless:
            failure.rerun = self.on_failure(generation, failure)
        return failure
