"""Where a guest's thread runs: on the loop's core while its calls are short, anywhere once one is not.

A call that is handed to a thread on another core wakes that core up, and the loop's again with the answer: 60 to 70 us
on a virtual machine, against 6 where both threads share a core and one waits for the other anyway. Linux only; else
the scheduler decides.
"""

from __future__ import annotations

import ctypes
import os
import threading

__all__ = ["Nearness"]


class Nearness:
    """Of one thread, which makes it. The other methods are the loop's."""

    __slots__ = ("_core", "_thread")

    def __init__(self) -> None:
        self._thread = threading.get_native_id()
        self._core = -1

    def stay(self) -> None:
        """Run where the caller runs: it is about to wait."""
        core = _current_core()
        if core != self._core and core >= 0:
            self._core = core
            _allow(self._thread, {core})

    def leave(self) -> None:
        """Run anywhere, and not here just now: the caller goes on, and should have its core to itself."""
        if self._core < 0:
            return
        self._core = -1
        if elsewhere := _CORES - {_current_core()}:
            _allow(self._thread, elsewhere)  # which moves it at once
        _allow(self._thread, _CORES)


def _allow(thread: int, cores: set[int] | frozenset[int]) -> None:
    try:
        os.sched_setaffinity(thread, cores)
    except OSError:
        pass  # it has ended, or the cores that may be used have changed: the scheduler knows best


def _no_core() -> int:
    return -1


def _find() -> tuple[frozenset[int], object]:
    if not hasattr(os, "sched_setaffinity"):
        return frozenset(), _no_core
    function = getattr(ctypes.CDLL(None), "sched_getcpu", None)
    return frozenset(os.sched_getaffinity(0)), function or _no_core


_CORES, _getcpu = _find()


def _current_core() -> int:
    return _getcpu()  # type: ignore[operator, no-any-return]
