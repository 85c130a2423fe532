"""The versions that served, kept in the data folder: a rollback, and what was refused, outlive the host.

`plugins/NAME/versions.json` lists them, `plugins/NAME/HASH/` has the files of each. It is read at the start and
written after each swap, off the loop; a file that can't be read is as if it were not there, and is logged.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import msgspec

from hotdesk_sdk import HotdeskError

from ..logs import Logger
from .entries import Kept
from .sources import Source, bundle_of, source_of

__all__ = ["Archive", "Archived"]


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


class Archive:
    """Owns `plugins/` in the data folder."""

    def __init__(self, folder: Path, log: Logger) -> None:
        self._folder = folder
        self._log = log
        self._writing: dict[str, asyncio.Lock] = {}

    def read(self, source: Source) -> Archived:
        """What was kept of a plugin; *source* is where it lives now."""
        folder = self._folder / source.name
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
        for one in kept:
            target = folder / one.bundle.digest
            if not target.exists():
                fresh = folder / f".{one.bundle.digest}"
                shutil.rmtree(fresh, ignore_errors=True)
                for file, data in one.bundle.files.items():
                    path = fresh / file
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(data)
                fresh.rename(target)
        rows = tuple(_Version(one.generation, one.bundle.digest, one.at) for one in kept)
        fresh = folder / ".versions.json"
        fresh.write_bytes(msgspec.json.encode(_Versions(last_number, refused, rows)))
        fresh.replace(folder / "versions.json")
        wanted = {one.bundle.digest for one in kept}
        for child in folder.iterdir():
            if child.is_dir() and child.name not in wanted:
                shutil.rmtree(child, ignore_errors=True)


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
