"""Nothing stands still, and nothing outlives what it was made of: bursts, leavers, clocks, cut replies, summaries."""

from __future__ import annotations

import asyncio
import random
import sqlite3
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from model_server import ModelServer, Script
from tests.llm.asking import settings_of
from tests.llm.raw_server import DONE, END, HEAD, STOP, read_request, said, serving

from conftest import Desk, StartDesk, wait_until
from hotdesk.config import LlmSettings, PluginSettings

PLUGINS = Path(__file__).parents[2] / "plugins"
CHATGPT = {name: (PLUGINS / name).read_text() for name in ("chatgpt.py", "chatgpt.toml")}


def models_at(url: str, **settings: Any) -> LlmSettings:
    return LlmSettings(models={"default": settings_of(url, **settings)}, grant=("chatgpt", "outer"))


def gauge(desk: Desk, name: str) -> float:
    return desk.host.metrics.registry.get_sample_value(name) or 0.0


async def all_ended(desk: Desk) -> None:
    await wait_until(lambda: desk.host.turns.live == 0, "every turn has ended", timeout_s=5)
    await wait_until(lambda: gauge(desk, "hotdesk_llm_open") == 0, "no request is open", timeout_s=5)


# -- a stream that stood still goes on ---------------------------------------------------------------------------------


async def test_bursts_over_what_a_reader_takes_leave_no_turn_standing(start_desk: StartDesk) -> None:
    """Room is made in the very moment in which a stream hears that there is none: it goes on all the same."""
    chance = random.Random(1)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_request(reader)
            writer.write(HEAD)
            for _ in range(25):
                writer.write(said("s"))
                await writer.drain()
                await asyncio.sleep(chance.random() * 0.003)
                writer.write(said("x" * 1000) * 20)
                await writer.drain()
                await asyncio.sleep(chance.random() * 0.003)
            writer.write(STOP + DONE + END)

    async with serving(answer) as url:
        desk = await start_desk(dict(CHATGPT), llm=models_at(url), stop_timeout_s=0.2)

        async def ask(name: int) -> bytes:
            async with desk.http.post(
                f"{desk.url}/v1/conversations/c{name}/messages",
                json={"text": "go"},
                headers={"Accept": "text/event-stream"},
            ) as response:
                return await response.read()

        async with asyncio.timeout(12):
            answers = await asyncio.gather(*(ask(name) for name in range(30)))
        assert all(b"event: done" in answer for answer in answers)
        await all_ended(desk)


async def test_visitors_who_leave_in_a_stream_leave_no_turn_standing(start_desk: StartDesk) -> None:
    """However they go, and in whatever moment: the answer is made to its end, and the model's place is free."""
    chance = random.Random(2)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_request(reader)
            writer.write(HEAD)
            for _ in range(80):
                writer.write(said("s" * 20))
                await writer.drain()
                await asyncio.sleep(0.004)
            writer.write(STOP + DONE + END)

    async with serving(answer) as url:
        desk = await start_desk(dict(CHATGPT), llm=models_at(url), stop_timeout_s=0.2)

        async def visit(number: int) -> None:
            ws = await desk.http.ws_connect(f"{desk.url}/v1/ws?conversation=c{number}", autoclose=False)
            await ws.send_json({"type": "message", "text": "go", "id": "m"})
            while (await ws.receive_json(timeout=5))["type"] != "chunk":
                pass
            await asyncio.sleep(chance.random() * 0.25)
            connection = ws._response.connection
            assert connection is not None
            assert connection.transport is not None
            if number % 3 == 0:
                connection.transport.abort()
            elif number % 3 == 1:
                connection.transport.close()
            else:
                await ws.close()

        await asyncio.gather(*(visit(number) for number in range(90)))
        await all_ended(desk)
        for number in range(90):
            record = await desk.host.backend.read(f"c{number}", 1, 2)
            assert [entry.text for entry in record or ()] == ["s" * 1600]


# -- clocks ------------------------------------------------------------------------------------------------------------

OUTER = """
import asyncio
from hotdesk_sdk import hookimpl

@hookimpl
async def middleware(ctx, turn, call_next):
    asking = asyncio.create_task(ctx.llm.complete("hi"))
    await asyncio.sleep(0.05)
    reply = await call_next(turn)  # the model answers meanwhile
    await asyncio.sleep(1000)
    return reply
"""
INNER = """
import asyncio
from hotdesk_sdk import hookimpl

@hookimpl
async def respond(turn):
    await asyncio.sleep(0.25)
    return "hello"
"""


async def test_a_wait_for_the_model_that_ends_in_another_call_gives_the_clock_back(
    model_server: ModelServer, start_desk: StartDesk
) -> None:
    """A middleware asks, goes on inwards, and then hangs: its own time ends it, and the reply is the inner one's."""
    model_server.default = Script(text="so", first_s=0.15)
    desk = await start_desk(
        {"outer.py": OUTER, "outer.toml": 'name = "outer"\ncapabilities = ["llm"]\n', "inner.py": INNER},
        llm=models_at(model_server.base_url),
        settings={"outer": PluginSettings(timeout_ms=300, order=1)},
        stop_timeout_s=0.2,
    )
    began = time.monotonic()
    async with asyncio.timeout(5):
        assert await desk.reply() == "hello"
    assert 0.3 < time.monotonic() - began < 3


# -- cut replies -------------------------------------------------------------------------------------------------------

CUTS = ("broken off", "cancelled", "cancelled while nobody takes more", "too long")


@pytest.mark.parametrize("cut", CUTS)
async def test_a_cut_reply_says_whose_it_is(cut: str, model_server: ModelServer, start_desk: StartDesk) -> None:
    """Its metadata name the model, as those of a whole one."""
    words = " ".join(f"word{number}" for number in range(400))
    model_server.default = {
        "broken off": Script(text=words, cut_after=5),
        "cancelled": Script(text=words, gap_s=0.02),
        "cancelled while nobody takes more": Script(pieces=["x" * 8192] * 4000),
        "too long": Script(text=words),
    }[cut]
    limit = 500 if cut == "too long" else 2**26
    llm = models_at(model_server.base_url, retries=0)
    desk = await start_desk(dict(CHATGPT), llm=llm, max_reply_chars=limit, stop_timeout_s=0.2)
    async with aiohttp.ClientSession() as visitor:
        asking: asyncio.Task[Any] | None = None
        if cut.startswith("cancelled"):
            headers = {"Accept": "text/event-stream"}
            url = f"{desk.url}/v1/conversations/c/messages"
            response = await visitor.post(url, json={"text": "go", "id": "m"}, headers=headers)
            await wait_until(lambda: model_server.open and model_server.requests[-1].content > 3, "it speaks")
            if cut == "cancelled":
                asking = asyncio.create_task(response.read())
            else:
                await wait_until(lambda: desk.host.turns._lanes["c"].running.room is not None, "nobody takes more")
            assert desk.host.turns.cancel("c", "m")
        else:
            await desk.say("go", id="m")
        await wait_until(lambda: desk.host.turns.live == 0, "the turn has ended")
        if asking is not None:
            await asking
    [_, reply] = await desk.record()
    assert (reply["metadata"].get("model"), reply["metadata"]["cut"]) == ("default", True)


# -- summaries ---------------------------------------------------------------------------------------------------------


async def test_a_summary_goes_with_the_conversation_it_was_made_of(
    tmp_path: Path,
    model_server: ModelServer,
    start_desk: StartDesk,
) -> None:
    """What was purged is told to nobody who later writes in a conversation of the same name, not even in short."""
    model_server.default = Script(
        answers=lambda body: Script(
            text="SECRET" if body["messages"][0]["content"].startswith("Put this part") else "ok"
        )
    )
    desk = await start_desk(
        dict(CHATGPT),
        llm=models_at(model_server.base_url),
        data=tmp_path / "data",
        retention_days=1,
        settings={"chatgpt": PluginSettings(config={"summarise": True, "history_tokens": 100})},
    )

    def secrets() -> int:
        return sum("SECRET" in str((seen.body or {})["messages"]) for seen in model_server.requests)

    def summaries() -> int:
        return sum("Put this part" in str((seen.body or {})["messages"]) for seen in model_server.requests)

    number = 0
    while not summaries():  # the last turn begins one, which waits in memory for the next
        number += 1
        assert number < 20
        await desk.say(f"old {number} " + "word " * 20)
        await wait_until(lambda: model_server.open == 0, "no summary is in the making")
    assert secrets() == 0
    [journal] = (tmp_path / "data").glob("*.db")
    db = sqlite3.connect(journal, timeout=5)
    db.execute("UPDATE journal SET at = at - 30 * 86400")
    db.commit()
    db.close()
    await desk.host.purge(time.time() - 86400)
    assert await desk.host.backend.record("c") is None
    for n in range(2):
        await desk.say(f"new {n}")
    assert secrets() == 0


async def test_what_was_said_before_the_model_takes_none_of_its_metadata_away(
    model_server: ModelServer, start_desk: StartDesk
) -> None:
    """A bot that says something itself and then leaves the word to the model has the model's name and counts too."""
    source = """
from hotdesk_sdk import hookimpl

@hookimpl
async def respond(ctx, turn):
    await turn.stream("Let me see. ")
    return await ctx.llm.reply(turn)
"""
    manifest = 'capabilities = ["llm"]'
    desk = await start_desk({"outer.py": source, "outer.toml": manifest}, llm=models_at(model_server.base_url))
    await desk.say("go", id="m")
    [_, reply] = await desk.record()
    assert reply["text"].startswith("Let me see. ")
    assert len(reply["text"]) > len("Let me see. ")
    assert reply["metadata"]["model"] == "default"
    assert reply["metadata"]["usage"]["out"] > 0
