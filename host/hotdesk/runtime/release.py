"""The end of a generation: what it left is taken away, and that it is gone is proven.

Known roots are swept (modules, tasks, timers, threads, logging handlers, atexit, singledispatch, the global metrics
registry); then weak references to the module's functions and classes tell whether anything still holds
them. What can't be freed is named, with its holder.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import gc
import logging
import sys
import threading
import time
import types
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import FunctionType, MappingProxyType, ModuleType
from typing import Any

from .active import Generation
from .python import PREFIX, PythonLoader

__all__ = ["Leftover", "Release", "describe_holders"]


@dataclass(frozen=True, slots=True)
class Leftover:
    """Something that a generation left behind; *freed* says whether the host could take it away."""

    kind: str
    what: str
    freed: bool

    def __str__(self) -> str:
        return f"{self.kind} {self.what}" + ("" if self.freed else " (still there)")


def _loggers() -> list[logging.Logger]:
    known = [item for item in logging.Logger.manager.loggerDict.values() if isinstance(item, logging.Logger)]
    return [logging.getLogger(), *known]


def _handlers() -> list[tuple[logging.Logger, logging.Handler]]:
    return [(logger, handler) for logger in _loggers() for handler in logger.handlers]


class Release:
    """Releases generations and counts those that are not yet proven gone."""

    def __init__(self, loader: PythonLoader) -> None:
        self._loader = loader
        self._watched: dict[tuple[str, int, str], list[weakref.ref[Any]]] = {}
        self._next_collect = 0.0
        self._singledispatch: weakref.WeakSet[Any] = weakref.WeakSet()
        self._modules_searched = 0
        self._find_singledispatch()

    @property
    def unproven(self) -> int:
        """How many released generations something still holds, as far as is known without a collection."""
        return len(self._held())

    def unproven_of(self, plugin: str) -> int:
        """The same for one plugin."""
        return sum(name == plugin for name, _, _ in self._held())

    def _held(self) -> list[tuple[str, int, str]]:
        return [key for key, refs in self._watched.items() if any(ref() is not None for ref in refs)]

    async def sweep(self, generation: Generation, *own: Any) -> list[Leftover]:
        """Take away what *generation*, which nobody uses any more, left at the known roots, and empty its modules.

        They are not emptied when something that could not be freed still runs on them. *own* are objects of its that
        are to be proven gone too.
        """
        left: list[Leftover] = []
        left += await _cancel_tasks(generation)
        left += _cancel_timers(generation)
        prefix = generation.module_name
        strays, generation.strays = generation.strays, []
        left += _remove_handlers([item for kind, item in strays if kind == "logging handler"], prefix)
        left += [Leftover("metric", name, True) for kind, name in strays if kind == "metric"]
        left += _unregister_atexit([item for kind, item in strays if kind == "atexit"])
        left += await _end_threads([item for kind, item in strays if kind == "thread"], prefix)
        strays.clear()
        modules = [m for key, m in sys.modules.copy().items() if key == prefix or key.startswith(prefix + ".")]
        self._loader.forget(prefix)
        objects = [*own, *(value for module in modules for value in _own_objects(module, prefix))]
        del own
        left += self._sweep_singledispatch(prefix)
        self._watched[(generation.plugin, generation.number, prefix)] = [weakref.ref(value) for value in objects]
        generation.hooks = {}
        generation.tools = []
        generation.routes = None
        clear = all(item.freed for item in left)
        del objects
        for module in modules:
            if clear:
                module.__dict__.clear()
        return left

    def _sweep_singledispatch(self, prefix: str) -> list[Leftover]:
        self._find_singledispatch()
        left = []
        for function in list(self._singledispatch):
            if _owned(function, prefix):
                continue
            registry = gc.get_referents(getattr(function, "registry", None))[0]
            for key, value in list(registry.items()):
                if _owned(key, prefix) or _owned(value, prefix):
                    del registry[key]
                    getattr(function, "_clear_cache", lambda: None)()
                    left.append(Leftover("singledispatch entry", f"{function.__name__}({key.__name__})", True))
        return left

    def _find_singledispatch(self) -> None:
        """Know every generic function that a plugin could register with: looked for when modules have come.

        The first search has to come before `gc.freeze`, after which the collector shows nothing older.
        """
        modules = sum(not name.startswith(PREFIX) for name in sys.modules.copy())
        if modules == self._modules_searched:
            return
        self._modules_searched = modules
        for item in gc.get_objects():
            # `type`, since `isinstance` asks `__class__`, which of a library's proxy imports what it stands for
            if type(item) is FunctionType and isinstance(getattr(item, "registry", None), MappingProxyType):
                self._singledispatch.add(item)

    def verify(self, *, must: bool = False) -> dict[tuple[str, int, str], list[Any]]:
        """The released generations that are still held, and by which of their objects.

        A full collection stops the loop for as long as it takes, so there is at most one per hundred times
        the last one's length; *must* asks for one now.
        """
        self._forget_dead()
        now = time.monotonic()
        if self._watched and (must or now >= self._next_collect):
            gc.collect()
            self._next_collect = now + 100 * (time.monotonic() - now)
            self._forget_dead()
        return {key: [target for ref in refs if (target := ref()) is not None] for key, refs in self._watched.items()}

    def _forget_dead(self) -> None:
        self._watched = {
            key: alive for key, refs in self._watched.items() if (alive := [ref for ref in refs if ref() is not None])
        }


def _owned(item: Any, prefix: str) -> bool:
    name = getattr(item, "__module__", None)
    return isinstance(name, str) and (name == prefix or name.startswith(prefix + "."))


def _own_objects(module: ModuleType, prefix: str) -> list[Any]:
    return [
        value for value in vars(module).values() if isinstance(value, FunctionType | type) and _owned(value, prefix)
    ]


def _remove_handlers(added: list[tuple[logging.Logger, logging.Handler]], prefix: str) -> list[Leftover]:
    left = []
    for logger, handler in _handlers():
        if (logger, handler) in added or _owned(type(handler), prefix):
            logger.removeHandler(handler)
            handler.close()
            left.append(Leftover("logging handler", f"{type(handler).__name__} on '{logger.name}'", True))
    return left


def _unregister_atexit(functions: list[Any]) -> list[Leftover]:
    for function in functions:
        atexit.unregister(function)
    return [Leftover("atexit", f"'{getattr(function, '__qualname__', function)}'", True) for function in functions]


async def _cancel_tasks(generation: Generation) -> list[Leftover]:
    strays = [task for task in list(generation.stray_tasks or ()) if not task.done()]
    current = asyncio.current_task()
    strays = [task for task in strays if task is not current]
    names = [_task_name(task) for task in strays]
    for task in strays:
        task.cancel()
    if strays:
        await asyncio.wait(strays, timeout=1.0)
    generation.stray_tasks = None
    return [Leftover("task", name, task.done()) for name, task in zip(names, strays, strict=True)]


def _task_name(task: asyncio.Task[Any]) -> str:
    coro = task.get_coro()
    inner = getattr(coro, "inner", coro)
    return f"'{getattr(inner, '__qualname__', task.get_name())}'"


def _cancel_timers(generation: Generation) -> list[Leftover]:
    left = []
    now = asyncio.get_running_loop().time()
    for handle in list(generation.stray_timers or ()):
        if not handle.cancelled() and handle.when() > now:
            handle.cancel()
            left.append(Leftover("timer", "set with loop.call_later", True))
        if handle.cancelled() and hasattr(handle, "_context"):
            handle._context = None  # asyncio keeps cancelled timers until it has a hundred, and their contexts hold us
    generation.stray_timers = None
    return left


async def _end_threads(noted: list[Any], prefix: str) -> list[Leftover]:
    threads = {thread for ref in noted if (thread := ref()) is not None}
    for thread in threading.enumerate():
        target = getattr(thread, "_target", None) or getattr(thread, "function", None)
        if _owned(target, prefix) or _owned(type(thread), prefix):
            threads.add(thread)
    left = []
    for thread in threads:
        if not thread.is_alive():
            continue
        if isinstance(thread, threading.Timer):
            thread.cancel()
            await asyncio.to_thread(thread.join, 0.5)
        left.append(Leftover("thread", f"'{thread.name}'", not thread.is_alive()))
    return left


def describe_holders(target: Any) -> str:
    """In words, what holds *target*: looks through the whole heap, so only for a report.

    The globals of modules are walked first, for the collector does not show what lived before it was frozen.
    """
    words = list(_holding_globals(target))
    ignore = {id(words), id(getattr(target, "__mro__", None))}
    for holder in () if words else gc.get_referrers(target):
        if id(holder) in ignore or isinstance(holder, types.GetSetDescriptorType | types.FrameType):
            continue
        if isinstance(holder, dict):
            owner = holder.get("__name__")
            keys = [str(key) for key, value in holder.items() if value is target][:1]
            words.append(f"{owner or 'a dict'}[{keys[0] if keys else '?'}]")
        elif isinstance(holder, FunctionType | functools.partial):
            words.append(f"function {getattr(holder, '__qualname__', holder)}")
        else:
            words.append(type(holder).__qualname__)
    return ", ".join(dict.fromkeys(words[:5])) or "nothing that can be seen from Python"


def _holding_globals(target: Any) -> Iterator[str]:
    """The globals, by module and name, that are *target* or a container of it."""
    for module_name, module in sys.modules.copy().items():
        for name, value in list(getattr(module, "__dict__", {}).items()):
            items: Iterable[Any] = (value,)
            if type(value) is dict:
                items = (*value, *value.values())
            elif type(value) in (list, tuple, set, frozenset):
                items = tuple(value)
            if any(item is target for item in items):
                yield f"{module_name}.{name}"
