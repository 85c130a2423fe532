"""Fetches the image that a visitor's URL names, and lets nobody look into the network that the host stands in.

The address that is connected to is the one that is checked, at the moment the socket is made: between a look-up and
a connection a name can change what it means.
"""

from __future__ import annotations

import asyncio
import socket
from concurrent.futures import ThreadPoolExecutor

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from ..errors import ImageUnusable
from ..runtime.network import InsideAddress, any_socket, causes, is_public, public_socket

__all__ = ["FETCH_S", "Fetcher", "check_image_url"]

MAX_URL = 2048
MAX_REDIRECTS = 3
FETCH_S = 10.0

AT_ONCE = 32
"""Fetches at the same time; the others wait, and the wait is not counted against them."""

_REDIRECTS = frozenset({301, 302, 303, 307, 308})


def check_image_url(text: str, hosts: frozenset[str] = frozenset()) -> URL:
    """*text* as a URL that may be asked for. Raises `ImageUnusable`.

    Says nothing of what a name resolves to. *hosts* are allowed whatever they are: `host`, or `host:port`.
    """
    if len(text) > MAX_URL:
        raise ImageUnusable(f"its url is over {MAX_URL} characters")
    if not text.isprintable() or " " in text or "\\" in text:
        raise ImageUnusable("its url has blanks, control characters or backslashes in it")
    try:
        url = URL(text)
        host, port = url.raw_host, url.port
    except ValueError:
        raise ImageUnusable("its url is not well-formed") from None
    if url.scheme not in ("http", "https") or not host or port is None:
        raise ImageUnusable("its url is neither http nor https")
    if url.raw_user is not None or url.raw_password is not None:
        raise ImageUnusable("its url has a name or password in it")
    if not _is_allowed(url, hosts):
        _check_host(host.rstrip(".").lower())
    return url


def _is_allowed(url: URL, hosts: frozenset[str]) -> bool:
    host = (url.raw_host or "").rstrip(".").lower()
    bracketed = f"[{host}]" if ":" in host else host
    return host in hosts or bracketed in hosts or f"{bracketed}:{url.port}" in hosts


def _check_host(host: str) -> None:
    last = host.rpartition(".")[2]
    if "%" in host or not host:
        raise ImageUnusable("its url is not well-formed")
    if host == "localhost" or host.endswith(".localhost"):
        raise ImageUnusable("its url points inside this network")
    is_address = ":" in host or last.isdigit() or last.startswith("0x")  # or what some resolvers take for one
    if is_address and not is_public(host):
        raise ImageUnusable("its url points inside this network")


class Fetcher:
    """Reads images from the web: http and https, few redirects, no cookies, no proxy, nobody's credentials.

    *hosts* may be fetched from though they are inside. *resolver* turns names into addresses; the system's if None.
    A fetch takes *seconds* at the most, redirects and all.
    """

    def __init__(
        self,
        max_bytes: int,
        hosts: frozenset[str],
        *,
        resolver: AbstractResolver | None = None,
        seconds: float = FETCH_S,
    ) -> None:
        self._max_bytes = max_bytes
        self._hosts = hosts
        self._resolver = resolver or _Names()
        self._seconds = seconds
        self._room = asyncio.Semaphore(AT_ONCE)

    async def aclose(self) -> None:
        """Nothing is fetched any more. A look-up that hangs is not waited for."""
        await self._resolver.close()

    async def fetch(self, url: str) -> bytes:
        """What *url* gives, unchecked. Raises `ImageUnusable`."""
        async with self._room:
            try:
                async with asyncio.timeout(self._seconds):
                    return await self._follow(check_image_url(url, self._hosts))
            except TimeoutError:
                raise ImageUnusable(f"its server took over {self._seconds:g} seconds") from None
            except (aiohttp.ClientError, OSError, ValueError) as exc:
                if any(isinstance(cause, InsideAddress) for cause in causes(exc)):
                    raise ImageUnusable("its url points inside this network") from None
                raise ImageUnusable("its server can't be reached, or breaks off") from exc

    async def _follow(self, url: URL) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            found = await self._get(url)
            if isinstance(found, bytes):
                return found
            try:
                target = url.join(URL(found))
            except ValueError:
                raise ImageUnusable("its server redirects to what is no url") from None
            url = check_image_url(str(target), self._hosts)
        raise ImageUnusable(f"its server redirects more than {MAX_REDIRECTS} times")

    async def _get(self, url: URL) -> bytes | str:
        """The body, or where to go instead."""
        connector = aiohttp.TCPConnector(
            resolver=self._resolver,
            use_dns_cache=False,
            force_close=True,
            socket_factory=any_socket if _is_allowed(url, self._hosts) else public_socket,
        )
        async with (
            aiohttp.ClientSession(
                connector=connector,
                connector_owner=True,
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                trust_env=False,
                timeout=aiohttp.ClientTimeout(total=None),
                headers={"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "hotdesk"},
            ) as session,
            session.get(url, allow_redirects=False) as response,
        ):
            if response.status in _REDIRECTS and "Location" in response.headers:
                return response.headers["Location"]
            if response.status != 200:
                raise ImageUnusable(f"its server answers {response.status}")
            return await self._read(response)

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        parts, size = [], 0
        async for part in response.content.iter_any():
            size += len(part)
            if size > self._max_bytes:
                raise ImageUnusable(f"it is over {self._max_bytes} bytes")
            parts.append(part)
        return b"".join(parts)


class _Names(AbstractResolver):
    """The system's resolver, in threads of its own: names that take long to look up, which a visitor can have as many
    of as they like, must not keep the host from finding its language model."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(4, "hotdesk-names")

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        found = await asyncio.get_running_loop().run_in_executor(
            self._threads, lambda: socket.getaddrinfo(host, port, family, socket.SOCK_STREAM)
        )
        return [
            ResolveResult(
                hostname=host,
                host=str(address[0]),
                port=int(address[1]),
                family=kind,
                proto=proto,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for kind, _, proto, _, address in found
            if not (len(address) > 3 and address[3])  # link-local: never public
        ]

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
