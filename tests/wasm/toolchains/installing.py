"""Where a toolchain is installed to: one folder each, made once, by one process at a time."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from . import Unavailable

__all__ = ["install_once", "run", "with_path"]

CACHE = Path.home() / ".cache" / "hotdesk-toolchains"
DONE = ".done"


def install_once(name: str, install: Callable[[Path], None]) -> Path:
    """The folder that *install* filled, now or in an earlier run. What an install left unfinished is thrown away.

    A new version of a toolchain is a new name. A second process waits for the first.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    folder = CACHE / name
    with (CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / DONE).exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            install(folder)
            (folder / DONE).touch()
    return folder


def run(
    args: Sequence[str | Path],
    *,
    remedy: str,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 240,
) -> str:
    """Run a step of an install and give what it printed. Raises `Unavailable` with its last lines and the *remedy*."""
    step = " ".join(str(arg) for arg in args[:3])
    try:
        done = subprocess.run(
            args,
            cwd=cwd,
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except OSError as exc:
        raise Unavailable(f"{step}: {exc.strerror}; {remedy}") from exc
    except subprocess.TimeoutExpired as exc:
        raise Unavailable(f"{step}: not done after {timeout_s:.0f} s; {remedy}") from exc
    if done.returncode:
        said = " / ".join((done.stderr or done.stdout).strip().splitlines()[-3:])
        raise Unavailable(f"{step}: exit status {done.returncode}: {said}; {remedy}")
    return done.stdout


def with_path(*folders: Path) -> dict[str, str]:
    """The environment in which programs are found in *folders* first."""
    return {"PATH": os.pathsep.join([*map(str, folders), os.environ.get("PATH", os.defpath)])}
