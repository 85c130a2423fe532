"""greeting: has the last word. Greets who writes for the first time, and owns up to what no other bot could answer.

Shows a bot that is asked last (`order = 90`), and a `probe`: texts that are missing are found before they serve.
"""

import re
from typing import Any

from hotdesk_sdk import Ctx, Turn, hookimpl

CHINESE = re.compile("[\u3400-\u9fff]")


@hookimpl
async def probe(ctx: Ctx) -> None:
    check(ctx.config)


@hookimpl
async def configure(config: dict[str, Any]) -> bool:
    """`respond` reads `ctx.config` anew each time, so there is nothing to take, only something to check."""
    check(config)
    return True


def check(config: dict[str, Any]) -> None:
    for language in ("en", "zh"):
        for text in ("greeting", "fallback"):
            if not isinstance(config.get(language, {}).get(text), str):
                raise ValueError(f"[config.{language}] needs a text `{text}`")


@hookimpl
async def respond(ctx: Ctx, turn: Turn) -> str:
    locale = turn.conversation.locale or ("zh" if CHINESE.search(turn.text) else "en")
    texts = ctx.config["zh" if locale.lower().startswith("zh") else "en"]
    return str(texts["greeting" if turn.message.seq == 1 else "fallback"])
