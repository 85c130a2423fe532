"""Every hook on one page.

A hook is an `async def` in the plugin's module, marked with `@hookimpl`, which takes by name just those
of the arguments below that it wants. `ctx` belongs to the generation, `turn` to one message.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pluggy

from .context import CallNext, Conversation, Ctx, StoredReply, Turn
from .messages import Intake, Json, Message, Reply, Request, Tool

__all__ = ["HOOKS", "Hooks", "hookimpl", "hookspec"]

hookspec = pluggy.HookspecMarker("hotdesk")
hookimpl = pluggy.HookimplMarker("hotdesk")


class Hooks:
    """The specification. Signatures, not implementations: the host awaits each implementation itself."""

    @hookspec
    async def setup(self, ctx: Ctx) -> None:
        """Once a generation, before it serves. Raising refuses the generation."""

    @hookspec
    async def teardown(self, ctx: Ctx) -> None:
        """Once a generation, after its last turn. What came through `ctx` is undone after this."""

    @hookspec
    async def configure(self, ctx: Ctx, config: dict[str, Any]) -> Any:
        """The config changed. Truthy: taken, no swap. Anything else: the host swaps instead."""

    @hookspec
    async def probe(self, ctx: Ctx) -> None:
        """After setup, before the swap. Raise to refuse the new generation."""

    @hookspec
    async def export_state(self, ctx: Ctx) -> Json:
        """On a swap, asked of the old generation: JSON-able state for the new one."""

    @hookspec
    async def import_state(self, ctx: Ctx, state: Json, version: str) -> None:
        """On a swap, given to the new generation: the old one's state, and the old one's manifest version."""

    @hookspec
    async def intake(self, ctx: Ctx, request: Request) -> Intake | None:
        """A webhook at `/hooks/{plugin}/…`: the messages in it, and the HTTP answer."""

    @hookspec
    async def middleware(self, ctx: Ctx, turn: Turn, call_next: CallNext) -> Reply | str | None:
        """Around every turn, outermost first. Return what `await call_next()` gave, a reply of one's own, or None."""

    @hookspec
    async def respond(self, ctx: Ctx, turn: Turn) -> str | Reply | AsyncIterator[str] | None:
        """The answer, or None to leave it to the next bot. An async generator streams."""

    @hookspec
    async def deliver(self, ctx: Ctx, conversation: Conversation, reply: StoredReply) -> None:
        """A reply in a conversation that this plugin's intake opened, in order. Raise to have it tried again."""

    @hookspec
    async def tools(self, ctx: Ctx) -> list[Tool]:  # type: ignore[empty-body]
        """Once a generation: functions that the language model may call."""

    @hookspec
    async def routes(self, ctx: Ctx) -> list[Any]:  # type: ignore[empty-body]
        """Once a generation: `(method, path, handler)` below `/p/{plugin}/`; the handler takes an aiohttp request."""

    @hookspec
    async def on_message(self, ctx: Ctx, message: Message) -> None:
        """A message was accepted."""

    @hookspec
    async def on_reply(self, ctx: Ctx, reply: StoredReply) -> None:
        """A reply was stored."""

    @hookspec
    async def on_conversation_opened(self, ctx: Ctx, conversation: Conversation) -> None:
        """The first message of a conversation was accepted, or the first after it was closed."""

    @hookspec
    async def on_conversation_closed(self, ctx: Ctx, conversation: Conversation) -> None:
        """A turn closed its conversation."""

    @hookspec
    async def on_assigned(self, ctx: Ctx, conversation: Conversation) -> None:
        """A turn changed `conversation.assignee`, or asked for a human (the tag `handoff`, `assignee` still None)."""


HOOKS: tuple[str, ...] = tuple(name for name in vars(Hooks) if not name.startswith("_"))
"""The names of all hooks, in the order of the specification."""
