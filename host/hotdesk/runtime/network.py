"""Keeps what guests and visitors ask for out of the network that the host stands in.

The address that is connected to is the one that is checked, at the moment the socket is made: between a look-up and
a connection a name can change what it means.
"""

from __future__ import annotations

import ipaddress
import socket
from typing import Any

__all__ = ["InsideAddress", "any_socket", "causes", "is_public", "public_socket"]

_INSIDE = tuple(
    ipaddress.ip_network(block)
    for block in (
        "192.0.0.0/24",
        "192.88.99.0/24",
        "::/96",
        "64:ff9b:1::/48",
        "2001::/23",
        "3fff::/20",
        "5f00::/16",
        "fec0::/10",
    )
)
"""What the standard library, depending on its age, takes for public, and is not; and ways into it: relays, tunnels,
local translation."""

_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
"""All that IANA has given out for the public."""

_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def is_public(address: str) -> bool:
    """Whether anyone on the Internet could be meant. An IPv4 address within an IPv6 one counts as itself."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.scope_id is not None:
            return False
        inner = ip.ipv4_mapped or ip.sixtofour
        if inner is None and ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if ip not in _GLOBAL_UNICAST:
            return False
    return (
        ip.is_global
        and not ip.is_multicast
        and not any(ip in block for block in _INSIDE if block.version == ip.version)
    )


class InsideAddress(OSError):
    """A connection to an address that is not public."""


def any_socket(info: Any) -> socket.socket:
    return socket.socket(info[0], info[1], info[2])


def public_socket(info: Any) -> socket.socket:
    """A socket for this address, the very one that is connected to next. Raises `OSError` unless it is public."""
    address = info[4]
    if not is_public(address[0]) or (len(address) > 3 and address[3]):
        raise InsideAddress("not a public address")
    return any_socket(info)


def causes(exc: BaseException | None) -> list[BaseException]:
    """An error and all that led to it."""
    found: list[BaseException] = []
    waiting = [exc]
    while waiting:
        current = waiting.pop()
        if current is None or current in found or len(found) > 32:
            continue
        found.append(current)
        waiting += [current.__cause__, current.__context__, getattr(current, "os_error", None)]
        if isinstance(current, BaseExceptionGroup):
            waiting += current.exceptions
    return found
