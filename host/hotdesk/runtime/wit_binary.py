"""Numbers in WebAssembly's binary format, for those who look into a component themselves."""

from __future__ import annotations

__all__ = ["Cut", "read_number"]


class Cut(ValueError):
    """The bytes end in the middle of something."""


def read_number(data: bytes | bytearray, at: int, end: int) -> tuple[int, int]:
    """An unsigned LEB128 of 32 bits: its value, and where what follows begins. Raises `ValueError`."""
    value = 0
    for shift in range(0, 35, 7):
        if at >= end:
            raise Cut(f"a number is missing at byte {at:,}")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError(f"a number of over 32 bits at byte {at:,}")
