"""What one completion of a 12-message prompt costs the host: message in over HTTP, reply stored in SQLite.

Beside it the same bot written with `openai` on bare aiohttp, which stores nothing. The desk's bot is the bundled
`chatgpt`: it always streams, and offers its tool `hand_over`, which the bare bot is spared. The prompt is built from a
live conversation of five exchanges whose sixth is measured: the system's words, ten entries, the message. 32
conversations are under way at once, so that commits are shared as they are in service.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from itertools import count
from statistics import median

from tests.load.client import request_bytes
from tests.load.desk import message_body, message_request
from tests.load.hosts import Server
from tests.load.llm_bare import EXCHANGES, TEXT
from tests.load.llm_client import send_all
from tests.load.llm_model import canned_text
from tests.load.llm_servers import read_stats, running_bot, running_desk, running_model
from tests.load.report import Figure, run_main

__all__ = ["measure"]

AT_ONCE = 32
PROMPT = 2 + 2 * EXCHANGES
CHUNKS = 20
MOST_MS = 0.9
LEAST_TIMES = 3.0
numbers = count()


class Costs:
    """CPU of one server a completion, and what went wrong."""

    def __init__(self) -> None:
        self.ms: list[float] = []
        self.failed = 0
        self.messages = 0.0


async def measure(short: bool) -> list[Figure]:
    """Alternate the desk and the bare bot in rounds, for answers of one chunk and of twenty."""
    rounds, turns = (1, 100) if short else (5, 500)
    streamed, whole, bare_stream, bare_whole = Costs(), Costs(), Costs(), Costs()
    async with AsyncExitStack() as stack:
        model = await stack.enter_async_context(running_model())
        one, many = (f"http://127.0.0.1:{model.port}/{tokens}/0/v1" for tokens in (1, CHUNKS))
        desk_one = await stack.enter_async_context(running_desk("llm-cost-one", one))
        desk_many = await stack.enter_async_context(running_desk("llm-cost-many", many))
        bot = await stack.enter_async_context(running_bot(many))
        for number in range(rounds + 1):
            size = turns if number else turns // 2  # the first round warms up
            for desk, costs, tokens in ((desk_one, whole, 1), (desk_many, streamed, CHUNKS)):
                names = [f"c{number}-{n}" for n in range(size)]
                for _ in range(EXCHANGES):
                    await send_all(desk.port, asked(names), is_reply(tokens), connections=AT_ONCE)
                await one_round(desk, model, asked(names), tokens, costs, counted=number > 0)
            for path, costs in (("/stream", bare_stream), ("/whole", bare_whole)):
                request = request_bytes("POST", path, message_body("m", TEXT))
                await one_round(bot, model, iter([request] * size), CHUNKS, costs, counted=number > 0)
    cost = {name: median(costs.ms) for name, costs in
            (("one", whole), ("many", streamed), ("stream", bare_stream), ("create", bare_whole))}  # fmt: skip
    everyone = (whole, streamed, bare_stream, bare_whole)
    return [
        Figure("a completion, answered in one chunk", cost["one"], "ms of CPU", at_most=MOST_MS),
        Figure(f"a completion, answered in {CHUNKS} chunks", cost["many"], "ms of CPU", at_most=MOST_MS),
        Figure("create() on bare aiohttp", cost["create"], "ms of CPU"),
        Figure(f"create(stream=True) on bare aiohttp, {CHUNKS} chunks", cost["stream"], "ms of CPU"),
        Figure("create() beside one chunk", cost["create"] / cost["one"], "times", at_least=LEAST_TIMES),
        Figure(f"create() beside {CHUNKS} chunks", cost["create"] / cost["many"], "times", at_least=LEAST_TIMES),
        Figure(f"create(stream=True) beside {CHUNKS} chunks", cost["stream"] / cost["many"], "times",
               at_least=LEAST_TIMES),
        Figure("messages in a prompt, fewest", min(costs.messages for costs in everyone), at_least=PROMPT),
        Figure("messages in a prompt, most", max(costs.messages for costs in everyone), at_most=PROMPT),
        Figure("failed", sum(costs.failed for costs in everyone), at_most=0),
    ]  # fmt: skip


async def one_round(
    server: Server, model: Server, requests: Iterator[bytes], tokens: int, costs: Costs, *, counted: bool
) -> None:
    """Send the requests and book the CPU that they cost."""
    stats, before = await read_stats(model), server.usage().cpu_s
    load = await send_all(server.port, requests, is_reply(tokens), connections=AT_ONCE)
    spent, after = server.usage().cpu_s - before, await read_stats(model)
    costs.failed += load.failed
    if counted:
        costs.ms.append(spent / max(1, load.answered) * 1000)
        costs.messages = (after.messages - stats.messages) / max(1, after.requests - stats.requests)


def asked(conversations: list[str]) -> Iterator[bytes]:
    """One message to each conversation."""
    return (message_request(name, f"m{next(numbers)}", TEXT) for name in conversations)


def is_reply(tokens: int) -> Callable[[int, bytes], bool]:
    """Whether an answer has the whole text of *tokens* in it."""
    whole = f'"{canned_text(tokens)}"'.encode()
    return lambda status, body: status == 200 and whole in body


if __name__ == "__main__":
    run_main(measure)
