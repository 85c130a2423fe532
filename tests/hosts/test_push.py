"""One plugin set over many hosts: what is pushed serves everywhere, and who does not serve it says so."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tests.cli.stand_in import Hotdesk
from tests.hosts.conftest import settled
from tests.hosts.pushing import Fleet, open_fleet, own_conversation
from tests.redis_servers import Link
from tests.redis_servers.server import RedisServer
from tests.wasm.components import answering

from conftest import ADMIN_TOKEN, Desk, StartDesk, echo, wait_until
from hotdesk.app import open_host
from hotdesk.cli import main
from hotdesk.config import Config, PluginSettings
from hotdesk.runtime import shelf as shelves
from hotdesk.runtime.shelf import PushConflict

StartFleet = Callable[..., Awaitable[Fleet]]

BROKEN_IN_SETUP = "from hotdesk_sdk import hookimpl\n\n@hookimpl\nasync def setup(ctx):\n    raise OSError('no disk')\n"

CHOOSY = """
from hotdesk_sdk import hookimpl

@hookimpl
async def setup(ctx):
    if ctx.config.get("old"):
        raise OSError("this host is too old for it")

@hookimpl
async def respond(turn):
    return "new"
"""


@pytest.fixture
async def start_fleet(start_desk: StartDesk, redis: RedisServer) -> AsyncIterator[StartFleet]:
    """Start hosts that have no plugins, each with the settings given for it; and a shelf to push to."""
    async with AsyncExitStack() as stack:

        async def start(*settings: dict[str, Any]) -> Fleet:
            url = f"{redis.url}?partitions=32"
            desks = [await start_desk({}, **{"backend": url, **one}) for one in settings or ({}, {})]
            return await stack.enter_async_context(open_fleet(url, *desks))

        yield start


# -- pushing -----------------------------------------------------------------------------------------------------


async def test_a_pushed_plugin_serves_on_every_host(
    start_fleet: StartFleet,
    redis: RedisServer,
    hotdesk: Hotdesk,
    tmp_path: Path,
) -> None:
    """`hotdesk push FILE` ends when every host serves it, says each one's receipt, and each one's own turns show it."""
    fleet = await start_fleet({}, {}, {})
    (tmp_path / "faq.py").write_text(echo(1))
    (tmp_path / "faq.toml").write_text('version = "1.2.0"\n')
    ran = await hotdesk("push", "faq.py", "--to", redis.url)
    assert (ran.code, ran.err) == (0, "")
    head, *hosts, summary = ran.out.splitlines()
    record = shelves.read_record("faq", (await fleet.shelf.read())[0]["faq"])
    assert head.startswith(f"faq 1.2.0  {record.hash[:12]}  2 files, 0.")
    assert [line.split()[1:5] for line in hosts] == [["faq", "1", "live", "in"]] * 3
    assert sorted(line.split()[0].rpartition(":")[2] for line in hosts) == sorted(
        desk.url.rpartition(":")[2] for desk in fleet.desks
    )
    assert summary == f"3 hosts serve faq {record.hash[:12]}"
    await settled(*fleet.desks)
    for desk in fleet.desks:
        assert await desk.reply("hello", own_conversation(desk)) == "1: hello"


def waiting_bot(version: int, door: Path) -> str:
    """A bot that answers its version, once *door* is there."""
    return (
        "import asyncio, pathlib\nfrom hotdesk_sdk import hookimpl\n\n@hookimpl\nasync def respond(turn):\n"
        f"    while not pathlib.Path({str(door)!r}).exists():\n        await asyncio.sleep(0.005)\n"
        f"    return '{version}'\n"
    )


async def test_an_update_leaves_turns_under_way_on_the_old_code(start_fleet: StartFleet, tmp_path: Path) -> None:
    """After a push new turns run on the new version on every host, and one that had begun ends on the old."""
    fleet = await start_fleet()
    await settled(*fleet.desks)
    door = tmp_path / "door"
    await fleet.serve("bot", {"__init__.py": waiting_bot(1, door)})
    names = [own_conversation(desk) for desk in fleet.desks]
    begun = [asyncio.create_task(desk.say("a", name)) for desk, name in zip(fleet.desks, names, strict=True)]
    for desk in fleet.desks:
        await wait_until(lambda desk=desk: desk.host.turns.live, "the turn runs")
    await fleet.serve("bot", {"__init__.py": echo(2)})
    assert not any(task.done() for task in begun)
    door.touch()
    for desk, name, task in zip(fleet.desks, names, begun, strict=True):
        [old] = (await task)["replies"]
        [new] = (await desk.say("b", name))["replies"]
        assert [(reply["text"], reply["generation"]) for reply in (old, new)] == [("1", 1), ("2: b", 2)]


async def test_the_same_twice_is_nothing(start_fleet: StartFleet) -> None:
    """Pushing what was pushed publishes nothing, and no host loads it anew."""
    fleet = await start_fleet()
    first = await fleet.serve("bot", {"__init__.py": echo(1)})
    again, fresh = await fleet.push("bot", {"__init__.py": echo(1)})
    assert (again, fresh) == (first, False)
    another, _ = await fleet.push("other", {"__init__.py": echo(1)})  # the same bytes by another name
    await fleet.wait_stands(another, "serves", "serves")
    assert fleet.generations("bot") == [1, 1]
    assert len(fleet.events("push_taken")) == 4


async def test_a_change_that_nobody_can_tell_counts_as_served(start_fleet: StartFleet) -> None:
    """A comment in the manifest is another version, which loads nothing and is told as what serves."""
    fleet = await start_fleet()
    await fleet.serve("bot", {"__init__.py": echo(1), "plugin.toml": 'version = "1"'})
    await fleet.serve("bot", {"__init__.py": echo(1), "plugin.toml": 'version = "1" # the first'})
    assert fleet.generations("bot") == [1, 1]


async def test_a_folder_comes_as_a_whole(start_fleet: StartFleet) -> None:
    """A package with its manifest, its modules and a file of several parts arrives as one generation, byte by byte."""
    fleet = await start_fleet()
    words = bytes(range(256)) * 6000
    for version in (1, 2):
        files: dict[str, str | bytes] = {f"part{n}.py": f"VERSION = {version}\n" for n in range(9)}
        files["data/words.bin"] = words
        files["plugin.toml"] = f'version = "{version}"\norder = {version}\n'
        files["__init__.py"] = (
            "import hashlib, pathlib\nfrom hotdesk_sdk import hookimpl\n"
            + "".join(f"from . import part{n}\n" for n in range(9))
            + "WORDS = pathlib.Path(__file__).with_name('data') / 'words.bin'\n"
            "@hookimpl\nasync def respond(turn):\n"
            f"    versions = {{part0.VERSION, part8.VERSION, {version}}}\n"
            "    return f'{versions} {hashlib.sha256(WORDS.read_bytes()).hexdigest()}'\n"
        )
        record = await fleet.serve("pack", files)
        assert (record.files, record.size > len(words)) == (12, True)
        for desk in fleet.desks:
            entry = desk.host.plugins.entry("pack")
            assert entry.current is not None
            assert entry.current.bundle.files == {
                path: data if isinstance(data, bytes) else data.encode() for path, data in files.items()
            }
            assert (entry.current.manifest.version, entry.last_number) == (str(version), version)
        reply = await fleet.desks[0].reply()
        assert reply == f"{{{version}}} {shelves.hash_of(words)}"


async def test_a_component_is_pushed_like_any_other(
    start_fleet: StartFleet,
    redis: RedisServer,
    hotdesk: Hotdesk,
    tmp_path: Path,
) -> None:
    """A `.wasm` file serves on every host, and an update of it is a swap; scripts read how from JSON."""
    fleet = await start_fleet()
    await fleet.serve("bot", {"plugin.wasm": answering("one")})
    assert [await desk.reply() for desk in fleet.desks] == ["one", "one"]
    (tmp_path / "bot.wasm").write_bytes(answering("two"))
    ran = await hotdesk("push", "bot.wasm", "--to", redis.url, "--json")
    told = json.loads(ran.out)
    assert (ran.code, told["plugin"], told["published"]) == (0, "bot", True)
    assert [(host["stand"], host["generation"]) for host in told["hosts"]] == [("serves", 2)] * 2
    assert [(host["receipt"]["from"], host["receipt"]["to"]) for host in told["hosts"]] == [(1, 2)] * 2
    assert [await desk.reply() for desk in fleet.desks] == ["two", "two"]


async def test_two_who_push_at_once_agree(start_fleet: StartFleet) -> None:
    """Of pushes and removals at the same time each is published, one after the other, and all hosts do as the last."""
    fleet = await start_fleet()
    await fleet.push("bot", {"__init__.py": echo(9)})
    pushes = (fleet.push("bot", {"__init__.py": echo(number)}) for number in range(3))
    (removed, *pushed) = await asyncio.gather(shelves.remove(fleet.shelf, "bot", "a test"), *pushes)
    assert all(fresh for _, fresh in pushed)
    record = shelves.read_record("bot", (await fleet.shelf.read())[0]["bot"])
    assert {one.hash for one, _ in pushed} <= {one.hash for one in (record, *record.before)}
    await fleet.wait_stands(record, *(["gone"] if record == removed else ["serves"]) * 2)
    kept = (await fleet.shelf.read())[0]
    for over in (b"", kept["bot"][:-1], b"another"):  # made from a record that is not the one there any more
        assert not await fleet.shelf.publish("bot", b"{}", over=over, hash="", data=b"", keep=[])
    assert (await fleet.shelf.read())[0] == kept


async def test_older_versions_can_be_pushed_back(start_fleet: StartFleet, redis: RedisServer) -> None:
    """The last five versions stay on the shelf, older ones go; each step back is to the one before, and round."""
    fleet = await start_fleet()
    records = [(await fleet.push("bot", {"__init__.py": echo(number)}))[0] for number in range(1, 8)]
    fields = await redis.command("HKEYS", "hotdesk{shelf}:b:bot")
    assert {field.split(":")[0] for field in fields} == {record.hash for record in records[2:]}
    for back in (6, 5, 4, 3, 7):
        record = await shelves.push_back(fleet.shelf, "bot", "a test")
        assert record.hash == records[back - 1].hash
        await fleet.wait_stands(record, "serves", "serves")
        assert await fleet.desks[0].reply() == f"{back}: hello"
    with pytest.raises(PushConflict, match="no other version of plugin 'unknown'"):
        await shelves.push_back(fleet.shelf, "unknown", "a test")


# -- what does not work ------------------------------------------------------------------------------------------


async def test_a_host_that_refuses_says_why_and_goes_on(
    start_fleet: StartFleet,
    redis: RedisServer,
    hotdesk: Hotdesk,
    tmp_path: Path,
) -> None:
    """Where the new version fails the old one serves on; the command names that host and its reason, and exits 1."""
    old = {"settings": {"bot": PluginSettings(config={"old": True})}}
    fleet = await start_fleet({}, old)
    await fleet.serve("bot", {"__init__.py": echo(1)})
    await settled(*fleet.desks)
    (tmp_path / "bot.py").write_text(CHOOSY)
    ran = await hotdesk("push", "bot.py", "--to", redis.url)
    assert ran.code == 1
    takes, refuses = (f":{desk.url.rpartition(':')[2]}  " for desk in fleet.desks)
    [line] = [line for line in ran.out.splitlines() if takes in line]
    assert "  bot 1 → 2 live in " in line
    [refused] = [line for line in ran.out.splitlines() if refuses in line]
    assert "refused: setup raised OSError: this host is too old for it" in refused
    assert refused.endswith("; generation 1 goes on serving")
    assert "1 host serves bot" in ran.out
    assert f"1 refused it: {refused.split()[0]}" in ran.out
    assert [await desk.reply("x", own_conversation(desk)) for desk in fleet.desks] == ["new", "1: x"]


async def test_what_does_not_load_here_is_not_pushed(
    start_fleet: StartFleet,
    redis: RedisServer,
    hotdesk: Hotdesk,
    tmp_path: Path,
) -> None:
    """`hotdesk push` loads and probes first; with `--force` it does not, and then every host refuses it."""
    fleet = await start_fleet()
    await fleet.serve("bot", {"__init__.py": echo(1)})
    (tmp_path / "bot.py").write_text(BROKEN_IN_SETUP)
    ran = await hotdesk("push", "bot.py", "--to", redis.url)
    assert ran.code == 1
    assert "setup raised OSError: no disk" in ran.err
    assert "nothing was pushed" in ran.err
    assert len(fleet.events("push_taken")) == 2
    ran = await hotdesk("push", "bot.py", "--to", redis.url, "--force")
    assert ran.code == 1
    assert ran.out.splitlines()[-1].startswith("0 hosts serve bot")
    assert "2 refused it" in ran.out.splitlines()[-1]
    assert fleet.generations("bot") == [1, 1]
    assert await fleet.desks[0].reply() == "1: hello"


async def test_a_version_that_fails_in_its_first_calls_is_told_as_refused(start_fleet: StartFleet) -> None:
    """A rollback by probation shows on its host as a refusal of what was pushed; the others serve it."""
    fleet = await start_fleet()
    await settled(*fleet.desks)
    await fleet.serve("bot", {"__init__.py": echo(1)})
    failing = "from hotdesk_sdk import hookimpl\n\n@hookimpl\nasync def respond(turn):\n    return 1 / 0\n"
    record = await fleet.serve("bot", {"__init__.py": failing})
    assert await fleet.desks[1].reply("x", own_conversation(fleet.desks[1])) == "1: x"
    why = await fleet.wait_stands(record, "serves", "refused")
    assert "generation 2 was rolled back" in why[1]


# -- pending, frozen, disabled, two folders ----------------------------------------------------------------------


async def test_pending_and_frozen_hold(start_fleet: StartFleet) -> None:
    """A push waits for a command where changes do so, and any host's `hotdesk plugins` says which ones lag."""
    fleet = await start_fleet({}, {"watch": "pending"}, {"watch": "frozen"})
    a, b, c = fleet.desks
    record, _ = await fleet.push("bot", {"__init__.py": echo(1)})
    await fleet.wait_stands(record, "serves", "pending", "frozen")
    assert fleet.generations("bot") == [1, None, None]
    await b.admin("POST", "plugins/bot/reload")
    await fleet.wait_stands(record, "serves", "serves", "frozen")
    shown = await a.admin("GET", "plugins/bot")
    assert {host["stand"] for host in shown["hosts"]} == {"serves", "frozen"}
    assert shown["pushed"]["hash"] == record.hash
    environ = {"HOTDESK_URL": a.url, "HOTDESK_ADMIN_TOKEN": ADMIN_TOKEN}
    port = c.url.rpartition(":")[2]
    listed = (await asyncio.to_thread(CliRunner(env=environ).invoke, main, ["plugins"])).output
    assert "2 of 3" in listed
    assert f":{port} lags: serves none; frozen" in listed
    record, _ = await fleet.push("bot", {"__init__.py": echo(2)})
    await fleet.wait_stands(record, "serves", "pending", "frozen")
    assert fleet.generations("bot") == [2, 1, None]
    said = (await asyncio.to_thread(CliRunner(env=environ).invoke, main, ["plugins", "show", "bot"])).output
    assert f"pushed    {record.hash[:12]}" in said
    assert said.count("serves generation 2") == 1
    assert said.count("serves generation 1") >= 1
    # The frozen host does not know the plugin before it is restarted or asked.
    assert [one["name"] for one in (await c.admin("GET", "plugins"))["elsewhere"]] == ["bot"]


async def test_a_disabled_plugin_stays_disabled(start_fleet: StartFleet) -> None:
    """A push does not enable what an operator disabled on one host; enabled, it serves the newest."""
    fleet = await start_fleet()
    await fleet.serve("bot", {"__init__.py": echo(1)})
    await fleet.desks[1].admin("POST", "plugins/bot/disable")
    record, _ = await fleet.push("bot", {"__init__.py": echo(2)})
    await fleet.wait_stands(record, "serves", "disabled")
    await fleet.desks[1].admin("POST", "plugins/bot/enable")
    await fleet.wait_stands(record, "serves", "serves")


async def test_both_sources_live_side_by_side(start_fleet: StartFleet) -> None:
    """A host's own plugins and pushed ones are in one onion; a saved file goes on being a change."""
    fleet = await start_fleet({})
    [desk] = fleet.desks
    shout = (
        "from hotdesk_sdk import hookimpl, Reply\n\n@hookimpl\nasync def middleware(turn, call_next):\n"
        "    reply = await call_next(turn)\n    return reply and Reply(text=reply.text.upper())\n"
    )
    await fleet.serve("shout", {"__init__.py": shout})
    desk.write("own.py", echo(1).replace("{VERSION}:", "one"))
    await desk.wait_generation("own", 1)
    assert await desk.reply("hello") == "ONE HELLO"
    desk.write("own.py", echo(1).replace("{VERSION}:", "two"))
    await desk.wait_generation("own", 2)
    assert await desk.reply("hello") == "TWO HELLO"


async def test_a_name_that_is_taken_stays_taken(start_fleet: StartFleet, start_desk: StartDesk) -> None:
    """Where a host has a plugin of that name in its own folder, that one serves and the push is refused, in words, also
    after a start; when the file goes, the pushed one serves."""
    fleet = await start_fleet()
    a, b = fleet.desks
    own = a.write("bot.py", echo(1))
    await a.wait_generation("bot", 1)
    record, _ = await fleet.push("bot", {"__init__.py": echo(2)})
    why, _ = await fleet.wait_stands(record, "refused", "serves")
    assert f"the name is taken by {own}" in why
    failed = await a.wait_event("plugin_failed", plugin="bot")
    assert f"the name is taken by {own}, so this is not loaded; rename one, or remove one" in failed["message"]
    assert [(await desk.plugin("bot"))["source"] == str(own) for desk in (a, b)] == [True, False]
    fleet.desks.append(await start_desk({"bot.py": echo(3)}, backend=a.host.config.backend))
    await fleet.wait_stands(record, "refused", "serves", "refused")
    assert (await fleet.desks[2].plugin("bot"))["source"] == str(fleet.desks[2].folder / "bot.py")
    own.unlink()
    await fleet.wait_stands(record, "serves", "serves", "refused")
    current = a.host.plugins.entry("bot").current
    assert current is not None
    assert current.bundle.files == {"__init__.py": echo(2).encode()}


# -- removing ----------------------------------------------------------------------------------------------------


async def test_a_removal_unloads_everywhere(
    start_fleet: StartFleet,
    redis: RedisServer,
    hotdesk: Hotdesk,
) -> None:
    """`hotdesk push --remove` takes a plugin from every host; what a host has of its own stays."""
    fleet = await start_fleet()
    a, b = fleet.desks
    await fleet.serve("bot", {"__init__.py": echo(1)})
    a.write("own.py", echo(9))
    await a.wait_generation("own", 1)
    ran = await hotdesk("push", "--remove", "bot", "--to", redis.url)
    assert (ran.code, ran.out.splitlines()[-1]) == (0, "2 hosts do without bot")
    assert fleet.generations("bot") == [None, None]
    assert await a.reply("x", "mine") in ("9: x", None)  # by whoever owns the conversation
    assert [entry.name for entry in b.host.plugins.entries] == []
    with pytest.raises(PushConflict, match="was not pushed"):
        await shelves.remove(fleet.shelf, "own", "a test")
    record, fresh = await fleet.push("bot", {"__init__.py": echo(1)})
    assert fresh
    await fleet.wait_stands(record, "serves", "serves")


async def test_a_removal_waits_where_changes_wait(start_fleet: StartFleet) -> None:
    """With `watch = "pending"` a plugin that was removed serves until somebody says reload."""
    fleet = await start_fleet({}, {"watch": "pending"})
    b = fleet.desks[1]
    record, _ = await fleet.push("bot", {"__init__.py": echo(1)})
    await fleet.wait_stands(record, "serves", "pending")
    await b.admin("POST", "plugins/bot/reload")
    await fleet.wait_stands(record, "serves", "serves")
    removed = await shelves.remove(fleet.shelf, "bot", "a test")
    await fleet.wait_stands(removed, "gone", "pending")
    assert fleet.generations("bot") == [None, 1]
    await b.host.plugins.reload("bot")
    await fleet.wait_stands(removed, "gone", "gone")


async def test_an_emptied_redis_unloads_nothing(start_fleet: StartFleet, redis: RedisServer) -> None:
    """Only a removal unloads a plugin: after FLUSHALL every host serves what it has, and takes what is pushed then."""
    fleet = await start_fleet()
    await fleet.serve("bot", {"__init__.py": echo(1)})
    count = int(await redis.command("GET", "hotdesk{shelf}:count"))
    await redis.command("FLUSHALL")
    await fleet.serve("other", {"__init__.py": echo(2)})
    assert int(await redis.command("GET", "hotdesk{shelf}:count")) > count  # or whoever reads on misses reports
    await shelves.remove(fleet.shelf, "other", "a test")
    await wait_until(lambda: fleet.generations("other") == [None, None], "it is unloaded")
    assert fleet.generations("bot") == [1, 1]
    assert {event["plugin"] for event in fleet.events("plugin_unloaded")} == {"other"}


# -- hosts that come, go and are away ----------------------------------------------------------------------------


async def test_a_host_that_comes_later_has_all_of_it(start_fleet: StartFleet, start_desk: StartDesk) -> None:
    """A new host serves everything that was pushed from its first turn on, and nothing that was removed; also one that
    takes no changes by itself."""
    fleet = await start_fleet({})
    for name in ("one", "two", "three"):
        await fleet.serve(name, {"__init__.py": echo(len(name))})
    await shelves.remove(fleet.shelf, "two", "a test")
    late = await start_desk({}, backend=fleet.desks[0].host.config.backend, watch="frozen")
    assert {entry.name for entry in late.host.plugins.entries if entry.current} == {"one", "three"}


async def test_a_host_that_was_cut_off_catches_up(
    start_fleet: StartFleet, start_desk: StartDesk, redis: RedisServer
) -> None:
    """What is pushed and removed while a host can't reach Redis is done there when it can; meanwhile it serves on."""
    async with await Link.open(redis.port) as link:
        url = f"redis://{link.address}:{link.port}/0?partitions=32"
        fleet = await start_fleet({}, {"backend": url})
        await fleet.serve("bot", {"__init__.py": echo(1)})
        await fleet.serve("gone", {"__init__.py": echo(1)})
        link.cut()
        second, _ = await fleet.push("bot", {"__init__.py": echo(2)})
        removed = await shelves.remove(fleet.shelf, "gone", "a test")
        heard = ([2, 1], [None, 1])
        await wait_until(lambda: (fleet.generations("bot"), fleet.generations("gone")) == heard, "one host hears")
        await link.heal()
        await fleet.wait_stands(second, "serves", "serves")
        await fleet.wait_stands(removed, "gone", "gone")
        assert not [event for event in fleet.desks[1].events if event["kind"] == "plugin_failed"]


async def test_a_restart_serves_what_it_had_and_mends_what_was_damaged(
    start_fleet: StartFleet, start_desk: StartDesk, redis: RedisServer, tmp_path: Path
) -> None:
    """What was pushed outlives host and shelf. Bytes that were changed on the disk are not loaded, but fetched anew."""
    fleet = await start_fleet({})
    records = {name: await fleet.serve(name, {"__init__.py": echo(1)}) for name in ("bot", "hurt")}
    records["hurt"] = await fleet.serve("hurt", {"__init__.py": echo(2)})
    data = tmp_path / "data9"
    config = Config(
        plugins=(str(fleet.desks[0].folder),), data=str(data), backend=fleet.desks[0].host.config.backend,
        admin_token=ADMIN_TOKEN, stop_timeout_s=3.0,
    )  # fmt: skip
    async with open_host(config, serve=False) as host:
        assert {entry.name: entry.last_number for entry in host.plugins.entries} == {"bot": 1, "hurt": 1}
    version = data / "pushed" / "versions" / records["hurt"].hash / "__init__.py"
    version.write_text("raise SystemExit('this must not run')\n")
    events: list[dict[str, Any]] = []
    async with open_host(config, serve=False, listen=events.append) as host:
        assert all(entry.current is not None for entry in host.plugins.entries)
        assert version.read_text() == echo(2)
        assert [event["plugin"] for event in events if event["kind"] == "push_refused"] == ["hurt"]
    await redis.command("FLUSHALL")
    async with open_host(config, serve=False) as host:
        assert {entry.name for entry in host.plugins.entries if entry.current} == {"bot", "hurt"}
    version.write_text("raise SystemExit('this must not run')\n")
    async with open_host(config, serve=False, listen=events.append) as host:
        assert {entry.name for entry in host.plugins.entries} == {"bot"}
        [_, refused] = [event for event in events if event["kind"] == "push_refused"]
        assert "not loaded, for it can't be fetched anew" in refused["message"]


async def test_reports_of_the_dead_are_not_told_and_go(start_fleet: StartFleet, redis: RedisServer) -> None:
    """Who is not alive has no say in who serves what, and its report is deleted after a while."""
    fleet = await start_fleet({})
    record = await fleet.serve("bot", {"__init__.py": echo(1)})
    report = b'{"host":"dead:1","pid":1}'
    await redis.command("HSET", "hotdesk{shelf}:reports", "w-long-dead", b"1 1000 " + report)
    await redis.command("HSET", "hotdesk{shelf}:reports", "w-just-dead", b"1 99999999999 " + report)
    async with open_fleet(redis.url, *fleet.desks) as other:
        assert len(await other.shelf.reports()) == 1
        assert list(await other.stands(record)) == [fleet.desks[0].url]
    left = await redis.command("HKEYS", "hotdesk{shelf}:reports")
    assert "w-just-dead" in left
    assert "w-long-dead" not in left


async def test_a_desk_of_its_own_has_no_other_hosts(start_desk: StartDesk) -> None:
    """With SQLite nothing is pushed, nothing is made on disk for it, and the admin API says so."""
    desk: Desk = await start_desk({"echo.py": echo(1)})
    shown = await desk.plugin("echo")
    assert (shown["hosts"], shown["pushed"]) == ([], None)
    assert (await desk.admin("GET", "plugins"))["elsewhere"] == []
    assert not Path(desk.host.config.data, "pushed").exists()
