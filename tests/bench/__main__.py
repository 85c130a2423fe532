"""Every figure of the README, measured again: `python -m tests.bench [--short] [NAME]...`.

Runs one after the other, each in a process of its own, prints one table, and writes all of it to
`tests/bench/out/latest.json`. Exit code 1 when a target is missed.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
from tests.load.report import Figure, print_table

ROOT = Path(__file__).parents[2]
OUT = Path(__file__).parent / "out"
RUNS = {
    "in_process": "tests.load.in_process",
    "http_rate": "tests.load.http_rate",
    "ws_rate": "tests.load.ws_rate",
    "onion": "tests.load.onion",
    "conversations": "tests.load.conversations",
    "idle_visitors": "tests.load.idle_visitors",
    "llm_cost": "tests.load.llm_cost",
    "llm_chunk": "tests.load.llm_chunk",
    "llm_latency": "tests.load.llm_latency",
    "llm_rows": "tests.load.llm_rows",
    "llm_context": "tests.load.llm_context",
    "swaps": "tests.load.swaps",
    "leak": "tests.load.leak",
    "wasm_call": "tests.load.wasm_call",
    "wasm_swaps": "tests.load.wasm_swaps",
    "wasm_cores": "tests.load.wasm_cores",
    "wasm_leak": "tests.load.wasm_leak",
    "kill": "tests.chaos.kill",
    "redis_rate": "tests.load.redis_rate",
    "redis_latency": "tests.load.redis_latency",
    "redis_context": "tests.load.redis_context",
    "redis_cost": "tests.load.redis_cost",
    "redis_ceiling": "tests.load.redis_ceiling",
    "redis_presence": "tests.load.redis_presence",
    "redis_reconnect": "tests.load.redis_reconnect",
    "push": "tests.load.push",
    "hosts": "tests.chaos.hosts",
    "hosts_workers": "tests.chaos.hosts --workers 2 --events 60",
    "hosts_sentinel": "tests.chaos.hosts --topology sentinel",
    "hosts_cluster": "tests.chaos.hosts --topology cluster",
    "once": "tests.chaos.once",
}


def main() -> int:
    """Run what was asked for, or all."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of {', '.join(RUNS)}; all where none is named")
    parser.add_argument("--short", action="store_true", help="a few seconds each, to see that they work")
    options = parser.parse_args()
    if unknown := set(options.names) - set(RUNS):
        parser.error(f"there is no run {', '.join(sorted(unknown))}; there are {', '.join(RUNS)}")
    results: list[dict[str, Any]] = []
    for name in options.names or RUNS:
        print(f"{name} ...", flush=True)
        results.append(run_one(name, short=options.short))
    rows = [(result["run"], msgspec.convert(figure, Figure)) for result in results for figure in result["figures"]]
    print_table("tests.bench" + " --short" * options.short, rows)
    for result in results:
        if "problem" in result:
            print(f"{result['run']} did not finish:\n{result['problem']}")
    write_results(results, short=options.short)
    return 0 if all(result["met"] for result in results) else 1


def run_one(name: str, *, short: bool) -> dict[str, Any]:
    """One run as a process of its own; one that fails is a result too, with the problem in it."""
    began = time.monotonic()
    command = [sys.executable, "-m", *RUNS[name].split(), "--json", *(["--short"] if short else [])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    try:
        result: dict[str, Any] = msgspec.json.decode(done.stdout)
    except msgspec.DecodeError:
        problem = done.stderr.decode(errors="replace")[-3000:]
        result = {"met": False, "figures": [], "problem": problem}
    return {**result, "run": name, "seconds": round(time.monotonic() - began, 1)}


def write_results(results: list[dict[str, Any]], *, short: bool) -> None:
    """Keep what was measured, and on what."""
    OUT.mkdir(parents=True, exist_ok=True)
    machine = {"python": platform.python_version(), "system": platform.platform(), "cores": os.cpu_count()}
    document = {"at": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "short": short, "machine": machine, "runs": results}
    (OUT / "latest.json").write_bytes(msgspec.json.format(msgspec.json.encode(document)))


if __name__ == "__main__":
    sys.exit(main())
