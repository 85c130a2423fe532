"""The Redis servers that other tests stand on do what they say, and leave nothing behind."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from time import perf_counter

import pytest
import pytest_asyncio
from tests.redis_servers import (
    Cluster,
    Connection,
    Link,
    Namespace,
    PortTaken,
    RedisServer,
    ReplyError,
    SentinelSet,
    StartFailed,
    can_use_namespaces,
    find_redis,
    free_port,
)

from conftest import wait_until

SLOW_S = 5.0
"""For what is over in milliseconds or comes never."""


def is_gone(pid: int) -> bool:
    """There is no such process, or only what its parent has not buried yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


async def refused(port: int) -> bool:
    """A connection to *port* of the loopback is refused."""
    try:
        (await Connection.open("127.0.0.1", port))._writer.transport.abort()
    except ConnectionRefusedError:
        return True
    return False


# -- one server --------------------------------------------------------------------------------------------------------


async def test_what_was_answered_outlives_a_sigkill(own_redis: RedisServer) -> None:
    """With `appendfsync always` every write that was answered is there after kill -9, on the same port."""
    async with await own_redis.open() as connection:
        for n in range(200):
            await connection.command("RPUSH", "list", n)
    port = own_redis.port
    await own_redis.kill()
    assert await refused(port)
    await own_redis.start()
    assert own_redis.port == port
    assert await own_redis.command("LRANGE", "list", 0, -1) == [str(n) for n in range(200)]


async def test_a_server_without_its_file_forgets() -> None:
    """The directives that are given go over those that are set by default; without the file there is nothing left."""
    async with RedisServer(appendonly=False, maxmemory="64mb", maxmemory_policy="allkeys-lru") as server:
        assert await server.command("CONFIG", "GET", "maxmemory") == ["maxmemory", str(64 * 2**20)]
        assert await server.command("CONFIG", "GET", "maxmemory-policy") == ["maxmemory-policy", "allkeys-lru"]
        await server.command("SET", "k", "v")
        await server.kill()
        await server.start()
        assert await server.command("GET", "k") is None


async def test_a_start_waits_until_the_data_is_loaded() -> None:
    """After a restart the first command is taken, however long the file takes to load, and is not told `LOADING`."""
    # 200 us a key: 300 ms for what is kept here, in which the server answers other commands with LOADING
    async with RedisServer(key_load_delay=200) as server:
        async with await server.open() as connection:
            await connection.pipeline([("SET", f"k{n}", n) for n in range(1500)])
        await server.kill()
        await server.start()
        assert await server.command("DBSIZE") == 1500
        assert int((await server.info("persistence"))["loading"]) == 0


async def test_a_stop_is_a_shutdown_and_takes_a_frozen_one_too(own_redis: RedisServer) -> None:
    """`stop` lets the server end by itself; one that is frozen is thawed for it; a restart comes back with the data."""
    await own_redis.command("SET", "k", "v")
    own_redis.freeze()
    with pytest.raises(TimeoutError):
        await own_redis.command("PING", timeout_s=0.05)
    await own_redis.stop()
    assert not own_redis.running
    assert "bye bye" in own_redis.log_tail()
    await own_redis.stop()
    await own_redis.start()
    with pytest.raises(RuntimeError, match="runs already"):
        await own_redis.start()
    await own_redis.restart()
    assert await own_redis.command("GET", "k") == "v"


async def test_a_frozen_server_goes_on_when_it_is_thawed(own_redis: RedisServer) -> None:
    """What was sent to a frozen server is answered once it is thawed; the process is the same."""
    pid = own_redis.pid
    async with await own_redis.open() as connection:
        own_redis.freeze()
        waiting = asyncio.create_task(connection.command("INCR", "n"))
        done, _ = await asyncio.wait([waiting], timeout=0.05)
        assert not done
        own_redis.thaw()
        assert await waiting == 1
    assert own_redis.pid == pid


async def test_nothing_is_left_of_a_cancelled_test() -> None:
    """Whatever ends the block: the process is gone, also a frozen one, and so is its folder."""
    seen: asyncio.Future[RedisServer] = asyncio.get_running_loop().create_future()

    async def block() -> None:
        async with RedisServer() as server:
            server.freeze()
            seen.set_result(server)
            await asyncio.Event().wait()

    task = asyncio.create_task(block())
    server = await seen
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert is_gone(server.pid)
    assert not server.folder.exists()


async def test_nothing_is_left_of_a_start_that_was_cancelled(tmp_path: Path) -> None:
    """A start that is given up in the middle leaves no process and no folder."""
    server = RedisServer(key_load_delay=1000, folder=tmp_path)
    await server.start()
    async with await server.open() as connection:
        await connection.pipeline([("SET", f"k{n}", n) for n in range(5000)])
    await server.kill()
    starting = asyncio.create_task(server.__aenter__())  # takes five seconds
    before = server.pid
    await wait_until(lambda: server.pid != before, "it is being started")
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert is_gone(server.pid)
    assert list(tmp_path.iterdir()) == []


async def test_a_taken_port_is_left_to_who_has_it(redis: RedisServer) -> None:
    """The first start tries another port, also where a Redis has it; if none is free the error has the end of the log.

    What listens there is not taken for the server, whether it answers as one or never.
    """
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken, free = other.getsockname()[1], free_port()
        ports = iter([taken, redis.port, free])
        async with RedisServer(pick_port=lambda: next(ports)) as server:
            assert server.port == free
            assert await server.command("PING") == "PONG"
        with pytest.raises(PortTaken, match=r"(?s)did not start; its log ends:.*[Aa]ddress already in use"):
            await RedisServer(pick_port=lambda: taken).__aenter__()


async def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    """The error has what the server printed, and nothing is left."""
    with pytest.raises(StartFailed, match="no-such-directive"):
        await RedisServer(no_such_directive=1, folder=tmp_path).__aenter__()
    assert list(tmp_path.iterdir()) == []


async def test_password_and_tls_are_asked_for() -> None:
    """The URL has what it takes, and without it nobody comes in."""
    async with RedisServer(password="s3/cret", tls=True) as server:
        assert server.url == f"rediss://:s3%2Fcret@127.0.0.1:{server.port}/0"
        assert await server.command("PING") == "PONG"
        assert await server.command("CONFIG", "GET", "port") == ["port", "0"]
        assert "BEGIN CERTIFICATE" in server.ca_file.read_text()
        with pytest.raises((EOFError, ConnectionError)):  # plain text is not understood
            await (await Connection.open("127.0.0.1", server.port)).command("PING")
        with pytest.raises(ReplyError, match="NOAUTH"):
            await (await Connection.open("127.0.0.1", server.port, tls=server._tls)).command("GET", "k")
        with pytest.raises(ReplyError, match="WRONGPASS"):
            await Connection.open("127.0.0.1", server.port, tls=server._tls, password="guess")


async def test_a_connection_speaks_all_of_the_protocol(redis: RedisServer) -> None:
    """Numbers, nothing, nested lists, bytes that are no text, errors alone and among others, and pushes."""
    async with await redis.open() as connection, await redis.open() as other:
        raw = bytes(range(256))
        assert await connection.command("SET", b"raw", raw) == "OK"
        assert (await connection.command("GET", "raw")).encode(errors="surrogateescape") == raw
        assert await connection.command("EVAL", "return {1, {'a', {}}, false, 'b'}", 0) == [1, ["a", []], None, "b"]
        with pytest.raises(ReplyError, match="WRONGTYPE"):
            await connection.command("LPUSH", "raw", 1)
        one, failed, two = await connection.pipeline([("INCR", "n"), ("LPUSH", "n", 1), ("INCR", "n")])
        assert (one, two) == (1, 2)
        assert isinstance(failed, ReplyError)
        assert await connection.command("SUBSCRIBE", "news") == ["subscribe", "news", 1]
        await other.command("PUBLISH", "news", "héllo")
        assert await connection.next_push() == ["message", "news", "héllo"]
        assert (await redis.info("server"))["tcp_port"] == str(redis.port)


@pytest.mark.parametrize("_turn", [1, 2])
async def test_the_shared_server_is_as_good_as_new(redis: RedisServer, _turn: int) -> None:
    """What one test left in it, another one does not find: keys, scripts, functions, connections, counters."""
    assert await redis.command("DBSIZE") == 0
    assert (await redis.info("memory"))["number_of_cached_scripts"] == "0"
    assert await redis.command("FUNCTION", "LIST") == []
    assert await redis.command("PUBSUB", "CHANNELS") == []
    assert "cmdstat_incr" not in await redis.info("commandstats")
    left = await redis.open()
    await left.command("SUBSCRIBE", "news")
    await redis.command("INCR", "n")
    await redis.command("EVAL", "return 1", 0)
    await redis.command("FUNCTION", "LOAD", "#!lua name=l\nredis.register_function('f', function() return 1 end)")
    left._writer.transport.set_write_buffer_limits(0)  # it is kept open on purpose, as a careless test would
    _careless.append(left)


_careless: list[Connection] = []


def test_the_program_is_new_enough_and_a_wrong_one_is_named(tmp_path: Path) -> None:
    """What is found is 7.0 or newer; anything else is refused in one sentence that says what to install."""
    from tests.redis_servers.program import _new_enough

    assert find_redis().is_file()
    for said, reason in (
        ("Redis server v=6.0.16 sha=0:0 bits=64", "is 6.0, too old"),
        ("nginx/1.22", "is no Redis server"),
    ):
        fake = tmp_path / "fake-server"
        fake.write_text(f"#!/bin/sh\necho '{said}'\n")
        fake.chmod(0o755)
        with pytest.raises(RuntimeError, match=rf"{reason}.*; install Redis 7.0 or newer"):
            _new_enough(fake)
    fake.write_text("#!/bin/sh\necho 'Valkey server v=8.1.1 sha=00000000:0 malloc=jemalloc-5.3.0 bits=64'\n")
    assert _new_enough(fake) == fake


# -- Sentinel ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_a_dead_master_is_replaced_and_comes_back_as_a_replica(tmp_path: Path) -> None:
    """The sentinels promote a replica, with its data; the old master follows it; then the other way by order."""
    async with SentinelSet(folder=tmp_path) as made:
        ports = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in made.sentinels)
        assert made.url == f"redis+sentinel://{ports}/mymaster/0"
        old = await made.master()
        assert old is made.servers[0]
        async with await old.open() as connection:
            await connection.command("SET", "k", "v")
            assert await connection.command("WAIT", 2, 5000) == 2
        new = await made.failover()
        assert new is not old
        assert not old.running
        assert await new.command("GET", "k") == "v"
        assert await new.command("SET", "k", "w") == "OK"
        await old.start()
        await made.wait_ready()
        assert (await old.command("ROLE"))[:3] == ["slave", "127.0.0.1", new.port]
        assert await old.command("GET", "k") == "w"
        made.sentinels[0].freeze()  # two of three are enough, and the frozen one is not waited for
        assert await made.master() is new
        made.sentinels[0].thaw()
        assert await made.failover(kill=False) is not new
        assert new.running
        pids = [process.pid for process in (*made.servers, *made.sentinels)]
    assert all(map(is_gone, pids))
    assert list(tmp_path.iterdir()) == []


# -- Cluster -----------------------------------------------------------------------------------------------------------


def key_of(*slots: int) -> str:
    """A key whose slot is one of *slots*."""
    return next(key for key in (f"k{n}" for n in range(10**6)) if slot_of(key) in slots)


def slot_of(key: str) -> int:
    """The slot of a key without a hash tag: CRC-16 (XMODEM), modulo 16,384."""
    crc = 0
    for byte in key.encode():
        crc ^= byte << 8
        for _ in range(8):
            crc = (crc << 1 ^ 0x1021 if crc & 0x8000 else crc << 1) & 0xFFFF
    return crc % 16384


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    """A cluster with replicas, in which who is the master may have changed; nothing of it is left at the end."""
    folder = tmp_path_factory.mktemp("cluster")
    async with Cluster(replicas=1, node_timeout_ms=500, folder=folder) as made:
        assert made.url == f"redis+cluster://127.0.0.1:{made.nodes[0].port}"
        yield made
        pids = [node.pid for node in made.nodes]
    assert all(map(is_gone, pids))
    assert list(folder.iterdir()) == []


async def test_slots_move_with_their_keys_while_they_are_used(cluster: Cluster) -> None:
    """All keys of a slot are at the new owner; halfway clients are sent after them, and in the end by everyone."""
    slots = range(100, 103)
    source, target, third = [await cluster.owner(key_of(slot)) for slot in (99, 9000, 16000)]
    tags = [key_of(slot) for slot in slots]
    keys = [f"{{{tag}}}{n}" for tag in tags for n in range(20)]
    async with await source.open() as connection:
        assert await connection.pipeline([("SET", key, key) for key in keys]) == ["OK"] * 60
    seen: list[int] = []

    async def halfway(slot: int) -> None:
        seen.append(slot)
        of_slot = [key for key in keys if key.startswith(f"{{{tags[slot - 100]}}}")]
        async with await source.open() as connection:
            replies = await connection.pipeline([("GET", key) for key in of_slot])
        asked = [str(reply) for reply in replies if isinstance(reply, ReplyError)]
        assert asked == [f"ASK {slot} 127.0.0.1:{target.port}"] * 10
        async with await target.open() as connection:  # born at the new owner while it moves
            await connection.command("ASKING")
            assert await connection.command("SET", f"{{{tags[slot - 100]}}}new", "new") == "OK"

    await cluster.move_slots(slots, source, target, halfway=halfway)
    assert seen == list(slots)
    async with await target.open() as connection:
        assert await connection.pipeline([("GET", key) for key in keys]) == keys
        assert await connection.command("GET", f"{{{tags[0]}}}new") == "new"
    for node in (source, third):
        with pytest.raises(ReplyError, match=f"MOVED 100 127.0.0.1:{target.port}"):
            await node.command("GET", tags[0])
    await cluster.wait_ready()
    assert await cluster.owner(tags[0]) is target
    assert await cluster.owner(key_of(103)) is source


async def test_a_replica_takes_the_slots_of_a_dead_master(cluster: Cluster) -> None:
    """With replicas the cluster outlives a master, which follows the new one when it is back."""
    key = key_of(*range(100))
    master = await cluster.owner(key)
    assert master is cluster.nodes[0]
    async with await master.open() as connection:
        await connection.command("SET", key, "v")
        assert await connection.command("WAIT", 1, 5000) == 1
    new = await cluster.failover(master)
    assert new is cluster.nodes[3]
    assert not master.running
    assert await cluster.owner(key) is new
    assert await new.command("GET", key) == "v"
    await master.start()
    await cluster.wait_ready()
    assert (await master.command("ROLE"))[:3] == ["slave", "127.0.0.1", new.port]
    assert await cluster.failover(new, kill=False) is master
    assert new.running


# -- a link ------------------------------------------------------------------------------------------------------------


async def test_a_link_that_is_cut_refuses_and_drops(redis: RedisServer) -> None:
    """A cut ends all connections and refuses new ones, for the server too; healed it serves on the same port."""
    async with await Link.open(redis.port) as link:
        connection = await Connection.open("127.0.0.1", link.port)
        number = await connection.command("CLIENT", "ID")
        assert (link.connections, link.accepted) == (1, 1)
        link.cut()
        with pytest.raises((EOFError, ConnectionError)):
            await connection.command("PING", timeout_s=SLOW_S)
        assert await refused(link.port)

        async def is_dropped() -> bool:
            return not await redis.command("CLIENT", "LIST", "ID", number)

        await wait_until(is_dropped, "the server has dropped the connection")
        assert link.connections == 0
        await link.heal()
        async with await Connection.open("127.0.0.1", link.port) as again:
            assert await again.command("PING") == "PONG"
    assert await refused(link.port)


async def test_a_link_that_stalls_keeps_everything_for_later(redis: RedisServer) -> None:
    """Nothing passes either way, new connections are taken, and all that was sent arrives once, in order."""
    async with await Link.open(redis.port) as link, await Connection.open("127.0.0.1", link.port) as connection:
        await connection.command("PING")
        link.stall()
        pushes = [("RPUSH", "list", f"{n}:" + "x" * 1000) for n in range(2000)]
        waiting = asyncio.create_task(connection.pipeline(pushes))
        async with await Connection.open("127.0.0.1", link.port) as second:
            with pytest.raises(TimeoutError):
                await second.command("PING", timeout_s=0.05)
        assert not waiting.done()
        assert await redis.command("EXISTS", "list") == 0
        await link.heal()
        assert await waiting == list(range(1, 2001))
        stored = await redis.command("LRANGE", "list", 0, -1)
        assert [int(entry.split(":")[0]) for entry in stored] == list(range(2000))


async def test_a_link_is_as_slow_as_it_is_told(redis: RedisServer) -> None:
    """The delay is added each way, is none for throughput, and keeps the order when it is taken away."""
    async with (
        await Link.open(redis.port, delay_s=0.05) as link,
        await Connection.open("127.0.0.1", link.port) as connection,
    ):
        began = perf_counter()
        await connection.command("PING")
        assert perf_counter() - began >= 0.1
        first = asyncio.create_task(connection.pipeline([("RPUSH", "list", n) for n in range(100)], timeout_s=SLOW_S))
        await asyncio.sleep(
            0.01
        )  # it is on its way, which shows nowhere; were it not, the test would hold all the same
        link.delay_s = 0.0
        async with await Connection.open("127.0.0.1", link.port) as second:  # overtakes it, on a way of its own
            assert await second.command("RPUSH", "list", "second") == 1
        assert await first == list(range(2, 102))


async def test_a_link_to_nobody_drops_who_comes(own_redis: RedisServer) -> None:
    """While the server is dead a connection ends at once, and the next one after its return is served."""
    async with await Link.open(own_redis.port) as link:
        await own_redis.kill()
        with pytest.raises((EOFError, ConnectionError)):
            await (await Connection.open("127.0.0.1", link.port)).command("PING", timeout_s=SLOW_S)
        await own_redis.start()
        async with await Connection.open("127.0.0.1", link.port) as connection:
            assert await connection.command("PING") == "PONG"


# -- a namespace -------------------------------------------------------------------------------------------------------

HOST = """\
import asyncio, sys

async def main():
    gateway, port, address, door = sys.argv[1:]
    reader, writer = await asyncio.open_connection(gateway, int(port))

    async def visit(_reader, visitor):
        visitor.write(b"welcome")
        visitor.close()

    async with await asyncio.start_server(visit, address, int(door)):
        while line := await asyncio.to_thread(sys.stdin.readline):
            writer.write(line.encode())
            print((await reader.readline()).decode().strip(), flush=True)

asyncio.run(main())
"""
"""A host: passes lines on to its server, one at a time, and lets visitors in while it waits for an answer."""


async def visit(address: str, port: int, timeout_s: float = SLOW_S) -> bytes:
    """What a visitor of the host is told."""
    async with asyncio.timeout(timeout_s):
        reader, writer = await asyncio.open_connection(address, port)
        try:
            return await reader.read()
        finally:
            writer.transport.abort()


async def test_a_namespace_is_cut_off_without_a_sound(namespace: Namespace) -> None:
    """Cut off from the servers a host still has its visitors; nothing is closed, and all arrives when healed."""
    async with RedisServer(address=namespace.gateway) as server:
        door = free_port()
        command = namespace.command(
            sys.executable, "-c", HOST, namespace.gateway, str(server.port), namespace.address, str(door)
        )
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        assert process.stdin is not None
        assert process.stdout is not None

        async def say(line: str) -> None:
            assert process.stdin is not None
            process.stdin.write(f"{line}\r\n".encode())
            await process.stdin.drain()

        await say("INCR n")
        assert await process.stdout.readline() == b":1\n"
        await namespace.cut()
        await say("INCR n")
        answer = asyncio.create_task(process.stdout.readline())
        assert await visit(namespace.address, door) == b"welcome"
        await asyncio.wait([answer], timeout=0.3)
        assert not answer.done()
        assert await server.command("GET", "n") == "1"
        assert len((await server.command("CLIENT", "LIST", "TYPE", "normal")).splitlines()) == 2
        await namespace.heal()
        async with asyncio.timeout(SLOW_S):
            assert await answer == b":2\n"
        await namespace.cut(visitors=True)
        with pytest.raises(TimeoutError):
            await visit(namespace.address, door, 0.2)
        pid = process.pid
        await namespace.aclose()
        await process.wait()
        assert is_gone(pid)
    listed = await asyncio.create_subprocess_exec("ip", "link", stdout=asyncio.subprocess.PIPE)
    assert namespace._device.encode() not in (await listed.communicate())[0]
    assert not Path("/run/netns", namespace.name).exists()


async def test_namespaces_share_a_server(namespace: Namespace) -> None:
    """Every namespace reaches what listens on the gateway of one of them, and each is cut off by itself."""
    reach = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 0.3).close()"
    async with Namespace() as other, RedisServer(address=namespace.gateway) as server:
        to = (sys.executable, "-c", reach, namespace.gateway, str(server.port))
        await namespace.run(*to)
        await other.run(*to)
        await other.cut()
        with pytest.raises(subprocess.CalledProcessError) as failure:
            await other.run(*to)
        assert "timed out" in failure.value.stderr
        await namespace.run(*to)
        with pytest.raises(TimeoutError):
            await other.run("sleep", "60", timeout_s=0.1)
        listed = await asyncio.create_subprocess_exec("ip", "netns", "pids", other.name, stdout=subprocess.PIPE)
        assert await listed.communicate() == (b"", None)


def test_the_reason_against_namespaces_can_be_met() -> None:
    """There is none, or it says what to do."""
    reason = can_use_namespaces()
    assert reason is None or os.geteuid() != 0 or "capabilities" in reason or "install" in reason
