"""One request to the models: its body, its way there, and what is tried when a try fails."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from hotdesk_sdk import LlmError, LlmRefused, LlmTimeout, LlmUnavailable

from ..logs import get_log
from .model import Model
from .retry import MAX_RETRY_AFTER_S, may_retry, retry_after
from .wire import Response, WireError

__all__ = ["Asked", "Failed", "Plan", "post"]

FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.5, 8.0
"""The wait after the first failed try, doubled with each; those of the official client."""

TELL_EACH_S = 60.0
"""How often a fallback from the same model is a line in the log."""

MAX_ERROR_BYTES = 64 * 1024
"""How much of an error answer is read."""

NOBODYS = frozenset({401, 403, 404})
"""The refusals that every request to that model gets. All others are about one request, and say nothing of the next."""

TRANSIENT = (WireError, OSError)

_encode = msgspec.json.Encoder().encode
monotonic = time.monotonic


class Asked(msgspec.Struct, frozen=True):
    """What a plugin asks for, whichever model answers. What is None is the model's own setting."""

    messages: Sequence[Mapping[str, Any]]
    temperature: float | None = None
    max_tokens: int | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    extra: Mapping[str, Any] = {}
    blind: Sequence[Mapping[str, Any]] | None = None
    """The messages for models without `vision`, where those differ."""

    def body(self, model: Model, *, stream: bool) -> bytes:
        """The JSON of the request to *model*. Raises `TypeError` or `ValueError` on what is not JSON."""
        settings = model.settings
        messages = self.messages if self.blind is None or settings.vision else self.blind
        body: dict[str, Any] = {"messages": messages, "model": settings.model}
        temperature = settings.temperature if self.temperature is None else self.temperature
        if temperature is not None:
            body["temperature"] = temperature
        max_tokens = settings.max_tokens if self.max_tokens is None else self.max_tokens
        if max_tokens is not None:
            body[model.max_tokens_field] = max_tokens
        if self.tools:
            body["tools"] = self.tools
        if stream:
            body["stream"] = True
            if settings.usage_in_streams:
                body["stream_options"] = {"include_usage": True}
        return _encode({**body, **settings.body, **self.extra} if settings.body or self.extra else body)


class Failed(Exception):
    """A try that failed: the error, whether the same model may be asked again, and when, if the provider said so."""

    def __init__(self, error: LlmError, *, retry: bool, wait_s: float | None = None) -> None:
        self.error = error
        self.retry = retry
        self.wait_s = wait_s
        super().__init__(str(error))


class Plan:
    """Which model is tried when: one is tried `retries` times more, and then the next one is.

    A model that failed again and again just now is passed over while another is left.
    """

    __slots__ = ("_index", "_models", "_tries", "started", "total_by")

    def __init__(self, models: Sequence[Model]) -> None:
        self._models = models
        self._index = 0
        self._tries = 0
        self.started = monotonic()
        self.total_by = self.started + models[0].settings.total_s
        self._skip_resting()

    @property
    def model(self) -> Model:
        """Whom to ask now."""
        return self._models[self._index]

    @property
    def _is_last(self) -> bool:
        return self._index + 1 == len(self._models)

    def _skip_resting(self) -> None:
        while not self._is_last and self.model.rests(monotonic()):
            self._fall_back("it failed again and again just now")

    def _fall_back(self, why: str) -> None:
        model = self.model
        model.fell_back.inc()
        self._index += 1
        self._tries = 0
        if model.told_at + TELL_EACH_S < (now := monotonic()):
            model.told_at = now
            get_log().warning("llm_fell_back", model=model.name, to=self.model.name, reason=why)

    async def after(self, failed: Failed) -> None:
        """Wait until the next try may begin. Raises the error when that was the last."""
        model, error = self.model, failed.error
        if not (isinstance(error, LlmRefused) and error.status not in NOBODYS):
            model.failed(monotonic())
        if failed.retry and self._tries < model.settings.retries and not model.wire.closed:
            wait = self._wait(failed.wait_s)
            # a provider that wants a long pause is waited for only when nobody else can answer
            if monotonic() + wait < self.total_by and (wait <= MAX_BACKOFF_S or self._is_last):
                self._tries += 1
                model.retried.inc()
                await asyncio.sleep(wait)
                return
        if self._is_last or monotonic() >= self.total_by:
            raise error
        self._fall_back(str(error))
        self._skip_resting()

    def _wait(self, wish: float | None) -> float:
        if wish is not None and 0 < wish <= MAX_RETRY_AFTER_S:
            return wish
        return min(FIRST_BACKOFF_S * 2.0**self._tries, MAX_BACKOFF_S) * (1 - 0.25 * random.random())


async def post(model: Model, body: bytes, by: float, seconds: float, phase: str = "first token") -> Response:
    """Send *body* and return the answer once its status says that it is one. Raises `Failed`.

    *by* is when that has to be, *seconds* and *phase* say in words which clock that is.
    """
    try:
        async with asyncio.timeout(by - monotonic()) as clock:
            response = await model.wire.post(body)
    except TimeoutError:
        if clock.expired():
            raise Failed(LlmTimeout(model.name, phase, seconds), retry=False) from None
        raise Failed(LlmTimeout(model.name, "connect", model.settings.connect_s), retry=True) from None
    except TRANSIENT as exc:
        raise Failed(LlmUnavailable(model.name, model.in_words(exc)), retry=True) from None
    if response.status == 200:
        packed = response.headers.get("content-encoding", "identity").lower()
        if packed == "identity":
            return response
        response.close()
        reason = f"answered with Content-Encoding {packed!r}, which was not asked for"
        raise Failed(LlmUnavailable(model.name, reason), retry=False)
    try:
        raise await _refused(model, response, by)
    finally:
        response.close()


async def _refused(model: Model, response: Response, by: float) -> Failed:
    status = response.status
    if status < 400:
        reason = f"answered with status {status}; look at base_url: {model.wire.shown_url} was asked"
        return Failed(LlmUnavailable(model.name, reason), retry=False)
    text = b""
    try:
        async with asyncio.timeout(max(0.05, min(5.0, by - monotonic()))):
            while len(text) < MAX_ERROR_BYTES and (part := await response.read()):
                text += part
    except (TimeoutError, *TRANSIENT):
        pass  # what it said so far has to do
    error = await model.official.error(status, response.headers, text[:MAX_ERROR_BYTES])
    return Failed(error, retry=may_retry(status, response.headers), wait_s=retry_after(response.headers))
