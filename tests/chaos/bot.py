"""The bot that all hosts of a chaos run serve, as source."""

from __future__ import annotations

__all__ = ["CHUNKS", "STREAM", "counting_bot"]

STREAM = "stream"
"""The text of a message that is answered in chunks."""

CHUNKS = 6

_SOURCE = '''\
"""Counts its turns in the conversation's state; says its version in every layer, and which process it runs in."""

import asyncio
import os
import random

from hotdesk_sdk import Reply, hookimpl

VERSION = "v{version}"


@hookimpl
async def middleware(turn, call_next):
    before = VERSION
    await asyncio.sleep(0.001)  # time for a swap between this layer and the bot
    reply = await call_next()
    reply.metadata["marks"] = [*reply.metadata["marks"], before, VERSION]
    return reply


async def speak():
    for number in range({chunks}):
        await asyncio.sleep({pause_s})
        yield f"[{{VERSION}}] {{number}} "


@hookimpl
async def respond(turn):
    state = turn.conversation.state
    count = state["count"] = state.get("count", 0) + 1
    metadata = {{"marks": [VERSION], "count": count, "process": os.getpid()}}
    if turn.text == "{stream}":
        return Reply(chunks=speak(), metadata=metadata)
    await asyncio.sleep(random.random() * {pause_s})  # so that a kill finds turns at every stage
    return Reply(f"[{{VERSION}}] {{count}}", metadata=metadata)
'''


def counting_bot(version: int, *, pause_s: float = 0.03) -> str:
    """A middleware and a bot: what they answer proves which code ran, where, and how often it took effect."""
    return _SOURCE.format(version=version, chunks=CHUNKS, stream=STREAM, pause_s=pause_s)
