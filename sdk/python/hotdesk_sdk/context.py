"""What a plugin is given: `ctx` for its generation, `turn` for one message. The host implements these protocols."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, overload

from .messages import Json, Message, Reply

if TYPE_CHECKING:
    from .llm import Llm

__all__ = [
    "CallNext",
    "Conversation",
    "Ctx",
    "Http",
    "HttpResponse",
    "Kv",
    "Log",
    "Metric",
    "StoredReply",
    "Turn",
]

T = TypeVar("T")


class CallNext(Protocol):
    """Goes one layer further in; None when nobody answered. May be called once."""

    def __call__(self, turn: Turn | None = None, /) -> Awaitable[Reply | None]: ...


class Conversation(Protocol):
    """The conversation of a turn. What a turn changes here is stored with its reply, in one commit."""

    @property
    def id(self) -> str: ...
    @property
    def channel(self) -> str:
        """The plugin whose intake opened it; empty for HTTP and WebSocket."""

    locale: str | None
    assignee: str | None
    tags: list[str]
    state: dict[str, Json]
    """Lives as long as the conversation; JSON-able. Shared by all plugins: prefix your keys."""

    def hand_over(self, reason: str = "") -> None:
        """Ask for a human: the tag `handoff`, the *reason* in `state["handoff"]`, and `on_assigned` after the turn."""

    def close(self) -> None:
        """End it with this turn: state, tags and assignee go. Its record stays; a new message opens it again."""


class Turn(Protocol):
    """One message being answered."""

    @property
    def id(self) -> str:
        """The message's id."""

    @property
    def message(self) -> Message: ...

    text: str
    """The text as the plugins further in see it. A middleware may change it; the record keeps the original."""

    @property
    def conversation(self) -> Conversation: ...
    @property
    def attempt(self) -> int:
        """1, or more when the turn is run again after a rollback or a restart."""

    async def history(self, limit: int = 20) -> list[Message | StoredReply]:
        """The *limit* newest entries before this message, oldest first."""

    def stream(self, text: str) -> Awaitable[None]:
        """Send *text* as the next chunk, from `respond`. Await it to go no faster than the reader."""


class StoredReply(Protocol):
    """A reply as the record has it."""

    @property
    def id(self) -> str: ...
    @property
    def conversation(self) -> str: ...
    @property
    def seq(self) -> int: ...
    @property
    def to(self) -> str | None: ...
    @property
    def text(self) -> str: ...
    @property
    def plugin(self) -> str: ...
    @property
    def generation(self) -> int: ...
    @property
    def metadata(self) -> dict[str, Json]: ...
    @property
    def at(self) -> float: ...


class Kv(Protocol):
    """A plugin's own keys and JSON values, kept across reloads and restarts. Needs the capability `kv`."""

    async def get(self, key: str, default: Json = None) -> Json: ...
    async def set(self, key: str, value: Json) -> None: ...
    async def delete(self, key: str) -> None: ...
    async def keys(self, prefix: str = "") -> list[str]: ...


class HttpResponse(Protocol):
    """An HTTP answer, read whole."""

    @property
    def status(self) -> int: ...
    @property
    def headers(self) -> Mapping[str, str]: ...
    @property
    def body(self) -> bytes: ...
    def text(self) -> str: ...
    def json(self) -> Json: ...


class Http(Protocol):
    """HTTP to the hosts that were asked for and granted (`http:HOST`); any other raises `CapabilityDenied`."""

    async def request(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        json: Json = None,
        body: bytes | str | None = None,
        timeout: float = 10.0,
    ) -> HttpResponse: ...
    async def get(self, url: str, **options: Any) -> HttpResponse: ...
    async def post(self, url: str, **options: Any) -> HttpResponse: ...


class Log(Protocol):
    """Structured logging: an event and its fields. Plugin and generation are added by the host."""

    def debug(self, event: str, **fields: object) -> None: ...
    def info(self, event: str, **fields: object) -> None: ...
    def warning(self, event: str, **fields: object) -> None: ...
    def error(self, event: str, **fields: object) -> None: ...


class Metric(Protocol):
    """A Prometheus metric of this plugin."""

    def inc(self, amount: float = 1, **labels: str) -> None: ...
    def set(self, value: float, **labels: str) -> None: ...
    def observe(self, value: float, **labels: str) -> None: ...


class Ctx(Protocol):
    """What a generation has of the host. All that it got here is undone when the generation ends, newest first."""

    @property
    def plugin(self) -> str: ...
    @property
    def generation(self) -> int: ...
    @property
    def config(self) -> dict[str, Any]:
        """The manifest's `[config]` with the operator's `[plugins.NAME]` over it."""

    @property
    def log(self) -> Log: ...
    @property
    def kv(self) -> Kv: ...
    @property
    def llm(self) -> Llm:
        """The language models that the operator has set. Needs the capability `llm`."""

    @property
    def http(self) -> Http: ...

    async def send(self, conversation: str, text: str, *, metadata: dict[str, Json] | None = None) -> StoredReply:
        """Say something in a conversation outside a turn. It is on disk when this returns."""

    def task(self, coro: Coroutine[Any, Any, Any], name: str | None = None) -> Any:
        """Run *coro* beside the turns. It is cancelled when the generation ends; a failure is logged."""

    def every(self, seconds: float, fn: Callable[[], Awaitable[Any]]) -> None:
        """Call *fn* every *seconds*, never twice at once, from one generation at a time."""

    def metric(self, kind: str, name: str, help: str = "", labels: tuple[str, ...] = ()) -> Metric:
        """A metric `hotdesk_plugin_{plugin}_{name}`; *kind* is counter, gauge or histogram."""

    @overload
    async def enter(self, cm: AbstractAsyncContextManager[T]) -> T: ...
    @overload
    async def enter(self, cm: AbstractContextManager[T]) -> T: ...

    def defer(self, fn: Callable[[], Any]) -> None:
        """Call *fn* when the generation ends; it may be async."""

    def require(self, plugin: str) -> Any:
        """The module of a plugin named in `requires`, in the generation that serves beside this one."""
