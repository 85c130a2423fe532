"""The server's program: the machine's own, or Debian's package taken apart."""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

from tests.wasm.toolchains import Unavailable, debian
from tests.wasm.toolchains.installing import install_once

__all__ = ["find_redis"]

FLOOR = (7, 0)
REMEDY = "install Redis 7.0 or newer, or Valkey (Debian: apt-get install redis-server)"

NAMED = os.environ.get("HOTDESK_TEST_REDIS")
"""A program to test with in place of what is found. Read here, for the tests clear such variables when they begin."""

PARTS = r"redis-.*|valkey-.*|lua-.*|lib(atomic|hiredis|jemalloc|lua|lzf|ssl|systemd|valkey).*"
"""Those of the package's dependencies that a bare Debian may not have."""


@functools.cache
def find_redis() -> Path:
    """`redis-server` or `valkey-server`, 7.0 or newer, or the program that `HOTDESK_TEST_REDIS` names.

    Where there is none, Debian's package is taken apart in the toolchains' folder (5 s, once a machine): that needs no
    rights, and it starts no system service as an installed package would. Raises `RuntimeError` with what to install.
    """
    if NAMED:
        return _new_enough(Path(NAMED))
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/bin"])):
            return _new_enough(Path(found))
    try:
        return _new_enough(install_once("redis", _unpack) / "redis-server")
    except (Unavailable, OSError) as exc:
        raise RuntimeError(f"no Redis server for the tests: {exc}; {REMEDY}") from exc


def _new_enough(program: Path) -> Path:
    """*program*, unless it is none or too old."""
    try:
        said = subprocess.run([program, "--version"], capture_output=True, text=True, check=False, timeout=30).stdout
    except OSError as exc:
        raise RuntimeError(f"{program}: {exc.strerror}; {REMEDY}") from exc
    version = re.search(r"\bv=(\d+)\.(\d+)", said)
    if not version:
        raise RuntimeError(f"{program} is no Redis server (--version says {said.strip()[:80]!r}); {REMEDY}")
    if (int(version[1]), int(version[2])) < FLOOR:
        raise RuntimeError(f"{program} is {version[1]}.{version[2]}, too old for the tests; {REMEDY}")
    return program


def _unpack(folder: Path) -> None:
    debian.take_apart(debian.needed_by("redis-server", PARTS, remedy=REMEDY), folder, remedy=REMEDY)
    libraries = [*folder.glob("usr/lib/*-linux-*"), *folder.glob("lib/*-linux-*")]
    path = shlex.quote(os.pathsep.join(map(str, libraries)))
    starter = folder / "redis-server"
    starter.write_text(f'#!/bin/sh\nLD_LIBRARY_PATH={path} exec {shlex.quote(f"{folder}/usr/bin/redis-server")} "$@"\n')
    starter.chmod(0o755)
