"""A generation's number means one version in all workers, and a worker that comes later serves what the others do."""

from __future__ import annotations

import os
import signal
from typing import Any

from tests.workers.conftest import StartWorkers
from tests.workers.desk import WHO, WorkerDesk

from conftest import wait_until
from hotdesk.workers.numbers import Numbers


def version(number: int) -> str:
    return WHO.replace("VERSION = 1", f"VERSION = {number}")


async def served(desk: WorkerDesk, plugin: str) -> dict[int, int]:
    """The version of a plugin that each worker answers with, by its place."""
    pids = await desk.pids()
    answers = await desk.on_each("GET", f"/p/{plugin}/")
    return {pids.index(pid): body["version"] for pid, (_, body) in answers.items()}


async def generations(desk: WorkerDesk, plugin: str) -> list[int | None]:
    _, body = await desk.ask("GET", f"/admin/plugins/{plugin}")
    return [row["generation"] for row in body["workers"]]


async def kill(desk: WorkerDesk, place: int) -> None:
    """Kill the worker in a place, and wait until another serves there."""
    again = len(desk.logged("worker_ready"))
    os.kill((await desk.pids())[place], signal.SIGKILL)
    await wait_until(lambda: len(desk.logged("worker_ready")) > again, "a worker in its place", timeout_s=20)


async def test_numbers_agree_over_swaps_deaths_restarts_and_reloads(desk_of_two: WorkerDesk) -> None:
    """Whatever a worker has been through, the number that it answers with means the version of the others."""
    desk = desk_of_two
    desk.write("plugins/counted.py", version(1))
    await desk.wait_said("counted 1 live")

    async def all_at(number: int, serving: int) -> bool:
        numbers = await generations(desk, "counted")
        return numbers == [number] * 2 and await served(desk, "counted") == dict.fromkeys(range(2), serving)

    desk.write("plugins/counted.py", version(2))
    await wait_until(lambda: all_at(2, 2), "generation 2")
    await kill(desk, 1)
    assert await all_at(2, 2)  # not 3: it is the same version
    desk.write("plugins/counted.py", version(3))
    await wait_until(lambda: all_at(3, 3), "generation 3")
    assert (await desk.ask("POST", "/admin/plugins/counted/reload"))[0] == 200
    assert await all_at(4, 3)  # a load of its own, as in one process
    assert (await desk.ask("POST", "/admin/plugins/counted/rollback"))[0] == 200
    assert await all_at(5, 2)
    await kill(desk, 0)
    assert await all_at(5, 2)  # and not what its file has, which was rolled back from
    desk.process.send_signal(signal.SIGHUP)
    await desk.wait_said("all 2 workers replaced")
    assert await all_at(5, 2)
    (desk.folder / "plugins" / "counted.py").unlink()


async def test_a_change_that_waits_for_a_command_waits_over_a_death(start_workers: StartWorkers) -> None:
    """`pending` holds: a worker that dies is followed by one that serves what it served, and shows the change."""
    desk = await start_workers(2, "--watch", "pending")
    desk.write("plugins/who.py", version(2))

    async def pending() -> list[Any]:
        _, plugin = await desk.ask("GET", "/admin/plugins/who")
        return [row.get("pending") for row in plugin["workers"]]

    async def both() -> bool:
        return await pending() == [True, True]

    await wait_until(both, "the change to be seen in both")
    await kill(desk, 1)
    assert await served(desk, "who") == {0: 1, 1: 1}
    assert await generations(desk, "who") == [1, 1]
    assert await pending() == [True, True]
    assert (await desk.ask("POST", "/admin/plugins/who/reload"))[0] == 200
    assert await served(desk, "who") == {0: 2, 1: 2}


async def test_a_file_that_does_not_load_takes_nothing_from_a_new_worker(desk_of_two: WorkerDesk) -> None:
    """What the others go on serving although its file is broken, a worker in the place of a dead one serves too."""
    desk = desk_of_two
    desk.write("plugins/broken.py", version(1))
    await desk.wait_said("broken 1 live")
    desk.write("plugins/broken.py", "this is no Python\n")
    await desk.wait_said("broken failed at parse")
    await kill(desk, 0)
    assert await served(desk, "broken") == {0: 1, 1: 1}
    assert await generations(desk, "broken") == [1, 1]
    _, plugin = await desk.ask("GET", "/admin/plugins/broken")
    assert {row["error"]["step"] for row in plugin["workers"]} == {"parse"}
    desk.process.send_signal(signal.SIGHUP)
    await desk.wait_said("all 2 workers replaced")
    assert await served(desk, "broken") == {0: 1, 1: 1}
    desk.write("plugins/broken.py", version(2))

    async def mended() -> bool:
        return await served(desk, "broken") == {0: 2, 1: 2} and await generations(desk, "broken") == [2, 2]

    await wait_until(mended, "the mended file in both")
    assert desk.logged("supervisor_silent") == []
    (desk.folder / "plugins" / "broken.py").unlink()


class Worker:
    """What one worker knows of a plugin's numbers."""

    def __init__(self, numbers: Numbers) -> None:
        self._numbers = numbers
        self.serves = 0
        self.known = 0

    def load(self, digest: str) -> int:
        self.serves = self._numbers.number("who", digest, self.serves, self.known)
        self.known = max(self.known, self.serves)
        return self.serves


def test_workers_that_load_the_same_versions_count_alike_however_late_they_are() -> None:
    """One may be several versions ahead of another, and a version may come back: the numbers are the same."""
    numbers = Numbers()
    quick, slow = Worker(numbers), Worker(numbers)
    assert quick.load("a") == slow.load("a") == 1
    saved = ["b", "a", "a", "c"]
    assert [quick.load(digest) for digest in saved] == [2, 3, 4, 5]
    assert [slow.load(digest) for digest in saved] == [2, 3, 4, 5]


def test_a_worker_that_missed_a_version_gets_the_number_of_the_next() -> None:
    numbers = Numbers()
    quick, slow = Worker(numbers), Worker(numbers)
    slow.load("a")
    assert [quick.load(digest) for digest in ("a", "b", "c")] == [1, 2, 3]
    assert slow.load("c") == 3


def test_a_worker_that_comes_later_gets_the_newest_number_of_what_it_finds() -> None:
    """After a rollback a version has several; the others serve it with the last."""
    numbers = Numbers()
    first = Worker(numbers)
    assert [first.load(digest) for digest in ("a", "b", "a")] == [1, 2, 3]
    assert Worker(numbers).load("a") == 3


def test_no_number_is_given_to_two_versions() -> None:
    """Also where workers see different ones, and after a restart of the supervisor, over which the archive counts."""
    numbers = Numbers()
    workers = [Worker(numbers) for _ in range(3)]
    given: dict[int, str] = {}
    for step in range(60):
        worker, digest = workers[step % 3], "abcdefg"[(step * 5 + step // 7) % 7]
        assert given.setdefault(worker.load(digest), digest) == digest
    later = Worker(Numbers())
    later.known = max(given)
    assert later.load("z") == max(given) + 1
