"""The components that the runs drop into a host, from WebAssembly text: no toolchain, any size, any number of versions.

A version is made of a component's bytes by writing its number over another of the same length, or by a section that
says nothing: other bytes, so another hash, so compiled anew.
"""

from __future__ import annotations

import random

from tests.wasm.components import DATA, RESULT, component, text

__all__ = ["ROUND", "answering_mark", "busy", "filler", "marking", "masking", "versioned", "with_section"]

_NOBODY = b"[v00000]"
_MARK_LENGTH = len(_NOBODY)


def versioned(wasm: bytes, version: int) -> bytes:
    """*wasm*, which says `[v00000]` somewhere, saying *version* instead."""
    if wasm.count(_NOBODY) != 1:
        raise ValueError("a component that says its version once")
    return wasm.replace(_NOBODY, b"[v%05d]" % version)


def with_section(wasm: bytes, text: str) -> bytes:
    """*wasm* with a custom section at its end, which means nothing."""
    name = text.encode()
    if len(name) > 100:
        raise ValueError("a size of one byte")
    return wasm + bytes([0, len(name) + 1, len(name)]) + name


def _rewritten(address: str, length: str) -> str:
    """The decision to go on with the text at *address*, both as expressions."""
    return f"""
  (i32.store (i32.const {RESULT}) (i32.const 0)) (i32.store (i32.const {RESULT + 4}) (i32.const 2))
  (i32.store (i32.const {RESULT + 8}) {address}) (i32.store (i32.const {RESULT + 12}) {length})
  (i32.const {RESULT})"""


def masking() -> bytes:
    """A middleware that puts a star in the place of each digit of what a visitor writes, and lets replies be."""
    return component(
        {
            "before": f"""
  (local.set $n (local.get 4)) (local.set $m (i32.add (local.get 4) (local.get 5)))
  (loop $next
    (if (i32.lt_u (local.get $n) (local.get $m)) (then
      (if (i32.lt_u (i32.sub (i32.load8_u (local.get $n)) (i32.const 48)) (i32.const 10))
        (then (i32.store8 (local.get $n) (i32.const 42))))
      (local.set $n (i32.add (local.get $n) (i32.const 1)))
      (br $next))))
  {_rewritten("(local.get 4)", "(local.get 5)")}"""
        }
    )


# Puts the mark behind the text at (address, size); the copy's address, and its size in $marked_size.
_MARKED = f"""
  (global $marked_size (mut i32) (i32.const 0))
  (func $marked (param $address i32) (param $size i32) (result i32)
    (local $copy i32)
    (local.set $copy (call $alloc (i32.add (local.get $size) (i32.const {_MARK_LENGTH}))))
    (memory.copy (local.get $copy) (local.get $address) (local.get $size))
    (memory.copy (i32.add (local.get $copy) (local.get $size)) (i32.const {DATA}) (i32.const {_MARK_LENGTH}))
    (global.set $marked_size (i32.add (local.get $size) (i32.const {_MARK_LENGTH})))
    (local.get $copy))
"""


def marking(more: str = "") -> bytes:
    """A middleware and a bot in one component that leave their version three times in what they answer.

    It leaves to others what begins with a small letter. What others stream passes through it, unchanged. *more* is
    put into the core module.
    """
    return component(
        {
            "before": f"(local.set $n (call $marked (local.get 4) (local.get 5)))"
            f"{_rewritten('(local.get $n)', '(global.get $marked_size)')}",
            "after": f"(local.set $n (call $marked (local.get 8) (local.get 9)))"
            f"{_rewritten('(local.get $n)', '(global.get $marked_size)')}",
            "transform": f"""
  (i32.store (i32.const {RESULT}) (i32.const 0))
  (i32.store (i32.const {RESULT + 4}) (local.get 8)) (i32.store (i32.const {RESULT + 8}) (local.get 9))
  (i64.store (i32.const {RESULT + 12}) (i64.const 0)) (i32.const {RESULT})""",
            "respond": f"""
  (i32.store (i32.const {RESULT}) (i32.const 0))
  (i64.store (i32.const {RESULT + 16}) (i64.const 0))
  (if (i32.gt_u (i32.load8_u (local.get 4)) (i32.const 96))
    (then (i32.store (i32.const {RESULT + 4}) (i32.const 0)))
    (else
      (i32.store (i32.const {RESULT + 4}) (i32.const 3))
      (local.set $n (call $marked (local.get 4) (local.get 5)))
      (i32.store (i32.const {RESULT + 8}) (local.get $n))
      (i32.store (i32.const {RESULT + 12}) (global.get $marked_size))))
  (i32.const {RESULT})""",
        },
        data=_NOBODY.decode(),
        more=_MARKED + more,
    )


def answering_mark() -> bytes:
    """A bot that answers with its version, and fills a megabyte of its memory before it does."""
    return component(
        {"respond": f"(drop (call $alloc (i32.const 1048576))) {text('answer', DATA, _MARK_LENGTH)}"},
        data=_NOBODY.decode(),
    )


def busy(rounds: int) -> bytes:
    """A middleware whose `before` computes for *rounds* rounds of a generator of pseudo-random numbers."""
    return component(
        {
            "before": f"""
  (local.set $n (i32.const {rounds})) (local.set $m (i32.const 1))
  (loop $next
    {ROUND}
    (br_if $next (local.tee $n (i32.sub (local.get $n) (i32.const 1)))))
  (i64.store (i32.const {RESULT}) (i64.const 0)) (i64.store (i32.const {RESULT + 8}) (i64.const 0))
  (i64.store (i32.const {RESULT + 16}) (i64.extend_i32_u (local.get $m)))
  (i32.const {RESULT})"""
        }
    )


ROUND = """
    (local.set $m (i32.xor (local.get $m) (i32.shl (local.get $m) (i32.const 13))))
    (local.set $m (i32.xor (local.get $m) (i32.shr_u (local.get $m) (i32.const 17))))
    (local.set $m (i32.xor (local.get $m) (i32.shl (local.get $m) (i32.const 5))))"""
"""One round of Marsaglia's xorshift on $m: each waits for the one before, so that it costs the same everywhere."""


def filler(functions: int) -> str:
    """*functions* functions of about 300 bytes each, no two alike: arithmetic, branches, loops, memory, calls.

    They are there to be compiled; the same number gives the same ones.
    """
    return "\n".join(_Function(number).text() for number in range(functions))


class _Function:
    """One function of the filler: six locals, statements that nest up to three deep."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._random = random.Random(number)
        self._labels = 0

    def text(self) -> str:
        body = " ".join(self._statement(0) for _ in range(7))
        return (
            f"(func $filler{self._number} (param $a i32) (param $b i32) (result i32)"
            f" (local $c i32) (local $d i32) (local $e i32) (local $f i64) {body}"
            f" (i32.add (local.get $c) (i32.xor (local.get $d) (i32.wrap_i64 (local.get $f)))))"
        )

    def _local(self) -> str:
        return self._random.choice("abcde")

    def _value(self, depth: int) -> str:
        kind = self._random.randrange(8) if depth < 3 else self._random.randrange(2)
        if kind == 0:
            return f"(i32.const {self._random.randrange(1 << 16)})"
        if kind in (1, 2):
            return f"(local.get ${self._local()})"
        if kind == 3:
            address = f"(i32.and {self._value(depth + 1)} (i32.const 4092))"
            return f"(i32.load offset={self._random.randrange(256) * 4} {address})"
        if kind == 4 and self._number:
            callee = self._random.randrange(max(0, self._number - 40), self._number)
            return f"(call $filler{callee} {self._value(depth + 1)} {self._value(depth + 1)})"
        operator = self._random.choice(("add", "sub", "mul", "and", "or", "xor", "shl", "shr_u", "lt_u", "eq", "rotl"))
        return f"(i32.{operator} {self._value(depth + 1)} {self._value(depth + 1)})"

    def _statement(self, depth: int) -> str:
        kind = self._random.randrange(7)
        if kind == 0 and depth < 3:
            return (
                f"(if {self._value(1)} (then {self._statement(depth + 1)} {self._statement(depth + 1)})"
                f" (else {self._statement(depth + 1)}))"
            )
        if kind == 1 and depth < 3:
            self._labels += 1
            label = f"$l{self._labels}"
            return (
                f"(local.set $e (i32.const {self._random.randrange(1, 50)}))"
                f" (loop {label} {self._statement(depth + 1)}"
                f" (br_if {label} (local.tee $e (i32.sub (local.get $e) (i32.const 1)))))"
            )
        if kind == 2:
            address = f"(i32.and {self._value(2)} (i32.const 4092))"
            return f"(i32.store offset={self._random.randrange(256) * 4} {address} {self._value(1)})"
        if kind == 3:
            wide = f"(i64.extend_i32_u {self._value(2)})"
            return f"(local.set $f (i64.add (i64.mul (local.get $f) (i64.const 31)) {wide}))"
        return f"(local.set ${self._local()} {self._value(0)})"
