"""What was kept outlives the host: versions to go back to, what was refused, and the count of generations."""

from __future__ import annotations

from pathlib import Path

from conftest import ADMIN_TOKEN, StartDesk, echo
from hotdesk.app import open_host
from hotdesk.config import Config


async def run_once(tmp_path: Path, source: str | None, *, say: bool = False) -> dict[str, object]:
    """Start a host on one data folder, let it serve once, stop it; what it said of `echo`."""
    plugins = tmp_path / "plugins"
    plugins.mkdir(exist_ok=True)
    if source is not None:
        (plugins / "echo.py").write_text(source)
    config = Config(plugins=(str(plugins),), data=str(tmp_path / "data"), admin_token=ADMIN_TOKEN, standby_s=0.05)
    async with open_host(config, serve=False) as host:
        if say:
            from hotdesk.chat.intake import NewMessage

            accepted = await host.intake.accept(NewMessage("c", "hello"), door="test")
            assert accepted.turn is not None
            ended = await accepted.turn.wait_ended()
            text = ended.replies[0].text if ended and ended.replies else None
        else:
            text = None
        entry = host.plugins.entry("echo")
        return {
            "text": text,
            "generation": entry.current.number if entry.current else None,
            "problem": entry.problem.message if entry.problem else None,
            "kept": [kept.generation for kept in entry.kept],
        }


async def test_generations_count_on_after_a_restart(tmp_path: Path) -> None:
    """The n-th load stays the n-th load: a reply's generation means one version, over restarts too."""
    assert (await run_once(tmp_path, echo(1)))["generation"] == 1
    assert (await run_once(tmp_path, echo(2)))["generation"] == 2
    after = await run_once(tmp_path, None, say=True)
    assert (after["generation"], after["text"]) == (3, "2: hello")
    assert after["kept"] == [1, 3]


async def test_a_rollback_outlives_the_host(tmp_path: Path) -> None:
    """What was rolled back is not loaded by the next start: the version before it serves, and the reason is told."""
    await run_once(tmp_path, echo(1))
    bad = echo(2).replace("return", "1 / 0\n    return")
    assert (await run_once(tmp_path, bad, say=True))["text"] == "1: hello"
    after = await run_once(tmp_path, None, say=True)
    assert after["text"] == "1: hello"
    assert "rolled back" in str(after["problem"])
    mended = await run_once(tmp_path, echo(3), say=True)
    assert (mended["text"], mended["problem"]) == ("3: hello", None)


async def test_a_rollback_by_command_reaches_back_before_the_start(start_desk: StartDesk, tmp_path: Path) -> None:
    """A version of an earlier run can be gone back to."""
    await run_once(tmp_path, echo(1))
    desk = await start_desk({"echo.py": echo(2)}, folder=tmp_path / "plugins", data=tmp_path / "data")
    assert await desk.reply() == "2: hello"
    await desk.admin("POST", "plugins/echo/rollback")
    assert await desk.reply() == "1: hello"


async def test_a_damaged_archive_costs_only_itself(tmp_path: Path) -> None:
    """A list that can't be read is as if it were not there."""
    await run_once(tmp_path, echo(1))
    (tmp_path / "data" / "plugins" / "echo" / "versions.json").write_text("garbage")
    assert (await run_once(tmp_path, echo(2), say=True))["text"] == "2: hello"
