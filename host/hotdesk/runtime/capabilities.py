"""What a plugin may use beyond its own code: asked for in its manifest and granted by the operator, both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

import aiohttp
import msgspec

from .active import Generation
from .network import public_socket

if TYPE_CHECKING:
    from .scope import Context, Scope

__all__ = ["CapabilityDoors", "KvStore", "PluginHttp", "PluginKv"]

MAX_VALUE_BYTES = 1024 * 1024
MAX_KEY_CHARS = 512
MAX_FETCHED_BYTES = 4 * 1024 * 1024
"""Of an answer that a component fetches."""


class KvStore(Protocol):
    """Where plugins' keys live; the backend's."""

    async def kv_get(self, plugin: str, key: str) -> bytes | None: ...
    async def kv_set(self, plugin: str, key: str, value: bytes | None) -> None: ...
    async def kv_keys(self, plugin: str, prefix: str) -> list[str]: ...


@dataclass(slots=True)
class CapabilityDoors:
    """The host's side of the capabilities; `denied` tells the operator."""

    kv: KvStore
    llm: Callable[[Generation, Scope], Any]
    """Makes `ctx.llm` of one generation; the chat room's."""

    denied: Callable[[str, int, str], None]
    http_hosts: frozenset[str] = frozenset()
    """Inside the network, and components may reach them all the same, where granted: `host` or `host:port`."""


class PluginKv:
    """See `hotdesk_sdk.Kv`. Keys are at most 512 characters, values at most 1 MiB as JSON."""

    def __init__(self, plugin: str, store: KvStore, admit: Callable[[], None]) -> None:
        self._plugin = plugin
        self._store = store
        self._admit = admit

    async def get(self, key: str, default: Any = None) -> Any:
        self._admit()
        value = await self._store.kv_get(self._plugin, self._checked(key))
        return default if value is None else msgspec.json.decode(value)

    async def set(self, key: str, value: Any) -> None:
        encoded = msgspec.json.encode(value)
        if len(encoded) > MAX_VALUE_BYTES:
            raise ValueError(f"kv value of {key!r} has {len(encoded)} bytes as JSON; the limit is {MAX_VALUE_BYTES}")
        self._admit()
        await self._store.kv_set(self._plugin, self._checked(key), encoded)

    async def delete(self, key: str) -> None:
        self._admit()
        await self._store.kv_set(self._plugin, self._checked(key), None)

    async def keys(self, prefix: str = "") -> list[str]:
        self._admit()
        return await self._store.kv_keys(self._plugin, prefix)

    @staticmethod
    def _checked(key: str) -> str:
        if not isinstance(key, str) or not 0 < len(key) <= MAX_KEY_CHARS:
            raise ValueError(f"kv key {key!r}: a key is a text of 1 to {MAX_KEY_CHARS} characters")
        return key


@dataclass(frozen=True, slots=True)
class FetchedResponse:
    """See `hotdesk_sdk.HttpResponse`."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def text(self) -> str:
        return self.body.decode()

    def json(self) -> Any:
        return msgspec.json.decode(self.body)


class PluginHttp:
    """See `hotdesk_sdk.Http`. Redirects are not followed: the next host would need a grant of its own."""

    def __init__(self, generation: Generation, ctx: Context, *, public_only: bool = False) -> None:
        self._generation = generation
        self._public_only = public_only
        self._ctx = ctx
        self._sessions: dict[bool, aiohttp.ClientSession] = {}

    async def request(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        json: Any = None,
        body: bytes | str | None = None,
        timeout: float = 10.0,
    ) -> FetchedResponse:
        parts = urlsplit(url)
        asked = [c for c in self._generation.manifest.capabilities if c.startswith("http:")]
        names = {f"http:{parts.hostname}", f"http:{parts.netloc.rpartition('@')[2]}"}
        capability = next((c for c in asked if c in names), f"http:{parts.hostname}")
        self._ctx._need(capability)
        self._ctx._scope.serve("ctx.http")
        inside = bool(names & {f"http:{host}" for host in self._ctx._doors.http_hosts})
        async with self._session_for(inside).request(
            method,
            url,
            headers=headers,
            json=json,
            data=body,
            timeout=aiohttp.ClientTimeout(total=timeout),
            allow_redirects=False,
        ) as response:
            if not self._public_only:
                return FetchedResponse(response.status, dict(response.headers), await response.read())
            parts_, size = [], 0
            async for part in response.content.iter_any():
                size += len(part)
                if size > MAX_FETCHED_BYTES:
                    raise ValueError(f"the answer has over {MAX_FETCHED_BYTES} bytes")
                parts_.append(part)
            return FetchedResponse(response.status, dict(response.headers), b"".join(parts_))

    def _session_for(self, inside: bool) -> aiohttp.ClientSession:
        """*inside*: the operator lets guests reach this host though it is inside."""
        public = self._public_only and not inside
        if public not in self._sessions:
            # a connection that was made for a public address is never used for another, so both have a pool
            connector = aiohttp.TCPConnector(socket_factory=public_socket) if public else None
            self._sessions[public] = aiohttp.ClientSession(
                connector=connector, cookie_jar=aiohttp.DummyCookieJar(), trust_env=False
            )
        return self._sessions[public]

    async def get(self, url: str, **options: Any) -> FetchedResponse:
        return await self.request("GET", url, **options)

    async def post(self, url: str, **options: Any) -> FetchedResponse:
        return await self.request("POST", url, **options)

    async def aclose(self) -> None:
        for session in self._sessions.values():
            await session.close()
