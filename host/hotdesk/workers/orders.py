"""What a supervisor and a worker say to each other, over a socket pair that the worker inherits.

First the orders, once. Then lines of JSON both ways, until either end is gone: a worker without a supervisor stops.
"""

from __future__ import annotations

import pickle
import socket
from typing import Any

import msgspec

from ..app import Host
from ..config import Config
from ..web.access import Keys
from ..web.seat import Joining
from ..web.siblings import DeskState

__all__ = ["LINE_LIMIT", "Greeting", "Line", "Orders", "decode_line", "encode_line", "pack_orders", "read_orders"]

LINE_LIMIT = 16 * 1024 * 1024
"""Bytes of one line; an event may have a plugin's whole traceback in it."""


class Orders(msgspec.Struct, frozen=True):
    """What a worker is to serve, and from where."""

    config: Config
    worker: int
    name: str
    listen_fd: int
    path: str
    keys: Keys
    joining: Joining
    log_events: bool
    state: DeskState
    python_path: tuple[str, ...]
    """The supervisor's own `sys.path`: what it can import, its workers can."""
    environ_python_path: str | None
    """What `PYTHONPATH` was for the supervisor, and is to be for what plugins start."""


class Greeting(msgspec.Struct, frozen=True):
    """What a host says of itself once it serves."""

    url: str
    serving: tuple[str, ...]
    folders: tuple[str, ...]
    watch: str
    journal: str
    model: str
    resumed: int
    admin_token: str | None = None
    workers: int = 1

    @classmethod
    def of(cls, host: Host) -> Greeting:
        slots = sorted((e.slot.order, e.name) for e in host.plugins.entries if e.slot is not None)
        return cls(
            url=host.url,
            serving=tuple(name for _, name in slots),
            folders=host.config.plugins,
            watch=host.plugins.watch_mode,
            journal=host.backend.url,
            model=host.llm.describe(),
            resumed=host.resumed,
            admin_token=host.new_admin_token,
        )


class NumberAsked(msgspec.Struct, frozen=True):
    """A generation is to be loaded: which number does it get? See `Numbers`."""

    plugin: str
    digest: str
    after: int
    known: int


class Line(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line, either way; just one of its fields is set, beside `id`, which an answer shares with its question."""

    id: int = 0
    # from a worker
    ready: Greeting | None = None
    failed: tuple[str, str] | None = None
    """It can't start: the kind of error, `config` or `other`, and its text."""
    event: dict[str, Any] | None = None
    number: NumberAsked | None = None
    restart: bool = False
    alive: bool = False
    """Its event loop runs."""
    stopped: int | None = None
    """It has ended well; so many of its turns are left to others."""
    # from the supervisor; events go this way too
    answer: Any = None
    state: DeskState | None = None
    buried: str = ""
    """The name of a worker process that is dead."""
    leave: bool = False
    """Others go on serving the port: end without failing anyone's request."""
    stop: bool = False
    """The whole desk ends."""


_encode = msgspec.json.Encoder(enc_hook=str).encode
decode_line = msgspec.json.Decoder(Line).decode


def encode_line(line: Line) -> bytes:
    return _encode(line) + b"\n"


def pack_orders(orders: Orders) -> bytes:
    # Not JSON: a plugin's own settings may be what only TOML can say, such as a date, and are not to change on the way.
    packed = pickle.dumps(orders)
    return len(packed).to_bytes(8) + packed


def read_orders(control: socket.socket) -> Orders:
    """Wait for the orders. Raises `EOFError` when the supervisor is gone."""
    orders = pickle.loads(_read(control, int.from_bytes(_read(control, 8))))
    assert isinstance(orders, Orders)
    return orders


def _read(control: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = control.recv(min(count - len(data), 1 << 16))
        if not part:
            raise EOFError("the supervisor is gone")
        data += part
    return bytes(data)
