"""What a guest may call. Runs on the guest's thread; what needs the loop is asked of it, and the guest waits.

Every function gives a value of the contract's type. A failure is a value too: `(False, (case, text))`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from .wasm import Instance

__all__ = ["IMPORTED", "LogBudget", "failure"]

MAX_STATE_BYTES = 64 * 1024
"""Of one value of a conversation's state."""

MAX_KEY_CHARS = 512
MAX_LOG_CHARS = 4096
LOG_RATE, LOG_BURST = 20.0, 100.0
"""Lines a second of one generation, and how many at once."""

FINE = (True, None)


def failure(case: str, text: str) -> tuple[bool, Any]:
    """The error *case* of the contract."""
    return False, (case, text)


class LogBudget:
    """How many lines a generation may still log. A token bucket; says how many were left out when it has room again."""

    def __init__(self) -> None:
        self._left = LOG_BURST
        self._at = time.monotonic()
        self.left_out = 0

    def take(self) -> bool:
        now = time.monotonic()
        self._left = min(LOG_BURST, self._left + (now - self._at) * LOG_RATE)
        self._at = now
        if self._left < 1:
            self.left_out += 1
            return False
        self._left -= 1
        return True


def log(instance: Instance, level: str, event: str, fields: str) -> None:
    owner = instance.owner
    budget = owner.log_budget
    if not budget.take():
        return
    if budget.left_out:
        left_out, budget.left_out = budget.left_out, 0
        owner.log.warning("guest_log_lines_left_out", count=left_out, allowed_per_s=LOG_RATE)
    found: Any = None
    if fields:
        try:
            found = msgspec.json.decode(fields[:MAX_LOG_CHARS])
        except (msgspec.DecodeError, RecursionError):
            found = {"fields": fields[:MAX_LOG_CHARS]}
    named = (
        {f"guest_{key}" if key in _TAKEN else key: value for key, value in found.items()}
        if (isinstance(found, dict))
        else ({} if found is None else {"fields": found})
    )
    turn = instance.call.turn if instance.call is not None else None
    if turn is not None:
        named |= {"conversation": turn.message.conversation, "message": turn.id}
    getattr(owner.log, level)(event[:MAX_LOG_CHARS], **named)


_TAKEN = frozenset(
    {"event", "level", "plugin", "generation", "conversation", "message", "timestamp", "exc_info", "stack_info"}
)


def config(instance: Instance) -> str:
    return str(instance.owner.config_text)


def time_left(instance: Instance) -> int:
    call = instance.call
    return max(0, min(2**32 - 1, int((call.deadline - time.monotonic()) * 1000))) if call is not None else 0


def emit(instance: Instance, text: str) -> Any:
    call = instance.call
    if call is None or call.emit is None:
        return failure("invalid", "emit works while a bot responds")
    return instance.ask("emit", text) if text else FINE


def _state(instance: Instance) -> dict[str, Any] | None:
    turn = instance.call.turn if instance.call is not None else None
    return None if turn is None else turn.conversation.state


_NO_TURN = failure("invalid", "there is no turn here, so no conversation")


def state_get(instance: Instance, key: str) -> Any:
    state = _state(instance)
    if state is None:
        return _NO_TURN
    return True, (msgspec.json.encode(state[key]).decode() if key in state else None)


def state_set(instance: Instance, key: str, value: str | None) -> Any:
    state = _state(instance)
    if state is None:
        return _NO_TURN
    if not 0 < len(key) <= MAX_KEY_CHARS:
        return failure("invalid", f"a key is a text of 1 to {MAX_KEY_CHARS} characters")
    if value is None:
        state.pop(key, None)
        return FINE
    if len(value) > MAX_STATE_BYTES:
        return failure("too-large", f"a value of the state has at most {MAX_STATE_BYTES} bytes")
    try:
        state[key] = msgspec.json.decode(value)
    except (msgspec.DecodeError, RecursionError) as exc:
        return failure("invalid", f"the value is not JSON: {exc}")
    return FINE


def _asks(operation: str) -> Callable[..., Any]:
    def ask(instance: Instance, *arguments: Any) -> Any:
        return instance.ask(operation, *arguments)

    return ask


IMPORTED: Mapping[str, Callable[..., Any]] = {
    "base.log": log,
    "base.config": config,
    "base.time-left": time_left,
    "base.emit": emit,
    "base.state-get": state_get,
    "base.state-set": state_set,
    **{name: _asks(name) for name in ("base.history", "base.send", "kv.get", "kv.set", "kv.delete", "kv.keys")},
    **{name: _asks(name) for name in ("llm.complete", "http.fetch")},
}
"""By "interface.function" of the contract."""
