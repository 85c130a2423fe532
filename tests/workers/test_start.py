"""A desk of several processes begins: one port, one greeting, one set of keys; and what stops the start."""

from __future__ import annotations

import asyncio
import re
import socket
import stat
from pathlib import Path

import psutil
import pytest
from tests.cli.stand_in import Hotdesk
from tests.redis_servers import RedisServer
from tests.workers.conftest import StartWorkers
from tests.workers.desk import WHO, WorkerDesk, starting

from hotdesk.config import Config
from hotdesk.errors import ConfigError
from hotdesk.web.port import bind_shared_port


async def test_a_desk_greets_once_and_every_worker_serves(start_workers: StartWorkers) -> None:
    """What all did is said once; each takes visitors' connections and knows the one token and secret that were made."""
    desk = await start_workers(3, settings="visitor_tokens = true\n", env={"HOTDESK_ADMIN_TOKEN": ""})
    assert sum("who 1 live" in line for line in desk.said) == 1
    assert sum("serves who" in line for line in desk.said) == 1
    assert any(line.startswith("  workers  3") for line in desk.said)
    [desk.token] = [found[1] for line in desk.said if (found := re.search(r"HOTDESK_ADMIN_TOKEN=(\S+)", line))]
    rows = await desk.workers()
    assert [(row["worker"], row["state"], row["restarts"]) for row in rows] == [(n, "ready", 0) for n in range(3)]
    body = {"conversation": "c", "visitor": "ann"}
    made = await desk.on_each("POST", "/admin/tokens", json=body)
    assert [status for status, _ in made.values()] == [201, 201, 201]
    assert sorted(desk.children()) == sorted(made) == sorted(row["pid"] for row in rows)
    assert {line["worker"] for line in desk.logged("plugin_loaded", plugin="who")} == {0, 1, 2}
    data = desk.folder / "data"
    assert stat.S_IMODE((data / "run").stat().st_mode) == 0o700
    files = sorted(path.name for path in data.iterdir() if path.is_file())
    assert files == ["admin_token.sha256", "hotdesk.lock", "visitor_secret"]
    assert stat.S_IMODE((data / "visitor_secret").stat().st_mode) == 0o600
    desk.token = ""
    for _, answer in made.values():
        path = f"/v1/conversations/c/messages?token={answer['token']}"
        for _ in range(10):  # on new connections, so that others than the one that made it are asked
            assert (await desk.ask("GET", path))[0] == 404  # nothing was said there; 401 without a token
    assert (await desk.ask("GET", "/v1/conversations/c/messages"))[0] == 401
    assert await desk.stop() == 0
    assert desk.said[-1] == "stopped"
    assert list((data / "run").iterdir()) == []


async def test_a_port_or_a_folder_that_is_taken_stops_the_start(
    desk_of_two: WorkerDesk, hotdesk: Hotdesk, tmp_path: Path
) -> None:
    """Nobody shares the port of a desk that serves, though the kernel would let the same user; or its folder."""
    desk = desk_of_two
    port = desk.url.rpartition(":")[2]
    (tmp_path / "plugins").mkdir()
    same = ("run", "--backend", desk.command[desk.command.index("--backend") + 1], "--workers", "2")
    began = await hotdesk(*same, "--port", port)
    assert began.code == 2
    assert f"setting 'port' is {port}" in began.err
    assert "choose another with --port" in began.err
    held = await hotdesk(*same, "--port", "0", cwd=desk.folder)
    assert held.code == 1
    assert f"in use by another hotdesk (pid {desk.process.pid})" in held.err
    assert len(await desk.pids()) == 2


async def test_a_start_that_a_worker_refuses_is_told_as_by_one_process(
    hotdesk: Hotdesk, redis: RedisServer, tmp_path: Path
) -> None:
    """What only a worker finds wrong ends the start of all, with its own words and exit code, said once."""
    command = ("run", "--port", "0", "--workers", "2", "--plugins", "nowhere")
    wrong = await hotdesk(*command, "--backend", redis.url)
    assert wrong.code == 2
    assert wrong.err.count("there is no such folder; `hotdesk init` makes one") == 1
    absent = await hotdesk(*command, "--backend", "redis://127.0.0.1:1/0")
    assert absent.code == 1
    assert absent.err.count("Error: backend redis://127.0.0.1:1/0: ") == 1
    assert "Traceback" not in wrong.err + absent.err
    assert list((tmp_path / "data" / "run").iterdir()) == []


async def test_a_desk_may_have_as_many_files_open_as_its_user(redis: RedisServer, tmp_path: Path) -> None:
    """Whatever soft limit it was started with: a visitor's connection is a file, and 1,024 are few."""
    desk = WorkerDesk(tmp_path, redis.url, 2)
    desk.command = ["sh", "-c", 'ulimit -S -n 256; exec "$@"', "sh", *desk.command]
    desk.write("plugins/who.py", WHO)
    async with starting(desk):
        limits = [psutil.Process(pid).rlimit(psutil.RLIMIT_NOFILE) for pid in (desk.process.pid, *await desk.pids())]
    assert len(limits) == 3
    assert all(soft == hard > 256 for soft, hard in limits)


DIES_ONCE = (
    """
try:
    open("died", "x").close()
except FileExistsError:
    pass
else:
    import os
    os._exit(7)
"""
    + WHO
)
"""Ends the first process that loads it."""


async def test_a_worker_that_fails_at_the_start_is_started_again_where_another_serves(
    start_workers: StartWorkers,
) -> None:
    """What befell one of them, as a Redis that was away for that moment, ends no desk that others serve."""
    desk = await start_workers(2, plugins={"who.py": DIES_ONCE})
    await desk.wait_whole()
    [died] = desk.logged("worker_died")
    assert (died["code"], died["message"]) == (7, "it ended with exit code 7")
    assert sorted(row["restarts"] for row in await desk.workers()) == [0, 1]
    assert (await desk.say("hello", "c"))["replies"][0]["text"] == "1: hello"


def test_sockets_that_share_a_port_share_it_with_nobody_else() -> None:
    """All places are bound and listening before anything is begun, on one port; a second desk is refused."""
    config = Config(port=0)
    socks = bind_shared_port(config, 4)
    try:
        ports = {sock.getsockname()[1] for sock in socks}
        assert len(ports) == 1
        assert len({sock.fileno() for sock in socks}) == 4
        with pytest.raises(ConfigError, match="choose another with --port"):
            bind_shared_port(Config(port=ports.pop()), 4)
    finally:
        for sock in socks:
            sock.close()


async def test_new_connections_are_spread_over_the_places() -> None:
    """The kernel gives each of four sockets its share of 400 connections."""
    socks = bind_shared_port(Config(port=0), 4)
    counts = dict.fromkeys(range(4), 0)
    try:
        address = socks[0].getsockname()
        visitors = []
        for _ in range(400):
            visitors.append(socket.create_connection(address))
            await asyncio.sleep(0)
        for number, sock in enumerate(socks):
            sock.setblocking(False)
            try:
                while True:
                    sock.accept()[0].close()
                    counts[number] += 1
            except BlockingIOError:
                pass
        for visitor in visitors:
            visitor.close()
    finally:
        for sock in socks:
            sock.close()
    assert sum(counts.values()) == 400
    assert min(counts.values()) > 50, counts
