"""The visitors of the language-model runs: messages over HTTP that wait for their reply, and WebSockets that read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from time import perf_counter

from tests.load.client import HttpConnection, Load, hold_gc

__all__ = ["send_all"]

ANSWERED_WITHIN_S = 120.0


async def send_all(
    port: int, requests: Iterable[bytes], accept: Callable[[int, bytes], bool], *, connections: int
) -> Load:
    """Send every request, each connection its next when the last was answered; *accept* judges an answer."""
    loop = asyncio.get_running_loop()
    load = Load()
    left = iter(requests)
    under_way: dict[HttpConnection, float] = {}
    finished = loop.create_future()

    def send(connection: HttpConnection) -> None:
        request = next(left, None)
        if request is not None:
            under_way[connection] = perf_counter()
            connection.transport.write(request)
        elif not under_way and not finished.done():
            finished.set_result(None)

    def answered(connection: HttpConnection, status: int, body: bytes) -> None:
        seconds = perf_counter() - under_way.pop(connection)
        if accept(status, body):
            load.latencies_s.append(seconds)
        else:
            load.failures[f"{status} {body[:200].decode(errors='replace')}"] += 1
        send(connection)

    def lost(connection: HttpConnection) -> None:
        if under_way.pop(connection, None) is not None:
            load.failures["connection lost"] += 1
            if not under_way and not finished.done():
                finished.set_result(None)

    opened = [
        (await loop.create_connection(lambda: HttpConnection(answered, lost), "127.0.0.1", port))[1]
        for _ in range(connections)
    ]
    with hold_gc():
        began = perf_counter()
        for connection in opened:
            send(connection)
        async with asyncio.timeout(ANSWERED_WITHIN_S):
            await finished
    load.seconds = perf_counter() - began
    for connection in opened:
        connection.transport.abort()
    return load
