"""One host a data folder, and one a journal: advisory locks that end with the process, however it ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

from ..errors import BackendError, DataFolderHeld

__all__ = ["FileLock", "FolderLock"]


class FileLock:
    """Held from `acquire` to `release`; the file says who holds it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd: int | None = None

    def acquire(self, held: Callable[[str], BackendError]) -> None:
        """Raises what *held* makes of the holder when another process has it, `OSError` when it can't be made."""
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(fd, 100).decode("ascii", "replace").strip() or "pid unknown"
            os.close(fd)
            raise held(holder) from None
        os.ftruncate(fd, 0)
        os.write(fd, f"pid {os.getpid()}\n".encode())
        self._fd = fd

    def release(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class FolderLock:
    """One host a data folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = FileLock(folder / "hotdesk.lock")

    def acquire(self) -> None:
        """Raises `DataFolderHeld`, or `BackendError` when the folder can't be used."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(lambda holder: DataFolderHeld(str(self._folder), holder))
        except OSError as exc:
            raise BackendError(
                f"the data folder {self._folder} can't be used: {exc.strerror}; choose one with --data"
            ) from exc

    def release(self) -> None:
        self._lock.release()
