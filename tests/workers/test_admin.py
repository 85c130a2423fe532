"""The admin API and the commands answer for all workers, and say who is behind when not all agree."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec
from tests.cli.stand_in import Hotdesk
from tests.workers.conftest import StartWorkers
from tests.workers.desk import WHO, WorkerDesk

from conftest import wait_until

PICKY = """
import os
from hotdesk_sdk import hookimpl

@hookimpl
async def setup(ctx):
    if str(os.getpid()) in open("refused").read().split():
        raise RuntimeError("not in this process")

@hookimpl
async def respond(turn):
    return "VERSION"
"""
"""Loads in every process but those whose pid is in the file `refused`."""


LATE = """
import asyncio, os
from hotdesk_sdk import hookimpl

@hookimpl
async def setup(ctx):
    while os.path.exists("slow"):
        open("slow-begun", "w").close()
        await asyncio.sleep(0.01)
"""
"""Loads once the file `slow` is gone."""


@asynccontextmanager
async def plugin_in(desk: WorkerDesk, name: str, source: str) -> AsyncIterator[None]:
    """A plugin that is there for one test, and afterwards in no worker any more: it might answer the next one."""
    desk.write(f"plugins/{name}.py", source)
    try:
        yield
    finally:
        (desk.folder / "plugins" / f"{name}.py").unlink()

        async def is_gone() -> bool:
            return all(status == 404 for status, _ in (await desk.on_each("GET", f"/admin/plugins/{name}")).values())

        await wait_until(is_gone, f"{name} is gone from all workers")


def env_of(desk: WorkerDesk) -> dict[str, str]:
    return {"HOTDESK_URL": desk.url, "HOTDESK_ADMIN_TOKEN": desk.token}


async def test_what_is_saved_is_said_once_and_shown_as_one(desk_of_two: WorkerDesk, hotdesk: Hotdesk) -> None:
    """While all agree, nothing in the list tells that there are several; counts are those of all together."""
    desk = desk_of_two
    async with plugin_in(desk, "saved", WHO):
        await desk.wait_said("saved 1 live")
        desk.write("plugins/saved.py", WHO.replace("VERSION = 1", "VERSION = 2"))
        await desk.wait_said("saved 1 → 2 live")

        async def both() -> bool:
            _, plugin = await desk.ask("GET", "/admin/plugins/saved")
            return [row["generation"] for row in plugin["workers"]] == [2, 2]

        await wait_until(both, "the second generation in both")
        for number in range(8):
            said = await desk.say("hello", f"saved-{number}")
            assert [(one["plugin"], one["generation"]) for one in said["replies"]] == [("saved", 2)]
        listed = await hotdesk("plugins", env=env_of(desk))
        assert [line.split()[:3] for line in listed.out.splitlines()[1:]] == [
            ["saved", "ACTIVE", "2"],
            ["who", "ACTIVE", "1"],
        ]
        pids = await desk.pids()
        for _, body in (await desk.on_each("GET", "/admin/plugins")).values():
            plugin = next(one for one in body["plugins"] if one["name"] == "saved")
            assert [(row["worker"], row["pid"], row["generation"], row["error"]) for row in plugin["workers"]] == [
                (0, pids[0], 2, None),
                (1, pids[1], 2, None),
            ]
            assert plugin["calls"] == sum(row["calls"] for row in plugin["workers"]) >= 8
        for _, shown in (await desk.on_each("GET", "/admin/plugins/saved")).values():
            assert len(shown["workers"]) == 2
            assert shown["config"] == {}
        assert sum("saved 1 → 2 live" in line for line in desk.said) == 1
    table = await hotdesk("workers", env=env_of(desk))
    assert [line.split()[0] for line in table.out.splitlines()] == ["WORKER", "0", "1"]


async def test_a_command_is_carried_out_in_every_worker(desk_of_two: WorkerDesk) -> None:
    """Whichever worker is asked; a worker that is started later knows of it too."""
    desk = desk_of_two
    async with plugin_in(desk, "told", WHO):
        await desk.wait_said("told 1 live")
        status, body = await desk.ask("POST", "/admin/plugins/told/disable")
        assert (status, [row["state"] for row in body["workers"]]) == (200, ["CLOSED", "CLOSED"])
        assert sum("told disabled" in line for line in desk.said) == 1
        os.kill((await desk.pids())[1], signal.SIGKILL)
        await desk.wait_said("worker 1 serves again")
        status, body = await desk.ask("GET", "/admin/plugins/told")
        assert [row["state"] for row in body["workers"]] == ["CLOSED", "CLOSED"]
        status, body = await desk.ask("POST", "/admin/plugins/told/enable")
        assert [(row["state"], row["generation"]) for row in body["workers"]] == [("ACTIVE", 2), ("ACTIVE", 2)]
        status, body = await desk.ask("POST", "/admin/plugins/told/reload")
        assert [row["generation"] for row in body["workers"]] == [3, 3]
        status, body = await desk.ask("POST", "/admin/plugins/told/rollback")
        assert status == 409
        assert "worker" not in body["error"]["message"]  # all say the same, so it is said as by one
    status, body = await desk.ask("POST", "/admin/plugins/nobody/reload")
    assert (status, body["error"]["code"]) == (404, "plugin_not_found")


async def test_a_command_reaches_a_worker_that_is_just_starting(desk_of_two: WorkerDesk) -> None:
    """What is done while it loads its plugins, before the others know of it, it looks up when they do."""
    desk = desk_of_two
    victim = (await desk.pids())[1]
    async with plugin_in(desk, "late", LATE), desk.connection(but=victim) as (http, _):
        await desk.wait_said("late 1 live")
        desk.write("slow", "")
        os.kill(victim, signal.SIGKILL)
        await wait_until((desk.folder / "slow-begun").exists, "worker 1 to load its plugins", timeout_s=20)
        async with http.post(f"{desk.url}/admin/plugins/late/disable") as response:
            body = await response.json()
        assert response.status == 422  # worker 1 could not be asked, and that is said
        assert "worker 1: it did not answer" in body["error"]["message"]
        (desk.folder / "slow").unlink()
        await desk.wait_said("worker 1 serves again")

        async def both() -> bool:
            _, plugin = await desk.ask("GET", "/admin/plugins/late")
            return [row["state"] for row in plugin["workers"]] == ["CLOSED", "CLOSED"]

        await wait_until(both, "the plugin to be disabled in both")
        assert (await desk.ask("POST", "/admin/plugins/late/enable"))[0] == 200


async def test_workers_that_do_not_agree_are_named(desk_of_two: WorkerDesk, hotdesk: Hotdesk) -> None:
    """On the terminal, in the list, and in the answer to a command: who failed, at what, and what it serves."""
    desk = desk_of_two
    desk.write("refused", "")
    async with plugin_in(desk, "picky", PICKY):
        await desk.wait_said("picky 1 live")
        desk.write("refused", str((await desk.pids())[1]))
        desk.write("plugins/picky.py", PICKY.replace("VERSION", "two"))
        failed = await desk.wait_said("picky failed")
        assert failed.startswith("picky failed at setup: ")
        assert failed.endswith("generation 1 goes on serving  [worker 1]")
        assert (await desk.wait_said("picky 1 → 2 live")).endswith("  [worker 0]")
        for status, plugin in (await desk.on_each("GET", "/admin/plugins/picky")).values():
            assert status == 200
            assert [row["generation"] for row in plugin["workers"]] == [2, 1]
            assert "not in this process" in plugin["error"]["message"]
            assert plugin["workers"][1]["error"]["step"] == "setup"
        listed = await hotdesk("plugins", env=env_of(desk))
        [note] = [line for line in listed.out.splitlines() if line.startswith("picky: ")]
        assert note.startswith("picky: worker 1 serves generation 1, the others 2: failed at setup: ")
        assert "not in this process" in note
        reloaded = await hotdesk("plugins", "reload", "picky", env=env_of(desk))
        assert reloaded.code == 1
        assert "worker 1: plugin 'picky': setup raised RuntimeError: not in this process" in reloaded.err
        assert "done in 1 of 2 workers" in reloaded.err


async def test_a_worker_that_is_stopped_holds_up_nobody(desk_of_two: WorkerDesk) -> None:
    """What the others are asked they answer within seconds, and say who was silent; when it goes on it is heard."""
    desk = desk_of_two
    stopped = (await desk.pids())[1]

    async def ask(path: str, ready: asyncio.Event, go: asyncio.Event) -> Any:
        async with desk.connection(but=stopped) as (http, _):
            ready.set()
            await go.wait()
            async with asyncio.timeout(20), http.get(f"{desk.url}{path}") as response:
                return await (response.text() if path == "/metrics" else response.json())

    readies, go = [asyncio.Event() for _ in range(3)], asyncio.Event()
    paths = ("/admin/plugins/who", "/admin/workers", "/metrics")
    asking = [asyncio.create_task(ask(path, ready, go)) for path, ready in zip(paths, readies, strict=True)]
    await asyncio.gather(*(ready.wait() for ready in readies))
    os.kill(stopped, signal.SIGSTOP)
    try:
        go.set()
        plugin, workers, scrape = await asyncio.gather(*asking)
    finally:
        os.kill(stopped, signal.SIGCONT)
    assert plugin["workers"][1] == {
        "worker": 1, "pid": stopped, "generation": None, "state": None, "error": {"message": "it does not answer"},
    }  # fmt: skip
    assert [row["connections"] is None for row in workers["workers"]] == [False, True]
    assert [line for line in scrape.splitlines() if line.startswith("hotdesk_worker_up{")] == [
        'hotdesk_worker_up{worker="0"} 1',
        'hotdesk_worker_up{worker="1"} 0',
    ]

    async def is_heard() -> bool:
        return (await desk.workers())[1]["connections"] is not None

    await wait_until(is_heard, "worker 1 to answer again")


async def test_events_of_all_workers_come_in_one_stream(desk_of_two: WorkerDesk) -> None:
    """Whoever listens at one worker hears what happens in each, and what the supervisor does, with the place."""
    desk = desk_of_two
    heard: list[dict[str, Any]] = []
    listens = asyncio.Event()
    async with plugin_in(desk, "heard", WHO), desk.connection() as (http, pid):
        place = (await desk.pids()).index(pid)

        async def listen() -> None:
            async with http.get(f"{desk.url}/admin/events", timeout=aiohttp.ClientTimeout(total=60)) as response:
                async for line in response.content:
                    listens.set()
                    heard.extend([msgspec.json.decode(line[5:])] if line.startswith(b"data:") else [])

        listening = asyncio.create_task(listen())
        await listens.wait()
        desk.write("plugins/heard.py", WHO.replace("VERSION = 1", "VERSION = 2"))

        def swapped() -> bool:
            return {one["worker"] for one in heard if one["kind"] in ("plugin_swapped", "plugin_loaded")} == {0, 1}

        await wait_until(swapped, "the swap in both workers")
        os.kill((await desk.pids())[1 - place], signal.SIGKILL)
        await wait_until(lambda: [one for one in heard if one["kind"] == "worker_ready"], "the death and the start")
        died = [one for one in heard if one["kind"] == "worker_died"]
        assert [(one["worker"], one["message"]) for one in died] == [(1 - place, "it was ended by SIGKILL")]
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)


async def test_events_as_json_have_their_worker(start_workers: StartWorkers) -> None:
    """`--json` is for scripts: every event of every worker, none put together."""
    desk = await start_workers(2, "--json", greets=False)

    def loads() -> list[dict[str, Any]]:
        events = [json.loads(line) for line in desk.said]
        assert all("worker" in event for event in events)
        return [event for event in events if event["kind"] == "plugin_loaded"]

    await wait_until(lambda: len(loads()) >= 2, "both loads", timeout_s=30)
    assert sorted((event["plugin"], event["worker"]) for event in loads()) == [("who", 0), ("who", 1)]
