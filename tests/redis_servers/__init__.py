"""Real Redis servers for tests: one, a Sentinel set, a Cluster, and what cuts a host off from them.

Everything here is plain asyncio and the server's own program: nothing leans on a Redis library, since that is what is
tested with it. Each class is an async context manager; at its end no process, folder, socket or namespace of it is
left, also when the test failed, was cancelled, or had frozen the server.
"""

from __future__ import annotations

from .cluster import Cluster
from .link import Link
from .namespace import Namespace, can_use_namespaces
from .ports import free_port
from .process import PortTaken, StartFailed
from .program import find_redis
from .resp import Connection, ReplyError
from .sentinel import Sentinel, SentinelSet
from .server import RedisServer

__all__ = [
    "Cluster",
    "Connection",
    "Link",
    "Namespace",
    "PortTaken",
    "RedisServer",
    "ReplyError",
    "Sentinel",
    "SentinelSet",
    "StartFailed",
    "can_use_namespaces",
    "find_redis",
    "free_port",
]
