"""All workers replaced, one by one: by SIGHUP, by command, and when it does not work."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
from tests.cli.stand_in import Hotdesk
from tests.redis_servers import RedisServer
from tests.workers.conftest import StartWorkers
from tests.workers.desk import WHO, WorkerDesk

from conftest import ADMIN_TOKEN, Desk, wait_until
from hotdesk.config import Config
from hotdesk.runtime.events import Events
from hotdesk.workers.supervisor import Supervisor, open_workers

HELD = WHO.replace("import os\n", "import asyncio\nimport os\n", 1).replace(
    'return f"{VERSION}: {turn.text}"',
    """open(turn.text, "w").close()
    while not os.path.exists("go"):
        await asyncio.sleep(0.01)
    return "1: held\"""",
)
"""A bot whose turns end when the file `go` is there."""


class Stream:
    """Visitors who come and go all the time, and what became of each request."""

    def __init__(self, desk: WorkerDesk) -> None:
        self._desk = desk
        self._stop = asyncio.Event()
        self.outcomes: Counter[str] = Counter()
        self.pids: set[int] = set()

    async def run(self, *, new: int, kept: int) -> None:
        """Until `stop`: *new* visitors who connect for each request, *kept* who keep their connections."""
        async with asyncio.TaskGroup() as group:
            for number in range(new):
                group.create_task(self._visit(f"new-{number}", force_close=True))
            for number in range(kept):
                group.create_task(self._visit(f"kept-{number}", force_close=False))

    def stop(self) -> None:
        self._stop.set()

    async def _visit(self, name: str, *, force_close: bool) -> None:
        connector = aiohttp.TCPConnector(force_close=force_close)
        async with aiohttp.ClientSession(connector=connector) as http:
            http._retry_connection = False  # the client would try a GET again behind the test's back
            count = 0
            while not self._stop.is_set():
                count += 1
                try:
                    async with http.get(f"{self._desk.url}/p/who/") as page:
                        self.pids.add((await page.json())["pid"])
                    async with http.post(
                        f"{self._desk.url}/v1/conversations/{name}-{count}/messages",
                        params={"wait": "10"},
                        json={"text": "hello"},
                    ) as response:
                        body = await response.json()
                        self._note(response.status, body)
                except (aiohttp.ClientError, OSError) as exc:
                    self.outcomes[f"{type(exc).__name__} {exc}"] += 1
                await asyncio.sleep(0.002)

    def _note(self, status: int, body: dict[str, Any]) -> None:
        if status == 200 and len(body["replies"]) == 1:
            self.outcomes["answered"] += 1
        else:
            self.outcomes[f"{status} {body}"] += 1


async def test_a_restart_of_all_workers_refuses_nobody_and_fails_no_request(desk_of_two: WorkerDesk) -> None:
    """Under a stream of new and of kept connections every request is answered, before, by and after each new worker."""
    desk = desk_of_two
    before = await desk.pids()
    stream = Stream(desk)
    running = asyncio.create_task(stream.run(new=4, kept=2))
    await wait_until(lambda: len(stream.pids) == 2, "both workers answer")
    await wait_until(desk.passed, "they pass connections on to each other")
    desk.process.send_signal(signal.SIGHUP)
    await desk.wait_said("all 2 workers replaced")
    after = await desk.pids()
    await wait_until(lambda: set(after) <= stream.pids, "both new workers answer")
    await wait_until(desk.passed, "they pass connections on")
    stream.stop()
    await running
    assert not set(before) & set(after)
    assert set(stream.outcomes) == {"answered"}, stream.outcomes
    assert stream.outcomes["answered"] > 50
    assert (await desk.roll())["state"] == "done"
    assert desk.children() == after


async def test_visitors_on_a_socket_are_told_to_come_back_and_find_another_worker(desk_of_two: WorkerDesk) -> None:
    """A socket of a worker that leaves is closed with 1012, at once when nothing is being answered there."""
    desk = desk_of_two
    async with aiohttp.ClientSession() as http:
        ended = asyncio.Event()

        async def visit(number: int) -> list[tuple[int | None, str | None]]:
            """Come back whenever told to, until the restart is over; what the visitor was told."""
            codes = []
            while True:
                async with http.ws_connect(f"{desk.url}/v1/ws?conversation=c{number}") as socket:
                    closed, over = asyncio.ensure_future(socket.receive()), asyncio.ensure_future(ended.wait())
                    await asyncio.wait({closed, over}, return_when=asyncio.FIRST_COMPLETED)
                    over.cancel()
                    if not closed.done():
                        await socket.send_json({"type": "ping"})
                        assert (await closed).json() == {"type": "pong"}
                        return codes
                    assert closed.result().type is aiohttp.WSMsgType.CLOSE
                    codes.append((closed.result().data, closed.result().extra))

        async with asyncio.TaskGroup() as group:
            visitors = [group.create_task(visit(number)) for number in range(8)]
            await wait_until(lambda: sockets_of(desk, 8), "eight sockets")
            assert (await desk.ask("POST", "/admin/restart"))[0] == 202
            assert (await desk.roll())["state"] == "done"
            ended.set()
        for visitor in visitors:
            assert visitor.result() in ([(1012, "come back")], [(1012, "come back")] * 2)


async def test_a_socket_on_which_nothing_is_said_does_not_wait_for_other_visitors_turns(
    start_workers: StartWorkers,
) -> None:
    """Long turns keep a worker that leaves for as long as they may take; who waits for none comes back at once."""
    desk = await start_workers(
        2, plugins={"who.py": HELD, "who.toml": "timeout_ms = 60000\n"}, env={"HOTDESK_STOP_TIMEOUT_S": "30"}
    )
    turns = [asyncio.create_task(desk.say(f"turn{n}", f"held-{n}", wait_s=60)) for n in range(8)]
    await wait_until(lambda: len(list(desk.folder.glob("turn*"))) == 8, "eight turns under way")
    async with aiohttp.ClientSession() as http:
        sockets = [await http.ws_connect(f"{desk.url}/v1/ws?conversation=idle-{n}") for n in range(8)]
        closings = [asyncio.create_task(socket.receive()) for socket in sockets]
        assert (await desk.ask("POST", "/admin/restart"))[0] == 202
        async with asyncio.timeout(20):
            closed, _ = await asyncio.wait(closings, return_when=asyncio.FIRST_COMPLETED)
        assert {closing.result().data for closing in closed} == {1012}
        assert not all(turn.done() for turn in turns)
        desk.write("go", "")
        for turn in turns:
            assert (await turn)["replies"][0]["text"] == "1: held"
        for closing in closings:
            closing.cancel()


async def sockets_of(desk: WorkerDesk, count: int) -> bool:
    """Whether *count* sockets are open, over all workers."""
    _, text = await desk.ask("GET", "/metrics")
    return sum(float(line.split()[1]) for line in text.splitlines() if line.startswith("hotdesk_websockets{")) == count


async def test_a_restart_takes_the_settings_anew_but_for_what_all_share(
    start_workers: StartWorkers, hotdesk: Hotdesk
) -> None:
    """`hotdesk restart` waits for the end of it and says what could not be taken; twice at once is once."""
    desk = await start_workers(2, settings="max_text_bytes = 10\n")
    env = {"HOTDESK_URL": desk.url, "HOTDESK_ADMIN_TOKEN": desk.token}
    long = {"json": {"text": "more than ten bytes"}}
    assert (await desk.ask("POST", "/v1/conversations/c/messages", **long))[0] == 413
    desk.write("hotdesk.toml", 'max_text_bytes = 1000\nhost = "127.0.0.2"\n')
    first, second = await asyncio.gather(hotdesk("restart", env=env), hotdesk("restart", "--json", env=env))
    assert first.code == second.code == 0, (first, second)
    assert first.out == "✓ 2 workers replaced; unchanged until a stop and start: host\n"
    assert (await desk.roll())["number"] == 1
    answers = await desk.on_each("POST", "/v1/conversations/c/messages", **long)
    assert {status for status, _ in answers.values()} == {202}


async def test_settings_that_are_wrong_end_a_restart_before_it_begins(
    desk_of_two: WorkerDesk, hotdesk: Hotdesk
) -> None:
    """The old workers go on serving, and the error names the setting, the value and what would be right.

    The list of workers tells of it until a restart succeeds.
    """
    desk = desk_of_two
    env = {"HOTDESK_URL": desk.url, "HOTDESK_ADMIN_TOKEN": desk.token}
    before = await desk.pids()
    desk.write("hotdesk.toml", "max_turns = 0\n")
    ran = await hotdesk("restart", env=env)
    assert ran.code == 1
    assert "the restart failed: setting 'max_turns' is 0" in ran.err
    assert await desk.pids() == before
    assert (await desk.wait_said("restart failed")).endswith("; the ones from before go on serving")
    assert "the last restart failed: setting 'max_turns' is 0" in (await hotdesk("workers", env=env)).out
    (desk.folder / "hotdesk.toml").unlink()
    assert (await hotdesk("restart", env=env)).code == 0
    assert "failed" not in (await hotdesk("workers", env=env)).out
    assert not set(await desk.pids()) & set(before)


async def test_a_new_worker_that_does_not_come_to_serve_replaces_nothing(redis: RedisServer, tmp_path: Path) -> None:
    """As with a plugin: it dies, or is never ready, and the old ones serve on; once that is mended a restart works."""
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    config = Config(
        plugins=(str(plugins),), data=str(tmp_path / "data"), port=0, backend=redis.url, workers=2, watch="frozen",
        admin_token="a token of the test", stop_timeout_s=3.0,
    )  # fmt: skip
    events = Events(None)

    async def outcome(supervisor: Supervisor, source: str) -> dict[str, Any]:
        """What a restart comes to with *source* as a plugin."""
        (plugins / "bomb.py").write_text(source)
        events.recent.clear()
        number = supervisor.restart()["restart"]
        assert supervisor.restart() == {"restart": number, "status": "under way"}
        ends = ("restart_failed", "restart_done")
        return await wait_until(  # type: ignore[no-any-return]
            lambda: next((one for one in events.recent if one["kind"] in ends), None), "its end", timeout_s=30
        )

    async with open_workers(
        config, read_config=lambda: config, events=events, heard=lambda event: None, ready_s=30.0
    ) as supervisor:
        before = [place.current for place in supervisor._places]
        died = await outcome(supervisor, "import os\nos._exit(7)\n")
        assert (died["kind"], died["worker"]) == ("restart_failed", 0)
        assert died["message"] == "it ended with exit code 7"
        supervisor._ready_s = 3.0
        late = await outcome(supervisor, "import time\ntime.sleep(600)\n")
        assert (late["kind"], late["message"]) == ("restart_failed", "it was not ready within 3 s")
        assert [place.current for place in supervisor._places] == before
        assert supervisor.serving == 2
        supervisor._ready_s = 30.0
        assert (await outcome(supervisor, ""))["kind"] == "restart_done"
        assert not {place.current for place in supervisor._places} & set(before)
        assert supervisor.serving == 2


async def test_a_host_of_one_process_says_that_it_can_not_be_restarted_so(desk: Desk, hotdesk: Hotdesk) -> None:
    """409 and a hint; and it is the one row of its workers."""
    env = {"HOTDESK_URL": desk.url, "HOTDESK_ADMIN_TOKEN": ADMIN_TOKEN}
    ran = await hotdesk("restart", env=env)
    assert ran.code == 1
    assert "this host is one process" in ran.err
    assert "--workers 2" in ran.err
    rows = await hotdesk("workers", env=env)
    assert [line.split()[0] for line in rows.out.splitlines()] == ["WORKER", "0"]
    assert (await desk.admin("GET", "workers"))["restart"] is None
