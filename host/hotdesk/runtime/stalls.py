"""Who holds the event loop: a thread that listens to the loop's heartbeat and looks at its stack when it is late.

asyncio's own slow-callback log does not work with uvloop, and speaks only once the callback has returned.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import FrameType

from .python import PREFIX

__all__ = ["StallWatch"]

BEAT_S = 0.025

_looking = threading.Lock()


class StallWatch:
    """Reports once for each time that the loop was held longer than *limit_s*: the module at fault, and the stack.

    `report(module_name_or_None, stack, seconds_so_far)` is called on the loop, once it runs again.
    """

    def __init__(
        self, limit_s: float, report: Callable[[str | None, str, float], None], lag: Callable[[float], None]
    ) -> None:
        self._limit_s = limit_s
        self._report = report
        self._lag = lag
        self._beat_at = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hotdesk-stalls", daemon=True)

    def start(self) -> None:
        """On the loop that is to be watched."""
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        self._handle = self._loop.call_soon(self._beat)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._handle.cancel()
        self._thread.join(1.0)

    def _beat(self) -> None:
        now = time.monotonic()
        self._lag(max(0.0, now - self._beat_at - BEAT_S))
        self._beat_at = now
        self._handle = self._loop.call_later(BEAT_S, self._beat)

    def _watch(self) -> None:
        reported = 0.0
        while not self._stop.wait(BEAT_S):
            beat, now = self._beat_at, time.monotonic()
            if now - beat < self._limit_s + BEAT_S or beat == reported:
                continue
            frame = _frame_of(self._loop_thread)
            if frame is None:
                continue
            reported = beat
            module, stack = _culprit(frame), "".join(traceback.format_stack(frame, limit=12))
            del frame
            try:
                self._loop.call_soon_threadsafe(self._report, module, stack, now - beat)
            except RuntimeError:
                return


def _frame_of(thread: int) -> FrameType | None:
    """Where *thread* is, and no collection meanwhile.

    Python 3.11 holds a lock of the runtime in there: a collection that lets another thread run, which a finalizer is
    enough for, stops the process for good when that thread starts one (python/cpython#106883). Goes with 3.11.
    """
    with _looking:
        collects = gc.isenabled()
        gc.disable()
        try:
            return sys._current_frames().get(thread)
        finally:
            if collects:
                gc.enable()


def _culprit(frame: FrameType | None) -> str | None:
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith(PREFIX):
            return str(name).partition(".")[0]
        frame = frame.f_back
    return None
