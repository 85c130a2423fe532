"""What several processes write in one data folder is always whole: kept versions, images, native code, keys."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from tests.workers.writers import KINDS, TIMES

from hotdesk.backend.images import ImageStore
from hotdesk.config import Config
from hotdesk.web.access import Keys, keep_admin_token, prepare_keys

PROCESSES = 4
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("kind", KINDS)
async def test_processes_that_write_the_same_never_read_a_half(kind: str, tmp_path: Path) -> None:
    """Each finds what it or another wrote whole, is disturbed by nobody's cleaning up, and has nothing to warn of."""
    (tmp_path / "faq.py").write_text("")
    assert await run_writers(kind, tmp_path) == ""
    names = [path.name for path in tmp_path.rglob("*")]
    assert [name for name in names if name.endswith(".part") or (name.startswith(".") and name != ".lock")] == []
    assert not (tmp_path / "images" / "tmp").exists() or not list((tmp_path / "images" / "tmp").iterdir())


async def test_lines_of_several_processes_are_not_mixed(tmp_path: Path) -> None:
    """Workers share the log: each of its lines is one event of one of them."""
    lines = (await run_writers("log", tmp_path)).splitlines()
    assert len(lines) == PROCESSES * TIMES * 10
    counts = Counter(json.loads(line)["count"] for line in lines)
    assert set(counts.values()) == {PROCESSES}


async def run_writers(kind: str, folder: Path) -> str:
    """Have several processes write at the same time; what all of them said on the stderr that they share."""
    with (folder / "stderr").open("wb") as stderr:
        processes = [
            await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "tests.workers.writers", kind, str(folder)),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, cwd=ROOT,
            )
            for _ in range(PROCESSES)
        ]  # fmt: skip
    for process in processes:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"here\n"
    await asyncio.gather(*(process.communicate(b"go\n") for process in processes))
    said = (folder / "stderr").read_text()
    assert [process.returncode for process in processes] == [0] * PROCESSES, said
    return said


def test_an_image_that_another_worker_was_just_sent_survives_a_purge(tmp_path: Path) -> None:
    """A purge lists the old ones first: what is wanted again before it comes to delete them is left."""
    store, other = ImageStore(tmp_path / "images"), ImageStore(tmp_path / "images")
    hash, before = "ab" + "0" * 62, time.time() - 50
    store.keep(hash, b"image")
    store.mark(hash, before - 50)
    assert store.older(before) == [hash]
    assert other.keep(hash, b"image") is False
    assert store.delete(hash, before) is False
    assert other.read(hash) == b"image"
    store.mark(hash, before - 50)
    assert store.delete(hash, before) is True
    assert other.read(hash) is None


def test_what_a_worker_is_writing_is_not_swept_by_one_that_begins(tmp_path: Path) -> None:
    """Only what nobody holds is left over from somebody who was killed."""
    store = ImageStore(tmp_path / "images")
    store.keep("ab" + "0" * 62, b"image")
    half = tmp_path / "images" / "tmp" / "left"
    half.write_bytes(b"\x89PNG")
    read, write = os.pipe()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(half.with_name("held")), str(write)], pass_fds=[write], stdin=subprocess.PIPE
    )
    try:
        assert os.read(read, 1) == b"!"
        store.sweep()
        assert sorted(path.name for path in half.parent.iterdir()) == ["held"]
    finally:
        holder.kill()
        holder.communicate()
        os.close(read)
        os.close(write)
    store.sweep()
    assert list(half.parent.iterdir()) == []


HOLD = """
import fcntl, os, sys, time
file = open(sys.argv[1], "wb")
fcntl.flock(file, fcntl.LOCK_EX)
os.write(int(sys.argv[2]), b"!")
time.sleep(60)
"""


def test_keys_are_made_once_and_kept_whole(tmp_path: Path) -> None:
    """What one start made, the next has; nothing of what was being written is left beside it."""
    config = Config(data=str(tmp_path), visitor_tokens=True)
    first = prepare_keys(config)
    assert first.new_admin_token is not None
    assert prepare_keys(config).admin_digest != first.admin_digest  # nobody was shown it, so it is not kept
    keep_admin_token(config, first)
    assert prepare_keys(config) == Keys(first.admin_digest, first.visitor_secret)
    assert prepare_keys(config, Keys("other", "other")).admin_digest == first.admin_digest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["admin_token.sha256", "visitor_secret"]
    (tmp_path / "admin_token.sha256").unlink()
    assert prepare_keys(config, first).admin_digest == first.admin_digest  # a desk that runs makes no new one
