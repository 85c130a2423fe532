"""Images on disk: each once, under the hash of its bytes.

Owns the files and nothing else; which conversation may see which image, and when one is no longer needed, is the
chat room's affair. Every method blocks and belongs to a thread of its caller's, never to the loop.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path

__all__ = ["ImageStore"]


class ImageStore:
    """The folder `images` of one host: `images/ab/HASH`, and `images/tmp` for what is still being written.

    A file that is there is whole: it was written elsewhere, flushed and renamed. Its time of change says when it was
    last wanted.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tmp = folder / "tmp"
        self._count = itertools.count()

    def sweep(self) -> None:
        """Delete what a host that was killed left half written. Nothing else may be writing."""
        if self._tmp.is_dir():
            for left in self._tmp.iterdir():
                left.unlink(missing_ok=True)

    def path(self, hash: str) -> Path:
        return self._folder / hash[:2] / hash

    def keep(self, hash: str, data: bytes) -> bool:
        """Have *data* on disk when this returns; whether it had to be written. Raises `OSError`.

        An image that is there is only marked as wanted now.
        """
        path = self.path(hash)
        try:
            os.utime(path)
        except FileNotFoundError:
            pass
        else:
            return False
        self._make(self._tmp)
        self._make(path.parent)
        fresh = self._tmp / f"{hash}.{next(self._count)}"
        try:
            descriptor = os.open(fresh, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(path)
        except OSError:
            fresh.unlink(missing_ok=True)
            raise
        _flush(path.parent)
        return True

    def _make(self, folder: Path) -> None:
        """Make *folder* below the store, and have its name on disk."""
        missing = []
        while not folder.is_dir():
            missing.append(folder)
            folder = folder.parent
        for made in reversed(missing):
            made.mkdir(mode=0o700, exist_ok=True)
            _flush(made.parent)

    def read(self, hash: str) -> bytes | None:
        """The bytes; None when there is no such image. Raises `OSError`."""
        try:
            return self.path(hash).read_bytes()
        except FileNotFoundError:
            return None

    def older(self, before: float) -> list[str]:
        """The images that nobody has wanted since *before* (Unix seconds)."""
        if not self._folder.is_dir():
            return []
        return [
            entry.name
            for folder in self._folder.iterdir()
            if folder.is_dir() and folder != self._tmp
            for entry in os.scandir(folder)
            if entry.stat().st_mtime < before
        ]

    def mark(self, hash: str, at: float) -> None:
        """Let an image count as wanted at *at*."""
        os.utime(self.path(hash), (at, at))

    def delete(self, hash: str) -> None:
        self.path(hash).unlink(missing_ok=True)


def _flush(folder: Path) -> None:
    """Have the names in *folder* on disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
