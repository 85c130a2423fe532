"""Opening a journal in Redis: what is wrong with a URL or a server is said in words, and never with the password."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import quote

import psutil
import pytest
import trustme
from tests.backend.conftest import url_of
from tests.backend.worker import Worker
from tests.redis_servers import RedisServer, free_port

from conftest import wait_until
from hotdesk.backend.redis_url import read_redis_url
from hotdesk.errors import BackendError, BackendUnavailable

SECRET = "s3cret"


async def open_once(url: str) -> Worker:
    """Open a backend and close it; for what it said about itself."""
    worker = await Worker.open(url)
    await worker.aclose()
    return worker


# -- the URL -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rest", "problem"),
    [
        ("", "write redis://"),
        ("/0", "write redis://"),
        (":6379/0", "write redis://"),
        ("h:0/0", "write redis://"),
        ("h:65536", "write redis://"),
        ("h:x", "write redis://"),
        ("h:", "write redis://"),
        ("h:-1", "write redis://"),
        ("[::1", "write redis://"),
        ("a,b/0", "one host"),
        ("h/x", "database is one number"),
        ("h/1/2", "database is one number"),
        ("h?partitions=0", "partitions is a number from 1 to 4096"),
        ("h?partitions=4097", "partitions is a number"),
        ("h?partitions=x", "partitions is a number"),
        ("h?partitions=", "partitions is a number"),
        ("h?replicas=17", "replicas is a number from 0 to 16"),
        ("h?prefix=", "prefix is letters"),
        ("h?prefix=a{b}", "prefix is letters"),
        ("h?prefix=a:b", "prefix is letters"),
        ("h?prefix=ä", "prefix is letters"),
        ("h?timeout=3", "it knows no timeout"),
    ],
)
@pytest.mark.parametrize("login", ["", f"user:{SECRET}@", f":{SECRET}@"])
async def test_a_wrong_url_is_refused(rest: str, problem: str, login: str) -> None:
    """A URL that can't be used stops the open with what is wrong and what would be right, and without the password."""
    with pytest.raises(BackendError, match=problem) as refused:
        await Worker.open(f"redis://{login}{rest}")
    assert SECRET not in str(refused.value)
    assert not isinstance(refused.value, BackendUnavailable)


@pytest.mark.parametrize(
    "url",
    [
        f"redis://:{SECRET}/{SECRET}@h:1/0",
        f"redis://u:{SECRET}?{SECRET}@h:1/0",
        f"redis://u:12?{SECRET}@h:1/0",
        f"redis://u:12/{SECRET}@h:1/0",
        f"redis://u:12#{SECRET}@h:1/0",
        f"redis://:{SECRET}#{SECRET}@h:1/0",
        f"redis://:{SECRET}@x/{SECRET}@h:1/0",
        f"redis://[:{SECRET}@h:1/0",
        f"redis:/:{SECRET}@h:1/0",
        f"redis+tls://:{SECRET}@h:1/0",
        f"postgres://u:{SECRET}@h/db",
        f"redis+cluster://u:{SECRET}@h/1",
        f"redis+sentinel://u:{SECRET}@h",
    ],
)
async def test_a_password_is_in_no_error(url: str) -> None:
    """However a URL with a password is wrong, also where the password is why: the password is not in what is said."""
    with pytest.raises(BackendError) as refused:
        await Worker.open(url)
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize("word", ["a/b", "a?b", "a#b", "a@b", "a:b", "ä", "%", " ", "a,b"])
async def test_a_password_of_any_letters_is_read(word: str) -> None:
    """What a URL can't have in it as it is stands there in percent signs, and is read back."""
    read = read_redis_url(f"redis://{quote(word, safe='')}:{quote(word, safe='')}@[::1]:7/3?prefix=x-1_y&partitions=9")
    assert (read.user, read.password, read.hosts, read.database) == (word, word, (("::1", 7),), 3)
    assert (read.prefix, read.partitions, read.kind, read.tls) == ("x-1_y", 9, "single", False)
    assert read.text == "redis://[::1]:7/3"
    assert "password" not in repr(read)


# -- the server --------------------------------------------------------------------------------------------------


async def test_other_partitions_are_refused(redis: RedisServer) -> None:
    """A journal keeps its number of partitions: another is refused with the one to write; another prefix is free."""
    await open_once(url_of(redis, partitions=8))
    with pytest.raises(BackendError, match=r"has 8 partitions; write \?partitions=8"):
        await open_once(url_of(redis, partitions=16))
    await open_once(f"{url_of(redis, partitions=16)}&prefix=other")
    await open_once(url_of(redis, partitions=8))


@pytest.mark.parametrize(
    ("settings", "durable", "warned"),
    [
        ({}, "appendfsync always: accepted is on disk", []),
        ({"appendonly": False}, "in memory only", ["appendonly is no.*set appendonly yes"]),
        ({"appendfsync": "everysec"}, "on disk within a second", ["appendfsync is everysec.*set appendfsync always"]),
        ({"appendfsync": "no"}, "on disk some time", ["appendfsync is no"]),
        ({"maxmemory_policy": "allkeys-lru"}, "on disk", ["maxmemory-policy is allkeys-lru.*noeviction"]),
        ({"rename_command": 'CONFIG ""'}, "of unknown durability", ["CONFIG GET append.*not allowed"] * 2),
        ({"user": "default on nopass ~* &* +@all -config"}, "of unknown", ["CONFIG GET append.*not allowed"] * 2),
        ({"rename_command": 'BGREWRITEAOF ""'}, "accepted is on disk", ["BGREWRITEAOF is not allowed here: run it"]),
        ({"user": "default on nopass ~* &* +@all -bgrewriteaof"}, "on disk", ["BGREWRITEAOF is not allowed here"]),
        (
            {"user": "default on nopass ~* &* +@all -bgrewriteaof", "appendonly": False},
            "memory only",
            ["appendonly is"],
        ),
    ],
    ids=[
        "safe",
        "no file",
        "everysec",
        "never synced",
        "evicts",
        "no CONFIG",
        "no right to CONFIG",
        "no BGREWRITEAOF",
        "no right to BGREWRITEAOF",
        "no right, no file",
    ],
)
async def test_what_is_unsafe_is_said(settings: dict[str, str], durable: str, warned: list[str]) -> None:
    """What about a server loses accepted messages is a warning with the remedy, and so is one that does not tell."""
    async with RedisServer(**settings) as server:  # type: ignore[arg-type]
        worker = await open_once(url_of(server))
    assert durable in worker.backend.durability
    assert len(worker.backend.warnings) == len(warned)
    for warning, pattern in zip(sorted(worker.backend.warnings), sorted(warned), strict=True):
        assert re.search(pattern if "max" not in warning or "max" in pattern else "CONFIG GET maxmemory", warning)


async def test_redis_is_asked_once_a_start_to_write_its_file_anew(own_redis: RedisServer) -> None:
    """Whoever comes first does; what a crash tore in the old file is gone then, and the others need not."""
    workers = [await Worker.open(url_of(own_redis)) for _ in range(3)]
    await wait_until(own_redis.has_written_anew, "it was written anew")
    await open_once(url_of(own_redis))
    assert (await own_redis.info("persistence"))["aof_rewrites"] == "1"
    for worker in workers:
        await worker.aclose()


async def test_a_redis_that_can_not_write_its_file_anew_is_said(own_redis: RedisServer) -> None:
    """Its child died of it, say: what to look at is a warning, and it is not asked again and again."""
    await own_redis.command("SET", "key", "value")
    await own_redis.command("CONFIG", "SET", "rdb-key-save-delay", 10_000_000)  # microseconds a key
    worker = await Worker.open(url_of(own_redis))
    assert worker.backend.warnings == ()
    assert own_redis.pid is not None
    (child,) = await wait_until(psutil.Process(own_redis.pid).children, "it writes")
    child.kill()

    async def has_failed() -> bool:
        return (await own_redis.info("persistence"))["aof_last_bgrewrite_status"] == "err"

    await wait_until(has_failed, "it could not")
    again = await open_once(url_of(own_redis))
    (warning,) = again.backend.warnings
    assert "could not write its append-only file anew: look at its log" in warning
    assert psutil.Process(own_redis.pid).children() == []
    await worker.aclose()


@asynccontextmanager
async def speaking_server(answer: Callable[[list[bytes]], bytes]) -> AsyncIterator[int]:
    """A server that answers each command, read from RESP, with what *answer* gives."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                words = []
                for _ in range(int(line[1:])):
                    length = int((await reader.readline())[1:])
                    words.append((await reader.readexactly(length + 2))[:-2])
                writer.write(answer(words))
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


@pytest.mark.parametrize(("version", "old"), [("6.2.14", True), ("5.0.0", True), ("7.0.0", False), ("8.2.1", False)])
async def test_an_old_redis_is_refused(version: str, old: bool) -> None:
    """A Redis below 7.0 is refused with its version and what is needed."""

    def answer(words: list[bytes]) -> bytes:
        match words[0].upper():
            case b"INFO":
                text = f"# Server\r\nredis_version:{version}\r\n".encode()
                return b"$%d\r\n%b\r\n" % (len(text), text)
            case b"CONFIG":
                return b"*0\r\n"
            case b"HGET":
                return b"$3\r\n256\r\n"
            case b"SCRIPT":
                return b"$1\r\nx\r\n"
            case b"HSETNX":
                return b":1\r\n"
        return b"+OK\r\n"

    async with speaking_server(answer) as port:
        if not old:
            await open_once(f"redis://127.0.0.1:{port}")
            return
        with pytest.raises(BackendError, match=rf"Redis {version}.*needs 7\.0 or newer"):
            await open_once(f"redis://127.0.0.1:{port}")


async def test_no_server_is_said_with_its_address() -> None:
    """Nobody listens there: the open fails soon, with the address."""
    port = free_port()
    with pytest.raises(BackendUnavailable, match=rf"redis://127\.0\.0\.1:{port}/0"):
        await open_once(f"redis://:{SECRET}@127.0.0.1:{port}/0")
    with pytest.raises(BackendUnavailable, match=r"no-such-host\.invalid"):
        await open_once("redis://no-such-host.invalid:1/0")


async def test_a_server_that_is_no_redis_is_said() -> None:
    """What answers in another language, or never, is no Redis: the open fails soon, in words."""

    async def answer_http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async def never(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    for serve in (answer_http, never):
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(BackendUnavailable) as failed:
            await open_once(f"redis://127.0.0.1:{port}/0")
        assert str(failed.value).removeprefix(f"backend redis://127.0.0.1:{port}/0: ")
        server.close()


async def test_a_wrong_password_is_said_without_it(capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong or missing password is refused with what to mend; the right one is in no text, log or warning either."""
    async with RedisServer(password=SECRET, appendonly=False) as server:
        url = url_of(server)
        worker = await Worker.open(url)
        await worker.start()
        await worker.say("c", "m1")
        await worker.aclose()
        assert SECRET in url
        for wrong in (
            url.replace(SECRET, "wr0ng"),
            url.replace(f":{SECRET}@", ""),
            url.replace(f":{SECRET}", "u:wr0ng"),
        ):
            with pytest.raises(BackendUnavailable, match="password in the URL") as refused:
                await open_once(wrong)
            assert "wr0ng" not in str(refused.value)
    said = capsys.readouterr()
    assert "appendonly" in said.out + said.err
    for text in (said.out, said.err, worker.backend.url, worker.backend.durability, *worker.backend.warnings):
        assert SECRET not in text
        assert "wr0ng" not in text


# -- TLS ---------------------------------------------------------------------------------------------------------


async def test_tls_with_its_authority(tmp_path: Path) -> None:
    """`rediss://` with `ca=` works, news included; another authority, none, or no file at all is refused in words."""
    async with RedisServer(tls=True) as server:
        worker = await Worker.open(f"{url_of(server)}&ca={server.ca_file}")
        await worker.start()
        assert (await worker.say("c", "m1")).seq == 1
        await worker.aclose()
        trustme.CA().cert_pem.write_to_path(str(tmp_path / "other.pem"))
        (tmp_path / "broken.pem").write_text("no certificate")
        for ca, problem in (
            (f"&ca={tmp_path / 'other.pem'}", "(?i)certificate"),
            ("", "(?i)certificate"),
            (f"&ca={tmp_path / 'broken.pem'}", "(?i)certificate"),
            (f"&ca={tmp_path / 'missing.pem'}", "missing.pem"),
        ):
            with pytest.raises(BackendError, match=problem):
                await open_once(url_of(server) + ca)
        with pytest.raises(BackendUnavailable):
            await open_once(url_of(server).replace("rediss://", "redis://"))
