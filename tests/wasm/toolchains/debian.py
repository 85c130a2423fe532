"""Packages of Debian or Ubuntu: installed where that is allowed, else taken apart in a folder."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from . import Unavailable
from .installing import CACHE, run

__all__ = ["install", "needed_by", "take_apart"]

QUIET = ("-qq", "-o", "DPkg::Lock::Timeout=180", "-o", "APT::Sandbox::User=root")


def install(packages: Sequence[str], *, remedy: str) -> None:
    """Install them, one process at a time. Raises `Unavailable` where that needs somebody else's rights."""
    if not shutil.which("apt-get"):
        raise Unavailable(f"there is no apt-get; {remedy}")
    if os.geteuid():
        raise Unavailable(f"only root may install {' and '.join(packages)}; {remedy}")
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "apt.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _apt(["install", "-y", "--no-install-recommends", *packages], remedy=remedy)


def needed_by(package: str, like: str, *, remedy: str) -> list[str]:
    """The package and those that it depends on, directly or not, whose names match *like*."""
    if not shutil.which("apt-cache"):
        raise Unavailable(f"there is no apt-cache; {remedy}")
    found = [package]
    for one in found:
        told = run(["apt-cache", "depends", "--important", one], remedy=remedy)
        names = re.findall(r"^ *\|?(?:Pre)?Depends: (\S+)", told, re.MULTILINE)
        found += [name for name in dict.fromkeys(names) if re.fullmatch(like, name) and name not in found]
    return found


def take_apart(packages: Sequence[str], folder: Path, only: Sequence[str] = (), *, remedy: str) -> None:
    """Put the files of packages below *folder*; nothing is installed, and no rights are needed. *only*: patterns."""
    archives = folder / "archives"
    archives.mkdir()
    _apt(["download", *packages], cwd=archives, remedy=remedy)
    patterns = ["--wildcards", *only] if only else []
    for archive in sorted(archives.glob("*.deb")):
        with subprocess.Popen(["dpkg", "--fsys-tarfile", archive], stdout=subprocess.PIPE) as files:
            # tar's own complaint is that a pattern is in none of the files
            subprocess.run(["tar", "-x", "-C", folder, *patterns], stdin=files.stdout, stderr=subprocess.DEVNULL)
    shutil.rmtree(archives)


def _apt(args: Sequence[str], *, remedy: str, cwd: Path | None = None) -> None:
    """Run apt-get; once more with fresh lists where they may be the reason that it failed."""
    env = {"DEBIAN_FRONTEND": "noninteractive"}
    try:
        run(["apt-get", *QUIET, *args], cwd=cwd, env=env, remedy=remedy)
    except Unavailable:
        if os.geteuid():
            raise
        run(["apt-get", *QUIET, "update"], env=env, remedy=remedy)
        run(["apt-get", *QUIET, *args], cwd=cwd, env=env, remedy=remedy)
