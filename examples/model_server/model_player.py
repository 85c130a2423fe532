"""What became of a request (`Seen`), and the `Player` that writes a plan to its connection."""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from model_plan import Plan
from model_script import MARK, Script

RESET = struct.pack("ii", 1, 0)  # linger for no time: close() sends a reset
WRITE_IN_A_ROW = 256 * 1024  # bytes; then the event loop has its turn
ID_MARK = MARK.encode()


@dataclass(slots=True, eq=False)
class Seen:
    """A request, and what became of it. Times are of the monotonic clock."""

    body: dict[str, Any] | None
    raw: bytes
    headers: Mapping[str, str]  # names in any case
    path: str
    query: Mapping[str, str]
    at: float  # when its body was complete
    connection: int  # the same for requests that came over the same connection
    script: Script = field(default_factory=Script)
    status: int = 0  # of the answer; 0 until its headers are out
    sent: int = 0  # events written, the role's, the usage's and [DONE] among them
    content: int = 0  # content events written
    finished: bool = False  # all that the script had to say is written, and the answer ended
    hung_up: float | None = None  # when the client was seen to close its connection before that
    ended: float | None = None
    clock: float = 0.0  # the time of day at `at`

    def report(self) -> dict[str, Any]:
        """The row of `GET /log`."""
        body = self.body or {}
        became = "answering" if self.ended is None else "finished" if self.finished else "cut"
        return {
            "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.clock)),
            "path": self.path,
            "model": body.get("model"),
            "stream": bool(body.get("stream")),
            "script": self.script.name or "script",
            "status": self.status,
            "sent": self.sent,
            "finished": self.finished,
            "became": "hung up" if self.hung_up is not None else became,
            "hung_up_after_s": None if self.hung_up is None else round(self.hung_up - self.at, 3),
            "took_s": None if self.ended is None else round(self.ended - self.at, 3),
        }


class Player:
    """Plays one plan to one connection: a single timer, and no wake-up of a task until the end.

    It stops at back-pressure (`blocked`) and goes on when it is told to.
    """

    __slots__ = (
        "_at",
        "_due",
        "_ended",
        "_id",
        "_loop",
        "_plan",
        "_protocol",
        "_seen",
        "_timer",
        "_transport",
        "_waiter",
    )

    def __init__(self, request: web.BaseRequest, plan: Plan, seen: Seen, id: bytes) -> None:
        transport = request.transport
        assert transport is not None
        self._loop = asyncio.get_running_loop()
        self._transport = transport
        self._protocol = request.protocol
        self._plan = plan
        self._seen = seen
        self._id = id
        self._at = 0
        self._due = self._loop.time() + plan.steps[0].wait_s
        self._timer: asyncio.Handle | None = None
        self._ended = False
        self._waiter: asyncio.Future[bool] | None = None

    async def play(self) -> bool:
        """Play until the end (True) or until the client takes no more (False): then drain and call again."""
        if self._ended:
            return True
        self._waiter = self._loop.create_future()
        try:
            self._tick()
            return await self._waiter
        finally:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def lose(self) -> None:
        """The connection is gone. Called once, at once."""
        if not self._ended and self._seen.hung_up is None:
            self._seen.hung_up = time.monotonic()
        self._end()

    def abort(self) -> None:
        """Break the connection off, whatever is still to be written."""
        self._ended = True
        self._transport.abort()
        self._end()

    def _end(self) -> None:
        self._ended = True
        self._stop(True)

    def _stop(self, ended: bool) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(ended)

    def _tick(self) -> None:
        """Write what is due, then set the timer for what comes next."""
        self._timer = None
        if self._ended:
            return
        if self._protocol.writing_paused:
            self._stop(False)
            return
        plan, seen, now = self._plan, self._seen, self._loop.time()
        steps, budget = plan.steps, WRITE_IN_A_ROW
        # A timer may fire a clock tick early.
        while self._at < len(steps) and self._due <= now + 0.0005:
            step = steps[self._at]
            self._at += 1
            if step.data:
                self._transport.write(step.data.replace(ID_MARK, self._id))
                if not seen.status:
                    seen.status = plan.status
                seen.sent += step.events
                seen.content += step.content
            if self._at == len(steps):
                break
            self._due += steps[self._at].wait_s
            budget -= len(step.data)
            if plan.paced:
                # Two turns: in the first the loop finds that the reader's socket has something, in the second it reads.
                self._timer = self._loop.call_soon(self._tick_soon)
                return
            if budget < 0 or self._protocol.writing_paused:
                self._tick_soon()
                return
        if self._at < len(steps):
            self._wait(now, self._due)
        else:
            self._finish(now)

    def _tick_soon(self) -> None:
        self._timer = self._loop.call_soon(self._tick)

    def _wait(self, now: float, due: float | None) -> None:
        """Set the timer for *due* (None: never) or for the keep-alive before it, if there is one."""
        every = self._plan.alive_s
        if every and self._at and (due is None or now + every < due):
            self._timer = self._loop.call_at(now + every, self._keep_alive)
        elif due is not None:
            self._timer = self._loop.call_at(due, self._tick)

    def _keep_alive(self) -> None:
        if not self._protocol.writing_paused:
            self._transport.write(self._plan.alive)
        now = self._loop.time()
        self._wait(now, self._due if self._at < len(self._plan.steps) else None)

    def _finish(self, now: float) -> None:
        """All steps are out."""
        plan = self._plan
        if plan.end in ("done", "close", "torn"):
            self._seen.finished = plan.end != "torn"
            self._end()
        elif plan.end == "stall":
            self._wait(now, None)
        elif plan.end == "endless":
            self._transport.write(plan.more)
            self._timer = self._loop.call_later(plan.more_s, self._tick)
        elif self._transport.get_write_buffer_size():
            # What was said before the cut must get out; a loop with a write buffer of its own needs its turn.
            self._timer = self._loop.call_later(0.001, self._tick)
        else:
            if plan.reset:
                self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            self.abort()
