"""chatgpt: answers with the language model. Small, because the host does the work: prompt, tools, stream, clocks.

Without a model, or without the grant `llm`, it says so once in the log and leaves every turn to the next bot.
"""

import re
from typing import Annotated, Any

import msgspec

from hotdesk_sdk import CapabilityDenied, Ctx, Llm, Reply, Tool, Turn, hookimpl


class HandOver(msgspec.Struct, forbid_unknown_fields=True):
    words: list[str] = []
    text: str = ""


class Settings(msgspec.Struct, forbid_unknown_fields=True):
    """All of `[config]`."""

    model: str = ""
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    max_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    history_tokens: Annotated[int, msgspec.Meta(ge=0)] = 4000
    summarise: bool = False
    tools: bool | list[str] = True
    system: str = ""
    hand_over: HandOver = msgspec.field(default_factory=HandOver)


settings = Settings()
asks_for_human: re.Pattern[str]
llm: Llm | None = None


@hookimpl
async def setup(ctx: Ctx) -> None:
    global llm
    try:
        llm = ctx.llm
        if not llm.available:
            ctx.log.warning("no_model_set", remedy="set HOTDESK_LLM_API_KEY, or [llm] in hotdesk.toml")
    except CapabilityDenied as denied:
        ctx.log.warning("no_model_granted", remedy=denied.problem)
    await configure(ctx.config)


@hookimpl
async def configure(config: dict[str, Any]) -> bool:
    global settings, asks_for_human
    new = msgspec.convert(config, Settings)
    names = llm.models if llm is not None else ()
    if new.model and names and new.model not in names:
        raise ValueError(f"[config] model is {new.model!r}; [llm] in hotdesk.toml has {', '.join(names)}")
    # words of scripts with spaces are found whole, Chinese ones anywhere
    words = [rf"\b{re.escape(word)}\b" if word.isascii() else re.escape(word) for word in new.hand_over.words]
    settings, asks_for_human = new, re.compile("|".join(words) or r"(?!)", re.IGNORECASE)
    return True


@hookimpl
async def respond(turn: Turn) -> str | Reply | None:
    if llm is None or not llm.available:
        return None
    if asks_for_human.search(turn.text):
        turn.conversation.hand_over("the visitor asked for a person")
        return settings.hand_over.text
    return await llm.reply(
        turn,
        system=settings.system,
        model=settings.model or None,
        temperature=settings.temperature,
        max_tokens=settings.max_tokens,
        history_tokens=settings.history_tokens,
        summarise=settings.summarise,
        tools=settings.tools,
    )


@hookimpl
async def tools() -> list[Tool]:
    async def hand_over(turn: Turn, reason: str) -> str:
        turn.conversation.hand_over(reason)
        return "A colleague has been asked to join. Tell the visitor that it takes a moment."

    reason = {"type": "string", "description": "Why, in one sentence for the colleague"}
    return [
        Tool(
            "hand_over",
            "Ask a human colleague to take over this conversation.",
            hand_over,
            {"type": "object", "properties": {"reason": reason}, "required": ["reason"]},
        )
    ]
