"""One Redis server."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from .process import ServerProcess
from .resp import Connection

__all__ = ["REPLICATION", "Directive", "Fsync", "RedisServer"]

Directive = str | int | bool | Sequence[str]
Fsync = Literal["always", "everysec", "no"]


REPLICATION: dict[str, Any] = {"repl_diskless_sync_delay": 0, "repl_ping_replica_period": 1}
"""For servers with replicas. As shipped a master waits 5 s for more of them before it sends its data, and a Cluster
does not name a replica to clients before its master's first ping, which is after 10 s."""


class RedisServer(ServerProcess):
    """A Redis server with an append-only file and no snapshots.

    >>> async with RedisServer(appendfsync="everysec", maxmemory="100mb") as server:
    ...     await server.command("SET", "k", 1)

    Other directives go by keyword, `_` for `-`; a list is a directive that is given several times.
    """

    def __init__(
        self,
        *,
        appendfsync: Fsync = "always",
        password: str | None = None,
        tls: bool = False,
        address: str = "127.0.0.1",
        folder: Path | None = None,
        pick_port: Callable[[], int] | None = None,
        **directives: Directive,
    ) -> None:
        """*address* is the one that is listened on; a namespace reaches its `gateway`, or any other of the machine."""
        super().__init__(address=address, folder=folder, pick_port=pick_port)
        self._password = password
        self._tls: ssl.SSLContext | None = self._make_certificates() if tls else None
        self._directives = {"appendfsync": appendfsync, **directives}

    @property
    def url(self) -> str:
        """`redis://127.0.0.1:PORT/0`, or `rediss://`, with the password."""
        return self.url_at(self.address, self.port)

    @property
    def ca_file(self) -> Path:
        """The authority that signed the certificate of a server with TLS, for clients to trust."""
        return self.folder / "ca.pem"

    def url_at(self, address: str, port: int) -> str:
        """The same for one who comes another way: through a link, or from a namespace."""
        password = f":{quote(self._password, safe='')}@" if self._password is not None else ""
        return f"{'rediss' if self._tls else 'redis'}://{password}{address}:{port}/0"

    async def open(self) -> Connection:
        return await Connection.open(self.address, self.port, password=self._password, tls=self._tls)

    async def has_written_anew(self) -> bool:
        """Whether it has made a new append-only file since it was started, and is not about to make another."""
        info = await self.info("persistence")
        done = info["aof_last_rewrite_time_sec"] != "-1" and info["aof_last_bgrewrite_status"] == "ok"
        return done and info["aof_rewrite_in_progress"] == "0"

    def arguments(self) -> Sequence[str]:
        return ()

    def settings(self) -> Iterator[str]:
        yield f"bind {self.address}"
        yield f"dir {self.folder}"
        yield "protected-mode no"  # it is for servers that listen to the world; a namespace is not the loopback
        yield 'save ""'
        if self._tls:
            yield "port 0"
            yield f"tls-port {self.port}"
            yield f"tls-cert-file {self.folder / 'server.pem'}"
            yield f"tls-key-file {self.folder / 'server.key'}"
            yield f"tls-ca-cert-file {self.ca_file}"
            yield "tls-auth-clients no"
        else:
            yield f"port {self.port}"
        if self._password is not None:
            yield f'requirepass "{self._password}"'
            yield f'masterauth "{self._password}"'
        for name, value in {"appendonly": True, **self._directives}.items():
            for one in [value] if isinstance(value, str | int) else value:
                said = {True: "yes", False: "no"}[one] if isinstance(one, bool) else one
                yield f"{name.replace('_', '-')} {said}"

    def _make_certificates(self) -> ssl.SSLContext:
        import trustme  # here, for the other servers need none of it

        authority = trustme.CA()
        certificate = authority.issue_cert(self.address, "localhost")
        authority.cert_pem.write_to_path(str(self.folder / "ca.pem"))
        certificate.private_key_pem.write_to_path(str(self.folder / "server.key"))
        for part in certificate.cert_chain_pems:
            part.write_to_path(str(self.folder / "server.pem"), append=True)
        context = ssl.create_default_context()
        authority.configure_trust(context)
        return context
