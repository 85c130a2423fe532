"""The toolchains of the plugin languages: `ensure()` of each module makes one available, or says why not."""

from __future__ import annotations

__all__ = ["Unavailable"]


class Unavailable(Exception):
    """A toolchain can't be had on this machine. The text has the reason and a remedy."""
