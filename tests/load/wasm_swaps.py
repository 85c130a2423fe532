"""Swaps of WebAssembly plugins under traffic: from the rename to the first answer by the new code, and what it cost.

Turns arrive at 500 a second and pass a chain of a component and a Python plugin, both of which are replaced again and
again. A component is cold (bytes that were never compiled, of three sizes) or known to the compile cache. Then the
examples in JavaScript and Go, which are large, with `wasm_baseline` and without. A history of it all goes to the
checker, once for the marks of each plugin of the chain.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from time import perf_counter

import msgspec
from tests.load.checker import KINDS, Verdict, judge
from tests.load.client import percentile
from tests.load.desk import Desk, Entry
from tests.load.history import Event, Recorded, Replied
from tests.load.hosts import OUT, Server, host_on, work_folder
from tests.load.report import Figure, run_main
from tests.load.swaps import RATE, Traffic, with_mark
from tests.load.wasm_sources import filler, marking, versioned, with_section
from tests.wasm.built import built
from tests.wasm.toolchains import Unavailable

__all__ = ["measure"]

UNSEEN_S = 10.0

GAP_S = 8.0
"""Between swaps of a large component: long enough for the thorough compile behind the one before to be done."""

FUNCTIONS = {"2 KiB": 0, "50 KiB": 150, "300 KiB": 965}
"""How much is put into a component beside what it does, by about what it weighs then."""

LANGUAGES = {"JavaScript": "js", "Go": "go"}

CHAIN = '''\
"""Stands between the component's middleware and its bot; answers what begins with a small letter."""

import asyncio

from hotdesk_sdk import Reply, hookimpl

VERSION = "p{version}"


@hookimpl
async def middleware(turn, call_next):
    before = VERSION
    await asyncio.sleep(0.001)  # time for a swap between the component's middleware and its bot
    reply = await call_next()
    reply.metadata["marks"] = [*reply.metadata.get("marks", ()), before, VERSION]
    return reply


async def count_slowly():
    for number in range(15):
        yield f"{{number}} "
        await asyncio.sleep(0.1)


@hookimpl
async def respond(turn):
    if turn.text.startswith("slowly"):
        return Reply(chunks=count_slowly(), metadata={{"marks": [VERSION]}})
    return Reply(turn.text, metadata={{"marks": [VERSION]}})
'''


def view(events: Iterable[Event], initial: str, owner: str) -> list[Event]:
    """The history as one plugin's marks tell it: those that begin with *initial*.

    Another plugin's reply carries marks too, of a generation that it does not name: within it they must agree, and it
    is taken out of the comparison over a generation's replies.
    """
    seen: list[Event] = []
    for event in events:
        if isinstance(event, Replied | Recorded) and event.marks:
            marks = tuple(mark for mark in event.marks if mark[0] == initial)
            plugin = event.plugin if event.plugin == owner or not marks else f"{event.plugin} with {marks[0]}"
            event = msgspec.structs.replace(event, marks=marks, plugin=plugin)
        seen.append(event)
    return seen


def _sized(functions: int) -> bytes:
    return marking(filler(functions))


def _newer(plugin: str, generation: int) -> Callable[[Entry], bool]:
    return lambda reply: reply.plugin == plugin and reply.generation > generation


@asynccontextmanager
async def _host(
    name: str, python: dict[str, str], other: dict[str, bytes], settings: str = ""
) -> AsyncIterator[Server]:
    with work_folder(name) as folder:
        server = host_on(folder, python)
        for file, data in other.items():
            (server.plugins / file).write_bytes(data)
        (folder / "hotdesk.toml").write_text(settings)
        try:
            await server.start()
            yield server
        finally:
            await server.stop()


async def measure(short: bool) -> list[Figure]:
    """The chain; then, in the long form, the large ones."""
    cold, known, python, seconds = (2, 3, 2, 7.0) if short else (50, 150, 50, 250.0)
    figures, verdicts, failed, unseen = await _chain(cold, known, python, seconds)
    for language, name in () if short else LANGUAGES.items():
        try:
            folder = await asyncio.to_thread(built, name)
        except Unavailable as exc:
            figures.append(Figure(f"no {language}: {exc}", 0))
            continue
        for baseline in (True, False):
            large = await _large(language, folder, 6, baseline)
            figures += large[0]
            verdicts.append(large[1])
            failed, unseen = failed + large[2], unseen + large[3]
    return [
        *figures,
        Figure("swaps unseen", unseen, at_most=0),
        Figure("failed", failed, at_most=0),
        Figure("not accepted", max(verdict.unaccepted for verdict in verdicts), at_most=0),
        *(Figure(kind, sum(verdict.count(kind) for verdict in verdicts), at_most=0) for kind in KINDS),
    ]


async def _chain(cold: int, known: int, python: int, seconds: float) -> tuple[list[Figure], list[Verdict], int, int]:
    """So many cold swaps of each size, so many of what is in the cache, so many of the Python plugin, in any order."""
    bare = {size: await asyncio.to_thread(_sized, n) for size, n in FUNCTIONS.items()}
    largest = bare["300 KiB"]
    waits: dict[str, list[float]] = {kind: [] for kind in (*FUNCTIONS, "known", "python")}
    edits = [*FUNCTIONS] * cold + ["known"] * known + ["python"] * python
    random.shuffle(edits)
    plugins = {"chain.py": CHAIN.format(version=0), "marked.toml": "order = 10\n"}
    async with _host("wasm-swaps", plugins, {"marked.wasm": versioned(largest, 1)}) as server:
        traffic = Traffic(server, ("Message", "Message", "python"), UNSEEN_S)
        component, chain = server.plugins / "marked.wasm", server.plugins / "chain.py"

        async def swap_component(version: int, wasm: bytes, into: list[float]) -> None:
            await traffic.replace(component, versioned(wasm, version), with_mark(f"v{version:05}"), into=into)

        async def edit() -> None:
            await swap_component(2, largest, [])  # and 1 was there at the start: both are in the cache now
            serving, began = 2, perf_counter()
            for number, kind in enumerate(edits, start=1):
                due = began + (seconds - 3.0) * (number - random.random() / 2) / len(edits)
                await asyncio.sleep(max(0.0, due - perf_counter()))
                if kind == "python":
                    changed = CHAIN.format(version=number).encode()
                    await traffic.replace(chain, changed, with_mark(f"p{number}"), into=waits[kind])
                elif kind == "known":
                    serving = 1 if serving == 2 else 2
                    await swap_component(serving, largest, waits[kind])
                else:
                    serving = 100 + number
                    await swap_component(serving, bare[kind], waits[kind])

        load = await traffic.run(edit, seconds)
    traffic.history.save(OUT / "wasm_swaps.jsonl")
    events = traffic.history.events
    verdicts = [judge(view(events, "v", "marked"))]
    whole = [fault for fault in judge(view(events, "p", "chain")).faults if fault.kind == "mixed"]
    verdicts.append(Verdict(0, 0, 0, 0, 0, tuple(whole)))  # the other kinds would be counted twice
    cold_waits = [wait for size in FUNCTIONS for wait in waits[size]]
    return (
        [
            Figure("swaps seen", sum(map(len, waits.values()))),
            *(Figure(f"cold, {size}, p50", percentile(waits[size], 50) * 1000, "ms") for size in FUNCTIONS),
            Figure("cold, 300 KiB, p99", percentile(waits["300 KiB"], 99) * 1000, "ms", at_most=200),
            Figure("cold, all sizes, p99", percentile(cold_waits, 99) * 1000, "ms", at_most=200),
            Figure("in the cache, p50", percentile(waits["known"], 50) * 1000, "ms"),
            Figure("in the cache, p99", percentile(waits["known"], 99) * 1000, "ms", at_most=90),
            Figure("the Python plugin beside it, p99", percentile(waits["python"], 99) * 1000, "ms", at_most=90),
            Figure("turns", verdicts[0].replies),
            Figure("streams across swaps", verdicts[0].streams),
            Figure(f"turn p50 at {RATE}/s", load.percentile_ms(50), "ms"),
            Figure(f"turn p99 at {RATE}/s", load.percentile_ms(99), "ms"),
        ],
        verdicts,
        load.failed,
        traffic.unseen,
    )


async def _large(language: str, folder: Path, swaps: int, baseline: bool) -> tuple[list[Figure], Verdict, int, int]:
    """Cold swaps of an example, one every some seconds: the thorough compile goes on behind the first answer."""
    data, manifest = ((folder / name).read_bytes() for name in ("plugin.wasm", "plugin.toml"))
    settings = f"wasm_baseline = {str(baseline).lower()}\n"
    waits: list[float] = []
    async with _host("wasm-large", {}, {"orders.wasm": data, "orders.toml": manifest}, settings) as server:
        traffic = Traffic(server, ("count",), UNSEEN_S)

        async def edit() -> None:
            desk = Desk(server)
            await asyncio.sleep(GAP_S)
            for number in range(swaps):
                before = (await desk.plugin("orders")).generation or 0
                changed = with_section(data, f"swap {number}")
                await traffic.replace(server.plugins / "orders.wasm", changed, _newer("orders", before), into=waits)
                await asyncio.sleep(GAP_S)
            desk.close()

        load = await traffic.run(edit, GAP_S + swaps * (GAP_S + 1.0) + 2.0, streams=0)
    how = "quickly first" if baseline else "thoroughly at once"
    about = f"{language} ({len(data) / 2**20:.1f} MiB), compiled {how}"
    worst = percentile(waits, 100) * 1000
    return (
        [
            Figure(f"{about}, p50", percentile(waits, 50) * 1000, "ms"),
            Figure(f"{about}, max", worst, "ms", at_most=500 if baseline else None),
            Figure(f"turn p99 meanwhile, {language}", load.percentile_ms(99), "ms"),
        ],
        judge(traffic.history.events),
        load.failed,
        traffic.unseen,
    )


if __name__ == "__main__":
    run_main(measure)
