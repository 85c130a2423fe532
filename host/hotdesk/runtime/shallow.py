"""How deep JSON may nest that is kept and shown: every reader of it, in any language, has a limit of its own."""

from __future__ import annotations

from typing import Any

__all__ = ["MAX_DEPTH", "is_shallow"]

MAX_DEPTH = 32


def is_shallow(value: Any, depth: int = MAX_DEPTH) -> bool:
    """Whether lists and dicts are nested at most *depth* deep."""
    if isinstance(value, dict):
        return depth > 0 and all(is_shallow(item, depth - 1) for item in value.values())
    if isinstance(value, list):
        return depth > 0 and all(is_shallow(item, depth - 1) for item in value)
    return True
