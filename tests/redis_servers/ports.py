"""Ports that a server can leave and come back to."""

from __future__ import annotations

import secrets
import socket
from itertools import count
from pathlib import Path

__all__ = ["free_port"]

LOWEST = 20000
EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")

# Not by `random`: what shuffles the tests seeds that alike in two runs side by side, which would want the same ports.
_turn = count(secrets.randbelow(2**20))


def free_port(address: str = "127.0.0.1") -> int:
    """A port of *address* that was free just now; never the same one twice in a row.

    It lies below those that the system gives to outgoing connections. Among those, a client that tries again and again
    to reach a dead server sooner or later gets the server's port as its own and is connected to itself.
    """
    end = _first_ephemeral()
    for _ in range(end - LOWEST):
        port = LOWEST + next(_turn) % (end - LOWEST)
        with socket.socket() as probe:
            try:
                probe.bind((address, port))
            except OSError:
                continue
            return port
    raise RuntimeError(f"no port of {address} between {LOWEST} and {end} is free")


def _first_ephemeral() -> int:
    try:
        return max(int(EPHEMERAL.read_text().split()[0]), LOWEST + 1000)
    except OSError:
        return 32768
