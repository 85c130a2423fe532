"""HTTP turns a second beside a bare aiohttp JSON echo: both ways committed, through three middleware and a bot.

Twice: by the lean generator of this folder, beside which the server is all that costs, and by aiohttp's own client,
which takes a good part of the two cores itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import count
from statistics import median
from time import perf_counter

import aiohttp
from tests.load.client import closed_loop, open_loop, request_bytes
from tests.load.desk import message_body, message_request
from tests.load.hosts import running_bare, running_host
from tests.load.report import Figure, run_main
from tests.load.sources import onion

__all__ = ["measure"]

CONNECTIONS = 64
CONVERSATIONS_A_CONNECTION = 16
TEXT = "Hello, when will I get my refund? The order is number 4711."
OPEN_RATE = 1423


async def measure(short: bool) -> list[Figure]:
    """Alternate bare and host in rounds and compare the medians, so that a busy neighbour meets both."""
    rounds, seconds = (2, 1.5) if short else (5, 6.0)
    bare_rates: list[float] = []
    host_rates: list[float] = []
    bare_own: list[float] = []
    host_own: list[float] = []
    failed = 0
    async with running_bare() as bare, running_host("http-rate", onion(3)) as host:
        asked = turn_requests()
        for number in range(rounds + 1):
            for server, request, accept, rates in (
                (bare, echo_request, is_ok, bare_rates),
                (host, asked, is_answered, host_rates),
            ):
                load = await closed_loop(
                    server.port, request, accept, connections=CONNECTIONS, seconds=seconds if number else 1.0
                )
                failed += load.failed
                if number:  # the first round warms both up
                    rates.append(load.rate)
            if number:
                bare_own.append(await own_client(f"http://127.0.0.1:{bare.port}/echo", seconds))
                host_own.append(
                    await own_client(
                        f"http://127.0.0.1:{host.port}/v1/conversations/own{{n}}/messages?wait=10", seconds
                    )
                )
        paced = await open_loop(
            host.port, lambda n: asked(n % CONNECTIONS, n), is_answered_nth, rate=OPEN_RATE, seconds=seconds * 2
        )
    ratio = median(host_rates) / median(bare_rates) * 100
    return [
        Figure("bare JSON echo", median(bare_rates), "requests/s"),
        Figure("turns", median(host_rates), "turns/s"),
        Figure("turns beside the bare echo", ratio, "%", at_least=55),
        Figure("bare JSON echo, aiohttp's client", median(bare_own), "requests/s"),
        Figure("turns, aiohttp's client", median(host_own), "turns/s"),
        Figure("the one to the other", median(host_own) / median(bare_own) * 100, "%", at_least=55),
        Figure(f"p50 at {OPEN_RATE:,}/s", paced.percentile_ms(50), "ms"),
        Figure(f"p99 at {OPEN_RATE:,}/s", paced.percentile_ms(99), "ms", at_most=60),
        Figure("failed", failed + paced.failed, at_most=0),
    ]


async def own_client(url: str, seconds: float) -> float:
    """Requests a second by aiohttp's client on as many connections, each waiting for its answer."""
    answered = 0
    deadline = perf_counter() + seconds
    connector = aiohttp.TCPConnector(limit=CONNECTIONS)
    async with aiohttp.ClientSession(connector=connector) as session:

        async def one_after_the_other(number: int) -> None:
            nonlocal answered
            own = url.format(n=number)
            while perf_counter() < deadline:
                async with session.post(own, json={"text": TEXT}) as response:
                    await response.json()
                    answered += response.status == 200

        await asyncio.gather(*(one_after_the_other(number) for number in range(CONNECTIONS)))
    return answered / seconds


def turn_requests() -> Callable[[int, int], bytes]:
    """Requests of ever new messages; each connection goes round conversations of its own."""
    numbers = count()

    def request(connection: int, n: int) -> bytes:
        conversation = f"c{connection}-{n % CONVERSATIONS_A_CONNECTION}"
        return message_request(conversation, f"m{next(numbers)}", TEXT)

    return request


def visitor_requests() -> Callable[[int, int], bytes]:
    """Requests of ever new messages; each connection is one visitor's, in one conversation."""
    numbers = count()
    return lambda connection, n: message_request(f"v{connection}", f"m{next(numbers)}", TEXT)


def echo_request(connection: int, n: int) -> bytes:
    """The same body as a turn's, for the bare echo."""
    return request_bytes("POST", "/echo", message_body(f"m{n}", TEXT))


def is_ok(status: int, body: bytes) -> bool:
    """Whether the bare echo answered."""
    return status == 200


def is_answered(status: int, body: bytes) -> bool:
    """Whether the turn ended, with a reply by a plugin."""
    return status == 200 and b'"generation"' in body


def is_answered_nth(n: int, status: int, body: bytes) -> bool:
    """`is_answered` as the open loop wants it."""
    return is_answered(status, body)


if __name__ == "__main__":
    run_main(measure)
