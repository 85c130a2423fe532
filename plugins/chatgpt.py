"""chatgpt: answers with the language model. Small, because the host does the work: prompt, tools, stream, clocks.

Without a model, or without the grant `llm`, it says so once in the log and leaves every turn to the next bot.
"""

from typing import Any

import msgspec

from hotdesk_sdk import CapabilityDenied, Ctx, Llm, Reply, Tool, Turn, hookimpl


class HandOver(msgspec.Struct, forbid_unknown_fields=True):
    words: list[str] = []
    text: str = ""


class Settings(msgspec.Struct, forbid_unknown_fields=True):
    """All of `[config]`."""

    model: str = ""
    temperature: float | None = None
    max_tokens: int | None = None
    history_tokens: int = 4000
    summarise: bool = False
    tools: bool | list[str] = True
    system: str = ""
    hand_over: HandOver = msgspec.field(default_factory=HandOver)


NO_MODEL = "set HOTDESK_LLM_API_KEY, or [llm] api_key or base_url"

settings = Settings()
llm: Llm | None = None


@hookimpl
async def setup(ctx: Ctx) -> None:
    global llm
    await configure(ctx, ctx.config)
    try:
        llm = ctx.llm if ctx.llm.available else None
        if llm is None:
            ctx.log.warning("no_model_set", remedy=NO_MODEL)
    except CapabilityDenied as denied:
        ctx.log.warning("no_model_granted", remedy=f"{NO_MODEL}; a model that is set already needs: {denied.problem}")


@hookimpl
async def configure(ctx: Ctx, config: dict[str, Any]) -> bool:
    global settings
    settings = msgspec.convert(config, Settings)
    return True


@hookimpl
async def respond(turn: Turn) -> str | Reply | None:
    if llm is None:
        return None
    if any(word.casefold() in turn.text.casefold() for word in settings.hand_over.words):
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
