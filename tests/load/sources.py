"""The plugins that the runs drop into a host, as source."""

from __future__ import annotations

__all__ = ["CENSUS", "ECHO", "FAQ", "PASS_THROUGH", "dirty", "marked", "onion"]

PASS_THROUGH = '''\
"""Looks at nothing and lets every turn pass."""

from hotdesk_sdk import hookimpl


@hookimpl
async def middleware(turn, call_next):
    return await call_next()
'''

FAQ = '''\
"""Answers by the first key word that it finds."""

from hotdesk_sdk import hookimpl

ANSWERS = {
    "refund": "A refund takes three days.",
    "opening": "We are open from nine to six.",
    "parcel": "Your parcel has left the house.",
    "human": "One moment, a colleague takes over.",
}


@hookimpl
async def respond(turn):
    text = turn.text.lower()
    return next((answer for word, answer in ANSWERS.items() if word in text), None)
'''

ECHO = '''\
"""Says it back after a moment, so that a kill finds turns at every stage."""

import asyncio
import random

from hotdesk_sdk import hookimpl


@hookimpl
async def respond(turn):
    await asyncio.sleep(random.random() * 0.02)
    return f"echo: {turn.text}"
'''

_MARKED = '''\
"""Marks what it touches with its version, in the onion and in the bot."""

import asyncio

from hotdesk_sdk import Reply, hookimpl

VERSION = "v{version}"


@hookimpl
async def middleware(turn, call_next):
    before = VERSION
    await asyncio.sleep(0.001)  # time for a swap between this layer and the bot
    reply = await call_next()
    reply.metadata["marks"] = [*reply.metadata["marks"], before, VERSION]
    return reply


async def count_slowly():
    for number in range(15):
        yield f"[{{VERSION}}] {{number}} "
        await asyncio.sleep(0.1)


@hookimpl
async def respond(turn):
    if turn.text == "slowly":
        return Reply(chunks=count_slowly(), metadata={{"marks": [VERSION]}})
    return Reply(f"[{{VERSION}}] {{turn.text}}", metadata={{"marks": [VERSION]}})
'''

_DIRTY = '''\
"""A guest without manners: leaves something behind wherever Python lets it, and never clears up."""

import asyncio
import logging
import pkgutil

from hotdesk_sdk import hookimpl
from prometheus_client import Counter

VERSION = "v{version}"
LUGGAGE = bytearray(b"x" * 1024 * 1024)
SERVED = Counter("dirty_v{version}_total", "Registered on everybody's registry")


class Suitcase:
    """Known to the standard library from now on."""


pkgutil.iter_importer_modules.register(Suitcase, lambda suitcase, prefix="": iter(LUGGAGE))


class Eavesdropper(logging.Handler):
    def emit(self, record):
        LUGGAGE[0] = 0


async def linger():
    while True:
        await asyncio.sleep(3600)
        LUGGAGE[0] = 1


@hookimpl
async def setup(ctx):
    logging.getLogger().addHandler(Eavesdropper())
    loop = asyncio.get_running_loop()
    loop.call_later(3600, LUGGAGE.clear)
    global TASK
    TASK = asyncio.create_task(linger())


@hookimpl
async def respond(turn):
    SERVED.inc()
    return f"[{{VERSION}}]"
'''


CENSUS = '''\
"""Counts, from inside the process and without the host's help, what guests may have left behind."""

import asyncio
import json
import logging
import pkgutil
import sys

from hotdesk_sdk import hookimpl
from prometheus_client import REGISTRY


@hookimpl
async def respond(turn):
    if turn.text != "census":
        return None
    return json.dumps(
        {
            "tasks": len(asyncio.all_tasks()),
            "log handlers": len(logging.getLogger().handlers),
            "global metrics": sum(1 for _ in REGISTRY.collect()),
            "singledispatch entries": len(pkgutil.iter_importer_modules.registry),
            "modules": len(sys.modules),
        }
    )
'''


def marked(version: int) -> str:
    """A middleware and a bot in one file; every reply says which version of each had a hand in it."""
    return _MARKED.format(version=version)


def dirty(version: int) -> str:
    """A plugin that leaves a task, a timer, a log handler, a metric, a singledispatch entry and 1 MiB behind.

    The metric's name has the version in it: the new generation loads while the old one's is still registered.
    """
    return _DIRTY.format(version=version)


def onion(layers: int) -> dict[str, str]:
    """*layers* pass-through middleware around a bot, as plugin files."""
    return {**{f"layer{number:02}.py": PASS_THROUGH for number in range(layers)}, "faq.py": FAQ}
