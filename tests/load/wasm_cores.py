"""Two WebAssembly plugins that compute 50 ms a call, both busy at once: whether they use both cores, and what the
loop has of it.

Beside it, what the machine gives: the same function in one process of its own, and in two at once.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from statistics import median
from typing import Any

import wasmtime
from tests.load.client import hold_gc, percentile
from tests.load.hosts import work_folder
from tests.load.report import Figure, ratio, run_main
from tests.load.wasm_sources import ROUND, busy

from hotdesk.app import Host, open_host
from hotdesk.config import Config
from hotdesk.logs import configure_logs
from hotdesk.runtime.wasm_guest import Guest

__all__ = ["measure"]

CALL_S = 0.05
BEAT_S = 0.001
"""uvloop's timers tick in milliseconds; lag is counted from when the beat was due."""

TURN = ("m1", "a-visitor", "hello", "{}")

_FUNCTION = f"""
(module (func (export "run") (param $n i32) (result i32)
  (local $m i32)
  (local.set $m (i32.const 1))
  (loop $next
    {ROUND}
    (br_if $next (local.tee $n (i32.sub (local.get $n) (i32.const 1)))))
  (local.get $m)))
"""


async def measure(short: bool) -> list[Figure]:
    """Idle, one busy, both busy, and the bare processes, in turn; medians of the rounds."""
    rounds, seconds = (2, 1.0) if short else (9, 4.0)
    configure_logs("json", "error")
    rounds_a_call = await asyncio.to_thread(_calibrate)
    bare = _Bare(rounds_a_call)
    with work_folder("wasm-cores") as folder:
        plugins = folder / "plugins"
        plugins.mkdir()
        for name in ("one", "other"):
            (plugins / f"{name}.wasm").write_bytes(busy(rounds_a_call))
        config = Config(plugins=(str(plugins),), data=str(folder / "data"))
        async with open_host(config, serve=False) as host:
            one, other = _guest(host, "one"), _guest(host, "other")
            rates: dict[str, list[float]] = {"one": [], "both": [], "bare one": [], "bare both": []}
            lags: dict[str, list[float]] = {"nothing": [], "one": [], "both": []}
            try:
                for _ in range(rounds):
                    for kind, guests in (("nothing", ()), ("one", (one,)), ("both", (one, other))):
                        rate, lag = await _stretch(guests, seconds)
                        lags[kind] += lag
                        if guests:
                            rates[kind].append(rate)
                    rates["bare one"].append(await asyncio.to_thread(bare.rate, 1, seconds))
                    rates["bare both"].append(await asyncio.to_thread(bare.rate, 2, seconds))
            finally:
                bare.close()
    return [
        Figure("one busy plugin", median(rates["one"]), "calls/s"),
        Figure("two at once", median(rates["both"]), "calls/s"),
        Figure("two beside one", ratio(rates, "both", "one"), "times", at_least=1.6),
        Figure("two bare processes beside one", ratio(rates, "bare both", "bare one"), "times"),
        Figure("a bare process", median(rates["bare one"]), "calls/s"),
        Figure("the loop's lag with nothing to do, p99", percentile(lags["nothing"], 99) * 1000, "ms"),
        Figure("beside one busy plugin, p99", percentile(lags["one"], 99) * 1000, "ms", at_most=10),
        Figure("beside two, p99", percentile(lags["both"], 99) * 1000, "ms", at_most=10),
        Figure("beside two, max", percentile(lags["both"], 100) * 1000, "ms"),
    ]


def _guest(host: Host, name: str) -> Guest:
    generation = host.plugins.entry(name).current
    assert generation is not None
    assert generation.guest is not None
    return generation.guest


async def _stretch(guests: tuple[Guest, ...], seconds: float) -> tuple[float, list[float]]:
    """Each of *guests* called again and again for *seconds*: calls a second, and how late each beat of the loop was."""
    until = time.perf_counter() + seconds
    lags: list[float] = []

    async def beat() -> None:
        while (due := time.perf_counter() + BEAT_S) < until:
            await asyncio.sleep(BEAT_S)
            lags.append(max(0.0, time.perf_counter() - due))

    async def call(guest: Guest) -> float:
        calls, began = 0, time.perf_counter()
        while time.perf_counter() < until:
            await guest.call("middleware.before", TURN)
            calls += 1
        return calls / (time.perf_counter() - began)

    with hold_gc():
        _, *rates = await asyncio.gather(beat(), *map(call, guests))
    return sum(filter(None, rates)), lags


def _function() -> Callable[[int], Any]:
    engine = wasmtime.Engine()
    store = wasmtime.Store(engine)
    run: Any = wasmtime.Instance(store, wasmtime.Module(engine, _FUNCTION), []).exports(store)["run"]
    return lambda rounds: run(store, rounds)


def _calibrate() -> int:
    """How many rounds take `CALL_S`; the quickest of some tries, since others may hold the core meanwhile."""
    run, rounds = _function(), 1_000_000
    took = []
    for _ in range(10):
        began = time.perf_counter()
        run(rounds)
        took.append(time.perf_counter() - began)
    return round(rounds * CALL_S / min(took))


class _Bare:
    """Two processes with the same function and nothing else."""

    def __init__(self, rounds: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._alone, self._together = context.Barrier(2), context.Barrier(3)
        self._pipes = []
        self._processes = []
        for _ in range(2):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work, args=(theirs, self._alone, self._together, rounds), daemon=True, name="bare"
            )
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def rate(self, processes: int, seconds: float) -> float:
        """Calls a second of so many of them."""
        pipes = self._pipes[:processes]
        for pipe in pipes:
            pipe.send((processes, seconds))
        (self._alone if processes == 1 else self._together).wait()
        return float(sum(pipe.recv() for pipe in pipes))

    def close(self) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.send(None)
            process.join(5.0)


def _work(pipe: Any, alone: Barrier, together: Barrier, rounds: int) -> None:
    run = _function()
    while (task := pipe.recv()) is not None:
        processes, seconds = task
        (alone if processes == 1 else together).wait()
        calls, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            run(rounds)
            calls += 1
        pipe.send(calls / (time.perf_counter() - began))


if __name__ == "__main__":
    run_main(measure)
