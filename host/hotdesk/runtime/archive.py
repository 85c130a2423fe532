"""The versions that served, kept in the data folder: a rollback, and what was refused, outlive the host.

`plugins/NAME/versions.json` lists them, `plugins/NAME/HASH/` has the files of each. It is read at the start and
written after each swap, off the loop; a file that can't be read is as if it were not there, and is logged.

Several workers write there. Each writes what it has itself, one at a time, and whoever is last is right: they serve the
same. What is read is whole, for everything is written elsewhere and renamed.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from hotdesk_sdk import HotdeskError

from ..logs import Logger
from .entries import Kept
from .sources import Source, bundle_of, source_of

__all__ = ["Archive", "Archived"]


TURN_S = 1.0
"""How long a worker waits for another that writes. One that is stopped in the middle of it must not hold up the rest,
and then nothing worse can happen than that a version is missing for a rollback."""

STALE_S = 3600.0
"""What was begun this long ago, and not finished, is nobody's any more."""


class _Version(msgspec.Struct, frozen=True):
    generation: int
    digest: str
    at: float


class _Versions(msgspec.Struct, frozen=True):
    last_number: int
    refused: str | None
    kept: tuple[_Version, ...]


class Archived(msgspec.Struct, frozen=True):
    """What is known of a plugin from before the start."""

    kept: tuple[Kept, ...] = ()
    refused: str | None = None
    last_number: int = 0


_decode = msgspec.json.Decoder(_Versions).decode

LOCK = ".lock"


class Archive:
    """Owns `plugins/` in the data folder."""

    def __init__(self, folder: Path, log: Logger) -> None:
        self._folder = folder
        self._log = log
        self._writing: dict[str, asyncio.Lock] = {}

    def read(self, source: Source) -> Archived:
        """What was kept of a plugin; *source* is where it lives now."""
        folder = self._folder / source.name
        if not folder.is_dir():
            return Archived()
        with _turn(folder):
            return self._read(folder, source)

    def _read(self, folder: Path, source: Source) -> Archived:
        try:
            versions = _decode((folder / "versions.json").read_bytes())
        except FileNotFoundError:
            return Archived()
        except (OSError, msgspec.DecodeError) as exc:
            self._log.warning("archive_unreadable", plugin=source.name, folder=str(folder), problem=str(exc))
            return Archived()
        kept = []
        for version in versions.kept:
            try:
                files = _files(folder / version.digest)
                kept.append(Kept(version.generation, bundle_of(source_of(files, source), files), version.at))
            except (OSError, HotdeskError) as exc:
                self._log.warning("archive_unreadable", plugin=source.name, version=version.digest, problem=str(exc))
        return Archived(tuple(kept), versions.refused, versions.last_number)

    async def write(self, name: str, kept: Iterable[Kept], refused: str | None, last_number: int) -> None:
        """Keep these versions and no others. A failure is logged: it costs a later rollback, and no message."""
        versions = tuple(kept)
        async with self._writing.setdefault(name, asyncio.Lock()):
            try:
                await asyncio.to_thread(self._write, name, versions, refused, last_number)
            except OSError as exc:
                self._log.warning("archive_not_written", plugin=name, problem=str(exc))

    def _write(self, name: str, kept: tuple[Kept, ...], refused: str | None, last_number: int) -> None:
        folder = self._folder / name
        folder.mkdir(parents=True, exist_ok=True)
        with _turn(folder):
            for one in kept:
                _keep(folder, one)
            with contextlib.suppress(OSError, msgspec.DecodeError):
                last_number = max(last_number, _decode((folder / "versions.json").read_bytes()).last_number)
            rows = tuple(_Version(one.generation, one.bundle.digest, one.at) for one in kept)
            fresh = folder / f".{secrets.token_hex(8)}"
            fresh.write_bytes(msgspec.json.encode(_Versions(last_number, refused, rows)))
            fresh.replace(folder / "versions.json")
            _sweep(folder, {one.bundle.digest for one in kept})


def _keep(folder: Path, one: Kept) -> None:
    """Have a version's files in *folder*."""
    target = folder / one.bundle.digest
    if target.exists():
        return
    fresh = folder / f".{secrets.token_hex(8)}"
    for file, data in one.bundle.files.items():
        path = fresh / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    try:
        fresh.rename(target)
    except OSError:
        shutil.rmtree(fresh, ignore_errors=True)
        if not target.exists():  # else another worker was quicker, with the same bytes
            raise


def _sweep(folder: Path, wanted: set[str]) -> None:
    """Delete the versions that are not *wanted*, and what was begun and left."""
    now = time.time()
    for child in folder.iterdir():
        if child.name in wanted or child.name in ("versions.json", LOCK):
            continue
        with contextlib.suppress(OSError):
            if child.name.startswith(".") and now - child.stat().st_mtime < STALE_S:
                continue
            if child.is_dir():
                shutil.rmtree(child, ignore_errors=True)
            else:
                child.unlink()


@contextlib.contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """Wait until no other worker reads or writes in *folder*, for at most `TURN_S`."""
    try:
        fd = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        yield
        return
    try:
        until = time.monotonic() + TURN_S
        while time.monotonic() < until:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.005)
        yield
    finally:
        os.close(fd)


def _files(folder: Path) -> dict[str, bytes]:
    found = {}
    for path, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            file = Path(path, name)
            found[file.relative_to(folder).as_posix()] = file.read_bytes()
    if not found:
        raise FileNotFoundError(f"no files in {folder}")
    return found
