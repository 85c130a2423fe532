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

    def is_whole(self, hash: str) -> bool:
        """Whether the files of a version are here, and have that hash."""
        folder = self._versions / hash
        source = Source(hash, folder, "folder")
        try:
            files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in source.files()}
            return hash_of(pack(hash, files)) == hash
        except (OSError, LoadFailed):
            return False

    def place(self, name: str, hash: str, files: Mapping[str, bytes] | None) -> None:
        """Have plugin *name* be the version *hash*, whose *files* are None where they are here and whole.

        One that is here and damaged goes, and is away for a moment.
        """
        target = self._versions / hash
        if files is not None:
            self._write(hash, files)
        os.utime(target)  # so that nobody takes it for one that is not wanted any more
        link = self.plugins / f".{secrets.token_hex(8)}"
        link.symlink_to(Path("..", self._versions.name, hash))
        link.replace(self.plugins / name)

    def _write(self, hash: str, files: Mapping[str, bytes]) -> None:
        target, fresh = self._versions / hash, self._versions / f".{secrets.token_hex(8)}"
        try:
            for name, data in files.items():
                path = fresh / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
                # Older than its inode by far: so a file is told that came by rename, and that nobody writes any more.
                os.utime(path, (0, 0))
            try:
                fresh.rename(target)
            except OSError:
                if not target.exists():
                    raise
                if not self.is_whole(hash):  # else another worker was quicker, with the same bytes
                    self._delete(target)
                    fresh.rename(target)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)

    def remove(self, name: str) -> None:
        """Have no plugin *name*."""
        (self.plugins / name).unlink(missing_ok=True)

    def find_damaged(self) -> set[str]:
        """The plugins whose files do not have their hash any more."""
        return {name for name, (hash, _) in self.held().items() if not self.is_whole(hash)}

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
        """At once as a whole: who has linked to it meanwhile finds nothing, and writes it anew."""
        if path.is_symlink():
            path.unlink()
            return
        gone = self._versions / f".{secrets.token_hex(8)}"
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
