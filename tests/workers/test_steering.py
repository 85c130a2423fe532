"""On a desk of several workers a visitor's connection is served by the worker that runs the conversation's turns."""

from __future__ import annotations

import asyncio
import os
import random
import signal

import aiohttp
import psutil
from tests.workers.conftest import StartWorkers
from tests.workers.desk import WHO, WorkerDesk

from conftest import wait_until

WHERE = WHO.replace('return f"{VERSION}: {turn.text}"', "return str(os.getpid())")
"""A bot that answers with its process."""


async def served_at(desk: WorkerDesk, conversation: str) -> tuple[int, int]:
    """The process at the other end of a new connection that began with *conversation*, and that of its turn."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1)) as http:
        path = f"{desk.url}/v1/conversations/{conversation}/messages"
        async with http.post(path, params={"wait": "10"}, json={"text": "where?"}) as response:
            body = await response.json()
            assert response.status == 200, body
        async with http.get(f"{desk.url}/p/who/") as page:
            return (await page.json())["pid"], int(body["replies"][0]["text"])


async def test_a_connection_is_served_where_its_turns_run(start_workers: StartWorkers) -> None:
    """By every door, whichever worker the kernel gave it to; also after one of them was killed and is there again."""
    desk = await start_workers(2, plugins={"who.py": WHERE})

    async def serves(name: str, count: int) -> set[int]:
        """Who runs the turns of so many conversations, once each connection is served where its turns run."""
        seen: list[list[tuple[int, int]]] = []

        async def is_steered() -> bool:
            seen.append([await served_at(desk, f"{name}{number}") for number in range(count)])
            return all(door == owner for door, owner in seen[-1]) and len({owner for _, owner in seen[-1]}) == 2

        try:
            await wait_until(is_steered, "both serve their own conversations", timeout_s=30)
        except AssertionError as exc:
            raise AssertionError(f"{exc}; served and owned: {seen}") from None
        return {owner for _, owner in seen[-1]}

    pids = set(await desk.pids())
    assert await serves("c", 40) == pids
    assert await desk.passed() > 5
    async with aiohttp.ClientSession() as http:
        before = await desk.passed()
        sockets = [await http.ws_connect(f"{desk.url}/v1/ws?conversation=c{n}") for n in range(40)]
        assert before + 5 < await desk.passed() < before + 35
        for ws in sockets:
            await ws.close()

    killed, left = sorted(pids)
    os.kill(killed, signal.SIGKILL)
    await desk.wait_whole()

    assert killed not in await serves("d", 20)
    assert left in await desk.pids()
    assert killed not in await desk.pids()
    run = desk.folder / "data" / "run"
    assert len(list(run.glob("worker-*-in.sock"))) == 2
    await desk.stop()
    assert list(run.iterdir()) == []


async def test_a_worker_without_files_loses_no_connection(start_workers: StartWorkers) -> None:
    """Its siblings keep what would be passed to it; what it has been passed, or given by the kernel, waits."""
    desk = await start_workers(2, plugins={"who.py": WHERE})
    owners = {f"c{number}": (await served_at(desk, f"c{number}"))[1] for number in range(20)}
    full = psutil.Process(next(iter(owners.values())))
    theirs = [conversation for conversation, owner in owners.items() if owner == full.pid]
    before = full.rlimit(psutil.RLIMIT_NOFILE)
    async with desk.connection(but=full.pid) as (other, _):
        full.rlimit(psutil.RLIMIT_NOFILE, (full.num_fds() + 4, before[1]))
        answers = await asyncio.gather(*(desk.say("hello", random.choice(theirs), wait_s=30) for _ in range(60)))
        full.rlimit(psutil.RLIMIT_NOFILE, before)
        async with other.get(f"{desk.url}/healthz") as response:
            assert response.status == 200
    assert {len(answer["replies"]) for answer in answers} == {1}
    assert desk.logged("connection_not_taken")

    async def is_passed_on_again() -> bool:
        passed = await desk.passed()
        for conversation in theirs * 3:
            await served_at(desk, conversation)
        return await desk.passed() > passed

    await wait_until(is_passed_on_again, "connections are passed to it again", timeout_s=20)
