"""WebSocket turns a second beside the frames a second of a bare aiohttp WebSocket echo.

Both with 64 connections and 4 messages under way on each. A turn is a message, `accepted` and `reply`: three
frames and two commits against the echo's two frames.
"""

from __future__ import annotations

from functools import partial
from itertools import count
from statistics import median

from tests.load.hosts import running_bare, running_host
from tests.load.http_rate import TEXT
from tests.load.report import Figure, run_main
from tests.load.sockets import socket_loop
from tests.load.sources import onion

__all__ = ["measure"]

CONNECTIONS = 64
IN_FLIGHT = 4


async def measure(short: bool) -> list[Figure]:
    """Alternate bare and host in rounds and compare the medians."""
    rounds, seconds = (2, 1.5) if short else (5, 6.0)
    rates: dict[str, list[float]] = {"bare": [], "host": []}
    failed = 0
    numbers = count()

    def message(connection: int, n: int) -> bytes:
        return b'{"type":"message","id":"m%d","text":"%b"}' % (next(numbers), TEXT.encode())

    async with running_bare() as bare, running_host("ws-rate", onion(3)) as host:
        for number in range(rounds + 1):
            # Each round on conversations of its own, so that none replays what an earlier one left.
            for name, server, target, accept in (
                ("bare", bare, "/ws?conversation=w{}-{}", lambda text: True),
                ("host", host, "/v1/ws?conversation=w{}-{}", end_of_turn),
            ):
                load = await socket_loop(
                    server.port,
                    partial(target.format, number),
                    message,
                    accept,
                    connections=CONNECTIONS,
                    in_flight=IN_FLIGHT,
                    seconds=seconds if number else 1.0,
                )
                failed += load.failed
                if number:  # the first round warms both up
                    rates[name].append(load.rate)
    bare_rate, host_rate = median(rates["bare"]), median(rates["host"])
    return [
        Figure("bare WebSocket echo", bare_rate, "frames/s"),
        Figure("turns", host_rate, "turns/s"),
        Figure("turns beside the bare echo", host_rate / bare_rate * 100, "%", at_least=30),
        Figure("failed", failed, at_most=0),
    ]


def end_of_turn(text: bytes) -> bool | None:
    """True for a reply, False for an error, None for a frame on the way."""
    if b'"accepted"' in text:
        return None
    return b'"generation"' in text


if __name__ == "__main__":
    run_main(measure)
