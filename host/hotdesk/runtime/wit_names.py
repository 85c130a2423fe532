"""Takes from a component the names that wasmtime would demangle when a guest traps.

A trap's text has the names of the guest's functions, and wasmtime demangles those that look like C++ (`_Z…`). A name of
a kilobyte can be made so that this takes all memory and never ends, in native code that no deadline reaches. So the
first byte of such a name is overwritten before anything is compiled; nothing else changes, no size either. Names of
Rust's own kind (`_R…`) are left: its demangler is bounded.
"""

from __future__ import annotations

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
    except IndexError:
        raise ValueError("a section is cut off") from None
    return bytes(out)


def _walk(data: bytearray, at: int, end: int, *, component: bool) -> None:
    while at < end:
        kind = data[at]
        size, at = _number(data, at + 1)
        stop = at + size
        if stop > end:
            raise ValueError("a section is longer than what it is in")
        if component and kind in (CORE_MODULE, COMPONENT):
            _walk(data, at + 8, stop, component=kind == COMPONENT)
        elif not component and kind == CUSTOM:
            length, name = _number(data, at)
            if data[name : name + length] == b"name":
                _names(data, name + length, stop)
        at = stop


def _names(data: bytearray, at: int, end: int) -> None:
    while at < end:
        kind = data[at]
        size, at = _number(data, at + 1)
        stop = at + size
        if kind == FUNCTION_NAMES:
            count, place = _number(data, at)
            for _ in range(count):
                if place >= stop:
                    raise ValueError("a name section is cut off")
                _, place = _number(data, place)
                length, place = _number(data, place)
                if data[place : place + 4].lstrip(b"_.").startswith(b"Z"):
                    data[place] = ord("?")
                place += length
        at = stop


def _number(data: bytearray, at: int) -> tuple[int, int]:
    """An unsigned LEB128 of 32 bits: its value, and where what follows begins."""
    value = 0
    for shift in range(0, 35, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number of over 32 bits")
