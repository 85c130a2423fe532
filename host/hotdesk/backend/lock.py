"""One host a data folder: an advisory lock that ends with the process, however it ends."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from ..errors import BackendError, DataFolderHeld

__all__ = ["FolderLock"]


class FolderLock:
    """Held from `acquire` to `release`. Raises `DataFolderHeld` when another process has it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._fd: int | None = None

    def acquire(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            fd = os.open(self._folder / "hotdesk.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as exc:
            raise BackendError(
                f"the data folder {self._folder} can't be used: {exc.strerror}; choose one with --data"
            ) from exc
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(fd, 100).decode("ascii", "replace").strip() or "pid unknown"
            os.close(fd)
            raise DataFolderHeld(str(self._folder), holder) from None
        os.ftruncate(fd, 0)
        os.write(fd, f"pid {os.getpid()}\n".encode())
        self._fd = fd

    def release(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
