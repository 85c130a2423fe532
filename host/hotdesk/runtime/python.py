"""Python plugins: each generation its own module under its own unique name, from the bytes that were hashed.

Never `importlib.reload`: names that left the source would stay alive, and old closures with them.
"""

from __future__ import annotations

import asyncio
import contextvars
import ctypes
import difflib
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import itertools
import linecache
import re
import sys
import threading
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pluggy

from hotdesk_sdk import HOOKS

from ..errors import LoadFailed
from ..metrics import CallStats
from .active import BoundHook, Generation, new_plugin_manager
from .call import blame
from .guards import CURRENT
from .sources import Bundle

__all__ = ["PythonLoader", "bind_hooks"]

PREFIX = "hotdesk_plugin_"

_serial = itertools.count(1)


class PythonLoader(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of loaded plugins, whose source is in memory. On `sys.meta_path` from `install` to `remove`."""

    def __init__(self) -> None:
        self._bundles: dict[str, Bundle] = {}
        self._shown: dict[str, str] = {}
        """The path that tracebacks show, to the generation's module whose source they show for it."""

    def install(self) -> None:
        sys.meta_path.insert(0, self)

    def remove(self) -> None:
        sys.meta_path.remove(self)

    async def load(self, generation: Generation, timeout_s: float) -> ModuleType:
        """Import *generation*'s module in a thread of its own, so that a slow import holds nobody up.

        Raises `LoadFailed` with the file and line. An import that does not end is interrupted.
        """
        bundle = generation.bundle
        name = f"{PREFIX}{''.join(c if c.isalnum() else '_' for c in generation.plugin)}_{next(_serial)}"
        generation.module_name = name
        self._bundles[name] = bundle
        try:
            module: ModuleType = await _in_thread(lambda: importlib.import_module(name), generation, timeout_s)
            return module
        except TimeoutError:
            self.forget(name)
            raise LoadFailed(generation.plugin, "import", f"importing it took over {timeout_s:g} s") from None
        except asyncio.CancelledError:
            self.forget(name)
            raise
        except BaseException as exc:  # the fault wall around foreign module code, sys.exit included
            self.forget(name)
            text, file, line = blame(exc, generation)
            if isinstance(exc, ModuleNotFoundError) and exc.name and exc.name.split(".")[0] == generation.plugin:
                text += f"; inside a plugin write `from .{exc.name.partition('.')[2] or 'module'} import …`"
            raise LoadFailed(generation.plugin, "import", text, file=file, line=line) from None

    def forget(self, name: str) -> None:
        """Take a generation's modules out of `sys.modules`, and its source out of the finder and out of tracebacks."""
        bundle = self._bundles.pop(name, None)
        for path in bundle.paths if bundle is not None else ():
            if self._shown.get(path) == name:
                del self._shown[path]
                linecache.cache.pop(path, None)
        for module in [key for key in sys.modules.copy() if key == name or key.startswith(name + ".")]:
            del sys.modules[module]

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        top, _, rest = fullname.partition(".")
        bundle = self._bundles.get(top)
        if bundle is None:
            return None
        base = rest.replace(".", "/")
        if not rest:
            names = ["__init__.py" if bundle.source.kind == "folder" else bundle.source.path.name]
        else:
            names = [f"{base}/__init__.py", f"{base}.py"]
        for name in names:
            if name in bundle.code:
                package = name.endswith("__init__.py")
                spec = importlib.machinery.ModuleSpec(fullname, self, is_package=package)
                spec.origin = str(
                    (bundle.source.path if bundle.source.kind == "folder" else bundle.source.path.parent) / name
                )
                spec.has_location = True
                spec.loader_state = name
                if package:
                    spec.submodule_search_locations = [str(bundle.source.path / base)]
                return spec
        return None

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        assert spec is not None
        bundle = self._bundles[spec.name.partition(".")[0]]
        name: str = spec.loader_state
        self._show(spec.name.partition(".")[0], bundle.code[name].co_filename, bundle.files[name])
        exec(bundle.code[name], module.__dict__)

    def _show(self, name: str, path: str, source: bytes) -> None:
        """Have tracebacks show *source* for *path*: Python itself would read the file as it is now."""
        try:
            lines = importlib.util.decode_source(source).splitlines(keepends=True)
        except (SyntaxError, UnicodeDecodeError):
            return
        self._shown[path] = name
        linecache.cache[path] = (len(source), None, lines, path)

    def get_source(self, fullname: str) -> str | None:
        """The source as it was loaded, for tracebacks."""
        spec = self.find_spec(fullname, None)
        if spec is None:
            return None
        return self._bundles[fullname.partition(".")[0]].files[spec.loader_state].decode("utf-8", "replace")


async def _in_thread(work: Callable[[], Any], generation: Generation, timeout_s: float) -> Any:
    """Run *work* in a thread of its own. On a timeout the thread is interrupted with an exception and let go."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Any] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if done.done():
            return
        if error is None:
            done.set_result(result)
        else:
            done.set_exception(_Carried(error))

    def run() -> None:
        CURRENT.set(generation)
        try:
            result = work()
        except BaseException as exc:  # carried to the loop, where it is judged
            _post(loop, settle, None, exc)
        else:
            _post(loop, settle, result, None)

    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(run,), name=f"load-{generation.plugin}", daemon=True)
    thread.start()
    try:
        async with asyncio.timeout(timeout_s):
            return await done
    except _Carried as carried:
        if isinstance(carried.error, asyncio.CancelledError):  # the module's own: nobody cancelled the load
            raise RuntimeError("the module raised CancelledError") from None
        raise carried.error from None
    except TimeoutError:
        if thread.ident is not None:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
        raise


def _post(loop: asyncio.AbstractEventLoop, call: Callable[..., None], *args: Any) -> None:
    try:
        loop.call_soon_threadsafe(call, *args)
    except RuntimeError:
        pass  # the loop has closed: nobody waits


class _Carried(Exception):
    """Brings an exception that a Future would not take (StopIteration, SystemExit) from the thread to the loop."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error


def bind_hooks(
    generation: Generation, module: ModuleType, ctx: Any, stats: Callable[[str, str], CallStats]
) -> dict[str, BoundHook]:
    """The module's hooks, checked by pluggy against the specification. Raises `LoadFailed` with the line."""
    manager = new_plugin_manager()
    try:
        manager.register(module, name=generation.plugin)
        manager.check_pending()
    except pluggy.PluginValidationError as exc:
        named = re.search(r"hook '(\w+)'", str(exc))
        function = getattr(module, named[1], None) if named else None
        raise _wrong(generation, module, "hooks", _in_plain_words(named[1] if named else "", exc), function) from None
    hooks: dict[str, BoundHook] = {}
    for name in HOOKS:
        for impl in getattr(manager.hook, name).get_hookimpls():
            function = impl.function
            generator = inspect.isasyncgenfunction(function)
            if not generator and not inspect.iscoroutinefunction(function):
                raise _wrong(generation, module, "hooks", f"hook '{name}' is not `async def`", function)
            if generator and name != "respond":
                raise _wrong(
                    generation,
                    module,
                    "hooks",
                    f"hook '{name}' has a `yield`; only respond may stream so",
                    function,
                )
            if impl.wrapper or impl.hookwrapper:
                raise _wrong(
                    generation,
                    module,
                    "hooks",
                    f"hook '{name}' is a pluggy wrapper; write a middleware",
                    function,
                )
            call = _adapt(function, impl.argnames, _SPECS[name], ctx)
            hooks[name] = BoundHook(name, call, generator, stats(generation.plugin, name))
    if not hooks:
        raise _wrong(
            generation,
            module,
            "hooks",
            "it has no hooks; mark an `async def respond(turn)` with @hookimpl",
            None,
        )
    return hooks


def _in_plain_words(hook: str, exc: pluggy.PluginValidationError) -> str:
    """What pluggy found wrong with a hook, and what would be right."""
    if hook in HOOKS:
        return (
            f"hook '{hook}' takes {str(exc).partition('{')[2].partition('}')[0]}; it may take {', '.join(_SPECS[hook])}"
        )
    if hook:
        near = difflib.get_close_matches(hook, HOOKS, 1)
        return f"there is no hook '{hook}'" + (
            f"; did you mean '{near[0]}'?" if near else f"; there are {', '.join(HOOKS)}"
        )
    return str(exc).strip().splitlines()[-1]


_SPECS = {
    name: tuple(inspect.signature(getattr(new_plugin_manager().hook, name).spec.function).parameters)[1:]
    for name in HOOKS
}


def _adapt(function: Callable[..., Any], takes: tuple[str, ...], spec: tuple[str, ...], ctx: Any) -> Callable[..., Any]:
    """A callable of the spec's arguments without `ctx`, which passes on just those that *function* takes."""
    given = spec[1:]
    if takes == given:
        return function
    if takes == spec:
        return lambda *args: function(ctx, *args)
    picks = tuple(-1 if name == "ctx" else given.index(name) for name in takes)
    return lambda *args: function(*[ctx if pick < 0 else args[pick] for pick in picks])


def _wrong(
    generation: Generation, module: ModuleType, step: str, problem: str, function: Callable[..., Any] | None
) -> LoadFailed:
    code = getattr(function, "__code__", None)
    return LoadFailed(
        generation.plugin,
        step,
        problem,
        file=code.co_filename if code else getattr(module, "__file__", None),
        line=code.co_firstlineno if code else None,
    )
