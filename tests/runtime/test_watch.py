"""Seeing a change: every way in which files come, change and go, and what is no change."""

from __future__ import annotations

import asyncio
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.runtime.traffic import traffic

from conftest import ADMIN_TOKEN, Desk, StartDesk, echo, wait_until
from hotdesk.app import open_host
from hotdesk.config import Config

HALF_S = 0.3
"""How long writers seen in the field leave a file half-written."""

SEEN_S = 0.6
"""Long enough for a change to have been seen, settled and loaded: what has not happened by then does not happen."""


async def let_pass(seconds: float) -> None:
    """Let time go by: for a claim that something does *not* happen, or for a writer that pauses."""
    until = time.monotonic() + seconds
    await wait_until(lambda: time.monotonic() >= until, f"{seconds} s")


def generation(desk: Desk, name: str = "echo") -> int | None:
    entry = next((e for e in desk.host.plugins.entries if e.name == name), None)
    return entry.current.number if entry and entry.current else None


def kinds(desk: Desk, *names: str) -> list[str]:
    return [event["kind"] for event in desk.events if event["kind"] in names]


# -- one file ----------------------------------------------------------------------------------------------------


async def test_an_atomic_rename_is_loaded_at_once(desk: Desk) -> None:
    """A file renamed over the old one is whole, so nothing is waited for: it serves well within 500 ms."""
    saved = time.monotonic()
    desk.write("echo.py", echo(2))
    await desk.wait_generation("echo", 2)
    assert time.monotonic() - saved < 0.3
    assert await desk.reply() == "2: hello"


async def test_an_in_place_write_is_loaded(desk: Desk) -> None:
    """A file written in place is loaded once its writer had time to finish, within 500 ms."""
    (desk.folder / "echo.py").write_text(echo(2))
    saved = time.monotonic()
    await desk.wait_generation("echo", 2)
    assert time.monotonic() - saved < 0.5
    assert await desk.reply() == "2: hello"


async def test_a_touched_file_is_no_change(desk: Desk) -> None:
    """The same bytes again, by rename or by touch, load nothing."""
    desk.write("echo.py", echo(1))
    await let_pass(SEEN_S)
    (desk.folder / "echo.py").touch()
    await let_pass(SEEN_S)
    assert generation(desk) == 1
    assert kinds(desk, "plugin_swapped", "plugin_failed", "plugin_pending") == []


async def test_an_editor_that_saves_twice_ends_with_the_last(desk: Desk) -> None:
    """An editor that truncates, writes, and writes again a moment later: the last save serves, the first may not."""
    path = desk.folder / "echo.py"
    path.write_text("")
    path.write_text(echo(2))
    await let_pass(0.03)
    path.write_text(echo(3))
    await wait_until(lambda: desk.host.plugins.entry("echo").receipt, "a swap")

    async def answers() -> bool:
        return await desk.reply() == "3: hello"

    await wait_until(answers, "the last save answers")
    assert kinds(desk, "plugin_failed") == []


async def test_saves_in_quick_succession_end_with_the_last(desk: Desk) -> None:
    """However the saves fall into the settling and the loading of those before, the last one serves in the end."""
    version = 1
    for pause_ms in range(40):
        version += 1
        desk.write("echo.py", echo(version))
        await let_pass(pause_ms / 1000)

    async def answers() -> bool:
        return await desk.reply() == f"{version}: hello"

    await wait_until(answers, "the last save answers", timeout_s=1.0)


async def test_a_save_while_the_one_before_is_parsed_is_not_lost(desk: Desk) -> None:
    """A second save that lands between the reading and the loading of the first is seen as a change of its own."""
    for round in range(12):
        version = 10 + 2 * round
        padding = "\n".join(f"x{n} = {{{n}: [{n}, ({n},)]}}" for n in range(3000))
        desk.write("echo.py", f"{echo(version)}\n{padding}\n")
        await let_pass(0.012 + round * 0.002)
        desk.write("echo.py", echo(version + 1))

        async def answers(want: str = f"{version + 1}: hello") -> bool:
            return await desk.reply() == want

        await wait_until(answers, f"version {version + 1} answers", timeout_s=1.5)


@pytest.mark.parametrize("held_open", [True, False], ids=["held open", "closed between"])
@pytest.mark.parametrize("parses", [True, False], ids=["the half parses", "the half does not parse"])
@pytest.mark.parametrize("new", [True, False], ids=["a new file", "over the old file"])
@pytest.mark.parametrize("deleting", [False, True], ids=["", "as another is deleted"])
async def test_a_half_written_file_is_never_loaded(
    desk: Desk, held_open: bool, parses: bool, new: bool, deleting: bool
) -> None:
    """A writer that pauses for 300 ms in the middle is waited for, even where the half alone would be a plugin, and
    whatever else changes in the folder."""
    whole = echo(2) + "    # the rest\n" + "HALF = False\n"
    cut = len(echo(2)) if parses else len(echo(2)) - 7
    name = "fresh" if new else "echo"
    path = desk.folder / f"{name}.py"
    if deleting:
        desk.write("other.py", echo(1))
        await desk.wait_event("plugin_loaded", plugin="other")
        (desk.folder / "other.py").unlink()
        if not new:  # as some editors save
            path.unlink()
    writer = path.open("w")
    try:
        writer.write(whole[:cut])
        writer.flush()
        if not held_open:
            writer.close()
        await let_pass(HALF_S)
        assert generation(desk, name) == (None if new else 1)
        if not held_open:
            writer = path.open("a")
        writer.write(whole[cut:])
    finally:
        writer.close()
    await wait_until(lambda: generation(desk, name) == (1 if new else 2), "the whole file serves")
    current = desk.host.plugins.entry(name).current
    assert current is not None
    assert current.bundle.files[f"{name}.py"].decode() == whole
    assert kinds(desk, "plugin_failed") == []


async def test_a_file_that_is_back_within_50_ms_was_never_gone(desk: Desk) -> None:
    """Editors that delete and write anew do not unload the plugin, and every message is answered meanwhile."""
    path = desk.folder / "echo.py"
    async with traffic(desk) as seen:
        await seen.wait_more()
        path.unlink()
        await let_pass(0.05)
        path.write_text(echo(2))
        await desk.wait_generation("echo", 2)
        await seen.wait_more()
    assert kinds(desk, "plugin_unloaded") == []
    assert seen.texts[-1] == "2: hello"


async def test_a_deleted_file_is_unloaded(start_desk: StartDesk) -> None:
    """A plugin whose file is deleted answers no more, is off the list, and leaves the others as they are."""
    desk = await start_desk({"echo.py": echo(1), "other.py": echo(9)})
    (desk.folder / "echo.py").unlink()
    await desk.wait_event("plugin_unloaded", plugin="echo")
    assert await desk.reply() == "9: hello"
    await wait_until(lambda: "echo" not in [e.name for e in desk.host.plugins.entries], "it is off the list")
    await desk.admin("GET", "plugins/echo", status=404)


async def test_a_plugin_that_comes_back_counts_on(desk: Desk) -> None:
    """A generation's number is never given twice, so a reply says which code it was even over a deletion."""
    (desk.folder / "echo.py").unlink()
    await desk.wait_event("plugin_unloaded", plugin="echo")
    desk.write("echo.py", echo(2))
    await desk.wait_event("plugin_loaded", plugin="echo", generation=2)
    assert await desk.reply() == "2: hello"


async def test_deleting_and_bringing_back_at_any_moment_ends_with_what_is_there(desk: Desk) -> None:
    """Deleted and back after 60 to 200 ms, around the moment at which it counts as gone: it serves in the end."""
    path = desk.folder / "echo.py"
    for round in range(8):
        path.unlink()
        await let_pass(0.06 + round * 0.02)
        desk.write("echo.py", echo(round + 2))

        async def answers(want: str = f"{round + 2}: hello") -> bool:
            return await desk.reply() == want

        await wait_until(answers, f"version {round + 2} answers", timeout_s=2.0)
    assert kinds(desk, "plugin_failed") == []


# -- folders -----------------------------------------------------------------------------------------------------


def package(version: int, parts: int = 9) -> dict[str, str]:
    """A package of `parts` + 1 files that only works when all of them are of one version."""
    files = {f"part{n}.py": f"VERSION = {version}\n" for n in range(parts)}
    names = ", ".join(f"part{n}" for n in range(parts))
    files["__init__.py"] = (
        f"from hotdesk_sdk import hookimpl\nfrom . import {names}\n"
        f"VERSIONS = {{m.VERSION for m in ({names})}} | {{{version}}}\n"
        "@hookimpl\nasync def respond(turn):\n    return str(sorted(VERSIONS))\n"
    )
    return files


@pytest.mark.parametrize("how", ["in place", "by rename"])
async def test_a_package_written_file_by_file_is_loaded_once(desk: Desk, how: str) -> None:
    """Ten files written one after the other, 10 ms apart, become one generation of one version, never a mixture."""
    folder = desk.folder / "pack"
    folder.mkdir()
    for version in (1, 2):
        for name, source in package(version).items():
            if how == "in place":
                (folder / name).write_text(source)
            else:
                desk.write(f"pack/{name}", source)
            await let_pass(0.01)
        await desk.wait_generation("pack", version)
        await let_pass(SEEN_S)
        assert generation(desk, "pack") == version
    assert kinds(desk, "plugin_failed") == []
    await desk.admin("POST", "plugins/echo/disable")
    assert await desk.reply() == "[2]"


async def test_a_renamed_folder_is_another_plugin(desk: Desk) -> None:
    """After a folder is renamed its old name is unloaded and the new one serves."""
    for name, source in package(1).items():
        desk.write(f"before/{name}", source)
    await desk.wait_generation("before", 1)
    (desk.folder / "before").rename(desk.folder / "after")
    await desk.wait_event("plugin_unloaded", plugin="before")
    await desk.wait_generation("after", 1)
    await desk.admin("GET", "plugins/before", status=404)


async def test_a_folder_moved_in_whole_is_loaded(desk: Desk, tmp_path: Path) -> None:
    """A folder that is renamed into the plugins folder becomes a plugin."""
    for name, source in package(1).items():
        (tmp_path / "aside").mkdir(exist_ok=True)
        (tmp_path / "aside" / name).write_text(source)
    (tmp_path / "aside").rename(desk.folder / "pack")
    await desk.wait_generation("pack", 1)
    shutil.rmtree(desk.folder / "pack")
    await desk.wait_event("plugin_unloaded", plugin="pack")


async def test_a_submodule_alone_is_a_change(start_desk: StartDesk) -> None:
    """Saving one module of a package loads the whole package anew."""
    desk = await start_desk({f"pack/{name}": source for name, source in package(1).items()})
    desk.write("pack/part3.py", "VERSION = 5\n")
    await desk.wait_generation("pack", 2)
    assert await desk.reply() == "[1, 5]"


async def test_what_is_no_part_of_a_plugin_changes_nothing(start_desk: StartDesk) -> None:
    """Tests, caches and editors' leavings in a package are not part of it."""
    desk = await start_desk({f"pack/{name}": source for name, source in package(1).items()})
    for name in ("test_it.py", "part1.py~", ".part1.py.swp", "__pycache__/part1.pyc", "conftest.py", "#part1.py#"):
        desk.write(f"pack/{name}", "anything")
    await let_pass(SEEN_S)
    assert generation(desk, "pack") == 1


# -- places ------------------------------------------------------------------------------------------------------


def config_map(folder: Path, number: int, files: dict[str, str]) -> None:
    """Write *files* the way a ConfigMap volume does: a dated folder, `..data` swapped over, links through it."""
    dated = folder / f"..2024_{number:02}"
    dated.mkdir(parents=True)
    for name, source in files.items():
        (dated / name).write_text(source)
        link = folder / name
        if not link.is_symlink():
            link.symlink_to(Path("..data") / name)
    (folder / "..data_tmp").symlink_to(dated.name)
    (folder / "..data_tmp").rename(folder / "..data")


async def test_a_config_map_swap_is_seen(start_desk: StartDesk, tmp_path: Path) -> None:
    """Files that are links through `..data` change when that link is swapped; the dated folders are no plugins."""
    folder = tmp_path / "mounted"
    config_map(folder, 1, {"echo.py": echo(1)})
    desk = await start_desk(folder=folder)
    assert await desk.reply() == "1: hello"
    config_map(folder, 2, {"echo.py": echo(2)})
    await desk.wait_generation("echo", 2)
    assert await desk.reply() == "2: hello"
    assert [e.name for e in desk.host.plugins.entries] == ["echo"]


async def test_a_config_map_below_a_package_is_seen(start_desk: StartDesk, tmp_path: Path) -> None:
    """The same where the mount is the plugin's own folder."""
    folder = tmp_path / "plugins"
    config_map(folder / "echo", 1, {"__init__.py": echo(1)})
    desk = await start_desk(folder=folder)
    config_map(folder / "echo", 2, {"__init__.py": echo(2)})
    await desk.wait_generation("echo", 2)
    assert await desk.reply() == "2: hello"


async def test_names_with_underscore_or_dot_are_no_plugins(desk: Desk) -> None:
    """`_shared.py`, `.hidden.py` and folders of such names are not looked at."""
    for name in ("_shared.py", ".hidden.py", "_pack/__init__.py", ".pack/__init__.py"):
        desk.write(name, "raise SystemExit('this must not run')\n")
    await let_pass(SEEN_S)
    assert [p["name"] for p in (await desk.admin("GET", "plugins"))["plugins"]] == ["echo"]
    assert kinds(desk, "plugin_failed") == []


async def test_several_folders_are_watched(tmp_path: Path) -> None:
    """Plugins come from every folder, in each of which a change is seen; a name that is taken stays taken."""
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, name, source in ((first, "one.py", echo(1)), (second, "two.py", echo(2))):
        folder.mkdir()
        (folder / name).write_text(source)
    events: list[dict[str, Any]] = []
    config = Config(plugins=(str(first), str(second)), data=str(tmp_path / "data"), admin_token=ADMIN_TOKEN)
    async with open_host(config, listen=events.append, serve=False) as host:
        assert {e.name for e in host.plugins.entries} == {"one", "two"}

        def swapped(name: str) -> bool:
            return host.plugins.entry(name).last_number == 2

        for number, (folder, name) in enumerate(((first, "one"), (second, "two")), 22):
            (folder / ".new").write_text(echo(number))
            (folder / ".new").replace(folder / f"{name}.py")
            await wait_until(partial(swapped, name), f"{name} is swapped")
        (second / "one.py").write_text(echo(3))
        await wait_until(lambda: host.plugins.entry("one").problem, "the clash is reported")
        [failed] = [event for event in events if event["kind"] == "plugin_failed"]
        assert (failed["plugin"], failed["step"], failed["file"]) == ("one", "find", str(second / "one.py"))
        current = host.plugins.entry("one").current
        assert current is not None
        assert current.bundle.source.path == first / "one.py"


async def test_an_unreadable_file_is_a_failure_of_that_plugin(start_desk: StartDesk) -> None:
    """A link that leads in a circle is reported under its name, and the watch goes on for all others."""
    desk = await start_desk({"echo.py": echo(1)})
    (desk.folder / "loop.py").symlink_to("loop.py")
    await let_pass(SEEN_S)
    desk.write("echo.py", echo(2))
    await desk.wait_generation("echo", 2)


# -- modes -------------------------------------------------------------------------------------------------------


async def test_the_watch_is_tried_out_at_the_start(desk: Desk) -> None:
    """A file of the host's own proves that events arrive; it is gone afterwards, and was never a plugin."""
    assert desk.host.plugins.watch_mode == "events"
    assert sorted(path.name for path in desk.folder.iterdir()) == ["echo.py"]
    assert (await desk.admin("GET", "plugins"))["watch"] == "events"


async def test_polling_sees_changes_and_says_so(
    start_desk: StartDesk, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """With `watch_poll` a change is seen within half a second, and the log and the admin API say "polling"."""
    desk = await start_desk({"echo.py": echo(1)}, watch_poll=True)
    said = "".join(capfd.readouterr()) + caplog.text
    assert "watch_polling" in said
    assert (await desk.admin("GET", "plugins"))["watch"] == "polling"
    saved = time.monotonic()
    desk.write("echo.py", echo(2))
    await desk.wait_generation("echo", 2)
    assert time.monotonic() - saved < 0.5
    (desk.folder / "echo.py").write_text(echo(3))
    await desk.wait_generation("echo", 3)
    (desk.folder / "echo.py").unlink()
    await desk.wait_event("plugin_unloaded", plugin="echo")


async def test_a_pending_watch_shows_and_waits(start_desk: StartDesk) -> None:
    """With `watch = "pending"` a change, and a new plugin, are shown and applied on command only."""
    desk = await start_desk({"echo.py": echo(1)}, watch="pending")
    assert await desk.reply() == "1: hello"
    desk.write("echo.py", echo(2))
    await desk.wait_event("plugin_pending", plugin="echo")
    shown = await desk.plugin("echo")
    assert (shown["pending"], shown["generation"]) == (True, 1)
    assert await desk.reply() == "1: hello"
    shown = await desk.admin("POST", "plugins/echo/reload")
    assert (shown["pending"], shown["generation"]) == (False, 2)
    assert await desk.reply() == "2: hello"
    desk.write("another.py", echo(7))
    await desk.wait_event("plugin_pending", plugin="another")
    shown = await desk.plugin("another")
    assert (shown["state"], shown["pending"]) == ("PENDING", True)
    await desk.admin("POST", "plugins/another/reload")
    assert generation(desk, "another") == 1


async def test_a_pending_watch_knows_what_is_no_change(start_desk: StartDesk) -> None:
    """The same bytes again wait for no command, and a change that is taken back is no longer pending."""
    desk = await start_desk({"echo.py": echo(1)}, watch="pending")
    desk.write("echo.py", echo(1))
    await let_pass(SEEN_S)
    assert not (await desk.plugin("echo"))["pending"]
    desk.write("echo.py", echo(2))
    await desk.wait_event("plugin_pending", plugin="echo")
    desk.write("echo.py", echo(1))

    async def settled() -> bool:
        return not (await desk.plugin("echo"))["pending"]

    await wait_until(settled, "nothing is pending")
    assert generation(desk) == 1


async def test_a_pending_deletion_keeps_serving_until_told(start_desk: StartDesk) -> None:
    """With `watch = "pending"` even a deleted file serves until somebody says reload."""
    desk = await start_desk({"echo.py": echo(1)}, watch="pending")
    (desk.folder / "echo.py").unlink()
    await desk.wait_event("plugin_pending", plugin="echo")
    assert await desk.reply() == "1: hello"
    await desk.host.plugins.reload("echo")
    assert await desk.reply() is None


async def test_a_frozen_watch_sees_nothing(start_desk: StartDesk) -> None:
    """With `watch = "frozen"` files are read at the start and on command, never by themselves."""
    desk = await start_desk({"echo.py": echo(1)}, watch="frozen")
    desk.write("echo.py", echo(2))
    await let_pass(SEEN_S)
    assert await desk.reply() == "1: hello"
    assert (await desk.admin("GET", "plugins"))["watch"] == "frozen"
    await desk.admin("POST", "plugins/echo/reload")
    assert await desk.reply() == "2: hello"


async def test_a_host_that_closes_in_the_middle_of_a_load_leaves_nothing(start_desk: StartDesk, tmp_path: Path) -> None:
    """Closing while a new generation is set up ends both: nothing serves, nothing stays (the leak check looks)."""
    folder = tmp_path / "closing"
    folder.mkdir()
    (folder / "echo.py").write_text(echo(1))
    events: list[dict[str, Any]] = []
    config = Config(
        plugins=(str(folder),), data=str(tmp_path / "d"), port=0, admin_token=ADMIN_TOKEN, stop_timeout_s=3.0
    )
    async with open_host(config, listen=events.append, serve=False) as host:
        setup = "@hookimpl\nasync def setup(ctx):\n    import asyncio\n    await asyncio.sleep(0.3)\n"
        (folder / ".new").write_text(echo(2) + setup)
        (folder / ".new").replace(folder / "echo.py")
        await wait_until(lambda: host.plugins.entry("echo").lock.locked(), "the change is being loaded")
        await asyncio.wait_for(let_pass(0.1), 1.0)
    assert [event["kind"] for event in events].count("plugin_swapped") == 0
