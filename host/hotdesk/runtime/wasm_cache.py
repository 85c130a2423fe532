"""Native code of components, kept by what it was compiled from: the host's own, never read from a plugin folder.

An entry's key is the component's hash with all that decides whether native code fits; what is read is checked against
the hash that it was kept with. The folder belongs to the host's user alone, and is refused when it does not: who can
write there can run anything.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import stat
import time
from pathlib import Path

from ..logs import Logger

__all__ = ["CodeCache"]

MAGIC = b"hotdesk native code 1\n"
SUFFIX = ".native"

STALE_S = 3600.0
"""A file that was begun this long ago is nobody's any more."""


class CodeCache:
    """The folder *root*, at most *max_bytes* large; the least recently used goes first. Every method blocks."""

    def __init__(self, root: Path, max_bytes: int, log: Logger) -> None:
        self.root = root
        self._max_bytes = max_bytes
        self._log = log

    def open(self) -> None:
        """Raises `OSError`, or `PermissionError` when others can write there."""
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = self.root.stat()
        if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise PermissionError(
                f"{self.root} can be written by others than this host's user, who could then run anything: delete it"
            )
        for path in self.root.glob("*.part"):  # another host may be writing one just now
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > STALE_S:
                    path.unlink()

    def new_file(self) -> Path:
        """Where to write what is then given to `keep`."""
        with contextlib.suppress(OSError):  # somebody may have cleaned up
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        return self.root / f"{secrets.token_hex(8)}.part"

    def read(self, key: str) -> bytes | None:
        """The native code kept as *key*, if it is there and as it was. What is not is thrown away."""
        path = self.root / f"{key}{SUFFIX}"
        try:
            with path.open("rb") as file:
                found = os.fstat(file.fileno())
                if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                    self._log.warning("native_code_not_ours", file=str(path), remedy="delete it: others can write it")
                    return None
                data = file.read()
        except OSError:
            return None
        head = len(MAGIC) + 32
        native = memoryview(data)[head:]
        if not data.startswith(MAGIC) or hashlib.sha256(native).digest() != data[len(MAGIC) : head]:
            self._log.warning("native_code_damaged", file=str(path), remedy="none needed: it is compiled again")
            path.unlink(missing_ok=True)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return bytes(native)

    def keep(self, key: str, written: Path) -> bytes:
        """Take what is in the file *written* as *key*; return it. The file is gone. Raises `OSError`."""
        native = written.read_bytes()
        written.unlink()
        if len(native) <= self._max_bytes:
            part = self.new_file()
            try:
                part.write_bytes(MAGIC + hashlib.sha256(native).digest() + native)
                part.replace(self.root / f"{key}{SUFFIX}")
            except OSError as exc:  # a full disk: it serves all the same, and is compiled again next time
                part.unlink(missing_ok=True)
                self._log.warning("native_code_not_kept", folder=str(self.root), problem=str(exc))
            self._bound()
        return native

    def _bound(self) -> None:
        entries = []
        for path in self.root.glob(f"*{SUFFIX}"):
            with contextlib.suppress(OSError):
                found = path.stat()
                entries.append((found.st_mtime_ns, found.st_size, path))
        size = sum(entry[1] for entry in entries)
        for _, bytes_, path in sorted(entries):
            if size <= self._max_bytes:
                break
            path.unlink(missing_ok=True)
            size -= bytes_
