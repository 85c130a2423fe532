"""`python -m hotdesk_sdk.conformance PATH`: a line for each claim; exit status 1 when one is not kept."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import sys
from pathlib import Path

from . import CASES, Case, run_case


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m hotdesk_sdk.conformance", description=__doc__)
    parser.add_argument("path", type=Path, help="the plugin: a .wasm or .py file, or the folder of either")
    parser.add_argument("--case", action="append", choices=[case.name for case in CASES], help="only this one")
    asked = parser.parse_args()
    if not asked.path.exists():
        parser.error(f"there is no plugin at {asked.path}")
    chosen = [case for case in CASES if not asked.case or case.name in asked.case]
    failed = sum(not _try(case, asked.path) for case in chosen)
    _say(f"{len(chosen) - failed} of {len(chosen)} claims are kept")
    return 1 if failed else 0


def _try(case: Case, path: Path) -> bool:
    log = io.StringIO()
    try:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            asyncio.run(run_case(case, path))
    except Exception as exc:  # whatever a plugin or its loading raises is why the claim is not kept
        _say(f"✗ {case.name}: {case.claim}\n    {str(exc) or repr(exc)}")
        return False
    _say(f"✓ {case.name}: {case.claim}")
    return True


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
