"""The desk with a language model under full load: text, images, dialogue, beside a model server that answers at once.

nginx gives canned answers, streamed to the desk, whose bot is the bundled `chatgpt`; one host process, nginx and the
load share the cores. 100 visitors are there at once, each asks again when it was answered. A text or an image opens a
conversation of its own. An image is a JPEG of about 30 KiB, uploaded with each message: one that no other message has,
so that each is checked, stored, flushed to disk and sent on; and the same one each time, which is stored once. In the
dialogue each conversation goes on for 20 turns, with all of it in the prompt.

Beside each row the bare bot on aiohttp and `openai`'s `create()`, which stores nothing, with nginx's whole answers.
"""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import count
from typing import Literal

from PIL import Image, ImageFilter
from tests.load.client import Load, closed_loop, request_bytes
from tests.load.desk import Desk, message_target
from tests.load.hosts import Server
from tests.load.llm_bare import TEXT
from tests.load.llm_model import canned_text
from tests.load.llm_servers import running_bot, running_desk
from tests.load.nginx import TOKENS, running_nginx
from tests.load.report import Figure, run_main

__all__ = ["measure"]

VISITORS = 100
TURNS = 20

Requests = Callable[[int, int], bytes]


@dataclass(frozen=True, slots=True)
class Row:
    """What is asked, and what the desk should reach."""

    name: str
    picture: Literal["", "own", "same"]
    turns: int
    rate: float
    mean_ms: float
    p99_ms: float

    @property
    def key(self) -> str:
        """For names of conversations."""
        return self.name.replace(" ", "-")


ROWS = (
    Row("text", "", 1, 1423, 68, 213),
    Row("new image", "own", 1, 892, 112, 345),
    Row("same image", "same", 1, 892, 112, 345),
    Row("dialogue", "", TURNS, 647, 154, 402),
)


async def measure(short: bool) -> list[Figure]:
    """Row by row: the desk, and then the bare bot."""
    seconds, warm_up_s = (1.0, 0.5) if short else (15.0, 1.0)
    figures: list[Figure] = []
    numbers = count()
    async with AsyncExitStack() as stack:
        nginx = await stack.enter_async_context(running_nginx())
        url = f"http://127.0.0.1:{nginx.port}"
        desk = await stack.enter_async_context(running_desk("llm-rows", f"{url}/stream/v1"))
        bot = await stack.enter_async_context(running_bot(f"{url}/whole/v1"))
        for row in ROWS:
            picture = jpeg() if row.picture else None
            for server, other in ((desk, False), (bot, True)):
                asked = requests("warm-" + row.key, "/talk/{}" if other else None, row, picture, numbers)
                await loaded(server, asked, warm_up_s)
            asked = requests(row.key, None, row, picture, numbers)
            load, cores = await with_cores(desk, nginx, loaded(desk, asked, seconds))
            broken = await broken_records(desk, row)
            asked = requests(row.key, "/talk/{}", row, picture, numbers)
            bare = await loaded(bot, asked, max(1.0, seconds / 2))
            figures += [
                Figure(f"{row.name}: questions answered", load.rate, "turns/s", at_least=row.rate),
                Figure(f"{row.name}: mean", mean_ms(load), "ms", at_most=row.mean_ms),
                Figure(f"{row.name}: p99", load.percentile_ms(99), "ms", at_most=row.p99_ms),
                *(Figure(f"{row.name}: {who}", busy, "cores") for who, busy in cores.items()),
                Figure(f"{row.name}: create() on bare aiohttp", bare.rate, "turns/s"),
                Figure(f"{row.name}: its mean", mean_ms(bare), "ms"),
                Figure(f"{row.name}: its p99", bare.percentile_ms(99), "ms"),
                Figure(f"{row.name}: failed", load.failed + bare.failed, at_most=0),
                Figure(f"{row.name}: conversations with a turn lost, doubled or out of order", broken, at_most=0),
            ]
    return figures


async def loaded(server: Server, asked: Requests, seconds: float) -> Load:
    return await closed_loop(server.port, asked, is_answered, connections=VISITORS, seconds=seconds)


async def with_cores(desk: Server, nginx: Server, load: Awaitable[Load]) -> tuple[Load, dict[str, float]]:
    """A load, and how many cores each of those who took part kept busy meanwhile."""

    def spent() -> tuple[float, float, float]:
        return desk.usage().cpu_s, nginx.usage().cpu_s, time.process_time()

    began, before = time.perf_counter(), spent()
    done = await load
    took = time.perf_counter() - began
    shares = [(after - first) / took for first, after in zip(before, spent(), strict=True)]
    return done, dict(zip(("host", "nginx", "load generator"), shares, strict=True))


def mean_ms(load: Load) -> float:
    return sum(load.latencies_s) / max(1, load.answered) * 1000


def requests(name: str, path: str | None, row: Row, picture: bytes | None, numbers: count[int]) -> Requests:
    """Each visitor's next message, `row.turns` of them a conversation; *path* is of a bot that is not the desk."""

    def request(visitor: int, n: int) -> bytes:
        conversation = f"{name}-{visitor}-{n // row.turns}"
        target = message_target(conversation, wait=True) if path is None else path.format(conversation)
        number = next(numbers)
        body = b'{"id":"m%d","text":"%b"' % (number, TEXT.encode())
        if picture is not None:
            body += b',"attachments":[{"type":"image","mime":"image/jpeg","data":"%b"}]' % (
                own(picture, number) if row.picture == "own" else own(picture, 0)
            )
        return request_bytes("POST", target, body + b"}")

    return request


def jpeg() -> bytes:
    """A photograph of nothing, about 30 KiB of it."""
    noise = Image.effect_noise((640, 480), 90).convert("RGB").filter(ImageFilter.GaussianBlur(1.5))
    buffer = io.BytesIO()
    noise.save(buffer, "JPEG", quality=50)
    return buffer.getvalue()


def own(picture: bytes, number: int) -> bytes:
    """*picture* as base64, with a comment in it that makes it another file."""
    comment = b"%016d" % number
    segment = b"\xff\xfe" + (len(comment) + 2).to_bytes(2) + comment
    return base64.b64encode(picture[:2] + segment + picture[2:])


def is_answered(status: int, body: bytes) -> bool:
    """Whether the model's whole text came as the reply."""
    return status == 200 and WHOLE in body.replace(b'": "', b'":"')


async def broken_records(server: Server, row: Row) -> int:
    """Of each visitor's first conversation, how many records do not have each message and then its reply."""
    desk = Desk(server)
    broken = 0
    try:
        for visitor in range(VISITORS):
            entries = await desk.read_record(f"{row.key}-{visitor}-0", time.monotonic())
            kinds = [entry.type for entry in entries]
            told = [entry.to for entry in entries[1::2]] == [entry.id for entry in entries[0::2]]
            whole = all(entry.text == canned_text(TOKENS) for entry in entries[1::2])
            in_order = [entry.seq for entry in entries] == list(range(1, len(entries) + 1))
            paired = kinds == ["message", "reply"] * (len(entries) // 2) and len(entries) > 0
            broken += not (told and whole and in_order and paired and len(entries) <= 2 * row.turns)
    finally:
        desk.close()
    return broken


WHOLE = f'"text":"{canned_text(TOKENS)}"'.encode()

if __name__ == "__main__":
    run_main(measure)
