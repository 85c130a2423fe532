"""What a plugin starts behind the host's back is still known: raw tasks and raw timers are put on its account.

A context variable says whose code runs. The loop's task factory and `call_later`/`call_at` look at it, so that a
release finds every task and timer that a generation left. Works on any asyncio loop whose instances take attributes
(asyncio's own and uvloop's do).
"""

from __future__ import annotations

import asyncio
import contextvars
import weakref
from collections.abc import Callable, Coroutine
from typing import Any

from .active import Generation

__all__ = ["CURRENT", "Guards", "host_task"]

CURRENT: contextvars.ContextVar[Generation | None] = contextvars.ContextVar("hotdesk_generation", default=None)
"""The generation whose code runs in this context, or None for the host's own."""


def host_task(coro: Coroutine[Any, Any, Any], name: str | None = None) -> asyncio.Task[Any]:
    """A task of the host's, on nobody's account even when a plugin's call led to it."""
    return asyncio.get_running_loop().create_task(coro, name=name, context=contextvars.Context())


async def _contain(coro: Coroutine[Any, Any, Any]) -> Any:
    """Run a plugin's raw task so that its `sys.exit` ends the task and not the host."""
    try:
        return await coro
    except (SystemExit, KeyboardInterrupt) as exc:
        raise RuntimeError(f"a plugin's task raised {type(exc).__name__}") from None


class Guards:
    """Installed on a loop while a host runs on it; takes itself off again on `remove`."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._factory = loop.get_task_factory()
        self._saved = {name: getattr(loop, name) for name in ("call_later", "call_at")}
        loop.set_task_factory(self._make_task)
        for name, original in self._saved.items():
            setattr(loop, name, self._timer(original))

    def remove(self) -> None:
        """Give the loop back as it was."""
        self._loop.set_task_factory(self._factory)
        for name in self._saved:
            delattr(self._loop, name)

    def _make_task(self, loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> asyncio.Task[Any]:
        context = options.get("context")
        generation = CURRENT.get() if context is None else context.get(CURRENT)
        if generation is not None:
            coro = _contain(coro)
        if self._factory is not None:
            task: Any = self._factory(loop, coro, **options)
        else:
            task = asyncio.Task(coro, loop=loop, **options)
        if generation is not None:
            if generation.stray_tasks is None:
                generation.stray_tasks = weakref.WeakSet()
            generation.stray_tasks.add(task)
        return task  # type: ignore[no-any-return]

    @staticmethod
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
