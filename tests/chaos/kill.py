"""SIGKILL at random moments under load: nothing that was accepted is lost, and nobody gets two answers.

Each sender has a conversation of its own and sends one message after the other, some waiting for the reply and
some only for `accepted`. A message without an answer is sent again with the same id, as a client must, or given up.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from time import perf_counter

from tests.load.checker import judge
from tests.load.client import ConnectionLost, HttpClient
from tests.load.desk import Desk, message_body, message_target, note_taken, read_taken
from tests.load.history import History, Sent
from tests.load.hosts import OUT, Server, host_on, work_folder
from tests.load.report import Figure, judged, run_main
from tests.load.sources import ECHO, PASS_THROUGH

__all__ = ["measure"]

SENDERS = 24
GIVE_UP = 0.2
SETTLE_S = 20.0


@dataclass(slots=True)
class _Senders:
    """The visitors. `paused` is cleared while there is no host to talk to, to spare the restart their attempts."""

    server: Server
    history: History = field(default_factory=History)
    over: bool = False

    async def run(self, number: int) -> None:
        client, conversation, n = HttpClient(self.server.port), f"k{number}", 0
        while not self.over:
            n += 1
            wait = number % 2 == 0
            while not await self._send(client, conversation, f"{conversation}-{n}", wait) and not self.over:
                if random.random() < GIVE_UP:
                    break
                await asyncio.sleep(0.02)
            if not wait:
                # Faster than the bot, so that a queue is there to be killed, and not so fast that it never ends.
                await asyncio.sleep(random.random() * 0.02)
        client.close()

    async def _send(self, client: HttpClient, conversation: str, id: str, wait: bool) -> bool:
        """One try; True when the host took the message."""
        self.history.add(Sent(conversation=conversation, id=id, time=perf_counter()))
        try:
            target = message_target(conversation, wait=wait)
            answer = await client.request("POST", target, message_body(id, f"message {id}"))
        except ConnectionLost:
            return False
        if answer.status not in (200, 202):
            return False
        note_taken(self.history, read_taken(answer.body), perf_counter())
        return True


async def measure(short: bool) -> list[Figure]:
    """Kill and start again on the same data folder; at the end read the record back and judge."""
    kills, up_s = (4, 1.0) if short else (50, 3.0)
    ready: list[float] = []
    with work_folder("kill") as folder:
        server = host_on(folder, {"echo.py": ECHO, "layer.py": PASS_THROUGH})
        await server.start()
        senders = _Senders(server)
        async with asyncio.TaskGroup() as group:
            for number in range(SENDERS):
                group.create_task(senders.run(number))
            for _ in range(kills):
                await asyncio.sleep(random.random() * up_s)
                await server.kill()
                ready.append(await server.start())
            await asyncio.sleep(1.0)
            senders.over = True
        await read_back(server, senders.history)
        await server.stop()
    senders.history.save(OUT / "kill.jsonl")
    verdict = judge(senders.history.events)
    return [
        Figure("kills", kills),
        Figure("sent", verdict.sent),
        Figure("accepted", verdict.accepted),
        Figure("replies", verdict.replies),
        Figure("serving again, median", sorted(ready)[len(ready) // 2], "s"),
        Figure("serving again, max", max(ready), "s", at_most=2),
        *judged(verdict),
    ]


async def read_back(server: Server, history: History) -> None:
    """Put the record into the history, once every message in it has its reply or has had the time for it."""
    desk = Desk(server)
    for number in range(SENDERS):
        began = perf_counter()
        while True:
            record = await desk.read_record(f"k{number}", perf_counter())
            answered = sum(entry.type == "reply" for entry in record)
            if answered * 2 >= len(record) or perf_counter() - began > SETTLE_S:
                break
            await asyncio.sleep(0.1)
        for entry in record:
            history.add(entry)
    desk.close()


if __name__ == "__main__":
    run_main(measure)
