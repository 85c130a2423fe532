"""Changes components and what goes into them, and sees what the host makes of it.

`python -m tests.wasm.fuzz --runs 100000` from the root of the repository, with `tests` and `host` to be found. The runs
are made in child processes, so that one that ends its process is counted, named by its number, and the rest are made;
`--only NUMBER` makes one run again. What is looked for: a process that ends, an exception that is not one of those that
say what a guest did, a deadline that was overrun by more than 20 ms (three times in a row: other processes take their
time too), a Store that is left.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import collections
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import wasmtime
from tests.wasm.alone import alone, owner
from tests.wasm.components import DATA, DEEP, DEEPLY, NEXT, component, giving, section, text, when_shouted
from wasmtime.component import Component

from hotdesk.errors import LoadFailed
from hotdesk.runtime.tools import load_tools
from hotdesk.runtime.wasm import Machine
from hotdesk.runtime.wasm_calls import GuestError, GuestFault, GuestTimeout
from hotdesk.runtime.wasm_guest import _good
from hotdesk.runtime.wasm_hooks import _Hooks
from hotdesk.runtime.wasm_imports import IMPORTED, failure
from hotdesk.runtime.wit_binary import read_number
from hotdesk.runtime.wit_contract import EXPORTS
from hotdesk.runtime.wit_engine import new_engine
from hotdesk.runtime.wit_inspect import inspect_component

__all__ = ["main", "run_child"]

EDGES = (b"\0", b"\xff", b"\x7f", b"\x80\x80\x80\x80\x08", b"\xff\xff\xff\xff\x0f")
"""What numbers and sizes are changed to."""

DEADLINE_S = 0.03
OVERRUN_S = 0.02
TRIES = 3

NOTE = 64
"""Bytes at the beginning of a child's standard error that say which run and step it has begun."""


def seeds() -> list[bytes]:
    """Good components, small ones: every interface, host calls, state in the memory, code that is deep or endless."""
    decisions = [("answer", ("hi", '{"tags": ["a"], "metadata": {"n": 1}}')), ("model", '{"temperature": 0.5}')]
    made = [giving({"bot.respond": (True, one), "middleware.before": (True, ("next", None))}) for one in decisions]
    made.append(
        giving(
            {
                "tools.list-tools": [("find", "Finds", '{"type": "object", "properties": {}}', "")],
                "tools.call-tool": (True, '{"found": [1, 2.5, "x"]}'),
                "lifecycle.setup": (True, None),
                "lifecycle.export-state": '{"n": 1}',
                "chunks.transform": (True, ("shown", "held")),
            }
        )
    )
    inbound = ("c", "text", "id", '{"sender": {"id": "x"}}')
    made.append(giving({"intake.receive": (True, ([inbound] * 3, (200, '{"a": "b"}', "body", "{}")))}))
    asks = {"base": ("log", "state-set", "time-left", "config"), "kv": ("get", "keys"), "http": ("fetch",)}
    body = (
        f"(call $base.log (i32.const 1) (i32.const {DATA}) (i32.const 4) (i32.const 20) (i32.const 2))"
        " (call $kv.keys (i32.const 16) (i32.const 1) (i32.const 9000)) (drop (call $base.time-left))"
        " (call $base.state-set (i32.const 16) (i32.const 1) (i32.const 1) (i32.const 20) (i32.const 2)"
        " (i32.const 9000))"
    )
    made.append(component({"respond": f"{body} {text('answer', DATA, 4)}"}, imports=asks, data="line{}"))
    made.append(component({"respond": when_shouted("(loop (br 0))", NEXT), "on-event": ""}, foreign=True))
    made.append(component({"respond": when_shouted(DEEP, NEXT)}, more=DEEPLY))
    return made


def sections(data: bytes) -> list[bytes]:
    """A component's sections, each with its header. Raises `ValueError` where a size makes no sense."""
    found, at = [], 8
    while at < len(data):
        size, start = read_number(data, at + 1, len(data))
        found.append(data[at : start + size])
        at = start + size
    return found


def changed(chance: random.Random, made: list[bytes]) -> bytes:
    """One of the seeds, with one to eight changes."""
    data = bytearray(chance.choice(made))
    if chance.random() < 0.15:
        parts = sections(bytes(data))
        other = sections(chance.choice(made))
        at = chance.randrange(len(parts))
        match chance.randrange(4):
            case 0:
                del parts[at]
            case 1:
                parts.insert(at, chance.choice(parts))
            case 2:
                parts[at] = chance.choice(other)
            case _:
                chance.shuffle(parts)
        data = data[:8] + b"".join(parts)
    whole = bytes(data)
    for _ in range(chance.choice((0, 1, 1, 1, 2, 3, 8))):
        whole = (
            _changed_within(chance, whole) if chance.random() < 0.9 else whole[:8] + _changed_bytes(chance, whole[8:])
        )
    return whole[: chance.randrange(len(whole))] if chance.random() < 0.03 else whole


def _changed_within(chance: random.Random, data: bytes) -> bytes:
    """A change inside one of the sections, of a module inside too, whose sizes are right again afterwards."""
    try:
        parts = sections(data)
    except ValueError:
        return _changed_bytes(chance, data)
    if not parts:
        return _changed_bytes(chance, data)
    at = chance.choices(range(len(parts)), weights=[len(part) for part in parts])[0]
    _, start = read_number(parts[at], 1, len(parts[at]))
    body = parts[at][start:]
    inside = body[:4] == b"\0asm" and chance.random() < 0.8
    body = _changed_within(chance, body) if inside else _changed_bytes(chance, body)
    parts[at] = section(parts[at][0], body)
    return data[:8] + b"".join(parts)


def _changed_bytes(chance: random.Random, raw: bytes) -> bytes:
    data = bytearray(raw)
    at = chance.randrange(max(1, len(data)))
    match chance.randrange(8):
        case 0:
            data[at : at + 1] = bytes([chance.randrange(256)])
        case 1 | 2 if at < len(data):
            data[at] ^= 1 << chance.randrange(8)
        case 3 if at < len(data):
            data[at] = (data[at] + chance.choice((-1, 1, 4, 8))) % 256
        case 4:
            data[at : at + 1] = chance.choice(EDGES)
        case 5:
            del data[at : at + chance.randrange(1, 5)]
        case 6:
            data[at:at] = chance.randbytes(chance.randrange(1, 5))
        case _:
            here = chance.randrange(max(1, len(data)))
            size = chance.choice((1, 4, 8))
            data[at : at + size] = data[here : here + size]
    return bytes(data)


PIECES = [
    "",
    "{}",
    "[]",
    "null",
    '{"a":',
    "1e999",
    "\ud800",
    "\0",
    "你好",
    "🙂",
    '"',
    "\\u0000",
    "[" * 3000,
    "9" * 400,
    "!",
]


def words(chance: random.Random) -> str:
    """A text of the kind that people, other programs and attackers send."""
    made = "".join(chance.choice(PIECES) for _ in range(chance.randrange(4)))
    return made * chance.choice((1, 1, 1, 1, 200))


def arguments(chance: random.Random, name: str) -> list[Any]:
    interface, _, function = name.partition(".")
    return [
        bool(chance.randrange(2))
        if one == "bool"
        else words(chance)
        if one == "string"
        else (words(chance),) * len(one[1])
        for one in EXPORTS[interface][function].parameters
    ]


class Silent:
    """A plugin's `ctx`, as far as hooks use it."""

    def __init__(self) -> None:
        self.log = owner().log
        self.llm = self

    async def reply(self, turn: Any, **options: Any) -> str:
        return repr(options)


async def judged(name: str, value: Any, code: Any) -> None:
    """What the host's hooks make of a result. Raises `GuestFault`, `GuestError`, `ValueError` for a schema."""

    async def call(*_: Any, **__: Any) -> Any:
        return _good(value)

    async def further_in() -> None:
        return None

    hooks = _Hooks(SimpleNamespace(code=code, call=call, import_state=call), Silent())  # type: ignore[arg-type]
    conversation = SimpleNamespace(
        id="c", channel="", locale="", assignee=None, tags=[], state={}, hand_over=str, close=lambda: None
    )
    message = SimpleNamespace(sender=None, conversation="c", attachments=(), metadata={}, seq=1, at=0.0)
    turn = SimpleNamespace(id="m", text="t", message=message, conversation=conversation, attempt=1, silenced=False)
    match name:
        case "bot.respond":
            await hooks.respond(turn)
        case "middleware.before":
            await hooks.middleware(turn, further_in)
        case "tools.list-tools":
            load_tools(await hooks.tools())
        case "tools.call-tool":
            await hooks._tool("t")()
        case "intake.receive":
            request = SimpleNamespace(method="POST", path="", query={}, query_string="", headers={}, body=b"")
            await hooks.intake(request)  # type: ignore[arg-type]
        case "lifecycle.export-state":
            await hooks.export_state()
        case _:
            _good(value)


class Fuzz:
    """The runs of one process."""

    def __init__(self, seed: int) -> None:
        self.machine = Machine(IMPORTED, memory_bytes=1 << 24, output_bytes=1 << 20)
        self._compilers = (self.machine.engine, new_engine(baseline=True))
        """Thorough and quick: every second run is compiled as what serves first is."""

        self.counts: collections.Counter[str] = collections.Counter()
        self.findings: list[str] = []
        self.worst = 0.0
        self._seed = seed
        self._seeds = seeds()
        self.stage: Callable[[str], None] = lambda stage: None

    async def run(self, number: int) -> None:
        """The run *number*, which is the same each time."""
        chance = random.Random(f"{self._seed}/{number}")
        data = changed(chance, self._seeds)
        try:
            inspected = inspect_component("fuzz", data, file="fuzz.wasm", max_bytes=1 << 24)
        except LoadFailed:
            self.counts["refused"] += 1
            return
        self.stage("compile")
        try:
            native = bytes(Component(self._compilers[number % 2], data).serialize())
        except wasmtime.WasmtimeError:
            self.counts["not compiled"] += 1
            return
        self.stage("run")
        try:
            code = self.machine.load("fuzz", native, inspected, "fuzz.wasm")
        except LoadFailed:
            self.counts["not loaded"] += 1
            return
        for _ in range(TRIES):
            overrun, how = await self._calls(random.Random(f"{number}"), code)
            if overrun <= OVERRUN_S:
                break
        else:
            self.findings.append(f"run {number}: {overrun * 1000:.0f} ms over its deadline")
        self.worst = max(self.worst, overrun)
        self.counts[how] += 1
        if self.machine.instances or self.machine._by_context or self.machine._by_number:
            self.findings.append(f"run {number}: a Store is left")

    async def _calls(self, chance: random.Random, code: Any) -> tuple[float, str]:
        """Make an instance and call what it exports. Returns by how much a deadline was overrun, and how it ended."""
        overrun, how = 0.0, "answered"
        async with alone(self.machine, code, answer=lambda *_: failure("denied", "kv")) as guest:
            names = ["", *chance.sample(sorted(code.functions), min(3, len(code.functions)))]
            for name in names:
                given = arguments(chance, name) if name else []
                ended = await guest.call(name, *given, timeout_s=DEADLINE_S)
                overrun = max(overrun, ended.overrun)
                value = ended.value
                if isinstance(value, GuestTimeout):
                    return overrun, "timed out"
                if isinstance(value, GuestFault):
                    return overrun, "trapped"
                if isinstance(value, BaseException):
                    raise value
                try:
                    await judged(name, value, code)
                except (GuestFault, GuestError):
                    how = "refused what it gave"
                except ValueError:
                    if name != "tools.list-tools":
                        raise
                    how = "refused what it gave"
        return overrun, how


def run_child(seed: int, first: int, last: int, note: Callable[[str], None]) -> dict[str, Any]:
    """The runs from *first* up to *last*. *note* is told what is begun."""

    async def run_all() -> dict[str, Any]:
        fuzz = Fuzz(seed)
        number = first
        fuzz.stage = lambda stage: note(f"{number} {stage}")
        try:
            for number in range(first, last):
                note(f"{number} inspect")
                try:
                    await fuzz.run(number)
                except Exception as exc:  # what is looked for
                    fuzz.findings.append(f"run {number}: {type(exc).__name__}: {str(exc)[:200]}")
        finally:
            fuzz.machine.close()
        return {"counts": fuzz.counts, "findings": fuzz.findings, "worst_ms": fuzz.worst * 1000}

    return asyncio.run(run_all())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument("--only", type=int)
    parser.add_argument("--child", nargs=2, type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    out = sys.stdout
    if given.only is not None:
        chance = random.Random(f"{given.seed}/{given.only}")
        out.write(f"{base64.b64encode(changed(chance, seeds())).decode()}\n")
        out.write(f"{json.dumps(run_child(given.seed, given.only, given.only + 1, lambda _: None))}\n")
        return 0
    if given.child:
        os.lseek(2, NOTE, os.SEEK_SET)  # what is said as the process ends stands after the note

        def note(line: str) -> None:
            os.pwrite(2, line.encode().ljust(NOTE), 0)  # a file, which the parent reads

        first, last = given.child
        out.write(json.dumps(run_child(given.seed, first, last, note)))
        return 0
    totals: collections.Counter[str] = collections.Counter()
    findings: list[str] = []
    worst, started = 0.0, time.monotonic()
    for first in range(0, given.runs, 5000):
        last = min(first + 5000, given.runs)
        for found in _found(given.seed, first, last):
            totals.update(found["counts"])
            findings += found["findings"]
            worst = max(worst, found["worst_ms"])
        out.write(f"{last:,} runs, {time.monotonic() - started:.0f} s, {dict(totals)}, {len(findings)} findings\n")
        out.flush()
    out.write(f"{given.runs:,} runs: {dict(totals)}; the longest overrun {worst:.1f} ms; {len(findings)} findings\n")
    out.write("".join(f"  {one}\n" for one in findings[:50]))
    return 1 if findings else 0


def _found(seed: int, first: int, last: int) -> Iterator[dict[str, Any]]:
    """What child processes found in the runs from *first* up to *last*.

    A process that ends takes with it what it had found: the runs before the one that ended it are made again.
    """
    if first >= last:
        return
    with tempfile.TemporaryFile() as said:
        command = [sys.executable, "-m", "tests.wasm.fuzz", "--seed", str(seed), "--child", str(first), str(last)]
        ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=said, check=False)
        said.seek(0)
        note, words = said.read(NOTE), " ".join(said.read(1000).decode(errors="replace").split())
    if ended.returncode == 0:
        yield json.loads(ended.stdout)
        return
    at = re.fullmatch(rb"(\d+) (\w+) *", note)
    if at is None:
        raise SystemExit(f"the process of the runs from {first} ended with {ended.returncode}: {note!r} {words}")
    number, stage = int(at[1]), at[2].decode()
    finding = f"run {number}: the process ended with {ended.returncode} in the step '{stage}': {words[:200]}"
    yield {"counts": {"ended the process": 1}, "findings": [finding], "worst_ms": 0.0}
    yield from _found(seed, first, number)
    yield from _found(seed, number + 1, last)


if __name__ == "__main__":
    sys.exit(main())
