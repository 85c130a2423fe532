"""One of several processes that write in the same folder: `python -m tests.workers.writers KIND FOLDER`.

Each fails when it finds anything that is not whole.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

from hotdesk.backend.images import ImageStore
from hotdesk.logs import configure_logs, get_log
from hotdesk.runtime.archive import Archive
from hotdesk.runtime.entries import Kept
from hotdesk.runtime.sources import Source, bundle_of
from hotdesk.runtime.wasm_cache import CodeCache

__all__ = ["KINDS", "TIMES"]

TIMES = 100


def keep_versions(folder: Path) -> None:
    """Three versions at a time, of six, as the swaps of a plugin would have them."""
    source = Source("faq", folder / "faq.py", "py")
    bundles = [bundle_of(source, {"faq.py": b"X = %d\n" % n * 200}) for n in range(6)]
    archive = Archive(folder / "plugins", get_log())
    for count in range(TIMES):
        kept = [Kept(count + n, bundles[count % 4 + n], 0.0) for n in range(3)]
        asyncio.run(archive.write("faq", kept, None, count))
        found = archive.read(source)
        assert len(found.kept) == 3, found
        assert all(one.bundle in bundles for one in found.kept)
        assert found.last_number >= count


def keep_images(folder: Path) -> None:
    """Seven images, kept, read and purged, while others sweep as a worker does that begins."""
    store = ImageStore(folder / "images")
    for count in range(TIMES):
        data = b"%d" % (count % 7) * 5000
        hash = sha256(data).hexdigest()
        store.keep(hash, data)
        assert store.read(hash) in (data, None)
        store.sweep()
        if count % 5 == 0:
            store.delete(hash, time.time() + 1)


def keep_native_code(folder: Path) -> None:
    """Five entries of a cache that holds three, opened anew each time."""
    for count in range(TIMES):
        cache = CodeCache(folder / "wasm", 160_000, get_log())
        cache.open()
        data = b"%d" % (count % 5) * 50_000
        written = cache.new_file()
        written.write_bytes(data)
        assert cache.keep(f"{count % 5:064d}", written) == data
        assert cache.read(f"{count % 5:064d}") in (data, None)


def write_log(folder: Path) -> None:
    """Lines of a log, as fast as they go."""
    log = get_log(folder=str(folder))
    for count in range(TIMES * 10):
        log.warning("said", count=count)


KINDS: dict[str, Callable[[Path], None]] = {
    "versions": keep_versions,
    "images": keep_images,
    "native code": keep_native_code,
}


def main() -> None:
    configure_logs("json", "warning")
    kind, folder = sys.argv[1], Path(sys.argv[2])
    sys.stdout.write("here\n")
    sys.stdout.flush()
    sys.stdin.readline()  # all begin together
    {**KINDS, "log": write_log}[kind](folder)


if __name__ == "__main__":
    main()
