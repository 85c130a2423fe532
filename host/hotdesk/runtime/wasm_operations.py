"""What the host does on the loop for a guest that asks: messages, keys and values, models, the network."""

from __future__ import annotations

import base64
import time
from typing import Any

import aiohttp
import msgspec

from hotdesk_sdk import CapabilityDenied, LlmError, ScopeClosed

from ..errors import describe
from .capabilities import MAX_VALUE_BYTES
from .scope import Context
from .wasm_calls import GuestCall
from .wasm_imports import Budget, decoded, failure

__all__ = ["Operations", "as_text"]

HTTP_S = 10.0
SEND_RATE, SEND_BURST = 5.0, 50.0
"""Messages a second of one generation, outside its answers, and how many at once."""

KV_RATE, KV_BURST = 256 * 1024.0, 4 * 1024 * 1024.0
"""Bytes a second that one generation writes, and how many at once."""

COMPLETE_OPTIONS = ("messages", "model", "temperature", "max_tokens", "tools")
NOT_FOR_GUESTS = frozenset(
    ["host", "connection", "keep-alive", "upgrade", "transfer-encoding", "content-length", "te", "trailer", "expect"]
)
"""Headers by which a request could become another than the one that was granted."""


class Operations:
    """The host functions of one generation that need the loop, within its grants and its budgets."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._send_budget = Budget(SEND_RATE, SEND_BURST)
        self._kv_budget = Budget(KV_RATE, KV_BURST)

    async def serve(self, call: GuestCall, operation: str, given: tuple[Any, ...]) -> Any:
        """The answer of a host function. Whatever fails is a value of the contract."""
        try:
            if operation == "llm.complete":
                return await self._complete(call, given[0])
            return True, await _OPERATIONS[operation](self, call, *given)
        except CapabilityDenied as exc:
            call.denied = exc.with_traceback(None)
            return failure("denied", exc.capability)
        except PermissionError as exc:
            return failure("denied", str(exc))
        except ScopeClosed as exc:
            return failure("unavailable", str(exc))
        except LlmError as exc:
            return failure("timeout" if exc.code == "llm_timeout" else "unavailable", exc.public)
        except (TooLarge, OverflowError) as exc:
            return failure("too-large", str(exc))
        except (ValueError, TypeError, RecursionError, msgspec.MsgspecError) as exc:
            return failure("invalid", describe(exc))
        except TimeoutError as exc:
            return failure("timeout", str(exc) or "the other side took too long")
        except OSError as exc:
            return failure("unavailable", describe(exc))
        except Exception as exc:  # the fault wall of a host function: the guest gets an error, the log the rest
            self._ctx.log.error("host_function_failed", function=operation, problem=describe(exc))
            return failure("other", "the host failed; its log says why")

    async def _complete(self, call: GuestCall, request: str) -> Any:
        asked = decoded(request)
        if not isinstance(asked, dict) or (unknown := asked.keys() - COMPLETE_OPTIONS):
            which = f", not {min(unknown)}" if isinstance(asked, dict) else ""
            return failure("invalid", f"a request is an object of {', '.join(COMPLETE_OPTIONS)}{which}")
        messages = asked.pop("messages", None)
        if not isinstance(messages, list):
            return failure("invalid", "messages is a list, as in the OpenAI chat protocol")
        call.resting = True  # the model's time is not the guest's: it has clocks of its own
        began = time.monotonic()
        try:
            completion = await self._ctx.llm.complete(messages, **asked)
        finally:
            call.deadline += time.monotonic() - began
            call.resting = False
        return True, msgspec.json.encode(completion).decode()

    async def _emit(self, call: GuestCall, text: str) -> None:
        assert call.emit is not None
        call.resting = True  # a slow reader's time is not the guest's
        try:
            await call.emit(text)
        finally:
            call.deadline = time.monotonic() + call.allowance  # as for Python, a chunk begins the time anew
            call.resting = False

    async def _history(self, call: GuestCall, limit: int) -> str:
        if call.turn is None:
            raise ValueError("there is no turn here, so no conversation")
        return msgspec.json.encode(await call.turn.history(min(limit, 1000))).decode()

    async def _send(self, call: GuestCall, conversation: str, text: str) -> str:
        if not self._send_budget.take():
            raise TooLarge(f"it sends more than {SEND_RATE:g} messages a second")
        own = call.turn is not None and conversation == call.turn.message.conversation
        try:
            return str((await self._ctx.send_for_guest(conversation, text, own=own)).id)
        except LookupError as exc:
            raise ValueError(str(exc)) from exc  # there is no such conversation

    async def _kv_get(self, call: GuestCall, key: str) -> str | None:
        value = await self._ctx.kv.get(key, _MISSING)
        return None if value is _MISSING else msgspec.json.encode(value).decode()

    async def _kv_set(self, call: GuestCall, key: str, value: str) -> None:
        if len(value) > MAX_VALUE_BYTES:
            raise TooLarge(f"a value has at most {MAX_VALUE_BYTES} bytes")
        if not self._kv_budget.take(len(key) + len(value.encode())):
            raise TooLarge(f"it writes more than {KV_RATE / 1024:g} KiB a second")
        await self._ctx.kv.set(key, decoded(value))

    async def _kv_delete(self, call: GuestCall, key: str) -> None:
        await self._ctx.kv.delete(key)

    async def _kv_keys(self, call: GuestCall, prefix: str) -> list[str]:
        return await self._ctx.kv.keys(prefix)

    async def _fetch(self, call: GuestCall, method: str, url: str, headers: str, body: str) -> tuple[Any, ...]:
        left = max(0.05, min(HTTP_S, call.deadline - time.monotonic()))
        named = msgspec.json.decode(headers or "{}", type=dict[str, str])
        if method.upper() == "CONNECT" or any(
            name.strip().lower() in NOT_FOR_GUESTS or name.lower().startswith("proxy-") for name in named
        ):
            raise ValueError("CONNECT, and headers such as Host and Connection, are not for guests")
        try:
            found = await self._ctx.http_for_guests.request(method, url, headers=named, body=body or None, timeout=left)
        except aiohttp.ClientError as exc:
            if isinstance(exc, ValueError | OSError):
                raise
            raise ConnectionError(describe(exc)) from exc  # it broke off, or does not speak HTTP
        text, extra = as_text(found.body)
        shown = {name: value.encode("utf-8", "replace").decode() for name, value in found.headers.items()}
        return found.status, msgspec.json.encode(shown).decode(), text, extra


class TooLarge(ValueError):
    """More than a limit of a host function allows."""


_MISSING = object()

_OPERATIONS: dict[str, Any] = {
    "emit": Operations._emit,
    "base.history": Operations._history,
    "base.send": Operations._send,
    "kv.get": Operations._kv_get,
    "kv.set": Operations._kv_set,
    "kv.delete": Operations._kv_delete,
    "kv.keys": Operations._kv_keys,
    "http.fetch": Operations._fetch,
}


def as_text(body: bytes) -> tuple[str, str]:
    """A body as the contract has it: text, or base64 with a note in `extra`."""
    try:
        return body.decode(), ""
    except UnicodeDecodeError:
        return base64.b64encode(body).decode(), '{"base64":true}'
