"""Compiles components, in a process of its own: `python -m hotdesk.runtime.wit_compile MEGABYTES NICENESS`.

A component can be made so that compiling it takes all memory, or for ever (huge or deeply nested functions). Here that
ends this process, by its limits or by whoever waits for it, and the host goes on. It also keeps the work off the
host's interpreter.

On standard input: a line of JSON `{"size", "target", "baseline"}`, then that many bytes. On standard output: a line
`{"taken"}` when it has them, then a line `{"error"}`, null when the native code is in the file *target*.
"""

from __future__ import annotations

import json
import os
import resource
import sys

__all__ = ["UNKEPT", "main"]

UNKEPT = "its native code can't be kept: "


def main() -> None:
    megabytes = int(sys.argv[1])
    limit = megabytes * 1024 * 1024
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(int(sys.argv[2]))
    from wasmtime import WasmtimeError
    from wasmtime.component import Component

    from hotdesk.runtime.wit_engine import new_engine
    from hotdesk.runtime.wit_names import without_mangled_names

    engines = {False: new_engine()}
    source, out = sys.stdin.buffer, sys.stdout
    print(json.dumps({"ready": True}), file=out, flush=True)
    while line := source.readline():
        task = json.loads(line)
        data = source.read(task["size"])
        print(json.dumps({"taken": True}), file=out, flush=True)
        error = None
        try:
            baseline = task["baseline"]
            if baseline not in engines:
                engines[baseline] = new_engine(baseline=True)
            native = Component(engines[baseline], without_mangled_names(data)).serialize()
            _write(task["target"], native)
        except (WasmtimeError, RuntimeError, ValueError, RecursionError) as exc:
            error = str(exc)[:2000]  # names in it are the component's, and a line that is too long is not read
        except MemoryError:
            error = f"compiling it takes over {megabytes} MB"
        except OSError as exc:
            error = f"{UNKEPT}{exc.strerror}"
        print(json.dumps({"error": error}), file=out, flush=True)


def _write(target: str, native: bytes | bytearray) -> None:
    with open(target, "wb") as file:
        file.write(native)


if __name__ == "__main__":
    main()
