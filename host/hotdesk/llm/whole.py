"""Answers that come whole: asked for, read to their end, and taken apart."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any, Protocol

from hotdesk_sdk import Completion, LlmError, LlmRefused, LlmTimeout, LlmUnavailable, ToolCall, Usage

from .events import decode_answer
from .model import Model
from .request import TRANSIENT, Asked, Failed, Plan, post
from .wire import Response, WireError

__all__ = ["MAX_ANSWER_BYTES", "Resting", "answer_of", "complete", "read_rest", "reason_of"]

MAX_ANSWER_BYTES = 16 * 1024 * 1024

monotonic = time.monotonic


class Resting(Protocol):
    """The clock of whoever waits; it stands still meanwhile, for the model has clocks of its own."""

    def rest(self) -> None: ...
    def go_on(self) -> None: ...


async def complete(asked: Asked, models: Sequence[Model], clock: Resting | None = None) -> Completion:
    """Ask for a whole answer. Raises `LlmError`."""
    plan = Plan(models)
    if clock is not None:
        clock.rest()
    try:
        while True:
            model = plan.model
            try:
                return await _complete(asked, model, plan)
            except Failed as failed:
                model.count("failed", None)
                await plan.after(failed)
            except asyncio.CancelledError:
                model.count("cancelled", None)
                raise
    finally:
        if clock is not None:
            clock.go_on()


async def _complete(asked: Asked, model: Model, plan: Plan) -> Completion:
    body = asked.body(model, stream=False)
    seconds = model.settings.total_s
    try:
        await model.enter(plan.total_by, seconds)
    except LlmError as exc:
        raise Failed(exc, retry=False) from None
    response = None
    try:
        async with asyncio.timeout(plan.total_by - monotonic()):
            response = await post(model, body, plan.total_by, seconds, "total")
            answer = await read_rest(response, b"")
        text, finish, usage, calls = answer_of(model, answer)
        if finish == "content_filter" and not text:
            raise Failed(LlmRefused(model.name, "its content filter stopped the answer"), retry=False)
    except TimeoutError:
        raise Failed(LlmTimeout(model.name, "total", seconds), retry=False) from None
    except TRANSIENT as exc:
        raise Failed(LlmUnavailable(model.name, model.in_words(exc)), retry=True) from None
    finally:
        if response is not None:
            response.close()  # does nothing to one that was read to its end
        model.leave()
    model.count("answered", usage)
    return Completion(text, model.name, finish, usage, tuple(calls))


async def read_rest(response: Response, data: bytes) -> bytes:
    parts = [data]
    size = len(data)
    while part := await response.read():
        parts.append(part)
        size += len(part)
        if size > MAX_ANSWER_BYTES:
            raise WireError(f"the answer is over {MAX_ANSWER_BYTES} bytes")
    return b"".join(parts)


def answer_of(model: Model, body: bytes) -> tuple[str, str, Usage | None, list[ToolCall]]:
    """Text, reason to end, usage and tool calls of a whole answer. Raises `Failed`."""
    try:
        answer = decode_answer(body)
    except (ValueError, RecursionError) as exc:
        raise Failed(LlmUnavailable(model.name, f"sent an answer that can't be read: {exc}"), retry=True) from None
    if answer.error:
        raise Failed(LlmUnavailable(model.name, reason_of(model, answer.error)), retry=True)
    said = answer.choices[0] if answer.choices else None
    if said is None or said.message is None:
        raise Failed(LlmUnavailable(model.name, "sent an answer without a message"), retry=True)
    usage = answer.usage.usage() if answer.usage else None
    calls = [
        ToolCall(call.id or "", (call.function.name if call.function else "") or "",
                 (call.function.arguments if call.function else "") or "")
        for call in said.message.tool_calls or ()
    ]  # fmt: skip
    return said.message.content or said.message.refusal or "", said.finish_reason or "stop", usage, calls


def reason_of(model: Model, error: Any) -> str:
    """The provider's own words, wherever it put them, and without the key."""
    if isinstance(error, dict):
        error = error.get("message") or error
    return model.official.hide(str(error))
