"""The host's errors, and the closed list of codes that a door may answer with.

Owns the hierarchy above the SDK's. A class per situation that somebody handles differently; each carries
what is at fault and builds its own text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hotdesk_sdk import HotdeskError, PluginError

__all__ = [
    "DOOR_ERRORS",
    "BackendError",
    "BackendUnavailable",
    "CallFailed",
    "CallTimeout",
    "ConfigError",
    "DataFolderHeld",
    "DoorError",
    "ImageUnusable",
    "LoadFailed",
    "StaleOwner",
    "TurnAborted",
    "UnknownPlugin",
    "describe",
]


def describe(exc: BaseException, limit: int = 500) -> str:
    """An exception in words, whatever it is: one of a plugin's may raise when it is asked for its text."""
    name = type(exc).__name__
    try:
        text = str(exc)
    except BaseException:  # even `sys.exit` in a `__str__` is only a text that could not be had
        text = "(it could not say why)"
    text = f"{name}: {text}" if text else name
    return text if len(text) <= limit else text[:limit] + "…"


class ConfigError(HotdeskError):
    """A setting that can't be used: its name, its value, where it came from, and what would be right."""

    def __init__(self, setting: str, value: object, source: str, remedy: str) -> None:
        self.setting = setting
        self.value = value
        super().__init__(f"setting '{setting}' is {value!r} ({source}): {remedy}")


class LoadFailed(PluginError):
    """A generation that did not come to serve. `step` is where it ended; `file` and `line` point into its source."""

    def __init__(
        self, plugin: str, step: str, problem: str, *, file: str | None = None, line: int | None = None
    ) -> None:
        self.step = step
        self.file = file
        self.line = line
        where = f" ({file}:{line})" if file and line else f" ({file})" if file else ""
        super().__init__(plugin, None, f"{problem}{where}")


class CallFailed(PluginError):
    """A call into a plugin that raised, or that gave what its hook may not give.

    `rerun` is set when the generation was in probation and is rolled back: True, or an awaitable that
    tells whether the rollback came about. The turn is then to be run again.
    """

    def __init__(self, plugin: str, generation: int, hook: str, problem: str) -> None:
        self.hook = hook
        self.rerun: Any = None
        self.public = f"plugin '{plugin}' failed; the log says why"
        """For visitors: no text of an exception, and no path."""
        super().__init__(plugin, generation, f"{hook} {problem}")


class CallTimeout(CallFailed):
    """A call into a plugin that took longer than its `timeout_ms`."""

    def __init__(self, plugin: str, generation: int, hook: str, timeout_ms: int) -> None:
        self.timeout_ms = timeout_ms
        super().__init__(plugin, generation, hook, f"took over {timeout_ms} ms")


class TurnAborted(HotdeskError):
    """Unwinds the onion of a turn that is to be refused or run again. Middleware can't stop it."""


class UnknownPlugin(HotdeskError):
    """A plugin name that nothing goes by."""

    def __init__(self, name: str, known: list[str]) -> None:
        self.name = name
        super().__init__(f"no plugin is called '{name}'; there are {', '.join(sorted(known)) or 'none'}")


class BackendError(HotdeskError):
    """The backend can't be used as it is: damaged, of a newer version, or of an unknown kind."""


class DataFolderHeld(BackendError):
    """Another host works in this data folder."""

    def __init__(self, folder: str, holder: str) -> None:
        super().__init__(
            f"the data folder {folder} is in use by another hotdesk ({holder}); stop it, or choose another with --data"
        )


class BackendUnavailable(BackendError):
    """The backend did not take a write or answer a read; it may later. Nothing of the request was kept.

    `unsure` is set where a connection broke with the request on its way: then it may have been kept.
    """

    def __init__(self, url: str, reason: str, *, unsure: bool = False) -> None:
        self.url = url
        self.reason = reason
        self.unsure = unsure
        super().__init__(f"backend {url}: {reason}")

    @property
    def told(self) -> str:
        """The reason as a visitor may read it: where a server is, and why it does not answer, is the operator's."""
        away = "the journal can't be reached now; the host's /readyz and log say why"
        if self.unsure:
            away = "the journal fell silent, and may have kept this; send it again with the same id"
        return away if self.url.partition("://")[0].startswith("redis") else self.reason


class MessageLost(BackendUnavailable):
    """A message that was accepted is not in the record: for a moment, as a server that was replaced and does not know
    it yet has an older one, or for ever, since the server's data were lost."""


class StaleOwner(BackendError):
    """A write of a worker that does not own the conversation any more: it was refused, and another's turn counts."""

    def __init__(self, url: str, conversation: str) -> None:
        self.conversation = conversation
        super().__init__(f"backend {url}: conversation {conversation!r} belongs to another worker now")


class ImageUnusable(HotdeskError):
    """An image that can't be shown to anyone. `reason` says why, in words that fit behind "the image: "."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


# `cancelled` is a conflict: the visitor's own wish stands against the answer. 499 says it, and is in no registry.
DOOR_ERRORS: dict[str, tuple[int, str]] = {
    "bad_http": (400, "the bytes are no HTTP/1.1, or a line of it is too long; the connection is closed"),
    "bad_json": (400, "the body or frame is not valid JSON (UTF-8)"),
    "bad_message": (400, "a field is missing, unknown, or of the wrong type"),
    "bad_parameter": (400, "a path or query parameter can't be used"),
    "unauthorized": (401, "a token is missing, wrong or expired"),
    "signature_invalid": (401, "a webhook's signature does not fit"),
    "forbidden": (403, "the token is for another conversation"),
    "origin_not_allowed": (403, "the page's origin is not in allowed_origins"),
    "not_found": (404, "no such path, plugin page or webhook"),
    "conversation_not_found": (404, "nothing was ever said in that conversation"),
    "plugin_not_found": (404, "no plugin goes by that name"),
    "method_not_allowed": (405, "the path has other methods; see the Allow header"),
    "conflict": (409, "the plugin's state does not allow that"),
    "cancelled": (409, "the visitor cancelled the turn; what was said so far is the reply"),
    "too_large": (413, "the body, frame, text or image is over its limit"),
    "unsupported_media_type": (415, "the body must be application/json"),
    "unprocessable": (422, "the plugin could not be loaded; the message says why"),
    "bad_attachment": (422, "an attachment can't be used; the message says which, and why"),
    "rate_limited": (429, "this sender sends too fast; see Retry-After"),
    "plugin_failed": (500, "the plugin behind this page or webhook failed"),
    "internal_error": (500, "a fault in hotdesk itself; the log says where"),
    "turn_refused": (503, "a plugin with on_failure=refuse failed, so the turn has no reply"),
    "stream_cut": (503, "the reply broke off; what was said so far is the reply"),
    "dead_letter": (503, "the message ended its worker again and again; it is kept for the operator"),
    "llm_unavailable": (503, "no language model could be reached"),
    "llm_refused": (503, "the language model did not take the message"),
    "llm_timeout": (503, "the language model took too long"),
    "overloaded": (503, "too many turns at once; see Retry-After"),
    "backend_unavailable": (503, "the journal can't be written or read now; see Retry-After"),
    "stopping": (503, "the host is stopping; come back"),
}
"""Every code that a door answers with: its HTTP status and what it says. Closed and documented in host/README.md."""


@dataclass
class DoorError(Exception):
    """What a door answers instead of a result. `code` is a key of `DOOR_ERRORS`."""

    code: str
    message: str
    hint: str | None = None
    retry_after_s: int | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__(self.message)

    @property
    def status(self) -> int:
        return DOOR_ERRORS[self.code][0]

    def body(self) -> dict[str, object]:
        """The one error shape, without the frame around it."""
        body: dict[str, object] = {"code": self.code, "message": self.message}
        if self.hint:
            body["hint"] = self.hint
        return body
