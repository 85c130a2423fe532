"""The language model as a plugin sees it: `ctx.llm`, which needs the capability `llm`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Protocol

import msgspec

from .context import Turn
from .messages import Json, Reply

__all__ = ["Completion", "Llm", "LlmStream", "ToolCall", "Usage"]


class Usage(msgspec.Struct, frozen=True):
    """Tokens as the provider counts them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


class ToolCall(msgspec.Struct):
    """A call that the model asks for; `arguments` is JSON as the model wrote it, not yet checked."""

    id: str = ""
    name: str = ""
    arguments: str = ""


class Completion(msgspec.Struct, frozen=True):
    """A whole answer. `model` is its name in the settings; `finish` is the provider's reason for ending it."""

    text: str
    model: str
    finish: str = ""
    usage: Usage | None = None
    tool_calls: tuple[ToolCall, ...] = ()


class LlmStream(Protocol):
    """An answer as it comes. `usage`, `finish` and `tool_calls` are complete when it has ended.

    Nothing is sent before the first text is pulled. `respond` may return one as it is; who stops pulling on
    the way calls `aclose()`, which hangs up.
    """

    finish: str
    usage: Usage | None
    tool_calls: list[ToolCall]

    @property
    def model(self) -> str: ...
    def __aiter__(self) -> AsyncIterator[str]: ...
    async def __anext__(self) -> str: ...
    async def aclose(self) -> None: ...


class Llm(Protocol):
    """The models that the operator has set. All that fails raises an `LlmError`.

    *model* is a name of the settings; the first one, and then its fallbacks, when it is not given. *messages* are
    those of the OpenAI chat protocol. The time that the model takes does not count as the plugin's own.
    """

    @property
    def available(self) -> bool:
        """Whether any model is set."""

    @property
    def models(self) -> tuple[str, ...]: ...

    async def complete(
        self,
        messages: str | Sequence[Mapping[str, Json]],
        *,
        model: str | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        tools: Sequence[Mapping[str, Json]] = (),
        **extra: Json,
    ) -> Completion:
        """Ask, and wait for the whole answer. *extra* goes into the request's body as it is."""

    def stream(
        self,
        messages: str | Sequence[Mapping[str, Json]],
        *,
        model: str | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        tools: Sequence[Mapping[str, Json]] = (),
        **extra: Json,
    ) -> LlmStream:
        """Ask, and read the answer as it comes."""

    async def reply(
        self,
        turn: Turn,
        *,
        system: str = "",
        model: str | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        history_tokens: int = 8000,
        summarise: bool = False,
        tools: bool | Sequence[str] = True,
        **extra: Json,
    ) -> Reply:
        """The model's answer to *turn*, for `respond` to return: a streamed reply.

        The prompt is *system*, as much of the conversation as fits in *history_tokens*, newest first, and the turn's
        text with its images. *tools* of the plugins are offered (all, none, or those named) and called. The reply's
        metadata has `model` and `usage`.
        """
