"""The component model's values, between Python and the memory that wasmtime's C API describes them in.

The wasmtime package converts by reflecting each type at each call, one ctypes access a field. Here a function's
arguments are laid out once and then only filled in, and a result is read a block at a time: a record-rich call costs a
tenth. Layouts are taken from the package's own declarations, so that a release that changes one is noticed at import.

In Python a record is a tuple of its fields, a variant `(case, payload)`, a result `(ok, payload)`, an option its
payload or None, an enum its case.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from typing import Any

import wasmtime._ffi

__all__ = ["Arguments", "TooMuch", "describe", "read_values", "release", "write_value"]

ffi: Any = wasmtime._ffi

VALUE = ctypes.sizeof(ffi.wasmtime_component_val_t)
ENTRY = ctypes.sizeof(ffi.wasmtime_component_valrecord_entry_t)
BOOL, U16, U32 = (getattr(ffi, f"WASMTIME_COMPONENT_{name}").value for name in ("BOOL", "U16", "U32"))
STRING, LIST, RECORD = (getattr(ffi, f"WASMTIME_COMPONENT_{name}").value for name in ("STRING", "LIST", "RECORD"))
VARIANT, ENUM, OPTION, RESULT = (
    getattr(ffi, f"WASMTIME_COMPONENT_{name}").value for name in ("VARIANT", "ENUM", "OPTION", "RESULT")
)

if (
    (VALUE, ENTRY, ctypes.sizeof(ffi.wasm_byte_vec_t), ffi.wasmtime_component_val_t.of.offset) != (32, 48, 16, 8)
    or ffi.wasmtime_component_valrecord_entry_t.val.offset != 16
    or ffi.wasmtime_component_valvariant_t.val.offset != 16
    or ffi.wasmtime_component_valresult_t.val.offset != 8
):
    raise ImportError("this release of wasmtime lays its values out in another way; hotdesk needs wasmtime 50")

_value = struct.Struct("<B7xQQQ")
"""A value: its kind, then what is in it. A text, list or record: size, address. A variant: its case's size and
address, then its payload's address. A result: whether it is fine, its payload's address. An option: its payload's."""

_entry = struct.Struct("<QQB7xQQQ")
"""A record's field: its name's size and address, and its value."""

_words = struct.Struct("<QQQ")
_pair = struct.Struct("<QQ")

string_at, addressof = ctypes.string_at, ctypes.addressof


MOST_PARTS = 60
"""Of a type that is compared; those of the contract have 15 at most."""


class TooMuch(ValueError):
    """A guest gave more than the limit; it was not copied."""

    def __init__(self, size: int, limit: int) -> None:
        super().__init__(f"it gave a text or list of {size:,} bytes; the limit is {limit:,}")


def read_values(address: int, count: int, limit: int) -> list[Any]:
    """The *count* values at *address*. Raises `TooMuch` before a text over *limit* bytes is copied, or a list that
    takes more."""
    block = string_at(address, count * VALUE)
    return [_read(limit, *fields) for fields in _value.iter_unpack(block)]


def _read(limit: int, kind: int, first: int, second: int, third: int) -> Any:
    if kind == STRING:
        return _text(first, second, limit)
    if kind == RECORD:
        block = string_at(second, first * ENTRY)
        return tuple([_read(limit, *fields[2:]) for fields in _entry.iter_unpack(block)])
    if kind == VARIANT:
        case = _text(first, second, limit)
        return case, (_read(limit, *_value.unpack(string_at(third, VALUE))) if third else None)
    if kind == RESULT:
        fine = bool(first & 0xFF)
        return fine, (_read(limit, *_value.unpack(string_at(second, VALUE))) if second else None)
    if kind == OPTION:
        return _read(limit, *_value.unpack(string_at(first, VALUE))) if first else None
    if kind == LIST:
        if first * VALUE > limit:
            raise TooMuch(first * VALUE, limit)
        return _items(first, second, limit)
    if kind == BOOL:
        return bool(first & 0xFF)
    if kind == U16:
        return first & 0xFFFF
    if kind == U32:
        return first & 0xFFFFFFFF
    if kind == ENUM:
        return _text(first, second, limit)
    raise TypeError(f"a value of kind {kind} is not in the contract")


def _items(count: int, address: int, limit: int) -> list[Any]:
    """A list, which takes at most *limit* bytes with all that is in it: a short one may hold long texts, many times."""
    left = limit
    found = []
    for fields in _value.iter_unpack(string_at(address, count * VALUE)):
        item = _read(left, *fields)
        left -= VALUE + (len(item) if isinstance(item, str) else _weight(item))
        if left < 0:
            raise TooMuch(limit - left, limit)
        found.append(item)
    return found


def _weight(item: Any) -> int:
    return sum(ENTRY + len(field) for field in item if isinstance(field, str)) if isinstance(item, tuple) else 0


def _text(size: int, address: int, limit: int) -> str:
    if size > limit:
        raise TooMuch(size, limit)
    return string_at(address, size).decode() if size else ""


class Arguments:
    """The arguments of one function, laid out once and filled in for each call. For one thread, one call at a time.

    *shape* has an item for each: "string", "bool", or the names of a record's fields, all of them texts.
    """

    def __init__(self, shape: Sequence[str | tuple[str, ...]]) -> None:
        fields = [item for item in shape if isinstance(item, tuple)]
        names = [name.encode() for record in fields for name in record]
        size = len(shape) * VALUE + sum(map(len, fields)) * ENTRY
        self._memory = ctypes.create_string_buffer(size + sum(map(len, names)))
        self._fixed = fixed = memoryview(self._memory).cast("B")
        self._shape = tuple(shape)
        self._places: list[int] = []
        """Where the size and address of each text go, or where a bool does."""

        self._texts = ctypes.create_string_buffer(4096)
        self._view = memoryview(self._texts).cast("B")
        base = addressof(self._memory)
        entry_at, name_at = len(shape) * VALUE, size
        for index, item in enumerate(shape):
            at = index * VALUE
            if isinstance(item, tuple):
                fixed[at] = RECORD
                _pair.pack_into(fixed, at + 8, len(item), base + entry_at)
                for name in item:
                    raw = name.encode()
                    fixed[name_at : name_at + len(raw)] = raw
                    _pair.pack_into(fixed, entry_at, len(raw), base + name_at)
                    fixed[entry_at + 16] = STRING
                    self._places.append(entry_at + 24)
                    entry_at, name_at = entry_at + ENTRY, name_at + len(raw)
            else:
                fixed[at] = STRING if item == "string" else BOOL
                self._places.append(at + 8)
        self.count = len(shape)
        self.pointer = ctypes.cast(self._memory, ctypes.POINTER(ffi.wasmtime_component_val_t))

    def fill(self, values: Sequence[Any]) -> None:
        """Put *values* in: texts, bools, and records as tuples of texts. They are copied."""
        flat: list[Any] = []
        for item, value in zip(self._shape, values, strict=True):
            if isinstance(item, tuple):
                flat += value
            else:
                flat.append(value)
        texts = [value.encode("utf-8", "replace") if isinstance(value, str) else value for value in flat]
        needed = sum(len(text) for text in texts if isinstance(text, bytes))
        if needed > len(self._view):
            self._view.release()
            self._texts = ctypes.create_string_buffer(needed * 2)
            self._view = memoryview(self._texts).cast("B")
        base, at, fixed, view = addressof(self._texts), 0, self._fixed, self._view
        for place, text in zip(self._places, texts, strict=True):
            if isinstance(text, bytes):
                end = at + len(text)
                view[at:end] = text
                _pair.pack_into(fixed, place, len(text), base + at)
                at = end
            else:
                fixed[place] = 1 if text else 0

    def shrink(self) -> None:
        """Let go of the room that one large call needed."""
        if len(self._view) > 65536:
            self._view.release()
            self._texts = ctypes.create_string_buffer(4096)
            self._view = memoryview(self._texts).cast("B")


def release(value: Any) -> None:
    """Free what a value read from wasmtime holds."""
    ffi.wasmtime_component_val_delete(ctypes.byref(value))


def write_value(address: int, shape: Any, value: Any) -> None:
    """Make *value* at *address*, owned by wasmtime. *shape* is what `describe` makes of a type, taken apart:

    "string", "u16", "u32", ("option", shape), ("list", shape), ("result", shape or None, shape or None),
    ("record", ((name, shape), ...)), ("variant", {case: shape or None}).
    """
    kind, words = _make(shape, value)
    _value.pack_into((ctypes.c_char * VALUE).from_address(address), 0, kind, *words)


def _make(shape: Any, value: Any) -> tuple[int, tuple[int, int, int]]:
    if shape == "string":
        return STRING, (*_owned_text(value), 0)
    if shape == "u32":
        return U32, (int(value), 0, 0)
    if shape == "u16":
        return U16, (int(value), 0, 0)
    name = shape[0]
    if name == "result":
        fine, payload = value
        inner = shape[1] if fine else shape[2]
        return RESULT, (1 if fine else 0, _boxed(inner, payload) if inner is not None else 0, 0)
    if name == "option":
        return OPTION, (0 if value is None else _boxed(shape[1], value), 0, 0)
    if name == "variant":
        case, payload = value
        inner = shape[1][case]
        return VARIANT, (*_owned_text(case), _boxed(inner, payload) if inner is not None else 0)
    if name == "list":
        items = ffi.wasmtime_component_vallist_t()
        ffi.wasmtime_component_vallist_new_uninit(ctypes.byref(items), len(value))
        at = ctypes.cast(items.data, ctypes.c_void_p).value or 0
        for index, item in enumerate(value):
            write_value(at + index * VALUE, shape[1], item)
        return LIST, (len(value), at, 0)
    if name == "record":
        record = ffi.wasmtime_component_valrecord_t()
        ffi.wasmtime_component_valrecord_new_uninit(ctypes.byref(record), len(shape[1]))
        at = ctypes.cast(record.data, ctypes.c_void_p).value or 0
        for index, ((field, inner), item) in enumerate(zip(shape[1], value, strict=True)):
            entry = at + index * ENTRY
            _pair.pack_into((ctypes.c_char * 16).from_address(entry), 0, *_owned_text(field))
            write_value(entry + 16, inner, item)
        return RECORD, (len(shape[1]), at, 0)
    raise TypeError(f"the contract has no {name}")


def _owned_text(text: str) -> tuple[int, int]:
    raw = text.encode("utf-8", "replace")
    made = ffi.wasm_byte_vec_t()
    ffi.wasm_byte_vec_new(
        ctypes.byref(made), len(raw), ctypes.cast(ctypes.c_char_p(raw), ctypes.POINTER(ctypes.c_uint8))
    )
    size, address = _pair.unpack(string_at(addressof(made), 16))
    return size, address


def _boxed(shape: Any, value: Any) -> int:
    made = ctypes.create_string_buffer(VALUE)
    write_value(addressof(made), shape, value)
    boxed = ffi.wasmtime_component_val_new(ctypes.cast(made, ctypes.POINTER(ffi.wasmtime_component_val_t)))
    return ctypes.cast(boxed, ctypes.c_void_p).value or 0


def describe(given: Any, room: list[int] | None = None) -> str:
    """A reflected type in the words of WIT, so that two can be compared; names of types are left out.

    A type can be short to write and have a million parts: what is over `MOST_PARTS` is left out.
    """
    room = [MOST_PARTS] if room is None else room
    room[0] -= 1
    if room[0] < 0:
        return "..."
    kind = type(given).__name__
    simple = {"String": "string", "Bool": "bool"}
    if kind in simple:
        return simple[kind]
    if kind == "RecordType":
        return "record{" + ",".join(f"{name}:{describe(one, room)}" for name, one in given.fields[:MOST_PARTS]) + "}"
    if kind == "VariantType":
        return "variant{" + ",".join(f"{name}{_payload(one, room)}" for name, one in given.cases[:MOST_PARTS]) + "}"
    if kind == "EnumType":
        return "enum{" + ",".join(given.names[:MOST_PARTS]) + "}"
    if kind == "ListType":
        return f"list<{describe(given.element, room)}>"
    if kind == "OptionType":
        return f"option<{describe(given.payload, room)}>"
    if kind == "ResultType":
        fine, error = ("_" if one is None else describe(one, room) for one in (given.ok, given.err))
        return f"result<{fine},{error}>"
    return kind.removesuffix("Type").lower()


def _payload(given: Any, room: list[int]) -> str:
    return "" if given is None else f"({describe(given, room)})"
