"""What a generation holds of the host, and how it is undone: newest first, awaited, complete despite errors."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol

from hotdesk_sdk import CapabilityDenied, ScopeClosed

from ..errors import describe
from ..logs import Logger
from .active import Generation
from .capabilities import CapabilityDoors, PluginHttp, PluginKv
from .guards import CURRENT, host_task
from .plugin_metrics import PluginMetric, PluginMetrics

__all__ = ["Context", "Scope", "Sender"]

UNDO_TIMEOUT_S = 5.0
"""How long one undo may take before the others go on without it."""


class Sender(Protocol):
    """Says something in a conversation outside a turn; the chat room's."""

    async def __call__(
        self,
        conversation: str,
        text: str,
        *,
        plugin: str,
        generation: int,
        metadata: dict[str, Any] | None,
        channel: str | None = None,
    ) -> Any: ...


class Jobs:
    """How many timed jobs of one generation run just now. Outlives it, and holds nothing of it."""

    __slots__ = ("running",)

    def __init__(self) -> None:
        self.running = 0


class Scope:
    """The undo list of one generation. After `aclose` it refuses new work with `ScopeClosed`.

    Its `every` jobs rest until the generation serves, and while it stands by: never in two generations at once.
    """

    def __init__(self, generation: Generation, log: Logger) -> None:
        self._generation = generation
        self._log = log
        self._undo: dict[object, tuple[str, Callable[[], Any]]] = {}
        self._paused = True
        self._before: Jobs | None = None
        self.jobs = Jobs()
        self.closed = False
        self.undone = False

    def serve(self, what: str) -> None:
        """Raises `ScopeClosed` once all is undone: what is undone may still use `ctx.kv` and its like."""
        if self.undone:
            raise ScopeClosed(self._generation.plugin, self._generation.number, what)

    def admit(self, what: str) -> None:
        """Raises `ScopeClosed` when the generation has ended."""
        if self.closed:
            raise ScopeClosed(self._generation.plugin, self._generation.number, what)

    def push(self, what: str, undo: Callable[[], Any]) -> Callable[[], object]:
        """Have *undo* (sync or async) called when the generation ends; returns how to forget it."""
        self.admit(what)
        key = object()
        self._undo[key] = (what, undo)
        return lambda: self._undo.pop(key, None)

    @property
    def paused(self) -> bool:
        """Whether jobs rest now: also while one of the generation before is still running."""
        if self._before is not None and not self._before.running:
            self._before = None
        return self._paused or self.closed or self._before is not None

    def pause(self) -> None:
        """Let timed jobs rest."""
        self._paused = True

    def take_over(self, before: Jobs | None) -> None:
        """Let timed jobs run, once those of *before* have come to their end."""
        self._paused, self._before = False, before

    async def aclose(self) -> list[str]:
        """Undo everything, newest first; return what could not be undone, in words."""
        self.closed = True
        problems = []
        token = CURRENT.set(self._generation)
        try:
            while self._undo:
                what, undo = self._undo.popitem()[1]
                problem = await self._undo_one(undo)
                if problem is not None:
                    problems.append(f"{what}: undoing it {problem}")
                    self._log.warning("scope_undo_failed", what=what, problem=problem)
        finally:
            CURRENT.reset(token)
            self.undone = True
        return problems

    @staticmethod
    async def _undo_one(undo: Callable[[], Any]) -> str | None:
        task = asyncio.current_task()
        asked = task.cancelling() if task else 0
        try:
            async with asyncio.timeout(UNDO_TIMEOUT_S):
                result = undo()
                if inspect.isawaitable(result):
                    await result
        except TimeoutError:
            return f"took over {UNDO_TIMEOUT_S:g} s"
        except asyncio.CancelledError:
            if task is not None and task.cancelling() > asked:
                raise
            return "raised CancelledError"
        except BaseException as exc:  # one undo that fails must not keep the others from happening
            return f"raised {describe(exc)}"
        return None


class Context:
    """`ctx`: one a generation. See `hotdesk_sdk.Ctx` for what each part promises."""

    def __init__(
        self,
        generation: Generation,
        *,
        scope: Scope,
        config: dict[str, Any],
        granted: frozenset[str],
        doors: CapabilityDoors,
        metrics: PluginMetrics,
        send: Sender,
        modules: dict[str, Any],
        log: Logger,
    ) -> None:
        self.plugin = generation.plugin
        self.generation = generation.number
        self.config = config
        self.log = log
        self.granted = granted
        self._generation = generation
        self._scope = scope
        self._doors = doors
        self._metrics = metrics
        self._send = send
        self._modules = modules
        self._http: PluginHttp | None = None
        self._guest_http: PluginHttp | None = None
        self._kv: PluginKv | None = None
        self._llm: Any = None

    def _need(self, capability: str) -> None:
        asked = capability in self._generation.manifest.capabilities
        if not asked or capability not in self.granted:
            self._doors.denied(self.plugin, self.generation, capability)
            raise CapabilityDenied(self.plugin, self.generation, capability, asked=asked)

    @property
    def kv(self) -> PluginKv:
        self._scope.serve("ctx.kv")
        self._need("kv")
        if self._kv is None:
            self._kv = PluginKv(self.plugin, self._doors.kv, lambda: self._scope.serve("ctx.kv"))
        return self._kv

    @property
    def llm(self) -> Any:
        self._scope.serve("ctx.llm")
        self._need("llm")
        if self._llm is None:
            self._llm = self._doors.llm(self._generation, self._scope)
        return self._llm

    @property
    def http(self) -> PluginHttp:
        self._scope.serve("ctx.http")
        if self._http is None:
            self._http = PluginHttp(self._generation, self)
            self._scope.push("ctx.http", self._http.aclose)
        return self._http

    @property
    def http_for_guests(self) -> PluginHttp:
        """`http` for a sandbox: public addresses only, and answers of a bounded size."""
        self._scope.serve("http")
        if self._guest_http is None:
            self._guest_http = PluginHttp(self._generation, self, public_only=True)
            self._scope.push("http", self._guest_http.aclose)
        return self._guest_http

    async def send(self, conversation: str, text: str, *, metadata: dict[str, Any] | None = None) -> Any:
        self._scope.serve("ctx.send")
        return await self._send(conversation, text, plugin=self.plugin, generation=self.generation, metadata=metadata)

    async def send_for_guest(self, conversation: str, text: str, *, own: bool) -> Any:
        """`send` for a sandbox: to the conversation at hand (*own*), or to one that the plugin's intake opened.

        Raises `PermissionError` for any other.
        """
        self._scope.serve("send")
        return await self._send(
            conversation,
            text,
            plugin=self.plugin,
            generation=self.generation,
            metadata=None,
            channel=None if own else self.plugin,
        )

    def task(self, coro: Coroutine[Any, Any, Any], name: str | None = None) -> asyncio.Task[Any]:
        label = f"task {name or getattr(coro, '__name__', 'task')!r}"
        if self._scope.closed:
            coro.close()
        self._scope.admit(label)

        async def run() -> Any:
            CURRENT.set(self._generation)
            try:
                return await coro
            except asyncio.CancelledError:
                raise
            except BaseException as exc:  # the fault wall of a plugin's own task
                self.log.error("task_failed", task=name, problem=describe(exc))
                return None

        task = host_task(run(), name=f"{self.plugin}/{self.generation}/{name or 'task'}")

        async def undo() -> None:
            coro.close() if inspect.getcoroutinestate(coro) == inspect.CORO_CREATED else None
            task.cancel()
            await asyncio.wait({task})

        forget = self._scope.push(label, undo)
        task.add_done_callback(lambda _: forget())
        return task

    def every(self, seconds: float, fn: Callable[[], Awaitable[Any]]) -> None:
        if seconds <= 0:
            raise ValueError(f"every: seconds is {seconds}; it must be above 0")
        name = getattr(fn, "__name__", "job")

        async def repeat() -> None:
            while True:
                await asyncio.sleep(seconds)
                if self._scope.paused:
                    continue
                self._scope.jobs.running += 1
                try:
                    await fn()
                except asyncio.CancelledError:
                    raise
                except BaseException as exc:  # a job that fails once is tried again at its next time
                    self.log.error("job_failed", job=name, problem=describe(exc))
                finally:
                    self._scope.jobs.running -= 1

        self.task(repeat(), name=f"every {seconds:g} s {name}")

    def metric(self, kind: str, name: str, help: str = "", labels: tuple[str, ...] = ()) -> PluginMetric:
        self._scope.admit("ctx.metric")
        metric, undo = self._metrics.open(self.plugin, kind, name, help, labels)
        self._scope.push(f"metric {name!r}", undo)
        return metric

    async def enter(self, cm: Any) -> Any:
        what = f"context {type(cm).__name__}"
        self._scope.admit(f"ctx.enter({type(cm).__name__})")
        if hasattr(type(cm), "__aenter__"):
            value, leave = await cm.__aenter__(), cm.__aexit__
        else:
            value, leave = cm.__enter__(), cm.__exit__
        try:
            self._scope.push(what, lambda: leave(None, None, None))
        except ScopeClosed:  # it ended while the context was being entered
            if inspect.isawaitable(left := leave(None, None, None)):
                await left
            raise
        return value

    def defer(self, fn: Callable[[], Any]) -> None:
        self._scope.push(f"defer {getattr(fn, '__name__', 'fn')!r}", fn)

    def require(self, plugin: str) -> Any:
        if plugin not in self._modules:
            raise LookupError(f"plugin '{self.plugin}' did not name '{plugin}' in requires = [...] of its manifest")
        return self._modules[plugin]
