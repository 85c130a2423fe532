"""Workers die, are started again, and end: alone, with the desk, and without their supervisor."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import termios
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from tests.redis_servers import RedisServer
from tests.workers.conftest import StartWorkers
from tests.workers.desk import WHO, WorkerDesk

from conftest import wait_until
from hotdesk.config import Config
from hotdesk.runtime.events import Events
from hotdesk.workers import child
from hotdesk.workers.supervisor import open_workers

FROZEN = 'watch = "frozen"\n'

SLOW = WHO.replace(
    'return f"{VERSION}: {turn.text}"',
    'open(turn.text, "w").close()\n    await asyncio.sleep(SECONDS)\n    return "slept"',
).replace("import os\n", "import asyncio\nimport os\n", 1)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


async def test_a_worker_that_is_killed_is_started_again_and_nobody_is_refused(desk_of_two: WorkerDesk) -> None:
    """Whoever connects to its place meanwhile waits for the next process there; the others are told who is dead."""
    desk = desk_of_two
    before = await desk.workers()
    victim = before[1]["pid"]
    os.kill(victim, signal.SIGKILL)
    statuses = await asyncio.gather(*(desk.ask("GET", "/healthz") for _ in range(60)))
    assert [status for status, _ in statuses] == [200] * 60
    await desk.wait_said("worker 1 serves again")
    after = await desk.workers()
    assert [row["pid"] == old["pid"] for row, old in zip(after, before, strict=True)] == [True, False]
    assert [row["restarts"] - old["restarts"] for row, old in zip(after, before, strict=True)] == [0, 1]
    died = next(line for line in desk.said if "worker 1 died" in line)
    assert died.startswith(f"worker 1 died: it was ended by SIGKILL (pid {victim}); started again")
    [heard] = await wait_until(lambda: desk.logged("worker_buried"), "the other told")
    assert heard["worker"] == 0
    assert heard["name"].startswith("1-")


async def test_a_worker_whose_loop_stands_still_is_replaced(
    redis: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its beats are missed, and it is killed as one that died; the other, whose beats come, stays."""
    monkeypatch.setattr(child, "STUCK_BEATS", 4)
    config = Config(
        plugins=(str(tmp_path / "plugins"),), data=str(tmp_path / "data"), port=0, backend=redis.url, workers=2,
        admin_token="a token of the test", stop_timeout_s=3.0,
    )  # fmt: skip
    (tmp_path / "plugins").mkdir()
    events = Events(None)
    async with open_workers(config, read_config=lambda: config, events=events, heard=lambda event: None) as supervisor:
        before = [row.pid for row in supervisor._state().workers]
        os.kill(before[1], signal.SIGSTOP)

        def told(kind: str) -> dict[str, Any] | None:
            return next((one for one in events.recent if one["kind"] == kind), None)

        died = await wait_until(lambda: told("worker_died"), "it is found out", timeout_s=30)
        assert (died["worker"], died["pid"]) == (1, before[1])
        assert died["message"] == "its event loop stood still for 4 s, so it was killed"
        await wait_until(lambda: told("worker_ready"), "another is in its place", timeout_s=30)
        after = [row.pid for row in supervisor._state().workers]
        assert [pid == old for pid, old in zip(after, before, strict=True)] == [True, False]


async def test_a_worker_that_dies_again_and_again_is_waited_for_longer_each_time(start_workers: StartWorkers) -> None:
    """The first time at once; then the waits grow, and the other place serves all the while."""
    desk = await start_workers(2, settings=FROZEN)
    desk.write("plugins/bomb.py", "import os\nos._exit(7)\n")
    first, other = await desk.pids()
    os.kill(first, signal.SIGKILL)
    died = await wait_until(
        lambda: len(rows := desk.logged("worker_died", worker=0)) >= 4 and rows, "four deaths", timeout_s=20
    )
    assert [row["again_in_s"] for row in died[:4]] == [0.0, 0.1, 0.2, 0.4]
    assert [row["message"] for row in died[:2]] == ["it was ended by SIGKILL", "it ended with exit code 7"]
    (desk.folder / "plugins" / "bomb.py").unlink()
    await desk.wait_said("worker 0 serves again")
    assert (await desk.pids())[1] == other
    assert len(desk.logged("worker_died", worker=1)) == 0


async def test_workers_that_lose_their_supervisor_end_and_leave_the_port(start_workers: StartWorkers) -> None:
    """Killed without a word to them, it leaves nothing behind; a new desk starts at once in the same folder."""
    desk = await start_workers(2)
    pids = await desk.pids()
    port = desk.url.rpartition(":")[2]
    desk.process.kill()
    await desk.wait_ended()
    await wait_until(lambda: not any(map(is_alive, pids)), "both workers to be gone")
    assert len(desk.logged("supervisor_lost")) == 2
    desk.command[desk.command.index("--port") + 1] = port
    await desk.start()
    assert desk.url.endswith(port)


async def test_a_stop_lets_turns_finish_side_by_side(start_workers: StartWorkers, tmp_path: Path) -> None:
    """SIGTERM: new visitors are refused, what runs is answered, and the desk is gone when the longest turn is."""
    desk = await start_workers(2, plugins={"who.py": SLOW.replace("SECONDS", "1.0")})
    async with asyncio.TaskGroup() as group:
        turns = [group.create_task(desk.say(str(tmp_path / f"turn{n}"), f"c{n}")) for n in range(6)]
        await wait_until(lambda: all((tmp_path / f"turn{n}").exists() for n in range(6)), "six turns under way")
        stopping = group.create_task(desk.stop())
        await desk.wait_said("stopping: finishing what is under way")

        async def is_refused() -> bool:
            try:
                await desk.ask("GET", "/healthz")
            except aiohttp.ClientConnectorError:
                return True
            except aiohttp.ClientError:
                return False
            return False

        await wait_until(is_refused, "the port to be closed")
        assert not any(turn.done() for turn in turns)
    assert {turn.result()["replies"][0]["text"] for turn in turns} == {"slept"}
    assert stopping.result() == 0
    assert desk.said[-1] == "stopped"


async def test_a_second_signal_leaves_at_once(start_workers: StartWorkers, tmp_path: Path) -> None:
    """Asked twice, nobody is waited for, and no worker is left."""
    desk = await start_workers(2, plugins={"who.py": SLOW.replace("SECONDS", "60")})
    pids = await desk.pids()
    turn = asyncio.create_task(desk.say(str(tmp_path / "turn"), "c"))
    await wait_until((tmp_path / "turn").exists, "a turn under way")
    desk.process.send_signal(signal.SIGINT)
    await desk.wait_said("stopping: finishing what is under way")
    desk.process.send_signal(signal.SIGINT)
    assert await desk.wait_ended() == 130
    await wait_until(lambda: not any(map(is_alive, pids)), "both workers to be gone")
    with pytest.raises(aiohttp.ClientError):
        await turn


async def test_a_closed_terminal_ends_the_desk(redis: RedisServer, tmp_path: Path) -> None:
    """SIGHUP replaces the workers, but not when it says that the terminal is gone: nobody wants a desk without one."""
    desk = WorkerDesk(tmp_path, redis.url, 2)
    desk.write("plugins/who.py", WHO)
    ours, theirs = os.openpty()
    process = await asyncio.create_subprocess_exec(
        *desk.command,
        stdin=theirs,
        stdout=theirs,
        stderr=asyncio.subprocess.DEVNULL,
        cwd=tmp_path,
        env=desk.env,
        preexec_fn=_take_terminal,
    )
    os.close(theirs)
    os.set_blocking(ours, False)
    said = bytearray()

    def has_greeted() -> bool:
        try:
            said.extend(os.read(ours, 65536))
        except BlockingIOError:
            pass
        return b"try      hotdesk chat" in said

    await wait_until(has_greeted, "the greeting", timeout_s=20)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.close(ours)
    async with asyncio.timeout(20):
        await process.wait()
    assert len(children) == 2
    assert not any(is_alive(int(pid)) for pid in children)


def _take_terminal() -> None:
    """In the child, before it is the host: stdin becomes the terminal of a session of its own."""
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
