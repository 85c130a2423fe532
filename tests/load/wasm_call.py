"""A message through a WebAssembly middleware and back, beside what else a Python program can do.

Three guests put stars in the place of digits. Ours is called as the host calls it, with a turn's whole record and all
that the host promises of a call: a deadline, limits, off the loop. Beside it, in turn, in the same process: the
wasmtime package's own call of a component's `run: func(s: string) -> string`, and Extism's Python host, which takes
the same turn as JSON text and gives its decision as JSON. Neither of these has a deadline or leaves the loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median
from typing import Any

import extism  # type: ignore[import-untyped]
import msgspec
import wasmtime
from tests.load.hosts import work_folder
from tests.load.report import Figure, ratio, run_main
from tests.load.sources import FAQ
from tests.load.wasm_sources import masking
from wasmtime.component import Component, Linker

from hotdesk.app import Host, open_host
from hotdesk.chat.intake import NewMessage
from hotdesk.config import Config
from hotdesk.logs import configure_logs
from hotdesk.runtime.wasm_hooks import turn_record

__all__ = ["measure"]

TEXT = "Hello, my order 4711 came without its refund, could you look?"
MASKED = "Hello, my order **** came without its refund, could you look?"
LONG = (TEXT + " ") * 66  # a little over 4 KiB
BLOCK = 100
AT_ONCE = 32

MASK_IN_PYTHON = '''\
"""Puts a star in the place of each digit, as the component does."""

import re

from hotdesk_sdk import hookimpl

DIGIT = re.compile("[0-9]")


@hookimpl
async def middleware(turn, call_next):
    turn.text = DIGIT.sub("*", turn.text)
    return await call_next()
'''

Call = Callable[[Any], Awaitable[str]]
"""One way to have a turn's text masked."""

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(dict[str, Any]).decode


async def measure(short: bool) -> list[Figure]:
    """The contenders in turn, block after block; then whole turns with and without a middleware."""
    rounds, turns, turn_rounds = (15, 640, 2) if short else (200, 6_400, 7)
    configure_logs("json", "error")
    async with _host({"mask.wasm": masking(), "faq.py": FAQ.encode()}) as host:
        generation = host.plugins.entry("mask").current
        assert generation is not None
        guest = generation.guest
        assert guest is not None
        turn, long_turn = await _turn(host, TEXT), await _turn(host, LONG)
        from_package, from_extism = _package(), _extism()

        async def ours(turn: Any) -> str:
            _, text = await guest.call("middleware.before", turn_record(turn), turn=turn)
            return str(text)

        async def both_ways(turn: Any) -> str:
            text = await ours(turn)
            await guest.call("middleware.after", turn_record(turn), (turn.text, '{"metadata":{}}'), turn=turn)
            return text

        async def extism_in_a_thread(turn: Any) -> str:
            return await asyncio.to_thread(from_extism, turn)

        async def package(turn: Any) -> str:
            return from_package(turn)

        async def json_in_extism(turn: Any) -> str:
            return from_extism(turn)

        contenders: dict[str, tuple[Call, Any]] = {
            "ours": (ours, turn),
            "package": (package, turn),
            "extism": (json_in_extism, turn),
            "both": (both_ways, turn),
            "ours 4": (ours, long_turn),
            "package 4": (package, long_turn),
            "extism 4": (json_in_extism, long_turn),
            "thread": (extism_in_a_thread, turn),
        }
        walls, cpus = await _compare(contenders, rounds)
    costs = await _whole_turns(turns, turn_rounds)
    return [
        Figure("a message through a middleware and back", median(walls["ours"]), "µs"),
        Figure("the package's call, text to text", median(walls["package"]), "µs"),
        Figure("Extism's, JSON to JSON", median(walls["extism"]), "µs"),
        Figure("ours beside the package's", ratio(walls, "ours", "package"), "times", at_most=3),
        Figure("ours beside Extism's", ratio(walls, "ours", "extism"), "times", at_most=2),
        Figure("Extism's in a thread of asyncio's", median(walls["thread"]), "µs"),
        Figure("before and after", median(walls["both"]), "µs"),
        Figure("with 4 KiB of text", median(walls["ours 4"]), "µs"),
        Figure("the package's, with 4 KiB", median(walls["package 4"]), "µs"),
        Figure("Extism's, with 4 KiB", median(walls["extism 4"]), "µs"),
        Figure("CPU of a call", median(cpus["ours"]), "µs of CPU"),
        Figure("CPU of the package's", median(cpus["package"]), "µs of CPU"),
        Figure("CPU of Extism's", median(cpus["extism"]), "µs of CPU"),
        *(Figure(f"CPU of a turn {kind}", cost, "µs of CPU") for kind, cost in costs.items()),
    ]


async def _compare(
    contenders: dict[str, tuple[Call, Any]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Of each contender, a value a round: the median time of a call, and the process's CPU a call, in µs."""
    walls: dict[str, list[float]] = {name: [] for name in contenders}
    cpus: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 2):
        for name, (call, turn) in contenders.items():
            expected = MASKED if turn.text == TEXT else LONG.replace("4711", "****")
            took = []
            cpu = time.process_time()
            for _ in range(BLOCK):
                began = time.perf_counter()
                text = await call(turn)
                took.append(time.perf_counter() - began)
                if text != expected:
                    raise RuntimeError(f"{name}: it made {text[:100]!r}")
            cpu = time.process_time() - cpu
            await asyncio.sleep(0.001)
            if number > 1:  # the first rounds warm up
                walls[name].append(median(took) * 1e6)
                cpus[name].append(cpu / BLOCK * 1e6)
    return walls, cpus


async def _whole_turns(turns: int, rounds: int) -> dict[str, float]:
    """The CPU of a turn in process, journal on, with one bot: alone, and behind each middleware; medians."""
    kinds: dict[str, dict[str, bytes]] = {
        "without a middleware": {},
        "with one in Python": {"mask.py": MASK_IN_PYTHON.encode()},
        "with one in WebAssembly": {"mask.wasm": masking()},
    }
    costs: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind, plugins in kinds.items():
            async with _host({**plugins, "faq.py": FAQ.encode()}) as host:
                await _turns(host, turns // 4)
                costs[kind].append(await _turns(host, turns))
    return {kind: median(found) for kind, found in costs.items()}


async def _turns(host: Host, count: int) -> float:
    """CPU microseconds of a turn, 32 conversations side by side."""

    async def one_after_the_other(lane: int) -> None:
        for number in range(count // AT_ONCE):
            accepted = await host.intake.accept(NewMessage(f"c{lane}-{number % 20}", TEXT), door="bench")
            assert accepted.turn is not None
            ended = await accepted.turn.wait_ended()
            if ended is None or not ended.replies:
                raise RuntimeError(f"a turn without an answer: {ended}")

    cpu = time.process_time()
    await asyncio.gather(*(one_after_the_other(lane) for lane in range(AT_ONCE)))
    return (time.process_time() - cpu) / count * 1e6


async def _turn(host: Host, text: str) -> Any:
    """A turn as a plugin sees it; it has ended, and is as it was."""
    accepted = await host.intake.accept(NewMessage("a-visitor", text), door="bench")
    assert accepted.turn is not None
    await accepted.turn.wait_ended()
    accepted.turn.text = text
    return accepted.turn


@asynccontextmanager
async def _host(plugins: dict[str, bytes]) -> AsyncIterator[Host]:
    with work_folder("wasm-call") as folder:
        (folder / "plugins").mkdir()
        for name, data in plugins.items():
            (folder / "plugins" / name).write_bytes(data)
        config = Config(plugins=(str(folder / "plugins"),), data=str(Path(folder, "data")))
        async with open_host(config, serve=False) as host:
            yield host


def _package() -> Callable[[Any], str]:
    """The wasmtime package, used as its documentation does."""
    engine = wasmtime.Engine()
    store = wasmtime.Store(engine)
    instance = Linker(engine).instantiate(store, Component(engine, _TEXT_TO_TEXT))
    run: Any = instance.get_func(store, "run")
    return lambda turn: str(run(store, turn.text))


def _extism() -> Callable[[Any], str]:
    """Extism's Python host, with the fastest JSON there is for Python on this side."""
    plugin = extism.Plugin(bytes(wasmtime.wat2wasm(_JSON_TO_JSON)))

    def call(turn: Any) -> str:
        message, conversation = turn.message, turn.conversation
        about = {
            "id": turn.id,
            "conversation": message.conversation,
            "text": turn.text,
            "sender": message.sender,
            "channel": conversation.channel,
            "locale": conversation.locale,
            "assignee": conversation.assignee,
            "tags": conversation.tags,
            "attachments": message.attachments,
            "metadata": message.metadata,
            "seq": message.seq,
            "at": message.at,
            "attempt": turn.attempt,
        }
        return str(_decode(plugin.call("before", _encode(about)))["text"])

    return call


_MASK = """
  (func $mask (param $at i32) (param $end i32)
    (loop $next
      (if (i32.lt_u (local.get $at) (local.get $end)) (then
        (if (i32.lt_u (i32.sub (i32.load8_u (local.get $at)) (i32.const 48)) (i32.const 10))
          (then (i32.store8 (local.get $at) (i32.const 42))))
        (local.set $at (i32.add (local.get $at) (i32.const 1)))
        (br $next)))))
"""

_TEXT_TO_TEXT = f"""
(component
  (core module $m
    (memory (export "memory") 2)
    {_MASK}
    (func (export "realloc") (param i32 i32 i32 i32) (result i32) (i32.const 1024))
    (func (export "run") (param $at i32) (param $size i32) (result i32)
      (call $mask (local.get $at) (i32.add (local.get $at) (local.get $size)))
      (i32.store (i32.const 16) (local.get $at)) (i32.store (i32.const 20) (local.get $size))
      (i32.const 16)))
  (core instance $i (instantiate $m))
  (func (export "run") (param "s" string) (result string)
    (canon lift (core func $i "run") (memory (core memory $i "memory")) (realloc (core func $i "realloc")))))
"""

_PREFIX = '{"decision":"rewrite","text":"'
_KEY = int.from_bytes(b'"text":"', "little")

# The input is copied to 4096, as Extism's development kits do: by eight bytes, then the rest. The text ends at a quote
# without a backslash before it; a \u escape is left alone. The answer is made around the text, where it lies.
_JSON_TO_JSON = f"""
(module
  (import "extism:host/env" "input_length" (func $input_length (result i64)))
  (import "extism:host/env" "input_load_u8" (func $input_load_u8 (param i64) (result i32)))
  (import "extism:host/env" "input_load_u64" (func $input_load_u64 (param i64) (result i64)))
  (import "extism:host/env" "alloc" (func $alloc (param i64) (result i64)))
  (import "extism:host/env" "store_u8" (func $store_u8 (param i64 i32)))
  (import "extism:host/env" "store_u64" (func $store_u64 (param i64 i64)))
  (import "extism:host/env" "output_set" (func $output_set (param i64 i64)))
  (memory (export "memory") 2)
  (data (i32.const 16) "{"".join(f"{chr(92)}{byte:02x}" for byte in _PREFIX.encode())}")
  (func $read (param $size i32)
    (local $n i32)
    (block $done (loop $eight
      (br_if $done (i32.gt_u (i32.add (local.get $n) (i32.const 8)) (local.get $size)))
      (i64.store offset=4096 (local.get $n) (call $input_load_u64 (i64.extend_i32_u (local.get $n))))
      (local.set $n (i32.add (local.get $n) (i32.const 8)))
      (br $eight)))
    (block $done (loop $one
      (br_if $done (i32.ge_u (local.get $n) (local.get $size)))
      (i32.store8 offset=4096 (local.get $n) (call $input_load_u8 (i64.extend_i32_u (local.get $n))))
      (local.set $n (i32.add (local.get $n) (i32.const 1)))
      (br $one))))
  (func $write (param $at i32) (param $size i32)
    (local $n i32) (local $out i64)
    (local.set $out (call $alloc (i64.extend_i32_u (local.get $size))))
    (block $done (loop $eight
      (br_if $done (i32.gt_u (i32.add (local.get $n) (i32.const 8)) (local.get $size)))
      (call $store_u64 (i64.add (local.get $out) (i64.extend_i32_u (local.get $n)))
        (i64.load (i32.add (local.get $at) (local.get $n))))
      (local.set $n (i32.add (local.get $n) (i32.const 8)))
      (br $eight)))
    (block $done (loop $one
      (br_if $done (i32.ge_u (local.get $n) (local.get $size)))
      (call $store_u8 (i64.add (local.get $out) (i64.extend_i32_u (local.get $n)))
        (i32.load8_u (i32.add (local.get $at) (local.get $n))))
      (local.set $n (i32.add (local.get $n) (i32.const 1)))
      (br $one)))
    (call $output_set (local.get $out) (i64.extend_i32_u (local.get $size))))
  (func (export "before") (result i32)
    (local $size i32) (local $at i32) (local $from i32) (local $c i32)
    (local.set $size (i32.wrap_i64 (call $input_length)))
    (call $read (local.get $size))
    (local.set $at (i32.const 4096))
    (loop $key
      (if (i64.ne (i64.load (local.get $at)) (i64.const {_KEY})) (then
        (local.set $at (i32.add (local.get $at) (i32.const 1)))
        (br $key))))
    (local.set $from (local.tee $at (i32.add (local.get $at) (i32.const 8))))
    (block $end (loop $next
      (local.set $c (i32.load8_u (local.get $at)))
      (br_if $end (i32.eq (local.get $c) (i32.const 34)))
      (if (i32.eq (local.get $c) (i32.const 92)) (then
        (local.set $at (i32.add (local.get $at)
          (select (i32.const 6) (i32.const 2) (i32.eq (i32.load8_u offset=1 (local.get $at)) (i32.const 117)))))
        (br $next)))
      (if (i32.lt_u (i32.sub (local.get $c) (i32.const 48)) (i32.const 10))
        (then (i32.store8 (local.get $at) (i32.const 42))))
      (local.set $at (i32.add (local.get $at) (i32.const 1)))
      (br $next)))
    (i32.store8 offset=1 (local.get $at) (i32.const 125))
    (local.set $from (i32.sub (local.get $from) (i32.const {len(_PREFIX)})))
    (memory.copy (local.get $from) (i32.const 16) (i32.const {len(_PREFIX)}))
    (call $write (local.get $from) (i32.sub (i32.add (local.get $at) (i32.const 2)) (local.get $from)))
    (i32.const 0)))
"""


if __name__ == "__main__":
    run_main(measure)
