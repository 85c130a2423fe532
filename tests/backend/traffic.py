"""Appends in many conversations, many at once, while servers come and go; and a judge of what became of them."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from tests.backend.worker import Answering, Worker
from tests.redis_servers import RedisServer

from conftest import wait_until
from hotdesk.backend import StoredReply
from hotdesk.errors import BackendUnavailable
from hotdesk_sdk import Message

__all__ = ["Traffic", "clients_of"]

AT_ONCE = 5
"""What one conversation asks for in one moment."""

PAUSE_S = 0.1
"""Between two such moments: fifty conversations are 2,000 messages a second or so."""

RETRY_S = 0.02


async def clients_of(server: RedisServer) -> int:
    """How many connections of backends there are at *server*: those that run scripts, or hear of what is said."""
    listed = str(await server.command("CLIENT", "LIST")).splitlines()
    return sum(any(f" cmd={name}" in client for name in ("evalsha", "wait", "ssubscribe")) for client in listed)


@dataclass
class Ask:
    """One append that was asked for, with what came of it; `seq` 0 for one that failed."""

    number: int
    id: str
    seq: int = 0
    duplicate: bool = False
    problem: BackendUnavailable | None = None
    done_at: float = 0.0


@dataclass
class Said:
    """One conversation's asks, in the order of asking; those that failed are asked for again until they succeed."""

    conversation: str
    asks: list[Ask] = field(default_factory=list)


class Traffic:
    """Keeps *names* speaking until `finish`, each at least *least* messages; every message is answered with a reply."""

    def __init__(self, worker: Worker, names: Iterable[str], *, least: int = 40) -> None:
        self.worker = worker
        self.said = {name: Said(name) for name in names}
        self._least = least
        self._enough = False
        self._answering = Answering(worker)
        self._tasks = [asyncio.ensure_future(self._speak(said)) for said in self.said.values()]

    @property
    def asks(self) -> list[Ask]:
        return [ask for said in self.said.values() for ask in said.asks]

    @property
    def problems(self) -> list[BackendUnavailable]:
        """Why asks failed."""
        return [ask.problem for ask in self.asks if ask.problem is not None]

    def successes(self, since: float = 0.0, *, of: Callable[[str], bool] = lambda name: True) -> list[float]:
        """When asks succeeded, after *since*, in the conversations *of*."""
        return sorted(
            ask.done_at
            for name, said in self.said.items()
            if of(name)
            for ask in said.asks
            if ask.seq and ask.done_at > since
        )

    async def _speak(self, said: Said) -> None:
        made = 0
        while made < self._least or not self._enough:
            ids = [f"{said.conversation}-{made + n}" for n in range(AT_ONCE)]
            made += AT_ONCE
            while ids:
                asks = [Ask(len(said.asks) + n, id) for n, id in enumerate(ids)]
                said.asks += asks
                await asyncio.gather(*(self._ask(said.conversation, ask) for ask in asks))
                ids = [ask.id for ask in asks if not ask.seq]
                if ids:
                    await asyncio.sleep(RETRY_S)
            await asyncio.sleep(PAUSE_S)

    async def _ask(self, conversation: str, ask: Ask) -> None:
        try:
            appended = await self.worker.append(conversation, ask.id)
            ask.seq, ask.duplicate = appended.seq, appended.duplicate
        except BackendUnavailable as exc:
            ask.problem = exc
        ask.done_at = time.monotonic()

    async def wait_spoken(self, more: int) -> None:
        """Wait until *more* asks have succeeded than have by now."""
        wanted = len(self.successes()) + more
        await wait_until(lambda: len(self.successes()) >= wanted, f"{more} more messages are kept")

    async def finish(self) -> None:
        """Say no more; wait until all that was said is kept, and its turn has ended."""
        self._enough = True
        await asyncio.gather(*self._tasks)

        async def are_ended() -> bool:
            return not await self.worker.backend.unfinished()

        await wait_until(are_ended, "all turns have ended")

    async def aclose(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._answering.aclose()

    async def judge(self, reader: Worker) -> None:
        """Every message is in the journal once and where it was said to be, in the order of asking, with one reply."""
        for name, said in self.said.items():
            entries = await reader.backend.read(name, 0, 100_000) or []
            assert [entry.seq for entry in entries] == list(range(1, len(entries) + 1))
            messages = {entry.id: entry.seq for entry in entries if isinstance(entry, Message)}
            assert Counter(messages.keys()) == Counter(entry.id for entry in entries if isinstance(entry, Message))
            kept = [ask for ask in said.asks if ask.seq]
            assert {ask.id: ask.seq for ask in kept} == messages
            fresh = [ask.seq for ask in kept if not ask.duplicate]
            assert fresh == sorted(fresh), f"{name} is not in the order of asking"
            answered = Counter(entry.to for entry in entries if isinstance(entry, StoredReply))
            wrong = {id: answered[id] for id in {*messages, *answered} if answered[id] != 1}
            assert not wrong, f"{name}: replies that are not one: {wrong}"
