"""A Redis that can lose its power: of its append-only file only what was synced is left.

SIGKILL does not show what `appendfsync` is for: what a dead process had written is in the system's page cache, and the
next one reads it there. So the server runs with a small library before the system's own, which notes how long each file
was when it was synced. After the kill the files are cut to that: just as a machine would find them, at the worst.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.redis_servers import RedisServer

__all__ = ["PoweredRedis", "can_lose_power"]

_LIBRARY = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

static int note(int fd, const char *name) {
    int (*sync)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    struct stat before;
    int known = fstat(fd, &before) == 0;  /* what comes while it syncs is not promised */
    int result = sync(fd);
    if (result == 0 && known) {
        int notes = open(getenv("SYNCED"), O_WRONLY | O_CREAT | O_APPEND, 0600);
        if (notes >= 0) {
            dprintf(notes, "%llu %lld\n", (unsigned long long)before.st_ino, (long long)before.st_size);
            close(notes);
        }
    }
    return result;
}

int fdatasync(int fd) { return note(fd, "fdatasync"); }
int fsync(int fd) { return note(fd, "fsync"); }
"""


def can_lose_power() -> str | None:
    """None, or the reason why it can't be shown here."""
    return None if shutil.which("cc") else "what a crash of the machine leaves is seen with a C compiler; install gcc"


class PoweredRedis(RedisServer):
    """A server whose power can be cut. Needs a C compiler: see `can_lose_power`."""

    async def lose_power(self) -> int:
        """Kill it, and let go what it had not synced; how many bytes those were. `start` starts it again."""
        await self.kill()
        synced: dict[int, int] = {}
        for line in self._notes.read_text().splitlines():
            file, size = map(int, line.split())
            synced[file] = size
        lost, kept_notes = 0, ""
        for file in (self.folder / "appendonlydir").glob("*.incr.aof"):
            about = file.stat()
            kept = min(about.st_size, synced.get(about.st_ino, 0))
            lost += about.st_size - kept
            with file.open("r+b") as content:
                content.truncate(kept)
            kept_notes += f"{about.st_ino} {kept}\n"  # what is left was on the disk
        self._notes.write_text(kept_notes)
        return lost

    @property
    def _notes(self) -> Path:
        return self.folder / "synced"

    def _spawn(self, command: Sequence[str]) -> None:
        library = self.folder / "power.so"
        if not library.exists():
            source = self.folder / "power.c"
            source.write_text(_LIBRARY)
            subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
        self._notes.touch()
        super()._spawn(["env", f"LD_PRELOAD={library}", f"SYNCED={self._notes}", *command])
