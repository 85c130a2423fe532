"""The floor under a chunk's cost: takes bytes from the model server and hands them on, looking at none of them.

    python tests/load/llm_relay.py PORT MODEL_PORT

What it spends is the event loop's and the kernel's: a wake-up, a read and a write a chunk.
"""

from __future__ import annotations

import asyncio
import sys

import uvloop

READY = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


class Near(asyncio.Protocol):
    """A visitor's connection; the one to the model server is made with the first request."""

    def __init__(self, model_port: int) -> None:
        self._model_port = model_port
        self._far: asyncio.Transport | None = None
        self._connecting: asyncio.Task[None] | None = None
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        if data.startswith(b"GET /readyz"):
            self.transport.write(READY)
        elif self._far is not None:
            self._far.write(data)
        else:
            self._connecting = asyncio.get_running_loop().create_task(self._connect(data))

    async def _connect(self, data: bytes) -> None:
        loop = asyncio.get_running_loop()
        self._far, _ = await loop.create_connection(lambda: Far(self.transport), "127.0.0.1", self._model_port)
        self._far.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._far is not None:
            self._far.abort()


class Far(asyncio.Protocol):
    """The connection to the model server."""

    def __init__(self, near: asyncio.Transport) -> None:
        self._near = near

    def data_received(self, data: bytes) -> None:
        self._near.write(data)


async def serve(port: int, model_port: int) -> None:
    """Serve until stopped."""
    server = await asyncio.get_running_loop().create_server(lambda: Near(model_port), "127.0.0.1", port, backlog=4096)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), int(sys.argv[2])))
