"""The admin API as a few typed calls, and its failures as sentences that say what to do.

Owns the wire; what the answers look like on a screen is `plugins.py`. Every failure is a `ClientFailed`,
which click prints and turns into the exit code.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import AsyncIterator
from types import TracebackType
from typing import IO, Any, Literal, Self, TypeVar
from urllib.parse import quote

import aiohttp
import click
import msgspec

__all__ = [
    "DEFAULT_URL",
    "Action",
    "AdminClient",
    "ClientFailed",
    "Elsewhere",
    "HostAbsent",
    "Listing",
    "OnHost",
    "Plugin",
    "PluginFailure",
    "UrlInvalid",
    "Worker",
    "no_host",
    "refusal",
]

DEFAULT_URL = "http://127.0.0.1:8080"

# A load that waits for a slow setup() is still an answer to come; a host that says nothing for longer is stuck.
TIMEOUT_S = 60.0

T = TypeVar("T")

Action = Literal["reload", "enable", "disable", "rollback"]


class ClientFailed(click.ClickException):
    """A client command that cannot go on: one sentence, and below it what to do. Exit code 1."""

    def __init__(self, problem: str, hint: str = "", *, code: str = "") -> None:
        super().__init__(problem)
        self.hint = hint
        self.code = code

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"{click.style('Error:', fg='red', bold=True)} {self.message}", file=file, err=file is None)
        if self.hint:
            click.echo(click.style(f"  {self.hint}", dim=True), file=file, err=file is None)


class HostAbsent(ClientFailed):
    """Nothing answers at the URL, or nothing that is hotdesk."""

    exit_code = 3


class UrlInvalid(ClientFailed):
    """The URL is none."""

    exit_code = 2


class Capabilities(msgspec.Struct, frozen=True):
    asked: tuple[str, ...] = ()
    granted: tuple[str, ...] = ()


class PluginFailure(msgspec.Struct, frozen=True):
    """Why the last change of a plugin does not serve."""

    message: str = ""
    file: str | None = None
    line: int | None = None
    step: str | None = None
    at: float | str | None = None


class Kept(msgspec.Struct, frozen=True):
    """A generation that `rollback` can return to."""

    generation: int
    version: str = ""
    hash: str = ""
    at: float | str | None = None


class Pushed(msgspec.Struct, frozen=True):
    """The newest version that was pushed for all hosts."""

    hash: str = ""
    version: str = ""
    at: float = 0.0
    by: str = ""
    removed: bool = False


class OnHost(msgspec.Struct, frozen=True):
    """How one of several hosts stands to a plugin."""

    host: str
    workers: int = 1
    stand: str | None = None
    why: str = ""
    state: str = ""
    generation: int | None = None
    version: str | None = None
    hash: str = ""
    lags: bool = False


class Elsewhere(msgspec.Struct, frozen=True):
    """A plugin that the host which answers does not have."""

    name: str
    raw: dict[str, Any]
    pushed: Pushed | None = None
    hosts: tuple[OnHost, ...] = ()


class Plugin(msgspec.Struct, frozen=True):
    """One plugin as the host reports it; `raw` is the report itself, with what is not named here."""

    name: str
    state: str
    raw: dict[str, Any]
    enabled: bool = True
    generation: int | None = None
    version: str | None = None
    source: str | None = None
    order: int | None = None
    order_from: str | None = None
    hooks: tuple[str, ...] = ()
    component: dict[str, Any] | None = None
    capabilities: Capabilities = Capabilities()
    requires: tuple[str, ...] = ()
    waiting_for: str | None = None
    pending: bool = False
    breaker: str = "closed"
    calls: int = 0
    failures: int = 0
    last_failure: dict[str, Any] | None = None
    error: PluginFailure | None = None
    receipt: dict[str, Any] | None = None
    kept: tuple[Kept, ...] = ()
    leftovers: tuple[str, ...] = ()
    config: dict[str, Any] = {}
    workers: tuple[dict[str, Any], ...] = ()
    pushed: Pushed | None = None
    hosts: tuple[OnHost, ...] = ()


class Listing(msgspec.Struct, frozen=True):
    """All plugins: those of the host that answers, and those that only others have or should have."""

    plugins: list[Plugin]
    elsewhere: list[Elsewhere]


class Worker(msgspec.Struct, frozen=True):
    """One worker process as the host reports it."""

    worker: int
    pid: int
    state: str
    since: float | None = None
    connections: int | None = None
    turns: int | None = None
    restarts: int = 0


class RollReport(msgspec.Struct, frozen=True):
    """How far the last restart of all workers is."""

    number: int = 0
    state: str = "none"
    replaced: int = 0
    message: str = ""


class WorkersReport(msgspec.Struct, frozen=True):
    """All workers; `restart` is None where the host is one process."""

    workers: tuple[Worker, ...]
    raw: dict[str, Any]
    restart: RollReport | None = None


class AdminClient:
    """A session with the admin API at *url*. Use it as an async context manager."""

    def __init__(self, url: str, token: str | None) -> None:
        self.url = url.rstrip("/")
        self._token = token
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=TIMEOUT_S)
        self._session = aiohttp.ClientSession(headers=headers, timeout=timeout)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def plugins(self) -> list[Plugin]:
        """All plugins that the host knows, in its order."""
        return (await self.list_plugins()).plugins

    async def list_plugins(self) -> Listing:
        """All plugins that the host knows, in its order, and those that it knows other hosts to have."""
        answer = await self._call("GET", "/admin/plugins")
        plugins = [self._read(item, Plugin) for item in answer.get("plugins", ())]
        return Listing(plugins, [self._read(item, Elsewhere) for item in answer.get("elsewhere", ())])

    async def plugin(self, name: str) -> Plugin:
        """One plugin with everything there is to know about it."""
        return self._read(await self._about(name, "GET", f"/admin/plugins/{quote(name, safe='')}"), Plugin)

    async def act(self, name: str, action: Action) -> Plugin:
        """Do *action* to a plugin and return how it stands after that."""
        return self._read(await self._about(name, "POST", f"/admin/plugins/{quote(name, safe='')}/{action}"), Plugin)

    async def workers(self) -> WorkersReport:
        """All worker processes, and how the last restart went."""
        raw = await self._call("GET", "/admin/workers")
        try:
            return msgspec.convert({**raw, "raw": raw}, WorkersReport)
        except msgspec.ValidationError as exc:
            raise _not_hotdesk(self.url, f"its answer is not understood: {exc}") from exc

    async def restart(self) -> dict[str, Any]:
        """Have all workers replaced: the number of that restart in `restart`, and whether it begins in `status`."""
        return await self._call("POST", "/admin/restart")

    async def dead_letters(self) -> dict[str, Any]:
        """All dead letters, below `dead_letters`."""
        return await self._call("GET", "/admin/dead-letters")

    async def dead_letter(self, conversation: str, seq: int) -> dict[str, Any]:
        """One dead letter and its message."""
        return await self._call("GET", f"/admin/dead-letters/{quote(conversation, safe='')}/{seq}")

    async def requeue(self, conversation: str, seq: int) -> dict[str, Any]:
        """Have a dead letter answered once more."""
        return await self._call("POST", f"/admin/dead-letters/{quote(conversation, safe='')}/{seq}/requeue")

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """Every load, swap, failure and receipt from now on, until the host goes away."""
        try:
            async with self._open().get(
                f"{self.url}/admin/events", timeout=aiohttp.ClientTimeout(total=None, sock_connect=5)
            ) as response:
                if response.status != 200:
                    raise refusal(self.url, response.status, await response.read(), token_given=bool(self._token))
                async for line in response.content:
                    if line.startswith(b"data:"):
                        yield msgspec.json.decode(line[5:], type=dict[str, Any])
        except (aiohttp.ClientError, TimeoutError, OSError) as exc:
            raise no_host(self.url, exc) from exc

    async def _about(self, name: str, method: str, path: str) -> dict[str, Any]:
        """A call about one plugin; if the host does not know it, the failure lists those that it knows."""
        try:
            return await self._call(method, path)
        except ClientFailed as failed:
            if failed.code != "plugin_not_found":
                raise
            known = sorted(plugin.name for plugin in await self.plugins())
        raise _unknown_plugin(name, known)

    async def _call(self, method: str, path: str) -> dict[str, Any]:
        try:
            async with self._open().request(method, self.url + path) as response:
                body = await response.read()
                status = response.status
        except (aiohttp.ClientError, TimeoutError, OSError) as exc:
            raise no_host(self.url, exc) from exc
        if status >= 400:
            raise refusal(self.url, status, body, token_given=bool(self._token))
        try:
            return msgspec.json.decode(body, type=dict[str, Any])
        except msgspec.DecodeError as exc:
            raise _not_hotdesk(self.url, f"its answer is not hotdesk's: {exc}") from exc

    def _read(self, raw: dict[str, Any], kind: type[T]) -> T:
        try:
            return msgspec.convert({**raw, "raw": raw}, kind)
        except msgspec.ValidationError as exc:
            raise _not_hotdesk(self.url, f"its answer is not understood: {exc}") from exc

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("AdminClient is used outside its `async with`")
        return self._session


def no_host(url: str, cause: BaseException) -> ClientFailed:
    """The failure for a URL that nothing answers at."""
    if isinstance(cause, aiohttp.InvalidURL | aiohttp.NonHttpUrlClientError):
        return UrlInvalid(f"{url!r} is not a URL of a host", f"It looks like {DEFAULT_URL} (--url, HOTDESK_URL).")
    if isinstance(cause, TimeoutError):
        problem = f"the host at {url} does not answer in time"
    elif isinstance(cause, aiohttp.ClientConnectorError):
        problem = f"no host answers at {url} ({_os_reason(cause.os_error)})"
    else:
        problem = f"the connection to {url} broke: {cause or type(cause).__name__}"
    return HostAbsent(problem, "Start one with `hotdesk run`, or name it with --url or HOTDESK_URL.")


def _os_reason(error: OSError) -> str:
    # asyncio writes its own "Connect call failed" over what the system said; the number is the system's.
    return os.strerror(error.errno).lower() if error.errno and error.errno > 0 else str(error.strerror or error)


def refusal(url: str, status: int, body: bytes, *, token_given: bool) -> ClientFailed:
    """The failure for an answer of 400 or more, in the host's own words where it has some."""
    try:
        error = msgspec.json.decode(body)["error"]
        code, message, hint = str(error["code"]), str(error["message"]), str(error.get("hint") or "")
    except (msgspec.DecodeError, KeyError, TypeError, AttributeError):
        return _not_hotdesk(url, f"it answered {status} and nothing that hotdesk would say")
    if status == 401 and token_given:
        return ClientFailed(
            f"the host at {url} does not know this admin token",
            "Give the one that its first start showed: --token or HOTDESK_ADMIN_TOKEN.",
            code=code,
        )
    if status == 401:
        return ClientFailed(
            f"the host at {url} wants its admin token",
            "Its first start showed it; give it with --token or HOTDESK_ADMIN_TOKEN.",
            code=code,
        )
    return ClientFailed(message, hint, code=code)


def _unknown_plugin(name: str, known: list[str]) -> ClientFailed:
    close = difflib.get_close_matches(name, known, n=1)
    listed = f"The host knows: {', '.join(known)}." if known else "The host knows no plugin at all."
    hint = f"Did you mean {close[0]}? {listed}" if close else listed
    return ClientFailed(f"there is no plugin '{name}'", hint, code="plugin_not_found")


def _not_hotdesk(url: str, what: str) -> ClientFailed:
    return HostAbsent(f"what answers at {url} is no hotdesk host: {what}", "Look at --url or HOTDESK_URL.")
