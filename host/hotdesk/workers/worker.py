"""`python -m hotdesk.workers.worker`: one worker process, started by a supervisor and by nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from typing import Any

import msgspec

from hotdesk_sdk import HotdeskError

from ..app import open_host
from ..errors import ConfigError
from ..logs import configure_logs, get_log
from ..web.seat import Seat
from ..web.siblings import Siblings
from .child import BEAT_S
from .loop import leave_the_deaf, loop_factory
from .orders import LINE_LIMIT, Greeting, Line, NumberAsked, Orders, decode_line, encode_line, read_orders

__all__ = ["main"]

ANSWER_S = 2.0
"""How long the supervisor has to answer. A plugin's swap must not stand still because it does."""

MAX_UNSENT = 4 * 1024 * 1024
"""Bytes that wait for a supervisor that reads nothing; beyond it events are not sent."""


def main() -> None:
    for number in (signal.SIGINT, signal.SIGHUP):  # of the terminal, and for the supervisor, which tells us
        signal.signal(number, signal.SIG_IGN)
    control = socket.socket(fileno=int(sys.argv[1]))
    try:
        orders = read_orders(control)
    except (EOFError, OSError):
        sys.exit(1)
    for fd in (control.fileno(), orders.listen_fd):
        os.set_inheritable(fd, False)
    sys.path[:] = orders.python_path
    os.environ.pop("PYTHONPATH", None)
    if orders.environ_python_path is not None:
        os.environ["PYTHONPATH"] = orders.environ_python_path
    configure_logs(orders.config.log_format, orders.config.log_level, worker=orders.worker)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        sys.exit(runner.run(_Worker(orders).run(control)))


class _Worker:
    """Runs a host, and speaks with the supervisor."""

    def __init__(self, orders: Orders) -> None:
        self._orders = orders
        self._writer: asyncio.StreamWriter
        self._stop = asyncio.Event()
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._count = 0
        self._siblings = Siblings(orders.worker, orders.name, self._restart)
        self._siblings.state = orders.state
        self._known = asyncio.Event()
        self._serves = False
        self._seat = Seat(
            worker=orders.worker,
            name=orders.name,
            sock=socket.socket(fileno=orders.listen_fd),
            path=orders.path,
            keys=orders.keys,
            siblings=self._siblings,
            number=self._number,
            joining=orders.joining,
        )

    async def run(self, control: socket.socket) -> int:
        reader, self._writer = await asyncio.open_unix_connection(sock=control, limit=LINE_LIMIT)
        hearing = asyncio.create_task(self._hear(reader))
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._stop.set)
        serving = asyncio.create_task(self._serve())
        await asyncio.wait({serving, hearing}, return_when=asyncio.FIRST_COMPLETED)
        if not self._serves:  # the supervisor is gone before anybody was served, or it can't start
            serving.cancel()
        await asyncio.wait({serving})
        hearing.cancel()
        await asyncio.gather(hearing, return_exceptions=True)
        code = self._say_last(serving)
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()
        await leave_the_deaf()
        return code

    def _say_last(self, serving: asyncio.Task[int]) -> int:
        """How it ended; the exit code. What is no error of ours to tell is raised, for the log."""
        if serving.cancelled():
            return 1
        exc = serving.exception()
        if isinstance(exc, ConfigError):
            self._say(Line(failed=("config", str(exc))))
            return 2
        if isinstance(exc, HotdeskError):
            self._say(Line(failed=("other", str(exc))))
            return 1
        self._say(Line(stopped=serving.result()))
        return 0

    async def _serve(self) -> int:
        """Run the host until told to stop; how many turns are left to others."""
        orders = self._orders
        async with contextlib.AsyncExitStack() as stack:
            opening = open_host(orders.config, listen=self._tell_event, log_events=orders.log_events, seat=self._seat)
            beating = asyncio.create_task(self._beat())
            stack.callback(beating.cancel)  # after the host is closed, which may take it longer than a missed beat
            host = await stack.enter_async_context(opening)
            self._serves = True
            self._say(Line(ready=Greeting.of(host)))
            if orders.joining:
                await self._catch_up(host.catch_up)
            await self._stop.wait()
        return host.turns.live

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            self._say(Line(alive=True), must=False)

    async def _catch_up(self, catch_up: Any) -> None:
        """Once the others are told of this worker: what they were told before, it has to look up."""
        known, stop = asyncio.ensure_future(self._known.wait()), asyncio.ensure_future(self._stop.wait())
        await asyncio.wait({known, stop}, return_when=asyncio.FIRST_COMPLETED)
        known.cancel()
        stop.cancel()
        try:
            await catch_up()
        except HotdeskError as exc:
            get_log().warning("commands_not_caught_up", problem=str(exc))

    # -- with the supervisor ---------------------------------------------------------------------------------

    def _say(self, line: Line, *, must: bool = True) -> None:
        if self._writer.is_closing():
            return
        if must or self._writer.transport.get_write_buffer_size() < MAX_UNSENT:
            self._writer.write(encode_line(line))

    def _tell_event(self, event: dict[str, Any]) -> None:
        self._say(Line(event=event), must=False)

    async def _hear(self, reader: asyncio.StreamReader) -> None:
        """Do as the supervisor says; when it is gone, stop."""
        try:
            while data := await reader.readline():
                try:
                    self._heard(decode_line(data))
                except msgspec.DecodeError as exc:
                    get_log().error("order_not_understood", problem=str(exc))
        except (OSError, ValueError) as exc:
            get_log().error("supervisor_lost", problem=str(exc))
        else:
            get_log().error("supervisor_lost", problem="it is gone; what is under way is finished")
        self._seat.departure.hurry()
        self._stop.set()

    def _heard(self, line: Line) -> None:
        if line.event is not None:
            self._siblings.hear(line.event)
        elif line.state is not None:
            self._siblings.state = line.state
            if any(row.name == self._orders.name and row.state == "ready" for row in line.state.workers):
                self._known.set()
        elif line.buried:
            get_log().info("worker_buried", name=line.buried)
            for hear in self._seat.on_buried:
                hear(line.buried)
        elif line.leave or line.stop:
            if line.stop:
                self._seat.departure.hurry()
            self._stop.set()
        elif line.id and (answer := self._answers.pop(line.id, None)) is not None and not answer.done():
            answer.set_result(line.answer)

    async def _ask(self, line: Line) -> Any:
        """Raises `TimeoutError` when the supervisor does not answer."""
        self._count = id = self._count + 1
        answer = self._answers[id] = asyncio.get_running_loop().create_future()
        try:
            self._say(msgspec.structs.replace(line, id=id))
            async with asyncio.timeout(ANSWER_S):
                return await answer
        finally:
            self._answers.pop(id, None)

    async def _number(self, plugin: str, digest: str, after: int, known: int) -> int:
        try:
            return int(await self._ask(Line(number=NumberAsked(plugin, digest, after, known))))
        except TimeoutError:
            get_log().error("supervisor_silent", plugin=plugin, remedy="its generation may be numbered unlike others")
            return known + 1

    async def _restart(self) -> dict[str, Any]:
        answer: dict[str, Any] = await self._ask(Line(restart=True))
        return answer


if __name__ == "__main__":
    main()
