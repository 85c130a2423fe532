"""Pushed plugins on this host's disk: a folder that is watched like any other, of links to whole versions.

    DATA/pushed/plugins/NAME        a link to
    DATA/pushed/versions/HASH/      the files with that hash, written once and never again

A version is written elsewhere and renamed, then the link is: whoever looks, sees all of one version. Several workers
may do so at the same time, each with the same bytes.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from ..errors import LoadFailed
from .shelf import hash_of, pack
from .sources import Source

__all__ = ["PushedFiles"]

STALE_S = 60.0
"""A version that nothing has linked to for so long is deleted, and so is what was begun and left."""


class PushedFiles:
    """Owns `pushed/` in the data folder. Everything here blocks, and raises `OSError` when it can't be done."""

    def __init__(self, folder: Path) -> None:
        self.plugins = folder / "plugins"
        self._versions = folder / "versions"

    def open(self) -> None:
        """Make the folders."""
        self.plugins.mkdir(parents=True, exist_ok=True)
        self._versions.mkdir(exist_ok=True)

    def held(self) -> dict[str, tuple[str, float]]:
        """The hash of each plugin that is here whole, and since when."""
        held = {}
        for name in os.listdir(self.plugins):
            with contextlib.suppress(OSError):  # it is no link, or goes just now
                link = self.plugins / name
                hash = os.path.basename(os.readlink(link))
                if not name.startswith(".") and (self._versions / hash).is_dir():
                    held[name] = hash, os.lstat(link).st_mtime
        return held

    def has(self, hash: str) -> bool:
        """Whether the files of a version are here."""
        return (self._versions / hash).is_dir()

    def place(self, name: str, hash: str, files: Mapping[str, bytes] | None) -> None:
        """Have plugin *name* be the version *hash*, whose *files* are None where they are here."""
        target = self._versions / hash
        if files is not None and not target.exists():
            self._write(target, files)
        os.utime(target)  # so that nobody takes it for one that is not wanted any more
        link = self.plugins / f".{secrets.token_hex(8)}"
        link.symlink_to(Path("..", self._versions.name, hash))
        link.replace(self.plugins / name)

    def _write(self, target: Path, files: Mapping[str, bytes]) -> None:
        fresh = self._versions / f".{secrets.token_hex(8)}"
        try:
            for name, data in files.items():
                path = fresh / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
                # Older than its inode by far: so a file is told that came by rename, and that nobody writes any more.
                os.utime(path, (0, 0))
            fresh.rename(target)
        except OSError:
            shutil.rmtree(fresh, ignore_errors=True)
            if not target.exists():  # else another worker was quicker, with the same bytes
                raise

    def remove(self, name: str) -> None:
        """Have no plugin *name*."""
        (self.plugins / name).unlink(missing_ok=True)

    def take_out_damaged(self) -> list[str]:
        """Remove the plugins whose files do not have their hash any more, with those files; which they were."""
        damaged = []
        for name, (hash, _) in self.held().items():
            try:
                whole = hash_of(pack(name, _read(name, self._versions / hash))) == hash
            except (OSError, LoadFailed):
                whole = False
            if not whole:
                self.remove(name)
                with contextlib.suppress(FileNotFoundError):  # it was another plugin's too
                    self._delete(self._versions / hash)
                damaged.append(name)
        return damaged

    def sweep(self) -> None:
        """Delete the versions that no plugin is any more."""
        held = {hash for hash, _ in self.held().values()}
        now = time.time()
        for folder in (self._versions, self.plugins):
            for child in folder.iterdir():
                wanted = child.name in held or (folder == self.plugins and not child.name.startswith("."))
                with contextlib.suppress(OSError):  # another worker was quicker
                    if not wanted and now - child.lstat().st_mtime > STALE_S:
                        self._delete(child)

    def _delete(self, path: Path) -> None:
        """Not while another worker links to it: by then it is gone as a whole, and is written anew."""
        if path.is_symlink():
            path.unlink()
            return
        gone = self._versions / f".{secrets.token_hex(8)}"
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def _read(name: str, folder: Path) -> dict[str, bytes]:
    """The files of a version that a host would load."""
    source = Source(name, folder, "folder")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in source.files()}
