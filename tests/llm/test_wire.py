"""The connections to a provider, beside a server of bare sockets that says byte by byte what it is told to."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trustme

from conftest import wait_until
from hotdesk.llm.connection import HIGH_WATER_BYTES, Response, WireError
from hotdesk.llm.wire import Wire

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
Answer = Callable[[bytes, asyncio.StreamWriter], Awaitable[bool]]
"""Takes a request's head and body; false closes the connection."""


class Bare:
    """A server of bare sockets: `heads` are the requests it saw, `connections` how many came."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.heads: list[bytes] = []
        self.bodies: list[bytes] = []
        self.connections = 0
        self.open = 0
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = [line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
                self.heads.append(head)
                self.bodies.append(await reader.readexactly(int(length[0].split(b":")[1])) if length else b"")
                if not await self.answer(head, writer):
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.open -= 1
            writer.close()


@asynccontextmanager
async def bare(*answers: bytes, answer: Answer | None = None, tls: ssl.SSLContext | None = None) -> AsyncIterator[Bare]:
    """A server that gives *answers*, one a request and the last for ever, or what *answer* does."""
    said = list(answers)

    async def give(head: bytes, writer: asyncio.StreamWriter) -> bool:
        text = said.pop(0) if len(said) > 1 else said[0]
        writer.write(text)
        await writer.drain()
        return b"Connection: close" not in text

    server_of = Bare(answer or give)
    server = await asyncio.start_server(server_of.serve, "127.0.0.1", 0, ssl=tls)
    server_of.port = server.sockets[0].getsockname()[1]
    async with server:
        yield server_of
        await wait_until(lambda: server_of.open == 0, what="every connection is closed")


@asynccontextmanager
async def wire_to(
    port: int, *, scheme: str = "http", host: str = "127.0.0.1", **options: object
) -> AsyncIterator[Wire]:
    wire = Wire(f"{scheme}://{host}:{port}/v1/x?a=b", [("X-Key", "k")], connect_s=2.0, **options)  # type: ignore[arg-type]
    try:
        yield wire
    finally:
        await wire.aclose()


async def all_of(response: Response) -> bytes:
    parts = []
    while part := await response.read():
        parts.append(part)
    return b"".join(parts)


async def test_a_request_is_what_it_should_be() -> None:
    """Method, path with its query, host, headers, length, body."""
    async with bare(OK) as server, wire_to(server.port) as wire:
        response = await wire.post("退".encode())
        assert (response.status, await all_of(response), response.ended) == (200, b"ok", True)
        head = f"POST /v1/x?a=b HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nX-Key: k\r\nContent-Length: 3\r\n\r\n"
        assert (server.heads, server.bodies) == ([head.encode()], ["退".encode()])


async def test_connections_are_kept_and_used_again() -> None:
    """One after the other over one connection; side by side over as many as needed."""
    async with bare(OK) as server, wire_to(server.port) as wire:
        for _ in range(5):
            assert await all_of(await wire.post(b"")) == b"ok"
        assert server.connections == 1
        await asyncio.gather(*(one(wire) for _ in range(8)))
        assert 2 <= server.connections <= 8
        before = server.connections
        await asyncio.gather(*(one(wire) for _ in range(2)))
        assert server.connections == before


async def one(wire: Wire) -> bytes:
    return await all_of(await wire.post(b"x"))


async def test_a_connection_that_went_away_while_it_was_idle_is_no_failure() -> None:
    """Servers close idle connections when they like; the request goes out on a new one, once."""
    async with bare(OK) as server, wire_to(server.port) as wire:
        assert await one(wire) == b"ok"
        [connection] = wire.connections
        calls = 0

        async def close_first(head: bytes, writer: asyncio.StreamWriter) -> bool:
            nonlocal calls
            calls += 1
            if calls == 1:
                return False  # closed just as the next request arrives
            writer.write(OK)
            return True

        server.answer = close_first
        assert await one(wire) == b"ok"
        assert (calls, server.connections) == (2, 2)
        assert connection not in wire.connections


async def test_a_new_connection_that_breaks_is_a_failure() -> None:
    """It is not tried again from here; whoever asks decides."""

    async def hang_up(head: bytes, writer: asyncio.StreamWriter) -> bool:
        return False

    async with bare(answer=hang_up) as server, wire_to(server.port) as wire:
        with pytest.raises(WireError, match="before the end"):
            await wire.post(b"x")
        assert server.connections == 1


@pytest.mark.parametrize(
    ("answer", "body", "kept"),
    [
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", b"ok", True),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;x=y\r\nok\r\n0\r\nT: 1\r\n\r\n", b"ok", True),
        (b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + OK, b"ok", True),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + OK, b"ok", True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok", b"ok", False),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nto the end", b"to the end", False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok", b"ok", False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b"", True),
    ],
)
async def test_every_shape_of_a_body_is_read(answer: bytes, body: bytes, kept: bool) -> None:
    """Chunked, counted, to the end of the connection; after interim answers, too."""
    async with bare(answer) as server, wire_to(server.port) as wire:
        response = await wire.post(b"")
        assert (response.status, await all_of(response)) == (200, body)
        assert await one(wire) == body
        assert server.connections == (1 if kept else 2)


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (b"SSH-2.0-OpenSSH\r\n\r\nConnection: close", "no HTTP"),
        (b"HTTP/1.1 banana\r\nConnection: close\r\n\r\n", "no HTTP"),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nX: " + b"x" * 200_000, "head of its answer is over"),
    ],
)
async def test_what_is_no_answer_is_said_so(answer: bytes, problem: str) -> None:
    """A clear error, and the connection is closed."""
    async with bare(answer) as server, wire_to(server.port) as wire:
        with pytest.raises(WireError, match=problem):
            await wire.post(b"")
        assert not wire.connections


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 20\r\nConnection: close\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n4\r\nhalf\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n4\r\nhalf\r\nZZ\r\n",
    ],
)
async def test_half_a_body_is_an_error_after_what_came(answer: bytes) -> None:
    """What came is given, and then the error; never a silent end."""
    async with bare(answer) as server, wire_to(server.port) as wire:
        response = await wire.post(b"")
        assert await response.read() == b"half"
        with pytest.raises(WireError):
            await response.read()


async def test_who_does_not_read_holds_the_provider_back() -> None:
    """Some hundred KiB are held, and the rest stays in the provider's socket, until somebody reads."""
    size, sent = 64 * 1024 * 1024, 0

    async def pour(head: bytes, writer: asyncio.StreamWriter) -> bool:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        piece = b"x" * 65536
        while sent < size:
            writer.write(piece)
            await writer.drain()
            sent += len(piece)
        return True

    async with bare(answer=pour) as server, wire_to(server.port) as wire:
        response = await wire.post(b"")
        before = -1
        while sent != before:
            before = sent
            await asyncio.sleep(0.2)
        assert sent < size
        assert response._size < HIGH_WATER_BYTES + 1024 * 1024
        heard: list[int] = []
        response.listen(lambda data: heard.append(len(data)))  # what was held is still to be read
        response.listen(None)
        assert len(await all_of(response)) + sum(heard) == size
        assert await wire.post(b"") is not None
        assert server.connections == 1


async def test_pieces_are_pushed_as_they_come() -> None:
    """`listen`: each piece from the socket's own callback, and an empty one at the end."""
    go = asyncio.Event()

    async def speak(head: bytes, writer: asyncio.StreamWriter) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for piece in (b"one", b"two"):
            await go.wait()
            go.clear()
            writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        await go.wait()
        writer.write(b"0\r\n\r\n")
        return True

    async with bare(answer=speak) as server, wire_to(server.port) as wire:
        response = await wire.post(b"")
        heard: list[bytes] = []
        response.listen(heard.append)
        for count in (1, 2, 3):
            go.set()
            await wait_until(lambda count=count: len(heard) == count, what="a piece")  # type: ignore[misc]
        assert heard == [b"one", b"two", b""]
        assert (response.ended, response.error) == (True, None)


async def test_hanging_up_wakes_who_reads_and_closes_at_once() -> None:
    """Another task's read ends with an error, and the provider sees the connection go."""

    async def stall(head: bytes, writer: asyncio.StreamWriter) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        return True

    async with bare(answer=stall) as server, wire_to(server.port) as wire:
        response = await wire.post(b"")
        reading = asyncio.create_task(response.read())
        await asyncio.sleep(0)
        response.close()
        with pytest.raises(WireError, match="hung up"):
            await reading
        await wait_until(lambda: server.open == 0, what="the provider sees it", timeout_s=1)


async def test_a_cancelled_request_closes_its_connection() -> None:
    """Before the headers, too; a connection that comes about after that is put down."""

    async def stall(head: bytes, writer: asyncio.StreamWriter) -> bool:
        await asyncio.sleep(0)
        return True

    async with bare(answer=stall) as server, wire_to(server.port) as wire:
        asking = asyncio.create_task(wire.post(b""))
        await wait_until(lambda: server.heads, what="it is asked")
        asking.cancel()
        await asyncio.wait({asking})
        await wait_until(lambda: server.open == 0, what="it is closed", timeout_s=1)
        for steps in range(6):
            asking = asyncio.create_task(wire.post(b""))
            for _ in range(steps):
                await asyncio.sleep(0)
            asking.cancel()
            await asyncio.wait({asking})
        await wait_until(lambda: server.open == 0 and not wire.connections, what="all are closed", timeout_s=2)


async def test_a_body_that_ends_late_gives_its_connection_back() -> None:
    """`let_end`: nobody waits for the last bytes, and the connection is used again; one that never ends is closed."""
    more = asyncio.Event()

    async def late(head: bytes, writer: asyncio.StreamWriter) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nend\r\n")
        await more.wait()
        writer.write(b"0\r\n\r\n")
        return True

    async with bare(answer=late) as server, wire_to(server.port) as wire:
        response = await wire.post(b"")
        assert await response.read() == b"end"
        response.let_end(5.0)
        more.set()
        await wait_until(lambda: response.ended, what="the body has ended")
        more.clear()
        response = await wire.post(b"")
        assert server.connections == 1
        assert await response.read() == b"end"
        response.let_end(0.05)
        await wait_until(lambda: not wire.connections, what="it is closed")
        more.set()


# -- TLS and proxies -------------------------------------------------------------------------------------------------


@pytest.fixture
def authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> trustme.CA:
    """A certificate authority that this process trusts."""
    authority = trustme.CA()
    file = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(file))
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    return authority


def tls_for(authority: trustme.CA, *names: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*names).configure_cert(context)
    return context


async def test_tls_is_checked(authority: trustme.CA) -> None:
    """A certificate of a trusted authority for that name, and no other."""
    async with bare(OK, tls=tls_for(authority, "localhost")) as server:
        async with wire_to(server.port, scheme="https", host="localhost") as wire:
            assert await one(wire) == b"ok"
            assert await one(wire) == b"ok"
            assert server.connections == 1
        async with wire_to(server.port, scheme="https", host="127.0.0.1") as wire:
            with pytest.raises(ssl.SSLCertVerificationError):
                await wire.post(b"")
    stranger = tls_for(trustme.CA(), "localhost")
    async with bare(OK, tls=stranger) as server, wire_to(server.port, scheme="https", host="localhost") as wire:
        with pytest.raises(ssl.SSLCertVerificationError):
            await wire.post(b"")


async def proxy_to(port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A tunnel, as a proxy makes one."""
    far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)

    async def copy(a: asyncio.StreamReader, b: asyncio.StreamWriter) -> None:
        try:
            while data := await a.read(65536):
                b.write(data)
        except ConnectionError:
            pass
        finally:
            b.close()

    await asyncio.gather(copy(reader, far_writer), copy(far_reader, writer))


async def test_a_proxy_tunnels_tls(authority: trustme.CA) -> None:
    """CONNECT with the user's name and password, and TLS to the far end through it."""
    heads: list[bytes] = []

    async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        await proxy_to(far.port, reader, writer)

    async with bare(OK, tls=tls_for(authority, "model.example")) as far:
        server = await asyncio.start_server(proxy, "127.0.0.1", 0)
        async with server:
            address = f"http://us%65r:p@127.0.0.1:{server.sockets[0].getsockname()[1]}"
            async with wire_to(443, scheme="https", host="model.example", proxy=address) as wire:
                assert await one(wire) == b"ok"
                assert await one(wire) == b"ok"
    assert len(heads) == 1
    assert heads[0].startswith(b"CONNECT model.example:443 HTTP/1.1\r\n")
    assert b"Proxy-Authorization: Basic dXNlcjpw\r\n" in heads[0]
    assert b"Proxy" not in far.heads[0]


async def test_a_proxy_is_asked_for_plain_http() -> None:
    """With the whole URL."""
    async with bare(OK) as proxy, wire_to(80, host="model.example", proxy=f"http://127.0.0.1:{proxy.port}") as wire:
        assert await one(wire) == b"ok"
    assert proxy.heads[0].startswith(b"POST http://model.example:80/v1/x?a=b HTTP/1.1\r\nHost: model.example:80\r\n")


async def test_a_proxy_that_refuses_is_named() -> None:
    """Its status is in the error."""
    refusal = b"HTTP/1.1 407 Proxy Authentication Required\r\nConnection: close\r\n\r\n"
    async with bare(refusal) as proxy:
        address = f"http://127.0.0.1:{proxy.port}"
        async with wire_to(443, scheme="https", host="m.example", proxy=address) as wire:
            with pytest.raises(WireError, match="proxy answered with status 407"):
                await wire.post(b"")
