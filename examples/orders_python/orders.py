"""Orders: answers what became of an order, masks words, and hands over to a person who is asked for."""

import re
from typing import Any

from hotdesk_sdk import CallNext, CapabilityDenied, Ctx, Reply, Tool, Turn, hookimpl
from hotdesk_sdk.masking import Words

STATUS = {"1001": "shipped", "1002": "packed", "1003": "damn late"}
NUMBER = {"type": "object", "properties": {"number": {"type": "string"}}, "required": ["number"]}
now: dict[str, Any] = {"answered": 0}  # the words too, once they are set up


@hookimpl
async def setup(ctx: Ctx) -> None:
    await configure(ctx.config)


@hookimpl
async def configure(config: dict[str, Any]) -> bool:
    now["words"] = Words(config.get("words"))
    return True


@hookimpl
async def export_state() -> int:
    return int(now["answered"])


@hookimpl
async def import_state(state: object) -> None:
    if type(state) is not int or not 0 <= state < 2**31:
        raise ValueError("state is not a number")
    now["answered"] = state


@hookimpl
async def middleware(turn: Turn, call_next: CallNext) -> Reply | str | None:
    if "human" in turn.text:
        turn.conversation.hand_over("asked for a human")
        return "A person will be with you shortly."
    turn.text = turn.text.removeprefix("say ")
    reply = None if "spam" in turn.text else await call_next()  # where nobody further in is asked, nobody answers
    if reply:
        reply.text = now["words"].mask(reply.text)
        reply.chunks = reply.chunks and now["words"].mask_stream(reply.chunks)
    return reply


@hookimpl
async def respond(ctx: Ctx, turn: Turn) -> str | None:
    if asked := re.search("order ([0-9]+)", turn.text):
        now["answered"] += 1
        status = STATUS.get(asked[1])
        for chunk in ("Order ", asked[1], " is ") if status else ():
            await turn.stream(chunk)
        return f"{status}." if status else f"There is no order {asked[1]}."  # comes after what was streamed
    if "count" in turn.text:
        return f"Answered {now['answered']}."
    if "secret" in turn.text:
        try:
            await ctx.kv.get("secret")
        except CapabilityDenied as refused:
            return f"Denied: {refused.capability}."
        return "Not denied."
    if "fail" in turn.text or "trap" in turn.text:
        raise RuntimeError("told to fail")
    return None


@hookimpl
async def tools() -> list[Tool]:
    return [Tool("order_status", "What became of an order.", order_status, NUMBER)]


async def order_status(number: str) -> dict[str, str]:
    if number not in STATUS:
        raise LookupError(f"no order {number}")
    return {"number": number, "status": STATUS[number]}
