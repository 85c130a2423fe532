"""What lies on the shelf is believed by its hash alone, and no further: nothing else of it reaches a disk or is run."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.hosts.pushing import Fleet, open_fleet
from tests.redis_servers.server import RedisServer

from conftest import StartDesk, echo, wait_until
from hotdesk.errors import LoadFailed
from hotdesk.runtime.pushed_files import PushedFiles
from hotdesk.runtime.shelf import Record, hash_of, pack, unpack

GOOD = {"__init__.py": echo(1).encode()}


@pytest.fixture
async def fleet(start_desk: StartDesk, redis: RedisServer) -> AsyncIterator[Fleet]:
    """One host that serves `bot`, and its shelf."""
    url = f"{redis.url}?partitions=8"
    async with open_fleet(url, await start_desk({}, backend=url)) as opened:
        await opened.serve("bot", GOOD)
        yield opened


def packed(files: dict[str, bytes]) -> bytes:
    """A package as it should be, whatever is in it."""
    return msgspec.msgpack.encode(dict(sorted(files.items())))


async def put(fleet: Fleet, name: str, data: bytes, *, hash: str = "", raw: bytes = b"", **fields: Any) -> Record:
    """Publish bytes that no `hotdesk push` would, with a record that fits them or the one given."""
    old = (await fleet.shelf.read())[0].get(name, b"")
    given = {"name": name, "hash": hash or hash_of(data), "size": len(data), "at": 1.0, **fields}
    record = msgspec.convert(given, Record)
    text = raw or msgspec.json.encode(record)
    assert await fleet.shelf.publish(name, text, over=old, hash=record.hash, data=data, keep=[])
    return record


def on_disk(fleet: Fleet) -> set[str]:
    """All that lies in the data folder for what was pushed."""
    folder = Path(fleet.desks[0].host.config.data, "pushed")
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# -- packages ----------------------------------------------------------------------------------------------------

HOSTILE: dict[str, tuple[dict[str, bytes], str]] = {
    "out of the folder": ({**GOOD, "../evil.py": b""}, "does not lie in its folder"),
    "out of a folder in it": ({**GOOD, "a/../../evil.py": b""}, "does not lie in its folder"),
    "from the root": ({**GOOD, "/etc/evil.py": b""}, "does not lie in its folder"),
    "an empty part": ({**GOOD, "a//b.py": b""}, "does not lie in its folder"),
    "an empty name": ({**GOOD, "": b""}, "does not lie in its folder"),
    "this folder": ({**GOOD, "./b.py": b""}, "does not lie in its folder"),
    "another system's path": ({**GOOD, "a\\b.py": b""}, "not every system can show"),
    "a control character": ({**GOOD, "a\x1b[2J.py": b""}, "not every system can show"),
    "an end of text": ({**GOOD, "a.py\x00.txt": b""}, "not every system can show"),
    "a long name": ({**GOOD, "a" * 300: b""}, "does not lie in its folder"),
    "a long path": ({**GOOD, "a/" * 250 + "b.py": b""}, "too long a path"),
    "a hidden file": ({**GOOD, ".env": b""}, "is no part of a plugin"),
    "a hidden folder": ({**GOOD, ".git/hooks": b""}, "is no part of a plugin"),
    "compiled code": ({**GOOD, "__pycache__/bot.py": b""}, "is no part of a plugin"),
    "compiled code beside it": ({**GOOD, "part.pyc": b""}, "is no part of a plugin"),
    "a test": ({**GOOD, "test_bot.py": b""}, "is no part of a plugin"),
    "a file and a folder": ({**GOOD, "part": b"", "part/more.py": b""}, "is a file and a folder"),
    "a huge source": ({**GOOD, "part.py": b"#" * 2_200_000}, "a source may have"),
    "too many files": ({**GOOD, **{f"part{n}.py": b"" for n in range(1001)}}, "over 1000 files"),
    "no plugin": ({"readme.txt": b""}, "neither __init__.py nor plugin.wasm"),
    "nothing": ({}, "neither __init__.py nor plugin.wasm"),
    "more beside a component": ({"plugin.wasm": b"\0asm", "plugin.py": b""}, "a component is plugin.wasm"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_package_is_a_plugins_files_and_nothing_else(what: str) -> None:
    """Paths that lead anywhere else, and files that no plugin has, are refused though the hash is right; none of it can
    be packed either."""
    files, problem = HOSTILE[what]
    data = packed(files)
    with pytest.raises(LoadFailed, match=problem):
        unpack("bot", data, hash_of(data))
    with pytest.raises(LoadFailed, match=problem):
        pack("bot", files)


NO_PACKAGES = {
    "no map": msgspec.msgpack.encode([1, 2]),
    "names that are no text": msgspec.msgpack.encode({1: b""}),
    "files that are no bytes": msgspec.msgpack.encode({"__init__.py": "text"}),
    "cut off": packed(GOOD)[:-1],
    "more behind": packed(GOOD) + b"\x00",
    "unsorted": msgspec.msgpack.encode({"b.py": b"", "__init__.py": b"", "a.py": b""}),
    "a file twice": b"\x82" + packed(GOOD)[1:] + packed(GOOD)[1:],
    "packed at length": b"\xde\x00\x01" + packed(GOOD)[1:],
}


@pytest.mark.parametrize("what", NO_PACKAGES)
def test_a_package_has_one_form(what: str) -> None:
    """Bytes that say the same in another way, or nothing that can be read, are refused though the hash is right."""
    with pytest.raises(LoadFailed, match=r"unpacked|packed in another way"):
        unpack("bot", NO_PACKAGES[what], hash_of(NO_PACKAGES[what]))


def test_a_component_and_its_manifest_are_a_package() -> None:
    """What is right is taken: a component, a package with data and folders in it, names in any script."""
    for files in (
        {"plugin.wasm": b"\0asm", "plugin.toml": b""},
        {"__init__.py": b"", "data/wörter/слова.txt": b"\x00\xff", "plugin.wasm": b""},
    ):
        assert unpack("bot", pack("bot", files), hash_of(pack("bot", files))) == files


# -- the shelf ---------------------------------------------------------------------------------------------------


async def test_bytes_of_another_hash_change_nothing(fleet: Fleet, redis: RedisServer) -> None:
    """A host that fetches other bytes than were pushed writes none of them, says so once, and serves on; pushed again
    with its own bytes, the version serves."""
    [desk] = fleet.desks
    before = on_disk(fleet)
    good = pack("bot", {"__init__.py": echo(2).encode()})
    evil = pack("bot", {"__init__.py": b"raise SystemExit('this must not run')"})
    record = await put(fleet, "bot", evil, hash=hash_of(good))
    event = await desk.wait_event("push_refused", plugin="bot")
    assert f"its bytes have the hash {hash_of(evil)[:12]}… and not {hash_of(good)[:12]}…" in event["message"]
    [why] = await fleet.wait_stands(record, "refused")
    assert why in event["message"]
    assert on_disk(fleet) == before
    assert await desk.reply() == "1: hello"
    assert [one["kind"] for one in desk.events].count("push_refused") == 1
    record, fresh = await fleet.push("bot", {"__init__.py": echo(2)})
    assert fresh
    await fleet.wait_stands(record, "serves")
    assert await desk.reply() == "2: hello"


async def test_bytes_that_are_missing_are_told(fleet: Fleet, redis: RedisServer) -> None:
    """A record without its bytes is refused; the same push again brings them."""
    [desk] = fleet.desks
    data = pack("other", GOOD)
    record = await put(fleet, "other", b"", hash=hash_of(data + b"x"), size=len(data))
    await fleet.wait_stands(record, "refused")
    event = await desk.wait_event("push_refused", plugin="other")
    assert "its bytes are not on the shelf" in event["message"]
    record, _ = await fleet.push("other", {"__init__.py": echo(3)})
    await fleet.wait_stands(record, "serves")


async def test_hostile_packages_reach_no_disk(fleet: Fleet, tmp_path: Path) -> None:
    """Every hostile package, with the right hash, is refused in words, and nothing of it is written anywhere."""
    [desk] = fleet.desks
    around = {path for path in tmp_path.rglob("*") if "pushed" not in path.parts}
    before = on_disk(fleet)
    for number, (what, (files, problem)) in enumerate(HOSTILE.items()):
        data = packed(files)
        await put(fleet, "bot", data, at=float(number))

        def told(problem: str = problem, number: int = number) -> bool:
            said = [event["message"] for event in desk.events if event["kind"] == "push_refused"]
            return len(said) == number + 1 and problem in said[-1]

        await wait_until(told, what)
    assert on_disk(fleet) == before
    assert {path for path in tmp_path.rglob("*") if "pushed" not in path.parts} - around <= {
        Path(desk.host.config.data) / "hotdesk.lock"
    }
    assert await desk.reply() == "1: hello"


NAMES = ("../evil", "..", "/etc", ".hidden", "_own", "a b", "a/b", "", "x" * 65, "a\nb", "ä")


async def test_hostile_names_and_records_are_no_plugins(fleet: Fleet) -> None:
    """A name that no plugin can have, and a record that can't be read, are refused; what is beside them is taken."""
    [desk] = fleet.desks
    before = on_disk(fleet)
    data = packed(GOOD)
    for name in NAMES:
        await put(fleet, name, data)
    raws: dict[str, Any] = {
        "empty": b"{}",
        "noise": b"\xff\xfe",
        "text": b'"record"',
        "another": msgspec.json.encode(Record(name="bot", hash=hash_of(data))),
        "huge": msgspec.json.encode(Record(name="huge", hash=hash_of(data), size=1 << 40)),
        "below": msgspec.json.encode(Record(name="below", hash=hash_of(data), size=-1)),
        "path": msgspec.json.encode(Record(name="path", hash="../../../../etc/" + "0" * 48, size=1)),
        "dots": msgspec.json.encode(Record(name="dots", hash="./" * 32, size=len(data))),
        "upper": msgspec.json.encode(Record(name="upper", hash=hash_of(data).upper(), size=len(data))),
    }
    for name, raw in raws.items():
        await put(fleet, name, data, raw=raw)
    record, _ = await fleet.push("good", {"__init__.py": echo(3)})
    await fleet.wait_stands(record, "serves")
    refused = [event["plugin"] for event in desk.events if event["kind"] == "push_refused"]
    assert sorted(refused) == sorted([*(name[:64] for name in NAMES), *raws])
    assert {entry.name for entry in desk.host.plugins.entries} == {"bot", "good"}
    new = {path.split("/")[1] for path in on_disk(fleet) - before if "/" in path}
    assert new == {"good", record.hash}


async def test_parts_that_are_too_large_are_not_fetched(fleet: Fleet, redis: RedisServer) -> None:
    """A part of five megabytes in the place of a small one is not even asked for."""
    [desk] = fleet.desks
    data = pack("big", {"__init__.py": echo(5).encode()})
    await redis.command("HSET", "hotdesk{shelf}:b:big", f"{hash_of(data)}:0", b"x" * 5_000_000)
    raw = msgspec.json.encode(Record(name="big", hash=hash_of(data), size=len(data), at=1.0))
    sent = await network_bytes(redis)
    assert await fleet.shelf.publish("big", raw, over=b"", hash=hash_of(data), data=b"", keep=[])
    await desk.wait_event("push_refused", plugin="big")
    assert await network_bytes(redis) - sent < 1_000_000
    await redis.command("DEL", "hotdesk{shelf}:b:big")


async def network_bytes(redis: RedisServer) -> int:
    info: str = await redis.command("INFO", "stats")
    return int(next(line.partition(":")[2] for line in info.splitlines() if line.startswith("total_net_output_bytes")))


# -- the disk ----------------------------------------------------------------------------------------------------


async def test_nobody_sees_half_a_version(start_desk: StartDesk, redis: RedisServer) -> None:
    """Versions that only work as a whole, pushed as fast as it goes under traffic, give no failure and no mixture."""
    url = f"{redis.url}?partitions=8"
    desks = [await start_desk({}, backend=url) for _ in range(2)]
    async with open_fleet(url, *desks) as fleet:
        for version in range(1, 13):
            parts = {f"part{n}.py": f"VERSION = {version}\n" for n in range(20)}
            names = ", ".join(f"part{n}" for n in range(20))
            main = (
                f"from hotdesk_sdk import hookimpl\nfrom . import {names}\n"
                f"assert {{m.VERSION for m in ({names})}} == {{{version}}}, 'a mixture'\n"
                f"@hookimpl\nasync def respond(turn):\n    return '{version}'\n"
            )
            record, _ = await fleet.push("pack", {**parts, "__init__.py": main})
        await fleet.wait_stands(record, "serves", "serves")
        assert fleet.events("plugin_failed") == []
        assert [await desk.reply() for desk in desks] == ["12", "12"]


async def test_workers_of_one_host_write_the_same(tmp_path: Path) -> None:
    """Several that place versions in one folder at the same time: whoever is done finds a whole version there, nobody
    ever finds none, and nothing half done is left."""
    places = [PushedFiles(tmp_path / "pushed") for _ in range(8)]
    places[0].open()
    files = {f"part{n}.py": bytes([n]) * 1000 for n in range(30)} | GOOD
    over = threading.Event()

    def place(one: PushedFiles, hash: str, now: dict[str, bytes]) -> int:
        one.place("bot", hash, now)
        return len(list((one.plugins / "bot").iterdir()))

    def look() -> tuple[int, int]:
        looks = missed = 0
        while not over.is_set():
            looks += 1
            missed += not os.path.exists(places[0].plugins / "bot" / "__init__.py")
        return looks, missed

    looking = None
    try:
        for version in range(8):
            now = files | {"version.txt": str(version).encode()}
            hash = hash_of(pack("bot", now))
            found = await asyncio.gather(*(asyncio.to_thread(place, one, hash, now) for one in places))
            assert found == [len(now)] * len(places)
            assert {name: found for name, (found, _) in places[1].held().items()} == {"bot": hash}
            assert places[2].find_damaged() == set()
            looking = looking or asyncio.ensure_future(asyncio.to_thread(look))
    finally:
        over.set()
    assert looking is not None
    looks, missed = await looking
    assert (looks > 8, missed) == (True, 0)
    assert [path.name for path in (tmp_path / "pushed").rglob(".*")] == []


def test_what_nobody_wants_any_more_is_deleted_later(tmp_path: Path) -> None:
    """A version that no plugin is goes after a minute, what is served or came just now does not."""
    place = PushedFiles(tmp_path / "pushed")
    place.open()
    hashes = []
    for version in range(3):
        files = GOOD | {"version.txt": str(version).encode()}
        hashes.append(hash_of(pack("bot", files)))
        place.place("bot", hashes[-1], files)
    versions = tmp_path / "pushed" / "versions"
    (versions / ".begun").mkdir()
    for old in (versions / hashes[0], versions / hashes[2], versions / ".begun"):
        os.utime(old, (1, 1))
    place.sweep()
    assert {path.name for path in versions.iterdir()} == {hashes[1], hashes[2]}
    place.place("bot", hashes[1], None)
    assert place.held()["bot"][0] == hashes[1]
