"""Takes the port: one socket, or as many as there are workers to share it."""

from __future__ import annotations

import socket
import sys

from ..config import Config
from ..errors import ConfigError

__all__ = ["BACKLOG", "bind_port", "bind_shared_port"]

BACKLOG = 1024
"""Connections that wait to be taken, for each socket."""


def bind_port(config: Config) -> socket.socket:
    """The port for one process, before anything else is begun, so that one that is taken costs nothing.

    Nobody gets in yet. Raises `ConfigError`.
    """
    return _bind(config, config.port)


def bind_shared_port(config: Config, count: int) -> list[socket.socket]:
    """The port for *count* processes: a socket for each, among which the kernel spreads new connections.

    They listen from now on: whoever connects is queued until that socket's process takes it, so that nobody is refused
    while one is being replaced. Where the kernel does not spread (it does on Linux) it is one socket, *count* times.
    Raises `ConfigError` when anything listens there, another desk of the same user among it.
    """
    first = _bind(config, config.port, listen=True)
    if not sys.platform.startswith("linux") or not hasattr(socket, "SO_REUSEPORT"):
        return [first] * count
    # Only now: a first socket that shared its port from the beginning would share it with another desk's as well.
    first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    socks = [first]
    try:
        while len(socks) < count:
            socks.append(_bind(config, first.getsockname()[1], shared=True, listen=True))
    except BaseException:
        for sock in socks:
            sock.close()
        raise
    return socks


def _bind(config: Config, port: int, *, shared: bool = False, listen: bool = False) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
    except OSError as exc:
        raise ConfigError("host", config.host, "start", f"it is no address of this machine: {exc.strerror}") from exc
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(address)
        if listen:
            sock.listen(BACKLOG)
    except OSError as exc:
        sock.close()
        remedy = f"can't listen on {config.host}: {exc.strerror}; choose another with --port or HOTDESK_PORT"
        raise ConfigError("port", config.port, "start", remedy) from exc
    return sock
