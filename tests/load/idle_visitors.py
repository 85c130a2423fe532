"""12,000 visitors who say nothing, on WebSockets: what each costs, and what turns beside them notice."""

from __future__ import annotations

import asyncio
import resource

from tests.load.client import open_loop
from tests.load.hosts import Server, running_bare, running_host
from tests.load.http_rate import is_answered_nth, turn_requests
from tests.load.report import Figure, run_main
from tests.load.sockets import WebSocket, open_socket
from tests.load.sources import onion

__all__ = ["measure"]

# A quarter of the visitors from each address: one address has 28,000 ports, and earlier runs hold some of them.
SOURCES = tuple(f"127.0.0.{number}" for number in range(2, 6))
AT_ONCE = 100
RATE = 500


async def measure(short: bool) -> list[Figure]:
    """Bare aiohttp first, then the host, each alone with the visitors."""
    # Long enough to see whatever a host does for every visitor each half minute.
    visitors, seconds = (1_000, 4.0) if short else (12_000, 45.0)
    allow_descriptors(visitors + 1_000)
    async with running_bare() as bare:
        bare_kib, sockets = await seat_visitors(bare, "/ws?conversation=idle-{}", visitors)
        dismiss(sockets)
    async with running_host("idle", onion(3)) as host:
        asked = turn_requests()

        async def turns(length: float) -> tuple[float, float, int]:
            load = await open_loop(host.port, lambda n: asked(n % 64, n), is_answered_nth, rate=RATE, seconds=length)
            return load.percentile_ms(50), load.percentile_ms(99), load.failed

        await turns(3.0)
        host_kib, sockets = await seat_visitors(host, "/v1/ws?conversation=idle-{}", visitors)
        p50, p99, failed = await turns(seconds)
        gone = sum(socket.closed is not None for socket in sockets)
        dismiss(sockets)
    return [
        Figure("visitors", visitors),
        Figure("bare aiohttp, a visitor", bare_kib, "KiB"),
        Figure("host, a visitor", host_kib, "KiB", at_most=16),
        Figure(f"p50 at {RATE}/s beside them", p50, "ms"),
        Figure(f"p99 at {RATE}/s beside them", p99, "ms", at_most=100),
        Figure("visitors turned away", gone, at_most=0),
        Figure("failed", failed, at_most=0),
    ]


def allow_descriptors(count: int) -> None:
    """Raise the soft limit for this process and its children; says what is missing where the hard one is lower."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        raise RuntimeError(f"this run needs {count} open files; the hard limit is {hard} (ulimit -Hn)")
    if soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def seat_visitors(server: Server, target: str, count: int) -> tuple[float, list[WebSocket]]:
    """Connect *count* visitors; return what the server's memory grew by for each, in KiB, and their sockets."""
    # The first connections pay for buffers and code that all share.
    dismiss(await connect(server, target, range(count, count + 200)))
    await asyncio.sleep(1.0)
    before = server.usage().rss_bytes
    sockets = await connect(server, target, range(count))
    await asyncio.sleep(2.0)
    return (server.usage().rss_bytes - before) / 1024 / count, sockets


async def connect(server: Server, target: str, numbers: range) -> list[WebSocket]:
    """Open a socket for each of *numbers*, some at once."""
    sockets: list[WebSocket] = []
    for start in range(0, len(numbers), AT_ONCE):
        batch = numbers[start : start + AT_ONCE]
        sockets += await asyncio.gather(
            *(open_socket(server.port, target.format(n), ignore, source=SOURCES[n % len(SOURCES)]) for n in batch)
        )
    return sockets


def ignore(socket: WebSocket, text: bytes) -> None:
    """A visitor who does not listen."""


def dismiss(sockets: list[WebSocket]) -> None:
    """Close them all, without ceremony."""
    for socket in sockets:
        socket.transport.abort()


if __name__ == "__main__":
    run_main(measure)
