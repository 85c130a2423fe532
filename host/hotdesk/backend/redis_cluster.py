"""Many Redis servers: a Cluster. (Being built.)"""

from __future__ import annotations

from typing import Any

from ..errors import BackendError
from .redis_servers import Hears
from .redis_url import RedisUrl
from .redis_wire import Scripts

__all__ = ["ManyServers"]


class ManyServers:
    """The servers of a Cluster."""

    def __init__(self, url: RedisUrl, scripts: Scripts, hears: Hears) -> None:
        raise BackendError(f"backend {url.text}: a Cluster can't be used yet")

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)
