"""`/healthz`, `/readyz`, `/metrics`: what an orchestrator and a scraper ask."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry

from ..backend import Backend
from ..chat.spool import Spool
from ..errors import BackendUnavailable
from .scrape import merge_scrapes, render_scrape
from .siblings import Siblings
from .wire import json_response

__all__ = ["Probes"]


class Probes:
    """`facts` is what `/readyz` tells beside whether it is ready. `/metrics` answers for all *siblings*.

    With a *spool*, a host whose backend is away takes messages all the same: it is "degraded", and to be sent them.
    """

    def __init__(
        self,
        *,
        backend: Backend,
        registry: CollectorRegistry,
        ready: Callable[[], bool],
        facts: Callable[[], dict[str, Any]],
        siblings: Siblings,
        spool: Spool | None,
    ) -> None:
        self._backend = backend
        self._registry = registry
        self._ready = ready
        self._facts = facts
        self._siblings = siblings
        self._spool = spool

    async def healthz(self, request: web.Request) -> web.StreamResponse:
        return json_response({"status": "alive"})

    async def readyz(self, request: web.Request) -> web.StreamResponse:
        problem = None if self._ready() else "not ready: starting or stopping"
        status = "ready" if problem is None else "not ready"
        if problem is None:
            try:
                async with asyncio.timeout(3.0):
                    await self._backend.ping()
            except (BackendUnavailable, TimeoutError) as exc:
                problem = str(exc) or "the backend did not answer within 3 s"
                full = self._spool.problem if self._spool is not None else "there is no spool"
                status = "degraded" if full is None else "not ready"
        body = {
            "status": status,
            "backend": self._backend.url.partition("://")[0],
            "durability": self._backend.durability,
            **({"warnings": self._backend.warnings} if self._backend.warnings else {}),
            **({"spooled": self._spool.count} if self._spool is not None else {}),
            **self._facts(),
        }
        if problem is not None:
            body["problem"] = problem
        return json_response(body, 503 if status == "not ready" else 200)

    async def metrics(self, request: web.Request) -> web.StreamResponse:
        worker = self._siblings.worker
        if worker is None:
            body = render_scrape(self._registry, None)
        else:
            told = await self._siblings.ask("GET", "/metrics")
            scrapes = {one.row.worker: one.body if one.status == 200 else None for one in told}
            body = merge_scrapes({**scrapes, worker: render_scrape(self._registry, worker)})
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})
