"""What happens to plugins, told to whoever listens: the log, the admin stream, the terminal."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from ..logs import Logger, get_log

__all__ = ["Events"]

_LEVELS = {
    "plugin_failed": "error",
    "plugin_rolled_back": "warning",
    "plugin_leftover": "warning",
    "push_refused": "error",
    "loop_stalled": "warning",
    "breaker_opened": "warning",
    "capability_denied": "warning",
    "worker_died": "error",
    "restart_failed": "error",
}


class Events:
    """Keeps the last 200 events and hands each to its listeners. A listener that raises is dropped.

    *log* is None where a listener shows them to people already.
    """

    def __init__(self, log: Logger | None) -> None:
        self._log = log
        self._listeners: list[Callable[[dict[str, Any]], None]] = []
        self.recent: deque[dict[str, Any]] = deque(maxlen=200)

    def listen(self, listener: Callable[[dict[str, Any]], None]) -> Callable[[], None]:
        """Have *listener* called with every event from now on; returns how to stop it."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener) if listener in self._listeners else None

    def tell(self, kind: str, **fields: Any) -> None:
        event = {"kind": kind, **fields, "at": time.time()}
        self.recent.append(event)
        if self._log is not None:
            getattr(self._log, _LEVELS.get(kind, "info"))(kind, **fields)
        for listener in list(self._listeners):
            try:
                listener(event)
            except Exception as exc:  # a listener's fault is not the plugin's
                get_log().error("listener_failed", problem=repr(exc))
                self._listeners.remove(listener)
