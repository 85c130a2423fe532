"""What a Redis URL says: where, with which key, how many partitions."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import parse_qsl, unquote, urlsplit

from ..errors import BackendError

__all__ = ["RedisUrl", "read_redis_url"]

PARTITIONS = 256
"""Enough for a hundred workers with two or three each, few enough to be taken over in one go."""

_KINDS: dict[str, Literal["single", "sentinel", "cluster"]] = {
    "redis": "single",
    "rediss": "single",
    "redis+sentinel": "sentinel",
    "rediss+sentinel": "sentinel",
    "redis+cluster": "cluster",
    "rediss+cluster": "cluster",
}
_PORTS = {"single": 6379, "sentinel": 26379, "cluster": 6379}
_FORM = "write redis://[USER:PASSWORD@]HOST[:PORT][/DATABASE]"


@dataclass(frozen=True, slots=True)
class RedisUrl:
    """A backend URL, read."""

    text: str
    """Without the password."""

    kind: Literal["single", "sentinel", "cluster"]
    hosts: tuple[tuple[str, int], ...]
    tls: bool
    user: str | None
    password: str | None = field(repr=False)
    database: int
    service: str
    """The name that Sentinel knows the master by."""

    prefix: str
    """What every key begins with."""

    partitions: int
    replicas: int
    """How many replicas must have a write before it counts as done."""

    ca: str | None
    """A file of certificates that the server's is checked against; None: those of the system."""


def read_redis_url(url: str) -> RedisUrl:
    """Read a backend URL. Raises `BackendError`, without the password, when it can't be used."""
    hidden = f"backend {url.partition(':')[0]}://…"  # while nobody knows yet where in it the password is
    try:
        parts = urlsplit(url)
    except ValueError as exc:
        raise BackendError(f"{hidden}: {exc}; {_FORM}") from None
    if "@" in parts.path + parts.query + parts.fragment:
        raise BackendError(f"{hidden}: write / ? # and @ as %2F %3F %23 and %40 in a user, a password or a file's name")
    kind = _KINDS.get(parts.scheme)
    login, at, places = parts.netloc.rpartition("@")
    shown = f"{parts.scheme}://{places}{parts.path}"

    def wrong(what: str) -> BackendError:
        return BackendError(f"backend {shown}: {what}")

    if kind is None or not places:
        raise wrong(_FORM)
    hosts = tuple(_host(place, _PORTS[kind], wrong) for place in places.split(","))
    if kind == "single" and len(hosts) > 1:
        raise wrong("redis:// has one host; redis+sentinel:// and redis+cluster:// may have several")
    user, _, password = login.partition(":")
    path = [unquote(part) for part in parts.path.split("/") if part]
    service = ""
    if kind == "sentinel":
        if not path:
            raise wrong("write the master's name behind the hosts: redis+sentinel://HOST:PORT,…/NAME[/DATABASE]")
        service = path.pop(0)
    database = 0
    if path:
        if len(path) > 1 or not path[0].isdecimal():
            raise wrong("the database is one number")
        database = int(path[0])
    if kind == "cluster" and database:
        raise wrong("a Cluster has database 0 only")
    given = dict(parse_qsl(parts.query, keep_blank_values=True))
    prefix = given.pop("prefix", "hotdesk")
    if not prefix or not prefix.isascii() or not prefix.replace("-", "").replace("_", "").isalnum():
        raise wrong("prefix is letters, digits, - and _")
    partitions = _number(given.pop("partitions", str(PARTITIONS)), "partitions", 1, 4096, wrong)
    replicas = _number(given.pop("replicas", "0"), "replicas", 0, 16, wrong)
    ca = given.pop("ca", None)
    if ca is not None and not os.access(ca, os.R_OK):
        raise wrong(f"ca={ca} can't be read")
    if given:
        raise wrong(f"it knows no {next(iter(given))}; there are prefix, partitions, replicas and ca")
    return RedisUrl(
        text=shown,
        kind=kind,
        hosts=hosts,
        tls=parts.scheme.startswith("rediss"),
        user=unquote(user) if at and user else None,
        password=unquote(password) if at and password else None,
        database=database,
        service=service,
        prefix=prefix,
        partitions=partitions,
        replicas=replicas,
        ca=ca,
    )


def _host(place: str, port: int, wrong: Callable[[str], BackendError]) -> tuple[str, int]:
    host, colon, number = place.rpartition(":") if not place.endswith("]") else (place, "", "")
    if not colon:
        host, number = place, str(port)
    host = host.removeprefix("[").removesuffix("]")
    if not host or not number.isdecimal() or not 0 < int(number) < 65536:
        raise wrong(_FORM)
    return host, int(number)


def _number(text: str, name: str, least: int, most: int, wrong: Callable[[str], BackendError]) -> int:
    if not text.isdecimal() or not least <= int(text) <= most:
        raise wrong(f"{name} is a number from {least} to {most}")
    return int(text)
