"""New connections go to the worker that runs their conversation's turns, and none is lost on the way."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from aiohttp import web

from conftest import wait_until
from hotdesk.web import steering
from hotdesk.web.departure import Departure
from hotdesk.web.steering import SteeredSite, conversation_in


class Worker:
    """A worker's doors: it answers with its name and the body that it was sent."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.entrance = str(folder / f"{name}-in.sock")
        self.sock = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.port: int = self.sock.getsockname()[1]
        self.homes: dict[str, Worker] = {}
        self.passed = 0
        self.departure = Departure()

    async def open(self) -> None:
        app = web.Application()
        app.router.add_route("*", "/{tail:.*}", self._answer)
        app.on_response_prepare.append(self.departure.tell)
        self.runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1.0)
        await self.runner.setup()
        self.site = SteeredSite(self.runner, self.sock, entrance=self.entrance, find=self._find, passed=self._count)
        await self.site.start()

    async def _answer(self, request: web.Request) -> web.Response:
        return web.Response(text=f"{self.name} {await request.text()}")

    def _find(self, conversation: str) -> str | None:
        home = self.homes.get(conversation)
        return home.entrance if home is not None else None

    def _count(self) -> None:
        self.passed += 1

    async def leave(self) -> None:
        """As a worker does whose place another takes."""
        await self.departure.close_port(self.runner)
        await self.departure.answer_all(self.runner, 10.0)
        await self.runner.cleanup()

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def say(self, conversation: str, text: str = "hello") -> str:
        """Who answers, and with what, on a connection of its own."""
        reader, writer = await self.connect()
        writer.write(post(conversation, text))
        answer = await body_of(reader)
        writer.close()
        return answer


StartWorker = Callable[[str], Awaitable[Worker]]


def post(conversation: str, text: str) -> bytes:
    head = f"POST /v1/conversations/{conversation}/messages HTTP/1.1\r\nHost: x\r\nContent-Length: {len(text)}\r\n\r\n"
    return head.encode() + text.encode()


async def body_of(reader: asyncio.StreamReader) -> str:
    async with asyncio.timeout(10):
        head = await reader.readuntil(b"\r\n\r\n")
        size = next(line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
        return (await reader.readexactly(int(size.split(b":")[1]))).decode()


@pytest.fixture
async def start_worker(tmp_path: Path) -> AsyncIterator[StartWorker]:
    async with AsyncExitStack() as stack:

        async def start(name: str) -> Worker:
            worker = Worker(name, tmp_path)
            stack.callback(worker.sock.close)
            await worker.open()
            stack.push_async_callback(worker.runner.cleanup)
            return worker

        yield start


@pytest.mark.parametrize(
    ("line", "conversation"),
    [
        (b"POST /v1/conversations/c1/messages?wait=5 HTTP/1.1\r\nHost: x\r\n", "c1"),
        (b"GET /v1/conversations/c1/events HTTP/1.1\r\n", "c1"),
        (b"GET /v1/conversations/a%20b%2Fc/messages HTTP/1.1\r\n", "a b/c"),
        (b"GET /v1/conversations/%E4%BD%A0/messages HTTP/1.1\r\n", "你"),
        (b"GET /v1/conversations/a+b HTTP/1.1\r\n", "a+b"),
        (b"GET /v1/ws?after=3&conversation=a+b%2B HTTP/1.1\r\n", "a b+"),
        (b"GET /v1/ws?conversation=c1 HTT", "c1"),
        (b"GET /v1/ws?conversation=c1", None),
        (b"GET /v1/ws?conversation= HTTP/1.1\r\n", None),
        (b"GET /v1/ws HTTP/1.1\r\n", None),
        (b"GET /v1/conversations/ HTTP/1.1\r\n", None),
        (b"POST /hooks/shop?conversation=c1 HTTP/1.1\r\n", None),
        (b"GET /healthz HTTP/1.1\r\n", None),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 \xff", None),
        (b"\xff \xfe \xfd", None),
        (b"\r\n\r\n", None),
        (b"", None),
    ],
)
def test_the_first_line_names_the_conversation(line: bytes, conversation: str | None) -> None:
    """As the doors read it; whatever is unclear names none."""
    assert conversation_in(line) == conversation


async def test_a_connection_goes_to_the_worker_of_its_conversation(start_worker: StartWorker) -> None:
    """With all that was sent on it; what is the worker's own, or nobody's, stays."""
    a, b = await start_worker("a"), await start_worker("b")
    a.homes = {"theirs": b}
    assert await a.say("theirs", "all of it") == "b all of it"
    assert await a.say("own") == "a hello"
    assert await a.say("") == "a hello"
    assert (a.passed, b.passed) == (1, 0)


async def test_a_connection_that_was_passed_on_stays(start_worker: StartWorker) -> None:
    """Also for the next requests on it, of whatever conversation: only the first line of all is looked at."""
    a, b = await start_worker("a"), await start_worker("b")
    a.homes = {"theirs": b}
    b.homes = {"theirs": a}  # who passes it on is believed: it can't go in circles
    reader, writer = await a.connect()
    for conversation in ("theirs", "own"):
        writer.write(post(conversation, "hello"))
        assert await body_of(reader) == "b hello"
    writer.close()


async def test_who_says_nothing_yet_is_waited_for(start_worker: StartWorker) -> None:
    """And others are served meanwhile."""
    a, b = await start_worker("a"), await start_worker("b")
    a.homes = {"theirs": b}
    silent, first = await a.connect()
    assert await a.say("own") == "a hello"
    first.write(post("theirs", "hello"))
    assert await body_of(silent) == "b hello"
    first.close()


async def test_who_is_silent_for_long_is_served_where_it_is(
    start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So is who sends its first line in pieces: it is looked at once."""
    a, b = await start_worker("a"), await start_worker("b")
    a.homes = {"theirs": b}
    reader, writer = await a.connect()
    writer.write(post("theirs", "hello")[:20])
    await wait_until(lambda: a.runner.server.connections, "it is served in pieces")  # type: ignore[union-attr]
    writer.write(post("theirs", "hello")[20:])
    assert await body_of(reader) == "a hello"
    writer.close()
    monkeypatch.setattr(steering, "LOOK_S", 0.05)
    await wait_until(lambda: not a.runner.server.connections, "it is gone")  # type: ignore[union-attr]
    reader, writer = await a.connect()
    await wait_until(lambda: a.runner.server.connections, "it is served in silence")  # type: ignore[union-attr]
    writer.write(post("theirs", "hello"))
    assert await body_of(reader) == "a hello"
    assert a.passed == 0
    writer.close()


async def test_what_is_passed_in_is_no_childs(start_worker: StartWorker) -> None:
    """A program that a plugin starts must not keep a visitor's connection open, as none that came by the port."""
    a, b = await start_worker("a"), await start_worker("b")
    a.homes = {"theirs": b}
    reader, writer = await a.connect()
    writer.write(post("theirs", "hello"))
    assert await body_of(reader) == "b hello"
    [connection] = b.runner.server.connections  # type: ignore[union-attr]
    assert connection.transport is not None
    assert os.get_inheritable(connection.transport.get_extra_info("socket").fileno()) is False
    writer.close()


async def test_nothing_is_kept_of_siblings_that_went(start_worker: StartWorker) -> None:
    """However often one comes and goes."""
    a = await start_worker("a")
    for number in range(3):
        b = await start_worker(f"b{number}")
        a.homes = {"theirs": b}
        assert await a.say("theirs") == f"b{number} hello"
        assert list(a.site._ways_out) == [b.entrance]
        await b.leave()
        await wait_until(lambda: not a.site._ways_out, "its way out is closed")


async def test_a_sibling_that_is_gone_or_full_is_passed_nothing(start_worker: StartWorker, tmp_path: Path) -> None:
    """Its entrance is missing, refuses, or has a queue that nobody empties: who came is served here."""
    a, b = await start_worker("a"), await start_worker("b")
    a.homes = {"theirs": b}
    assert await a.say("theirs") == "b hello"
    await b.leave()
    assert not Path(b.entrance).exists()
    assert [await a.say("theirs") for _ in range(3)] == ["a hello"] * 3
    stopped = Worker("stopped", tmp_path)
    stopped.sock.close()
    a.homes = {"theirs": stopped}
    with socket.socket(socket.AF_UNIX) as inner:
        inner.bind(stopped.entrance)
        assert await a.say("theirs") == "a hello"  # nobody listens
        inner.listen(1)
        asked = []
        while a.passed < 2000:
            passed = a.passed
            reader, writer = await a.connect()
            writer.write(post("theirs", "hello"))
            answer = asyncio.ensure_future(body_of(reader))
            await wait_until(lambda: a.passed > passed or answer.done(), "it is passed on, or answered")  # noqa: B023
            asked.append((writer, answer))
            if answer.done():
                break
        assert asked[-1][1].result() == "a hello"
        assert 10 < a.passed < 2000
        for writer, answer in asked:
            answer.cancel()
            writer.close()


@pytest.mark.parametrize("leaver", ["who passes on", "who is passed to"])
async def test_none_is_lost_when_a_worker_leaves(start_worker: StartWorker, leaver: str) -> None:
    """At any moment of it: everyone who was let in, by whichever of them, has an answer."""
    for moment in range(12):
        a, b = await start_worker(f"a{moment}"), await start_worker(f"b{moment}")
        a.homes = {"theirs": b}
        connected = [await a.connect() for _ in range(60)]
        await wait_until(lambda: len(a.site._silent) == 60, "all are let in")  # noqa: B023
        leaving = None
        answers = []
        for number, (reader, writer) in enumerate(connected):
            writer.write(post("theirs", "hello"))
            answers.append(asyncio.ensure_future(body_of(reader)))
            if number == 5 * moment:
                leaving = asyncio.ensure_future((a if leaver == "who passes on" else b).leave())
            if number % 7 == moment % 7:
                await asyncio.sleep(0)
        assert set(await asyncio.gather(*answers)) <= {f"a{moment} hello", f"b{moment} hello"}
        assert leaving is not None
        await leaving
        for _, writer in connected:
            writer.close()


async def test_what_a_sibling_passed_at_the_very_end_is_served(start_worker: StartWorker) -> None:
    """It lies in the entrance of a worker that leaves, which has not looked there."""
    a, b = await start_worker("a"), await start_worker("b")
    a.homes = {"theirs": b}
    asyncio.get_running_loop().remove_reader(b.site._inner)  # type: ignore[arg-type]
    reader, writer = await a.connect()
    writer.write(post("theirs", "hello"))
    await wait_until(lambda: a.passed, "it is passed on")
    answer = asyncio.ensure_future(body_of(reader))
    await b.leave()
    assert await answer == "b hello"
    writer.close()
