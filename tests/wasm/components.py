"""Components for tests, from WebAssembly text: small, hostile where a test wants it, and no toolchain needed.

`component` wraps functions of a core module as exports of the contract's interfaces. The core module has a memory, a
`realloc` that only grows, and the helpers of `PRELUDE`; what is given by a function's name is the body of that export.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import wasmtime

from hotdesk.runtime.wit_contract import EXPORTS as CONTRACT

__all__ = [
    "DATA",
    "DEEP",
    "DEEPLY",
    "EXPORTS",
    "FOREIGN",
    "LOOP",
    "NEXT",
    "PACKAGE",
    "RESULT",
    "TRAP",
    "ZERO",
    "answering",
    "component",
    "escaped",
    "giving",
    "giving_back",
    "leb",
    "section",
    "text",
    "when_shouted",
]

VERSION = "1.0.0"
PACKAGE = "hotdesk:plugin"

TYPES = {
    "turn": '(record (field "id" string) (field "conversation" string) (field "text" string) (field "extra" string))',
    "reply": '(record (field "text" string) (field "extra" string))',
    "handover": '(record (field "reason" string) (field "text" string))',
    "decision": (
        '(variant (case "next") (case "leave") (case "rewrite" string) (case "answer" $reply)'
        ' (case "hand-over" $handover) (case "drop" string) (case "model" string) (case "other" string))'
    ),
    "error": (
        '(variant (case "denied" string) (case "invalid" string) (case "too-large" string) (case "timeout" string)'
        ' (case "unavailable" string) (case "other" string))'
    ),
    "tool": (
        '(record (field "name" string) (field "description" string) (field "parameters" string) (field "extra" string))'
    ),
    "request": (
        '(record (field "method" string) (field "path" string) (field "query" string) (field "headers" string)'
        ' (field "body" string) (field "extra" string))'
    ),
    "inbound": (
        '(record (field "conversation" string) (field "text" string) (field "id" string) (field "extra" string))'
    ),
    "response": '(record (field "status" u16) (field "headers" string) (field "body" string) (field "extra" string))',
    "intake-result": '(record (field "messages" (list $inbound)) (field "answer" $response))',
    "piece": '(record (field "text" string) (field "held" string))',
    "level": '(enum "debug" "info" "warning" "error")',
}

USES = {  # the types that a type is made of, itself last
    "decision": ("reply", "handover", "decision"),
    "intake-result": ("inbound", "response", "intake-result"),
}

DECIDES = "(result (result $decision (error string)))"
FINE = "(result (result (error string)))"

EXPORTS = {  # interface: functions, each (component type, core type), and the types used
    "middleware": (
        ("turn", "decision"),
        {
            "before": (f'(param "turn" $turn) {DECIDES}', 8, "i32"),
            "after": (f'(param "turn" $turn) (param "reply" $reply) {DECIDES}', 12, "i32"),
        },
    ),
    "chunks": (
        ("turn", "piece"),
        {
            "transform": (
                '(param "turn" $turn) (param "text" string) (param "last" bool)'
                " (result (result $piece (error string)))",
                11,
                "i32",
            )
        },
    ),
    "bot": (("turn", "decision"), {"respond": (f'(param "turn" $turn) {DECIDES}', 8, "i32")}),
    "tools": (
        ("tool",),
        {
            "list-tools": ("(result (list $tool))", 0, "i32"),
            "call-tool": (
                '(param "name" string) (param "arguments" string) (result (result string (error string)))',
                4,
                "i32",
            ),
        },
    ),
    "intake": (
        ("request", "intake-result"),
        {"receive": ('(param "request" $request) (result (result $intake-result (error string)))', 12, "i32")},
    ),
    "delivery": (
        ("reply",),
        {"deliver": (f'(param "conversation" string) (param "reply" $reply) {FINE}', 6, "i32")},
    ),
    "events": ((), {"on-event": ('(param "name" string) (param "data" string)', 4, "")}),
    "lifecycle": (
        (),
        {
            "setup": (f'(param "config" string) {FINE}', 2, "i32"),
            "configure": ('(param "config" string) (result (result bool (error string)))', 2, "i32"),
            "probe": (FINE, 0, "i32"),
            "export-state": ("(result (option string))", 0, "i32"),
            "import-state": (f'(param "state" string) (param "version" string) {FINE}', 4, "i32"),
        },
    ),
}

IMPORTS = {  # interface: types used, and functions: (component type, core parameters, core result)
    "base": (
        ("error", "level"),
        {
            "log": ('(param "level" $level) (param "event" string) (param "fields" string)', 5, ""),
            "config": ("(result string)", 1, ""),
            "time-left": ("(result u32)", 0, "i32"),
            "emit": ('(param "text" string) (result (result (error $error)))', 3, ""),
            "state-get": ('(param "key" string) (result (result (option string) (error $error)))', 3, ""),
            "state-set": (
                '(param "key" string) (param "value" (option string)) (result (result (error $error)))',
                6,
                "",
            ),
            "history": ('(param "limit" u32) (result (result string (error $error)))', 2, ""),
            "send": (
                '(param "conversation" string) (param "text" string) (result (result string (error $error)))',
                5,
                "",
            ),
        },
    ),
    "kv": (
        ("error",),
        {
            "get": ('(param "key" string) (result (result (option string) (error $error)))', 3, ""),
            "set": ('(param "key" string) (param "value" string) (result (result (error $error)))', 5, ""),
            "delete": ('(param "key" string) (result (result (error $error)))', 3, ""),
            "keys": ('(param "prefix" string) (result (result (list string) (error $error)))', 3, ""),
        },
    ),
    "llm": (
        ("error",),
        {"complete": ('(param "request" string) (result (result string (error $error)))', 3, "")},
    ),
    "http": (
        ("error", "response"),
        {
            "fetch": (
                '(param "method" string) (param "url" string) (param "headers" string) (param "body" string)'
                " (result (result $response (error $error)))",
                9,
                "",
            )
        },
    ),
}

# Constants at the start of the memory, then the area that results are written to, then the heap.
DATA = 16
RESULT = 8192
HEAP = 16384

PRELUDE = f"""
  (global $heap (mut i32) (i32.const {HEAP}))
  (func $alloc (param $size i32) (result i32)
    (local $at i32)
    (local.set $at (i32.and (i32.add (global.get $heap) (i32.const 7)) (i32.const -8)))
    (global.set $heap (i32.add (local.get $at) (local.get $size)))
    (block $room
      (br_if $room (i32.le_u (global.get $heap) (i32.shl (memory.size) (i32.const 16))))
      (br_if $room (i32.ne (i32.const -1) (memory.grow (i32.add (i32.const 1) (i32.shr_u
        (i32.sub (global.get $heap) (i32.shl (memory.size) (i32.const 16))) (i32.const 16))))))
      (unreachable))
    (local.get $at))
  (func (export "realloc") (param i32 i32 i32 i32) (result i32)
    (local $at i32)
    (local.set $at (call $alloc (local.get 3)))
    (memory.copy (local.get $at) (local.get 0) (local.get 1))
    (local.get $at))
  (func (export "freed") (param i32) (global.set $heap (i32.const {HEAP})))
  (func (export "freed-none") (global.set $heap (i32.const {HEAP})))
"""


def escaped(data: bytes) -> str:
    """*data* as it is written in a text of WAT, whatever the bytes are."""
    return "".join(f"\\{byte:02x}" for byte in data)


def leb(number: int) -> bytes:
    """*number* as an unsigned LEB128, in as few bytes as it takes."""
    made = bytearray()
    while number > 0x7F:
        made.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*made, number])


def section(number: int, body: bytes) -> bytes:
    """The section *number* of a module or component in its binary form."""
    return bytes([number]) + leb(len(body)) + body


def text(name: str, address: int, length: int) -> str:
    """A decision (or any variant case number) with one text of *length* bytes at *address*, as a body's end."""
    case = {"next": 0, "leave": 1, "rewrite": 2, "answer": 3, "drop": 5, "model": 6, "other": 7}[name]
    return (
        f"(i32.store (i32.const {RESULT}) (i32.const 0)) (i32.store (i32.const {RESULT + 4}) (i32.const {case}))"
        f" (i32.store (i32.const {RESULT + 8}) (i32.const {address}))"
        f" (i32.store (i32.const {RESULT + 12}) (i32.const {length}))"
        f" (i32.store (i32.const {RESULT + 16}) (i32.const 0)) (i32.store (i32.const {RESULT + 20}) (i32.const 0))"
        f" (i32.const {RESULT})"
    )


NEXT = text("next", 0, 0)

ZERO = (
    f"(i64.store (i32.const {RESULT}) (i64.const 0)) (i64.store (i32.const {RESULT + 8}) (i64.const 0))"
    f" (i32.const {RESULT})"
)
"""What any function may give that has no more to say: fine, none, no tools."""

FOREIGN = "wasi:cli/exit@0.2.3"

LOOP = "(loop (br 0)) (unreachable)"
"""A body that never ends."""

TRAP = "(unreachable)"

DEEP = "(drop (call $deep (i32.const 0))) (unreachable)"
"""A body that calls itself until the stack is full; needs `DEEPLY` in `more`."""

DEEPLY = (
    "(func $deep (param i32) (result i32) (i32.add (i32.const 1) (call $deep (i32.add (local.get 0) (i32.const 1)))))"
)


def giving_back(body: str) -> str:
    """A *body* that leaves a result, from within another."""
    return f"(return (block (result i32) {body}))"


def when_shouted(body: str, otherwise: str = NEXT) -> str:
    """*body* for a turn whose text begins with an exclamation mark, *otherwise* for others."""
    return f"(if (i32.eq (i32.load8_u (local.get 4)) (i32.const 33)) (then {body})) {otherwise}"


DEFAULTS = {"before": NEXT, "after": NEXT, "respond": NEXT}


def component(
    bodies: Mapping[str, str],
    *,
    imports: Mapping[str, tuple[str, ...]] | None = None,
    data: str = "",
    more: str = "",
    version: str = VERSION,
    memory: str = "1",
    wrap: str = "",
    foreign: bool = False,
    heap: tuple[str, str] = ("", ""),
) -> bytes:
    """A component that exports the interfaces to which the functions in *bodies* belong; the others get a default.

    *imports* are functions of the host's interfaces, callable as `$base.log` and so on. *data* is put at `DATA`, *more*
    into the core module, *wrap* into the component itself. With *foreign* it imports a function of another package,
    callable as `$foreign`. In the helpers, the first text of *heap* is replaced by the second.
    """
    chosen = [name for name, (_, functions) in EXPORTS.items() if functions.keys() & bodies.keys()]
    imported = imports or {}
    out = ["(component"]
    lowered = []
    if foreign:
        out.append(f' (import "{FOREIGN}" (instance $other (export "exit" (func))))')
        out.append(' (core func $foreign (canon lower (func $other "exit")))')
    for name, functions in imported.items():
        used, table = IMPORTS[name]
        out.append(f' (import "{PACKAGE}/{name}@{version}" (instance ${name}')
        out += [
            f'  (type ${one}_ {TYPES[one]}) (export "{one}" (type ${one} (eq ${one}_)))' for one in _with_parts(used)
        ]
        out += [f'  (export "{function}" (func {table[function][0]}))' for function in functions]
        out.append(" ))")
        lowered += [(name, function) for function in functions]
    # The memory and realloc that lowered imports need come from a module of their own.
    out.append(f' (core module $heap_module (memory (export "memory") {memory}) {_HEAP_ONLY.replace(*heap)})')
    out.append(" (core instance $heap (instantiate $heap_module))")
    for name, function in lowered:
        out.append(
            f' (core func ${name}.{function} (canon lower (func ${name} "{function}")'
            ' (memory (core memory $heap "memory")) (realloc (core func $heap "realloc"))))'
        )
    out.append(" (core module $plugin")
    for name, function in lowered:
        _, parameters, result = IMPORTS[name][1][function]
        out.append(f'  (import "{name}" "{function}" (func ${name}.{function} {_core(parameters, result)}))')
    if foreign:
        out.append('  (import "foreign" "exit" (func $foreign))')
    out.append('  (import "heap" "memory" (memory 0))')
    out.append('  (import "heap" "alloc" (func $alloc (param i32) (result i32)))')
    if data:
        out.append(f'  (data (i32.const {DATA}) "{data}")')
    out.append(more)
    for name in chosen:
        for function, (_, parameters, result) in EXPORTS[name][1].items():
            body = bodies.get(function, DEFAULTS.get(function, ZERO if result else ""))
            out.append(
                f'  (func (export "{function}") {_core(parameters, result)} (local $n i32) (local $m i32) {body})'
            )
    out.append(" )")
    out.append(' (core instance $core (instantiate $plugin (with "heap" (instance $heap))')
    if foreign:
        out.append('  (with "foreign" (instance (export "exit" (func $foreign))))')
    for name, functions in imported.items():
        exports = "".join(f' (export "{function}" (func ${name}.{function}))' for function in functions)
        out.append(f'  (with "{name}" (instance{exports}))')
    out.append(" ))")
    for name in chosen:
        out.append(_export(name, version))
    out += [wrap, ")"]
    return bytes(wasmtime.wat2wasm("\n".join(out)))


_HEAP_ONLY = PRELUDE.replace("(func $alloc ", '(func $alloc (export "alloc") ')


def _core(parameters: int, result: str) -> str:
    params = f"(param {' '.join(['i32'] * parameters)})" if parameters else ""
    return f"{params} {f'(result {result})' if result else ''}"


def _with_parts(names: tuple[str, ...]) -> list[str]:
    parts: list[str] = []
    for name in names:
        parts += [one for one in USES.get(name, (name,)) if one not in parts]
    return parts


def _renamed(definition: str, types: list[str], before: str, after: str) -> str:
    """*definition*, with the names of *types* in it between *before* and *after*."""
    for one in types:
        for end in (")", " "):
            definition = definition.replace(f"${one}{end}", f"${before}{one}{after}{end}")
    return definition


def _export(name: str, version: str) -> str:
    """One interface: types are named by going through a component, for only named types may be exported."""
    used, functions = EXPORTS[name]
    types = _with_parts(used)
    prefix = f"{name}-"
    out = [f" (type ${prefix}{one} {_renamed(TYPES[one], types, prefix, '')})" for one in types]
    for function, (signature, _, result) in functions.items():
        outside = _renamed(signature, types, prefix, "")
        options = ' (memory (core memory $heap "memory")) (realloc (core func $heap "realloc"))'
        after = (
            ' (post-return (core func $heap "freed"))' if result else ' (post-return (core func $heap "freed-none"))'
        )
        out.append(f' (func ${prefix}{function} {outside} (canon lift (core func $core "{function}"){options}{after}))')
    out.append(f" (component ${prefix}shim")
    out += [f'  (type ${one}_ {TYPES[one]}) (import "import-type-{one}" (type ${one} (eq ${one}_)))' for one in types]
    for function, (signature, _, _) in functions.items():
        out.append(f'  (import "import-func-{function}" (func ${function}_ {signature}))')
    for one in types:
        definition = _renamed(TYPES[one], types, "", "-out")
        out.append(f'  (type ${one}-again {definition}) (export ${one}-out "{one}" (type ${one}-again))')
    for function, (signature, _, _) in functions.items():
        outside = _renamed(signature, types, "", "-out")
        out.append(f'  (export "{function}" (func ${function}_) (func {outside}))')
    out.append(" )")
    out.append(f" (instance ${prefix}instance (instantiate ${prefix}shim")
    out += [f'  (with "import-type-{one}" (type ${prefix}{one}))' for one in types]
    out += [f'  (with "import-func-{function}" (func ${prefix}{function}))' for function in functions]
    out.append(" ))")
    out.append(f' (export "{PACKAGE}/{name}@{version}" (instance ${prefix}instance))')
    return "\n".join(out)


def answering(said: str) -> bytes:
    """A bot that always says *said*."""
    raw = said.encode()
    return component({"respond": text("answer", DATA, len(raw))}, data=escaped(raw))


class _Memory:
    """Values laid out the way that the component model has them in a memory, from `DATA` on."""

    def __init__(self) -> None:
        self.at = DATA
        self.bytes = bytearray()

    def place(self, raw: bytes) -> int:
        self.bytes += b"\0" * (-len(self.bytes) % 8)
        at = DATA + len(self.bytes)
        self.bytes += raw
        return at

    def value(self, shape: Any, value: Any) -> bytes:
        """*value*, as `wit_values` has values in Python; texts may be bytes that are no UTF-8."""
        if shape == "string":
            raw = value if isinstance(value, bytes) else value.encode()
            return struct.pack("<II", self.place(raw), len(raw))
        if shape in ("u16", "bool"):
            return struct.pack("<H", value) if shape == "u16" else bytes([value])
        kind = shape[0]
        if kind == "record":
            return self._fields(
                [(_alignment(one), self.value(one, v)) for (_, one), v in zip(shape[1], value, strict=True)]
            )
        if kind == "list":
            items = b"".join(self.value(shape[1], one) for one in value)
            return struct.pack("<II", self.place(items), len(value))
        cases, number, payload = _cases(shape, value)
        align = max([1, *(_alignment(one) for one in cases if one is not None)])
        inner = b"" if cases[number] is None else self.value(cases[number], payload)
        size = align + max([0, *(_size(one) for one in cases if one is not None)])
        return (bytes([number]).ljust(align, b"\0") + inner).ljust(size, b"\0")

    @staticmethod
    def _fields(fields: list[tuple[int, bytes]]) -> bytes:
        made = b""
        for align, raw in fields:
            made += b"\0" * (-len(made) % align) + raw
        return made + b"\0" * (-len(made) % max(align for align, _ in fields))


def _cases(shape: Any, value: Any) -> tuple[list[Any], int, Any]:
    """The payloads of a variant, option or result; which case *value* is, and its payload."""
    if shape[0] == "option":
        return [None, shape[1]], int(value is not None), value
    if shape[0] == "result":
        return [shape[1], shape[2]], int(not value[0]), value[1]
    return list(shape[1].values()), list(shape[1]).index(value[0]), value[1]


def _alignment(shape: Any) -> int:
    if isinstance(shape, str):
        return {"string": 4, "u16": 2, "bool": 1}[shape]
    if shape[0] == "list":
        return 4
    parts = [one for _, one in shape[1]] if shape[0] == "record" else _payloads(shape)
    return max([1, *map(_alignment, parts)])


def _size(shape: Any) -> int:
    if isinstance(shape, str):
        return {"string": 8, "u16": 2, "bool": 1}[shape]
    if shape[0] == "list":
        return 8
    align = _alignment(shape)
    if shape[0] == "record":
        size = 0
        for _, one in shape[1]:
            size += -size % _alignment(one) + _size(one)
    else:
        size = align + max([0, *map(_size, _payloads(shape))])
    return size + -size % align


def _payloads(shape: Any) -> list[Any]:
    kind = shape[0]
    given = [shape[1]] if kind == "option" else [shape[1], shape[2]] if kind == "result" else shape[1].values()
    return [one for one in given if one is not None]


def giving(results: Mapping[str, Any], *, instead: Mapping[str, str] | None = None, **options: Any) -> bytes:
    """A component whose functions always give *results*, by "interface.function"; *instead* has bodies of others."""
    memory = _Memory()
    bodies = dict(instead or {})
    for name, value in results.items():
        interface, _, function = name.partition(".")
        at = memory.place(memory.value(CONTRACT[interface][function].result, value))
        bodies[function] = f"(i32.const {at})"
    assert len(memory.bytes) < RESULT - DATA, "too much for the constants' room"
    return component(bodies, data=escaped(bytes(memory.bytes)), **options)
