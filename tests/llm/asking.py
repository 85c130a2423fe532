"""Short words for asking: models without a host around them, and what came of a question."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry

from hotdesk.config import LlmSettings, ModelSettings
from hotdesk.llm.client import Llm
from hotdesk.llm.request import Asked
from hotdesk.llm.stream import LlmStream
from hotdesk.metrics import Metrics
from hotdesk_sdk import LlmError

__all__ = ["ASKED", "HELLO", "OpenModels", "failure_of", "models_of", "sample", "settings_of", "text_of", "texts_of"]

HELLO: list[dict[str, Any]] = [{"role": "user", "content": "hello"}]
ASKED = Asked(HELLO)

OpenModels = Callable[..., Awaitable[Llm]]


def settings_of(base_url: str, **settings: Any) -> ModelSettings:
    """One model's settings, checked as those of a file are."""
    return msgspec.convert({"base_url": base_url, "model": "m", **settings}, ModelSettings)


@contextlib.asynccontextmanager
async def models_of() -> AsyncIterator[OpenModels]:
    """Gives a function that opens models; all of them are closed at the end."""
    async with contextlib.AsyncExitStack() as stack:

        async def open_them(
            base_url: str = "",
            *,
            models: Mapping[str, Mapping[str, Any]] | None = None,
            fallback: Sequence[str] = (),
            **settings: Any,
        ) -> Llm:
            named = models or {"default": {"base_url": base_url, **settings}}
            registry = CollectorRegistry()
            found = {name: settings_of(**{"base_url": base_url, **settings, **given}) for name, given in named.items()}
            llm = Llm(LlmSettings(models=found, fallback=tuple(fallback)), Metrics(registry))
            stack.push_async_callback(llm.aclose)
            await llm.open()
            return llm

        yield open_them


async def texts_of(stream: LlmStream) -> list[str]:
    """Every text of a stream."""
    return [text async for text in stream]


async def text_of(llm: Llm, asked: Asked = ASKED, name: str | None = None) -> str:
    """The whole text of a streamed answer."""
    return "".join(await texts_of(llm.stream(asked, name)))


async def failure_of(llm: Llm, asked: Asked = ASKED, name: str | None = None) -> tuple[str, LlmError]:
    """What was said before a streamed answer failed, and how it failed."""
    said = ""
    try:
        async for text in llm.stream(asked, name):
            said += text
    except LlmError as exc:
        return said, exc
    raise AssertionError(f"it did not fail; it said {said!r}")


def sample(llm: Llm, name: str, **labels: str) -> float:
    """A metric's value; 0 for one that was never counted."""
    metrics = next(iter(llm.models.values()))._metrics
    return metrics.registry.get_sample_value(name, labels) or 0.0
