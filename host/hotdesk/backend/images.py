"""Images on disk: each once, under the hash of its bytes.

Owns the files and nothing else; which conversation may see which image, and when one is no longer needed, is the
chat room's affair. Every method blocks and belongs to a thread of its caller's, never to the loop.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from pathlib import Path

__all__ = ["ImageStore"]


class ImageStore:
    """The folder `images` of one host: `images/ab/HASH`, and `images/tmp` for what is still being written.

    A file that is there is whole: it was written elsewhere, flushed and renamed. Its time of change says when it was
    last wanted. Several workers may share it: each holds a lock on what it is writing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tmp = folder / "tmp"

    def sweep(self) -> None:
        """Delete what a worker that was killed left half written."""
        if not self._tmp.is_dir():
            return
        for left in self._tmp.iterdir():
            with contextlib.suppress(OSError):
                descriptor = os.open(left, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while somebody is writing it
                    left.unlink(missing_ok=True)
                finally:
                    os.close(descriptor)

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
        fresh = self._tmp / f"{hash}.{secrets.token_hex(8)}"
        try:
            with os.fdopen(_create_held(fresh), "wb") as file:
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

    def delete(self, hash: str, before: float) -> bool:
        """Delete an image unless somebody has wanted it since *before*; whether it is gone.

        It is looked at once more when it is out of reach: another worker may have marked it just now.
        """
        path = self.path(hash)
        self._make(self._tmp)
        grave = self._tmp / f"{hash}.{secrets.token_hex(8)}"
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # so that no sweep takes it for a half
            except BlockingIOError:  # somebody is just done with writing it
                return False
            if os.fstat(file.fileno()).st_mtime >= before:
                return False
            path.rename(grave)
            if os.fstat(file.fileno()).st_mtime >= before:
                grave.replace(path)
                return False
            grave.unlink()
        return True


def _create_held(path: Path) -> int:
    """Create *path* for writing, with a lock that keeps sweeps away from it."""
    while True:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)  # a worker that begins swept it before it had its lock


def _flush(folder: Path) -> None:
    """Have the names in *folder* on disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
