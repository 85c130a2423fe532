"""How durable a Redis is, by its own settings; and a mend of what a crash leaves in its append-only file."""

from __future__ import annotations

from ..errors import BackendError, BackendUnavailable
from .redis_servers import Servers
from .redis_url import RedisUrl

__all__ = ["look_at_servers", "renew_files"]

FLOOR = (7, 0)

MAY_NOT = (
    "BGREWRITEAOF is not allowed here: run it yourself after every crash of Redis, or what it was writing then may"
    " come to be at the start after the next"
)
COULD_NOT = (
    "Redis could not write its append-only file anew: look at its log, its disk and its memory, and run BGREWRITEAOF;"
    " what a crash tore in the old file may come to be at the next start"
)


async def look_at_servers(url: RedisUrl, servers: Servers) -> tuple[str, tuple[str, ...]]:
    """What `accepted` means there, and what about it is unsafe. Raises `BackendError` where a server is too old."""
    said: set[str] = set()
    warnings: list[str] = []
    for info in await servers.each("INFO", "server"):
        version = _info(info).get("redis_version", "0")
        if tuple(int(part) for part in version.split(".")[:2]) < FLOOR:
            raise BackendError(f"backend {url.text}: it is Redis {version}; hotdesk needs 7.0 or newer, or Valkey")
    for option, judge in (("append*", _judge_append), ("maxmemory-policy", _judge_eviction)):
        try:
            for rows in await servers.each("CONFIG", "GET", option):
                values = {key.decode(): value.decode() for key, value in zip(rows[::2], rows[1::2], strict=True)}
                judge(values, said, warnings)
        except BackendError as exc:
            if isinstance(exc, BackendUnavailable) and "permission" not in exc.reason:
                raise
            warnings.append(f"CONFIG GET {option} is not allowed here: nobody can say how durable this Redis is")
    if url.kind != "single":
        replicas = [int(_info(info).get("connected_slaves", 0)) for info in await servers.each("INFO", "replication")]
        if max(replicas) > url.replicas:
            warnings.append(
                f"a failover may lose what was accepted: a master has {max(replicas)} replicas, and"
                f" {url.replicas or 'none'} must confirm it; write ?replicas={max(replicas)}"
            )
    durability = "redis " + ("; ".join(sorted(said)) or "of unknown durability")
    if url.replicas:
        durability += f"; confirmed by {url.replicas} replicas"
    return durability, tuple(dict.fromkeys(warnings))


async def renew_files(servers: Servers) -> tuple[str, ...]:
    """Have each server that has not done so since its start write its append-only file anew; what is unsafe where not.

    One that is killed while it writes a transaction down is started without it, as it should be, but leaves its first
    commands in the file if the last of them is not whole. Whatever is written next completes them: at the start after
    that they are carried out too, and what was kept after them may not be (in Valkey mended by its pull request 4342).
    """
    warnings = []
    for answer in await servers.each("INFO", "persistence", then=_renewal, failed=True):
        if isinstance(answer, BackendUnavailable) and "permission" not in answer.reason:
            raise answer
        if isinstance(answer, BackendError):
            said = str(answer)
            if "in progress" in said:  # another worker's
                continue
            warnings.append(COULD_NOT if "Can't execute" in said else MAY_NOT)
        elif isinstance(answer, BaseException):
            raise answer
        elif b"aof_last_bgrewrite_status:err" in answer:
            warnings.append(COULD_NOT)
    return tuple(dict.fromkeys(warnings))


def _renewal(info: bytes) -> tuple[str, ...] | None:
    now = _info(info)
    busy = now.get("aof_rewrite_in_progress") != "0" or now.get("aof_rewrite_scheduled") != "0"
    tried = now.get("aof_last_rewrite_time_sec") != "-1" or now.get("aof_last_bgrewrite_status") != "ok"
    return None if busy or tried or now.get("aof_enabled") != "1" else ("BGREWRITEAOF",)


def _info(text: bytes) -> dict[str, str]:
    pairs = (line.partition(":") for line in text.decode().splitlines() if ":" in line)
    return {name: value for name, _, value in pairs}


def _judge_append(values: dict[str, str], said: set[str], warnings: list[str]) -> None:
    if values.get("appendonly") != "yes":
        said.add("without append-only file: accepted is in memory only")
        warnings.append("appendonly is no: what was accepted is lost when Redis ends; set appendonly yes")
        return
    fsync = values.get("appendfsync", "?")
    if fsync == "always":
        said.add("appendfsync always: accepted is on disk")
        return
    said.add(f"appendfsync {fsync}: accepted is on disk {'within a second' if fsync == 'everysec' else 'some time'}")
    warnings.append(
        f"appendfsync is {fsync}: a crash of the machine loses what was accepted last; set appendfsync always"
    )


def _judge_eviction(values: dict[str, str], said: set[str], warnings: list[str]) -> None:
    policy = values.get("maxmemory-policy", "noeviction")
    if policy != "noeviction":
        warnings.append(f"maxmemory-policy is {policy}: Redis may drop what was accepted; set it to noeviction")
