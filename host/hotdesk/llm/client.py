"""The language models of one host: opened with it, asked by name, closed with it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from hotdesk_sdk import Completion, LlmUnavailable

from ..config import LlmSettings
from ..metrics import Metrics
from .model import Model
from .request import Asked
from .stream import LlmStream
from .whole import Resting, complete

__all__ = ["Llm"]

NONE_SET = "none is set; write [llm] api_key or base_url in hotdesk.toml, or set HOTDESK_LLM_API_KEY"


class Llm:
    """The first model answers, and its fallbacks after it; a request may name another."""

    def __init__(self, settings: LlmSettings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._retiring: dict[asyncio.Task[None], Model] = {}
        self.models: dict[str, Model] = {name: Model(name, model, metrics) for name, model in settings.models.items()}
        metrics.watch_gauge(
            "hotdesk_llm_open", "Requests to language models under way", lambda: sum(m.running for m in self._all)
        )
        metrics.watch_gauge(
            "hotdesk_llm_waiting", "Requests that wait for a place", lambda: sum(m.waiting for m in self._all)
        )

    @property
    def settings(self) -> LlmSettings:
        """What they were opened or configured with last."""
        return self._settings

    @property
    def _all(self) -> Sequence[Model]:
        return tuple(self.models.values())

    async def open(self) -> None:
        for model in self._all:
            await model.open()

    async def configure(self, settings: LlmSettings) -> None:
        """Take new settings: requests from now on go by them, those under way end as they began."""
        models: dict[str, Model] = {}
        for name, wanted in settings.models.items():
            now = self.models.get(name)
            models[name] = now if now is not None and now.settings == wanted else Model(name, wanted, self._metrics)
        fresh = [model for name, model in models.items() if model is not self.models.get(name)]
        for model in fresh:
            await model.open()
        old = [model for model in self._all if model not in models.values()]
        self.models, self._settings = models, settings
        for model in old:
            task = asyncio.get_running_loop().create_task(_close_when_free(model))
            self._retiring[task] = model
            task.add_done_callback(lambda task: self._retiring.pop(task, None))

    def describe(self) -> str:
        """Who answers, in words."""
        if not self.models:
            return "none; HOTDESK_LLM_API_KEY or [llm] in hotdesk.toml sets one"
        first = next(iter(self.models.values()))
        others = [name for name in self._settings.fallback if name != first.name]
        then = f", then {', '.join(others)}" if others else ""
        key = f" (key from {self._settings.key_from})" if first.name == "default" and self._settings.key_from else ""
        return f"{first.settings.model} at {first.wire.shown_url.removesuffix('/chat/completions')}{key}{then}"

    async def aclose(self) -> None:
        for task in list(self._retiring):
            task.cancel()
        await asyncio.gather(*(model.aclose() for model in [*self._all, *self._retiring.values()]))

    def choose(self, name: str | None) -> tuple[Model, ...]:
        """Whom to ask, in order. Raises `LlmUnavailable` when there is nobody of that name, or at all."""
        if not self.models:
            raise LlmUnavailable(name or "", NONE_SET)
        first = next(iter(self.models)) if name is None else name
        if first not in self.models:
            raise LlmUnavailable(first, f"no model is called that in the settings; there are {', '.join(self.models)}")
        names = dict.fromkeys([first, *self._settings.fallback])
        return tuple(self.models[name] for name in names)

    def stream(self, asked: Asked, name: str | None = None, clock: Resting | None = None) -> LlmStream:
        """See `LlmStream`."""
        return LlmStream(asked, self.choose(name), clock)

    async def complete(self, asked: Asked, name: str | None = None, clock: Resting | None = None) -> Completion:
        """Ask for a whole answer. Raises `LlmError`."""
        return await complete(asked, self.choose(name), clock)


async def _close_when_free(model: Model) -> None:
    await model.wait_free()
    await model.aclose()


def as_messages(messages: str | Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """What a plugin asks with; a text alone is a user's message."""
    return [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
