"""What a guest may call. Runs on the guest's thread; what needs the loop is asked of it, and the guest waits.

Every function gives a value of the contract's type. A failure is a value too: `(False, (case, text))`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from .shallow import MAX_DEPTH, is_shallow
from .wasm_calls import Stopped

if TYPE_CHECKING:
    from .wasm import Instance

__all__ = ["IMPORTED", "LOG_BURST", "LOG_RATE", "Budget", "decoded", "failure"]

MAX_STATE_BYTES = 64 * 1024
"""Of one value of a conversation's state."""

MAX_STATE_TOTAL = 256 * 1024
"""What a conversation's state may have before a turn, and what components add to it in one."""

MAX_KEY_CHARS = 512
MAX_LOG_CHARS = 4096
LOG_RATE, LOG_BURST = 20.0, 100.0
"""Lines a second of one generation, and how many at once."""

FINE = (True, None)


def failure(case: str, text: str) -> tuple[bool, Any]:
    """The error *case* of the contract."""
    return False, (case, text)


class Budget:
    """How much of something a generation may still have: *burst* at once, and *rate* more each second."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = self._left = burst
        self._at = time.monotonic()
        self.left_out = 0
        """How often there was none left, since somebody set it to 0."""

    def take(self, amount: float = 1.0) -> bool:
        now = time.monotonic()
        self._left = min(self._burst, self._left + (now - self._at) * self._rate)
        self._at = now
        if self._left < amount:
            self.left_out += 1
            return False
        self._left -= amount
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
    getattr(owner.log, level)(_printable(event[:MAX_LOG_CHARS]), **{_printable(key): one for key, one in named.items()})


_TAKEN = frozenset(
    {"event", "self", "level", "plugin", "generation", "conversation", "message", "timestamp", "exc_info", "stack_info"}
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


def _printable(text: str) -> str:
    """*text* with what could forge a line, or move a terminal's cursor, written out."""
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def decoded(text: str) -> Any:
    """JSON that is going to be kept. Raises `ValueError`, also for what nests too deeply for others to read."""
    value = msgspec.json.decode(text)
    if not is_shallow(value):
        raise ValueError(f"it nests deeper than {MAX_DEPTH}")
    return value


def _state(instance: Instance) -> dict[str, Any] | None:
    call = instance.call
    if call is None or call.turn is None:
        return None
    if call.cancelled:
        raise Stopped
    state = call.turn.conversation.state
    return state if isinstance(state, dict) else None


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
    size = len(value.encode()) + len(key)
    if size > MAX_STATE_BYTES:
        return failure("too-large", f"a value of the state has at most {MAX_STATE_BYTES} bytes")
    assert instance.call is not None
    turn = instance.call.turn
    if len(turn.record.state) + turn.conversation.set_by_guests + size > MAX_STATE_TOTAL:
        return failure("too-large", f"a conversation's state has at most {MAX_STATE_TOTAL} bytes from components")
    try:
        state[key] = decoded(value)
    except (ValueError, RecursionError) as exc:
        return failure("invalid", f"the value is not JSON: {exc}")
    turn.conversation.set_by_guests += size
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
