"""Takes from a component the names that wasmtime would demangle when a guest traps.

A trap's text has the names of the guest's functions, and wasmtime demangles those that look like C++ (`_Z…`). A name of
a kilobyte can be made so that this takes all memory and never ends, in native code that no deadline reaches. So the
first byte of such a name is overwritten before anything is compiled; nothing else changes, no size either. Names of
Rust's own kind (`_R…`) are left: its demangler is bounded.
"""

from __future__ import annotations

from .wit_binary import Cut, read_number

__all__ = ["without_mangled_names"]

CORE_MODULE, COMPONENT = 1, 4
"""Sections of a component that have others inside (the component model's Binary.md)."""

CUSTOM = 0
FUNCTION_NAMES = 1
"""The part of a core module's name section that has them."""


def without_mangled_names(data: bytes) -> bytes:
    """*data*, a component, with names that can't be taken for C++. Raises `ValueError` where it is malformed."""
    out = bytearray(data)
    try:
        _walk(out, 8, len(out), component=True)
    except (Cut, IndexError):
        raise ValueError("a section is cut off") from None
    return bytes(out)


def _walk(data: bytearray, at: int, end: int, *, component: bool) -> None:
    while at < end:
        kind = data[at]
        size, at = read_number(data, at + 1, end)
        stop = at + size
        if stop > end:
            raise ValueError("a section is longer than what it is in")
        if component and kind in (CORE_MODULE, COMPONENT):
            _walk(data, at + 8, stop, component=kind == COMPONENT)
        elif not component and kind == CUSTOM:
            length, name = read_number(data, at, stop)
            if data[name : name + length] == b"name":
                _names(data, name + length, stop)
        at = stop


def _names(data: bytearray, at: int, end: int) -> None:
    while at < end:
        kind = data[at]
        size, at = read_number(data, at + 1, end)
        stop = at + size
        if kind == FUNCTION_NAMES:
            count, place = read_number(data, at, stop)
            for _ in range(count):
                _, place = read_number(data, place, stop)
                length, place = read_number(data, place, stop)
                if data[place : place + 4].lstrip(b"_.").startswith(b"Z"):
                    data[place] = ord("?")
                place += length
        at = stop
