"""What a plugin starts behind the host's back is still known: raw tasks, timers and the like are put on its account.

A context variable says whose code runs. The loop's task factory and `call_later`/`call_at` look at it, so that a
release finds every task and timer that a generation left; so do the interpreter's own doors for log handlers, threads,
exit functions and metrics. Works on any asyncio loop whose instances take attributes
(asyncio's own and uvloop's do).
"""

from __future__ import annotations

import asyncio
import atexit
import contextvars
import functools
import logging
import threading
import weakref
from collections.abc import Callable, Coroutine, Generator
from typing import Any

from prometheus_client import REGISTRY

from .active import Generation

__all__ = ["CURRENT", "Guards", "host_task"]

CURRENT: contextvars.ContextVar[Generation | None] = contextvars.ContextVar("hotdesk_generation", default=None)
"""The generation whose code runs in this context, or None for the host's own."""


def host_task(coro: Coroutine[Any, Any, Any], name: str | None = None) -> asyncio.Task[Any]:
    """A task of the host's, on nobody's account even when a plugin's call led to it."""
    return asyncio.get_running_loop().create_task(coro, name=name, context=contextvars.Context())


class Contained(Coroutine[Any, Any, Any]):
    """The coroutine of a plugin's raw task, whose `sys.exit` ends the task and not the host.

    No coroutine around it: one that is cancelled before its first step would never have awaited the inner one.
    """

    __slots__ = ("inner",)

    def __init__(self, inner: Coroutine[Any, Any, Any]) -> None:
        self.inner = inner

    def send(self, value: Any) -> Any:
        try:
            return self.inner.send(value)
        except (SystemExit, KeyboardInterrupt) as exc:
            raise RuntimeError(f"a plugin's task raised {type(exc).__name__}") from None

    def throw(self, *error: Any) -> Any:
        try:
            return self.inner.throw(*error)
        except (SystemExit, KeyboardInterrupt) as exc:
            raise RuntimeError(f"a plugin's task raised {type(exc).__name__}") from None

    def close(self) -> None:
        self.inner.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        return (yield from self.inner.__await__())


class Guards:
    """Installed on a loop while a host runs on it; takes itself off again on `remove`.

    Several hosts on one loop share one installation, which goes with the last of them, in whatever order they end.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop: Any = loop
        if not getattr(loop, _USERS, 0):
            factory = loop.get_task_factory()
            loop.set_task_factory(_task_maker(factory))
            setattr(loop, _FACTORY, factory)
            for name in _TIMERS:
                setattr(loop, name, _timer(getattr(loop, name)))
        setattr(loop, _USERS, getattr(loop, _USERS, 0) + 1)
        _process.install()

    def remove(self) -> None:
        """Give the loop back as it was."""
        _process.remove()
        users = getattr(self._loop, _USERS) - 1
        setattr(self._loop, _USERS, users)
        if not users:
            self._loop.set_task_factory(getattr(self._loop, _FACTORY))
            for name in _TIMERS:
                delattr(self._loop, name)


_USERS, _FACTORY, _TIMERS = "_hotdesk_users", "_hotdesk_factory", ("call_later", "call_at")


def _task_maker(factory: Any) -> Callable[..., asyncio.Task[Any]]:
    def make_task(loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> asyncio.Task[Any]:
        context = options.get("context")
        generation = CURRENT.get() if context is None else context.get(CURRENT)
        if generation is not None:
            coro = Contained(coro)
        task: Any = asyncio.Task(coro, loop=loop, **options) if factory is None else factory(loop, coro, **options)
        if generation is not None:
            if generation.stray_tasks is None:
                generation.stray_tasks = weakref.WeakSet()
            generation.stray_tasks.add(task)
        return task  # type: ignore[no-any-return]

    return make_task


def _timer(original: Callable[..., asyncio.TimerHandle]) -> Callable[..., asyncio.TimerHandle]:
    def schedule(
        when: float, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        handle = original(when, callback, *args, context=context)
        generation = CURRENT.get()
        if generation is not None:
            if generation.stray_timers is None:
                generation.stray_timers = weakref.WeakSet()
            generation.stray_timers.add(handle)
        return handle

    return schedule


class _Process:
    """The doors through which a guest leaves something in the whole process: each notes on whose account it was used.

    They belong to the interpreter and not to a loop, so hosts share them, and the last one puts them back.
    """

    def __init__(self) -> None:
        self._users = 0
        self._saved: list[tuple[Any, str, Any]] = []

    def install(self) -> None:
        self._users += 1
        if self._users > 1:
            return
        self._put(logging.Logger, "addHandler", _note_handler)
        self._put(threading.Thread, "start", _note_thread)
        self._put(atexit, "register", _note_atexit)
        self._put(atexit, "unregister", _forget_atexit)
        self._put(REGISTRY, "register", _note_metric)

    def remove(self) -> None:
        self._users -= 1
        while not self._users and self._saved:
            owner, name, original = self._saved.pop()
            if owner is REGISTRY:
                delattr(owner, name)
            else:
                setattr(owner, name, original)

    def _put(self, owner: Any, name: str, door: Callable[[Any], Callable[..., Any]]) -> None:
        original = getattr(owner, name)
        self._saved.append((owner, name, original))
        setattr(owner, name, functools.wraps(original)(door(original)))


_process = _Process()


def _note_handler(original: Callable[..., None]) -> Callable[..., None]:
    def add_handler(self: logging.Logger, hdlr: logging.Handler) -> None:
        original(self, hdlr)
        if (generation := CURRENT.get()) is not None:
            generation.strays.append(("logging handler", (self, hdlr)))

    return add_handler


def _note_thread(original: Callable[..., None]) -> Callable[..., None]:
    def start(self: threading.Thread) -> None:
        original(self)
        if (generation := CURRENT.get()) is not None and not self.name.startswith(SHARED_THREADS):
            generation.strays.append(("thread", weakref.ref(self)))

    return start


SHARED_THREADS = ("load-", "hotdesk-", "asyncio_", "ThreadPoolExecutor", "AnyIO")
"""How the names of threads begin that live as long as the host, or as their pool, whoever made them start."""


def _note_atexit(original: Callable[..., Any]) -> Callable[..., Any]:
    def register(func: Any, /, *args: Any, **kwargs: Any) -> Any:
        original(func, *args, **kwargs)
        if (generation := CURRENT.get()) is not None:
            generation.strays.append(("atexit", func))
        return func

    return register


def _forget_atexit(original: Callable[..., None]) -> Callable[..., None]:
    def unregister(func: Any, /) -> None:
        original(func)
        if (generation := CURRENT.get()) is not None:
            generation.strays = [stray for stray in generation.strays if stray != ("atexit", func)]

    return unregister


def _note_metric(original: Callable[..., None]) -> Callable[..., None]:
    def register(collector: Any) -> None:
        """A guest's metric never gets there: the next generation's, of the same name, would be refused."""
        if (generation := CURRENT.get()) is None:
            original(collector)
            return
        describe = getattr(collector, "describe", None)
        names = [metric.name for metric in describe()] if describe else []
        generation.strays.append(("metric", min(names, default=type(collector).__name__)))

    return register
