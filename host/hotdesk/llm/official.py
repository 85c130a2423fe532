"""What the official client knows: where a request goes, how it is signed, and what an error answer means.

Imported when a model is set and not before, for that takes most of a second. The requests do not go through it:
`create()` costs 8.6 ms of CPU a call. Each model asks it once, through its public doors, for the URL and the headers,
and shows it every error answer. A test holds the two side by side.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx2
import openai

from hotdesk_sdk import LlmError, LlmRefused, LlmUnavailable

from ..config import ModelSettings
from .retry import retry_after

__all__ = ["Official", "Template"]

NO_KEY = "no key is set"

MIN_SECRET_CHARS = 6
"""What is shorter is a word like any other, and no key."""


@dataclass(frozen=True, slots=True)
class Template:
    """What is the same in every request to one model."""

    url: str
    headers: tuple[tuple[str, str], ...]


class _Replay(httpx2.AsyncBaseTransport):
    """Stands where the network would be: notes the request, and answers what it is told."""

    def __init__(self) -> None:
        self.request: httpx2.Request | None = None
        self.answer = httpx2.Response(200, json={})

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        self.request = request
        return self.answer


class Official:
    """The official client of one model, with no network behind it."""

    def __init__(self, name: str, settings: ModelSettings) -> None:
        self._name = name
        self._settings = settings
        self._replay = _Replay()
        self._replaying = asyncio.Lock()
        http = openai.DefaultAsyncHttpxClient(transport=self._replay, trust_env=False)
        self._client: openai.AsyncOpenAI
        if settings.api_version:
            self._client = openai.AsyncAzureOpenAI(
                azure_endpoint=settings.base_url,
                api_version=settings.api_version,
                api_key=settings.api_key or NO_KEY,
                default_headers=settings.headers or None,
                max_retries=0,
                timeout=settings.total_s,
                http_client=http,
            )
        else:
            self._client = openai.AsyncOpenAI(
                base_url=settings.base_url or None,
                api_key=settings.api_key or NO_KEY,
                default_headers=settings.headers or None,
                max_retries=0,
                timeout=settings.total_s,
                http_client=http,
            )

    async def template(self) -> Template:
        """Where and how a completion is asked for."""
        self._replay.answer = httpx2.Response(200, json={})
        body = {"model": self._settings.model, "messages": []}
        await self._client.post("/chat/completions", cast_to=object, body=body)
        request = self._replay.request
        assert request is not None
        skipped = {"accept-encoding", "content-length", "host", "connection"}
        if not self._settings.api_key:
            skipped |= {"authorization", "api-key"} - {name.lower() for name in self._settings.headers}
        headers = tuple((name, value) for name, value in request.headers.multi_items() if name.lower() not in skipped)
        headers += (("Accept-Encoding", "identity"),)  # a stream that is packed arrives late
        return Template(str(request.url), headers)

    async def error(self, status: int, headers: Mapping[str, str], body: bytes) -> LlmError:
        """What an answer with a *status* from 400 on means."""
        told = {name: value for name, value in headers.items() if name.lower() != "content-encoding"}
        try:
            async with self._replaying:
                self._replay.answer = httpx2.Response(status, headers=told, content=body)
                await self._client.post("/chat/completions", cast_to=object, body={"model": self._settings.model})
        except openai.APIStatusError as exc:
            return self._as_ours(exc, status, headers)
        except openai.OpenAIError as exc:
            return LlmUnavailable(self._name, self.hide(str(exc)))
        return LlmUnavailable(self._name, f"answered with status {status}")

    def _as_ours(self, exc: openai.APIStatusError, status: int, headers: Mapping[str, str]) -> LlmError:
        reason = self.hide(exc.message)
        if isinstance(exc, openai.RateLimitError | openai.InternalServerError | openai.ConflictError) or status == 408:
            return LlmUnavailable(self._name, reason, retry_after_s=retry_after(headers))
        return LlmRefused(self._name, reason, status=status)

    def hide(self, text: str) -> str:
        """*text* without the key and what the headers say, whoever put them there, and not endless."""
        settings = self._settings
        words = [word for value in settings.headers.values() for word in (value, *value.split())]
        for secret in (settings.api_key, *words, urlsplit(settings.proxy).password or ""):
            if len(secret) >= MIN_SECRET_CHARS:
                text = text.replace(secret, "…")
        return text if len(text) <= 500 else text[:500] + "…"

    async def aclose(self) -> None:
        await self._client.close()
