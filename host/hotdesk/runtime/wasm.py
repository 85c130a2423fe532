"""Runs components: an engine, the clock that ends what runs too long, and instances, each on a thread of its own.

What the wasmtime package does not do safely is not used: a host function's exception could end the process or come up
in another thread's call, so host functions here are called from C directly, and nothing that they raise gets past
`Machine._on_call`. A Store is made, used and closed on one thread. An instance that trapped is thrown away.
"""

from __future__ import annotations

import asyncio
import contextvars
import ctypes
import itertools
import re
import threading
import time
from collections.abc import Callable, Mapping
from queue import Empty, SimpleQueue
from typing import Any

import wasmtime
import wasmtime._bindings
import wasmtime._ffi
from wasmtime.component import Component, ComponentInstanceType, Linker

from ..errors import LoadFailed
from .nearness import Nearness
from .wasm_calls import DONE, FAILED, OPERATION, STOP, GuestCall, GuestFault, GuestTimeout, Stopped
from .wit_contract import EXPORTS, IMPORTS, PACKAGE, words
from .wit_engine import TICK_S, build_key, new_engine
from .wit_inspect import Inspected
from .wit_values import Arguments, TooMuch, describe, read_values, release, write_value

__all__ = ["Code", "Instance", "Machine"]

CHECK_TICKS = 2
"""After how many ticks a running guest is looked at again. Each look needs the interpreter for some microseconds."""

PROOF_S = 2.0
"""How long the proof that a guest can be stopped may take, on a machine that does other things too."""

CALLS_AT_ONCE, REST_S = 250, 0.0002
"""After so many calls of the host in one call of its own, a guest rests before each. One that asks for ever would take
the interpreter back as soon as it gives it up, and the loop would wait milliseconds for each of its turns."""

MAX_ITEMS = 100
"""Functions and types of one interface; those of the contract have eleven at most."""

MAX_MEMORIES, MAX_INSTANCES, MAX_TABLES, MAX_TABLE_ELEMENTS = 4, 64, 64, 200_000
"""A component is made of several core instances (adapters, shims); each of its memories may be `wasm_memory_bytes`."""

ffi: Any = wasmtime._ffi

_addressof = ctypes.addressof
_HostFunction = ctypes.CFUNCTYPE(
    ctypes.c_size_t,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_void_p,
    ctypes.c_size_t,
)
_EpochFunction = ctypes.CFUNCTYPE(
    ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint64), ctypes.c_void_p
)
_Finalizer = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_NO_FINALIZER = _Finalizer()


class Ticker:
    """Moves the engine's epoch while any guest runs. A daemon thread, which rests while none does."""

    def __init__(self, engine: wasmtime.Engine) -> None:
        self._engine = engine
        self._running: set[object] = set()
        self._wake = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._tick, name="wasm-epochs", daemon=True)
        contextvars.Context().run(self._thread.start)

    def _tick(self) -> None:
        while not self._closed:
            self._wake.wait()
            if not self._running:
                self._wake.clear()
                if self._running:  # it began between the look and the clear
                    self._wake.set()
                continue
            time.sleep(TICK_S)
            self._engine.increment_epoch()

    def begin(self, one: object) -> None:
        self._running.add(one)
        if not self._wake.is_set():
            self._wake.set()

    def end(self, one: object) -> None:
        self._running.discard(one)

    def close(self) -> None:
        self._closed = True
        self._running.add(self)
        self._wake.set()
        self._thread.join(1.0)


class Code:
    """A component, compiled and checked against the contract: what instances are made of."""

    def __init__(self, component: Component, inspected: Inspected, linker: Linker) -> None:
        self.component = component
        self.inspected = inspected
        self.linker = linker
        """What it may import. One that imports more than the contract has its own: each such function traps."""

        self.emits = False
        """Whether it imports `base.emit`, so that its bot may stream."""

        self.functions: dict[str, Any] = {}
        """By "interface.function": the index that finds it in an instance."""

        for interface in inspected.exports:
            parent = component.get_export_index(f"{PACKAGE}/{interface}@{inspected.version}")
            for name in EXPORTS[interface]:
                index = component.get_export_index(name, parent) if parent is not None else None
                if index is not None:
                    self.functions[f"{interface}.{name}"] = index


class Machine:
    """The engine of one host, its linker and its ticker. Blocks: made in a thread.

    *functions* has a Python function for each of `IMPORTS`, by "interface.function"; it is called on the instance's
    thread with the instance first.
    """

    def __init__(self, functions: Mapping[str, Callable[..., Any]], *, memory_bytes: int, output_bytes: int) -> None:
        self.engine = new_engine()
        self.key = build_key()
        self.memory_bytes = memory_bytes
        self.output_bytes = output_bytes
        self.instances: set[Instance] = set()
        """Those whose Store is alive."""

        self._by_context: dict[int, Instance] = {}
        self._by_number: dict[int, Instance] = {}
        self._numbers = itertools.count(1)
        self._called = _HostFunction(self._on_call)
        self._epoch = _EpochFunction(self._on_epoch)
        self._table: list[tuple[str, Callable[..., Any], Any]] = []
        self.ticker = Ticker(self.engine)
        self._prove_epochs()
        for interface, table in IMPORTS.items():
            self._table += [
                (f"{interface}.{name}", functions[f"{interface}.{name}"], one.result) for name, one in table.items()
            ]
        self._linker = self._new_linker()

    def close(self) -> None:
        """When all instances have ended."""
        self.ticker.close()

    # -- code ------------------------------------------------------------------------------------------------

    def load(self, plugin: str, native: bytes, inspected: Inspected, file: str) -> Code:
        """Native code of the host's own making, checked against the contract. Raises `LoadFailed`. Blocks."""
        try:
            component = Component.deserialize(self.engine, native)
        except wasmtime.WasmtimeError as exc:
            raise LoadFailed(plugin, "compile", f"its native code does not fit: {_first_line(exc)}", file=file) from exc
        problem = self._mismatch(component, inspected)
        if problem is not None:
            raise LoadFailed(plugin, "inspect", problem, file=file)
        code = Code(component, inspected, self._linker)
        if "base" in inspected.imports:
            base: Any = component.type.imports(self.engine)[f"{PACKAGE}/base@{inspected.version}"].ty
            code.emits = "emit" in base.exports(self.engine)
        if inspected.foreign:
            code.linker = self._new_linker()
            code.linker.define_unknown_imports_as_traps(component)
        return code

    def _mismatch(self, component: Component, inspected: Inspected) -> str | None:
        """Where the component's own idea of the contract is another; None where it is the same."""
        kind: Any = component.type
        for side, table, found in (
            ("exports", EXPORTS, kind.exports(self.engine)),
            ("imports", IMPORTS, kind.imports(self.engine)),
        ):
            chosen = inspected.exports if side == "exports" else inspected.imports
            for interface in chosen:
                item = found.get(f"{PACKAGE}/{interface}@{inspected.version}")
                inside = None if item is None else item.ty
                if not isinstance(inside, ComponentInstanceType):
                    return f"it {side} '{interface}', but not as an interface"
                count = ffi.wasmtime_component_instance_type_export_count(inside.ptr(), self.engine.ptr())
                if count > MAX_ITEMS:  # looking at each of a hundred thousand would take minutes
                    return f"it {side} {interface} with {count:,} items, which the contract does not have"
                items: dict[str, Any] = dict(inside.exports(self.engine))
                functions = {name: one for name, one in items.items() if type(one.ty).__name__ == "FuncType"}
                for name in functions.keys() - table[interface].keys():
                    return f"it {side} {interface}.{name}, which the contract does not have"
                if side == "exports" and (missing := table[interface].keys() - functions.keys()):
                    return f"it exports the interface '{interface}' without its function '{min(missing)}'"
                for name, function in functions.items():
                    want = table[interface][name]
                    has = [describe(one) for _, one in function.ty.params], function.ty.result
                    result = None if has[1] is None else describe(has[1])
                    wants = [words(one) for one in want.parameters]
                    if (has[0], result) != (wants, None if want.result is None else words(want.result)):
                        return (
                            f"its {interface}.{name} takes ({', '.join(has[0])[:500]}) and gives"
                            f" {(result or 'nothing')[:500]};"
                            f" {PACKAGE}@{inspected.version} says ({', '.join(wants)}) and {words(want.result)}"
                        )
        return None

    # -- what guests import ----------------------------------------------------------------------------------

    def _new_linker(self) -> Linker:
        """A linker with all that the contract offers."""
        linker = Linker(self.engine)
        callback = ctypes.cast(self._called, ffi.wasmtime_component_func_callback_t)
        number = 0
        with linker.root() as root:
            for interface, table in IMPORTS.items():
                with root.add_instance(f"{PACKAGE}/{interface}@1.0.0") as instance:
                    for name in table:
                        number += 1
                        raw = name.encode()
                        error = ffi.wasmtime_component_linker_instance_add_func(
                            instance.ptr(), raw, len(raw), callback, number, _NO_FINALIZER
                        )
                        if error:
                            raise wasmtime.WasmtimeError._from_ptr(error)
        return linker

    def _on_call(
        self, number: int, context: int, kind: int, arguments: int, count: int, results: int, result_count: int
    ) -> int:
        """A guest calls. Whatever happens, nothing is raised from here: an error's address is returned, or 0."""
        try:
            _name, function, shape = self._table[number - 1]
            instance = self._by_context[context]
            instance.asked += 1
            if instance.asked > CALLS_AT_ONCE:
                time.sleep(REST_S)
            values = read_values(arguments, count, self.output_bytes) if count else []
            result = function(instance, *values)
            if shape is not None:
                write_value(results, shape, result)
            return 0
        except Stopped:
            instance.stopped = True
            return _error("hotdesk: stopped")
        except TooMuch as exc:
            return _error(f"hotdesk: {exc}")
        except BaseException as exc:  # the wall between Python and C; the guest traps, its call fails
            return _error(f"hotdesk: host function failed: {type(exc).__name__}: {exc}")

    def _on_epoch(self, context: int, number: int, delta: Any, kind: int) -> int:
        """The epoch moved past what a guest may run without a look. Nothing is raised from here either."""
        try:
            instance = self._by_number[number]
            call = instance.call
            if call is None or call.cancelled or time.monotonic() >= call.deadline:
                instance.stopped = True
                return _error("hotdesk: stopped")
            delta[0] = CHECK_TICKS
            ctypes.c_uint8.from_address(kind).value = 0  # go on
            return 0
        except BaseException:
            return _error("hotdesk: stopped")

    def _prove_epochs(self) -> None:
        """Stop an endless loop; a machine on which that can't be done runs no guests. Raises `RuntimeError`."""
        module = wasmtime.Module(self.engine, '(module (func (export "run") (loop (br 0))))')
        store = wasmtime.Store(self.engine)
        store.set_epoch_deadline(1)
        run: Any = wasmtime.Instance(store, module, []).exports(store)["run"]
        ended = threading.Event()

        def loop() -> None:
            try:
                run(store)
            except (wasmtime.Trap, wasmtime.WasmtimeError):
                ended.set()

        self.ticker.begin(self)
        thread = threading.Thread(target=loop, name="wasm-proof", daemon=True)
        contextvars.Context().run(thread.start)
        stopped = ended.wait(PROOF_S)
        self.ticker.end(self)
        if not stopped:
            raise RuntimeError("guests can't be stopped on this machine: the epoch does not move")
        thread.join()
        store.close()


def _error(text: str) -> int:
    made = ffi.wasmtime_error_new(text.encode("utf-8", "replace").replace(b"\0", b"?"))
    return ctypes.cast(made, ctypes.c_void_p).value or 0


class Instance:
    """One instance of a component, with a Store of its own, on a thread of its own. Calls come one at a time."""

    def __init__(self, machine: Machine, code: Code, name: str, loop: asyncio.AbstractEventLoop, owner: Any) -> None:
        self.owner = owner
        self.call: GuestCall | None = None
        self.dead = False
        self.doomed = False
        """Its call was given up: it ends as soon as it notices."""

        self.asked = 0
        """Calls of the host in the call at hand."""

        self.stopped = False
        """The host ended the call at hand. Not read from the trap's text: names in there are the guest's."""

        self.settings = 0
        """Which of its owner's configs it has."""

        self.ended: asyncio.Future[None] = loop.create_future()
        self._machine = machine
        self.code = code
        self._loop = loop
        self._calls: SimpleQueue[GuestCall | None] = SimpleQueue()
        self._answers: SimpleQueue[Any] = SimpleQueue()
        self._functions: dict[str, tuple[Any, Arguments, bool]] = {}
        self._number = next(machine._numbers)
        self.nearness: Nearness | None = None
        """Set once its thread runs."""

        self._thread = threading.Thread(target=self._run, name=f"wasm-{name}", daemon=True)
        contextvars.Context().run(self._thread.start)

    def submit(self, call: GuestCall | None) -> None:
        """Have *call* made; None ends the instance."""
        self._calls.put(call)

    def answer(self, answer: Any) -> None:
        """What a host function that is asked for gives."""
        self._answers.put(answer)

    def ask(self, operation: str, *arguments: Any) -> Any:
        """Have the loop do *operation*, and wait. For host functions, on this instance's thread. Raises `Stopped`."""
        call = self.call
        assert call is not None
        if not call.say((OPERATION, (operation, arguments))):
            raise Stopped
        while True:
            left = None if call.resting else call.deadline - time.monotonic()
            try:
                answer = self._answers.get(timeout=None if left is None else max(0.001, left))
                break
            except Empty:
                if not call.resting and time.monotonic() >= call.deadline:
                    raise Stopped from None
        if answer is STOP:
            raise Stopped
        return answer

    # -- on its thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        store: wasmtime.Store | None = None
        self.nearness = Nearness()
        try:
            while (call := self._calls.get()) is not None and not self.dead:
                try:
                    if store is None:
                        store = self._open(call)
                        result = None
                    else:
                        result = self._invoke(store, call)
                except BaseException as exc:  # the wall of a thread: whoever called is told, and this one ends
                    self.dead = True
                    call.say((FAILED, exc.with_traceback(None)))  # the frames of this thread end here
                    break
                call.say((DONE, result))
                del call, result
        finally:
            self.dead = True
            self._functions.clear()
            if store is not None:
                self._machine._by_context.pop(self._context, None)
                store.close()
                del store
            self._machine._by_number.pop(self._number, None)
            self._machine.instances.discard(self)
            try:
                self._loop.call_soon_threadsafe(self._end)
            except RuntimeError:
                pass  # the loop has closed

    def _end(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)

    def _open(self, call: GuestCall) -> wasmtime.Store:
        machine = self._machine
        store = wasmtime.Store(machine.engine)
        machine.instances.add(self)
        try:
            store.set_limits(
                memory_size=machine.memory_bytes,
                table_elements=MAX_TABLE_ELEMENTS,
                instances=MAX_INSTANCES,
                tables=MAX_TABLES,
                memories=MAX_MEMORIES,
            )
            self._pointer = store._context()
            self._context = ctypes.cast(self._pointer, ctypes.c_void_p).value or 0
            machine._by_context[self._context] = self
            machine._by_number[self._number] = self
            _set_epoch(store, machine._epoch, self._number)
            self._guarded(call, lambda: self._instantiate(store))
        except BaseException:
            machine._by_context.pop(self._context, None)
            store.close()
            machine.instances.discard(self)
            raise
        return store

    def _instantiate(self, store: wasmtime.Store) -> Any:
        instance = ffi.wasmtime_component_instance_t()
        error = ffi.wasmtime_component_linker_instantiate(
            self.code.linker.ptr(), self._pointer, self.code.component.ptr(), ctypes.byref(instance)
        )
        if not error:
            self._raw = instance
        return error

    def _find(self, name: str) -> tuple[Any, Arguments, bool]:
        interface, _, function = name.partition(".")
        shape = EXPORTS[interface][function]
        found = ffi.wasmtime_component_func_t()
        index = self.code.functions[name]
        if not ffi.wasmtime_component_instance_get_func(
            ctypes.byref(self._raw), self._pointer, index.ptr(), ctypes.byref(found)
        ):
            raise GuestFault(f"{name} is not in the instance")
        parameters = [
            tuple(field for field, _ in one[1]) if isinstance(one, tuple) else one for one in shape.parameters
        ]
        made = found, Arguments(parameters), shape.result is not None
        self._functions[name] = made
        return made

    def _invoke(self, store: wasmtime.Store, call: GuestCall) -> Any:
        function, arguments, gives = self._functions.get(call.name) or self._find(call.name)
        arguments.fill(call.arguments)
        result = ffi.wasmtime_component_val_t() if gives else None
        self._guarded(
            call,
            lambda: ffi.wasmtime_component_func_call(
                ctypes.byref(function),
                self._pointer,
                arguments.pointer,
                arguments.count,
                None if result is None else ctypes.byref(result),
                1 if gives else 0,
            ),
        )
        arguments.shrink()
        if result is None:
            return None
        try:
            return read_values(_addressof(result), 1, self._machine.output_bytes)[0]
        except (TooMuch, UnicodeDecodeError, TypeError) as exc:
            raise GuestFault(str(exc)) from None
        finally:
            release(result)

    def _guarded(self, call: GuestCall, run: Callable[[], Any]) -> None:
        """Let the guest run until it is done, or its deadline is over. Raises `GuestTimeout` or `GuestFault`."""
        if call.cancelled:
            raise GuestTimeout
        self.call = call
        self.asked = 0
        self.stopped = False
        ffi.wasmtime_context_set_epoch_deadline(self._pointer, 1)
        ticker = self._machine.ticker
        ticker.begin(self)
        try:
            error = run()
        finally:
            ticker.end(self)
            self.call = None
        if not error:
            return
        text = str(wasmtime.WasmtimeError._from_ptr(error))
        if call.cancelled or self.stopped:
            raise GuestTimeout
        raise GuestFault(_trap_in_words(text))


def _set_epoch(store: wasmtime.Store, callback: Any, number: int) -> None:
    """Have *callback* asked, with *number*, when the store's epoch deadline is over."""
    set_callback: Any = wasmtime._bindings._wasmtime_store_epoch_deadline_callback
    set_callback(store.ptr(), ctypes.cast(callback, set_callback.argtypes[1]), number, _NO_FINALIZER)


def _first_line(exc: BaseException) -> str:
    return next((line.strip() for line in str(exc).splitlines() if line.strip()), type(exc).__name__)


def _trap_in_words(text: str) -> str:
    """A trap's reason, and the innermost function of the guest that has a name."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    reason = lines[-1] if lines else "it trapped"
    reason = re.sub(r"^\d+: ", "", reason)
    reason = reason.removeprefix("wasm trap: ").removeprefix("hotdesk: ")
    for line in lines:
        number, _, rest = line.partition(":")
        if number.isdigit() and "!" in rest:
            name = rest.rpartition("!")[2].strip()
            if name and not name.startswith("<"):
                return f"{reason}, in {name[:200]}"
    return reason[:500]
