"""One language model: its connections, its bound, its counters, and whether it is worth asking just now."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from hotdesk_sdk import LlmTimeout, LlmUnavailable, Usage

from ..config import ModelSettings
from ..metrics import Metrics
from .wire import Wire

if TYPE_CHECKING:
    from .official import Official

__all__ = ["Model"]

REST_AFTER, REST_S = 5, 10.0
"""After so many failures in a row a model rests so long: nobody waits for it while another can answer."""

OPENAI_HOSTS = ("api.openai.com", ".openai.azure.com")
"""Who wants `max_completion_tokens`; everybody else knows the older `max_tokens`."""

monotonic = time.monotonic


class Model:
    """Opened once a host, by `open`. Requests go straight to it; the official client said how."""

    def __init__(self, name: str, settings: ModelSettings, metrics: Metrics) -> None:
        self.name = name
        self.settings = settings
        self.official: Official
        self.wire: Wire
        host = urlsplit(settings.base_url).hostname or "api.openai.com"
        self.max_tokens_field = "max_completion_tokens" if host.endswith(OPENAI_HOSTS) else "max_tokens"
        self._metrics = metrics
        self.first_token = metrics.llm_first_token.labels(name)
        self.fell_back = metrics.llm_fallbacks.labels(name)
        self.retried = metrics.llm_retries.labels(name)
        self._tokens_in = metrics.llm_tokens.labels(name, "in")
        self._tokens_out = metrics.llm_tokens.labels(name, "out")
        self._cost = metrics.llm_cost.labels(name)
        self._outcomes: dict[str, Any] = {}
        self.told_at = -1e9
        """When the log was last told that another was asked instead (monotonic)."""
        self._failures = 0
        self._resting_until = 0.0
        self.running = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._free: asyncio.Event | None = None

    async def open(self) -> None:
        from .official import Official

        self.official = Official(self.name, self.settings)
        template = await self.official.template()
        settings = self.settings
        self.wire = Wire(template.url, template.headers, proxy=settings.proxy, connect_s=settings.connect_s)

    async def aclose(self) -> None:
        await self.wire.aclose()
        await self.official.aclose()

    # -- how many at once ------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    async def enter(self, by: float, seconds: float) -> None:
        """Take one of the `concurrency` places; those who wait get theirs in the order in which they came.

        Raises `LlmUnavailable` when `queue` wait already, `LlmTimeout` when the wait is over at *by*.
        """
        if self.running < self.settings.concurrency:
            self.running += 1
            return
        if len(self._waiting) >= self.settings.queue:
            reason = f"{self.running} requests are under way and {len(self._waiting)} wait"
            raise LlmUnavailable(self.name, reason, retry_after_s=1.0)
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        try:
            async with asyncio.timeout(by - monotonic()):
                await place
        except BaseException as exc:
            if place.done() and not place.cancelled():
                self.leave()  # it came just as the wait was given up
            elif place in self._waiting:  # `leave` may have passed over it meanwhile
                self._waiting.remove(place)
            if isinstance(exc, TimeoutError):
                raise LlmTimeout(self.name, "queue", seconds) from None
            raise

    def leave(self) -> None:
        """Give the place to who waits longest."""
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(None)
                return
        self.running -= 1
        if not self.running and self._free is not None:
            self._free.set()

    async def wait_free(self) -> None:
        """Wait until no request is under way."""
        if self.running:
            self._free = asyncio.Event()
            await self._free.wait()

    # -- what became of requests -----------------------------------------------------------------------------------

    def rests(self, now: float) -> bool:
        """Whether it failed again and again just now."""
        return now < self._resting_until

    def failed(self, now: float) -> None:
        self._failures += 1
        if self._failures >= REST_AFTER:
            self._resting_until = now + REST_S

    def count(self, outcome: str, usage: Usage | None) -> None:
        """A request came to its end: `answered`, `cut`, `cancelled` or `failed`."""
        counter = self._outcomes.get(outcome)
        if counter is None:
            counter = self._outcomes[outcome] = self._metrics.llm_requests.labels(self.name, outcome)
        counter.inc()
        if outcome == "answered":
            self._failures = 0
            self._resting_until = 0.0
        if usage is not None:
            self._tokens_in.inc(usage.prompt_tokens)
            self._tokens_out.inc(usage.completion_tokens)
            settings = self.settings
            if settings.price_in or settings.price_out:
                cost = usage.prompt_tokens * settings.price_in + usage.completion_tokens * settings.price_out
                self._cost.inc(cost / 1e6)

    def in_words(self, exc: BaseException) -> str:
        """A failure of the connection, for people."""
        text = str(exc) or type(exc).__name__
        return f"{self.wire.host}:{self.wire.port}: {text}"
