"""Many Redis servers: which one has a slot now, and how order is kept while slots change hands.

The commands of one slot are in one place at a time: on their way to one server, or held here. They are held from the
moment in which a server refuses one of them, or another server gets the slot, until nothing of the slot is under way
any more and its server has carried out the first that is held. So whatever moves, they are carried out in their order.

While the keys of a slot are moved, Redis carries out no script whose keys are not all on one side, nor, where they
are on their way, one of whose keys there is none yet (`TRYAGAIN`): a partition stands still until its slot has moved.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from redis.crc import key_slot
from redis.exceptions import AskError, ClusterDownError, MovedError, TryAgainError

from ..errors import BackendError, BackendUnavailable
from ..logs import get_log
from .redis_news import News
from .redis_servers import Hears, Then, ask
from .redis_url import RedisUrl
from .redis_wire import Command, Lane, Scripts, Way, connect, explain, own_task

__all__ = ["ManyServers"]

SLOTS = 16384

HOLD_S = 3.0
"""How long a command waits for its slot to be moved."""

RETRY_S = 0.02
"""How often it is tried meanwhile."""

WATCH_S = 0.2
"""How often the servers' map is read while something is wrong."""

CALM_S = 30.0
"""And while nothing is, so that new replicas are known when all masters are gone."""

SLOW_S = 0.25
"""A server that answers nothing for so long may have been replaced: look, rather than wait for the time-out."""

RETIRE_S = 0.3
"""How long a server that has no slots any more has to answer what is on its way to it."""

HEDGE_S = 0.1
"""How long a server that is asked for the map is waited for before another is asked too."""

ASK_S = 2.0
"""And how long the last of them; a connection that can't be made has said so by then."""

RESYNC_S = 0.1
"""Channels of many slots that move one after the other are one reason to read again what was missed."""

Address = tuple[str, int]
Refused = tuple[Command, Exception]


class _Node:
    """The connections to one server; each is made when it is needed."""

    def __init__(self, address: Address, lanes: dict[Way, Lane], news: News) -> None:
        self.address = address
        self.lanes = lanes
        self.main = lanes[Way.TURNS]
        self.aside = lanes[Way.ASIDE]
        self.news = news

    @property
    def unwell(self) -> bool:
        return any(lane.down is not None or lane.waiting_s > SLOW_S for lane in self.lanes.values())


class ManyServers:
    """The masters of a Cluster, by the map that they give of themselves."""

    def __init__(self, url: RedisUrl, scripts: Scripts, hears: Hears) -> None:
        self._url = url
        self._scripts = scripts
        self._hears = hears
        self._loop = asyncio.get_running_loop()
        self._owner: list[Address | None] = [None] * SLOTS
        self._masters: tuple[Address, ...] = ()
        self._others: tuple[Address, ...] = ()
        """Replicas: they know the map too."""

        self._nodes: dict[Address, _Node] = {}
        self._leaving: set[_Node] = set()
        self._held: dict[int, list[Command]] = {}
        self._channels: dict[str, int] = {}
        self._places: dict[str, _Node] = {}
        """Where each channel is subscribed to."""

        self._unheard: set[str] = set()
        """Channels that were heard, and are to be heard again elsewhere."""

        self._resync: asyncio.TimerHandle | None = None
        self._hearing = False
        self._problem: str | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loading: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._closed = False

    # -- commands --------------------------------------------------------------------------------------------

    def send(self, command: Command, way: Way = Way.TURNS) -> None:
        if self._closed:
            self._fail(command, BackendUnavailable(self._url.text, "the host is stopping"))
        elif way is not Way.TURNS:
            node = self._node_of(command.slot)
            if node is None:
                self._spawn(self._carry(command, way))
            else:
                node.lanes[way].send(command)
        elif (held := self._held.get(command.slot)) is not None:
            held.append(command)
            command.until = command.until or time.monotonic() + HOLD_S
        elif (node := self._node_of(command.slot)) is None:
            self._hold(command.slot, [command])
        else:
            node.main.send(command)

    async def each(self, *args: Any, then: Then | None = None, failed: bool = False) -> list[Any]:
        if not self._masters:
            await self._load()
        asking = (ask(self._node(address).aside, args, then) for address in self._masters)
        return await asyncio.gather(*asking, return_exceptions=failed)

    def _node_of(self, slot: int) -> _Node | None:
        """Whose *slot* is; for -1 any that is well."""
        if slot >= 0:
            address = self._owner[slot]
            return None if address is None else self._node(address)
        nodes = [self._node(address) for address in self._masters]
        return next((node for node in nodes if not node.unwell), nodes[0] if nodes else None)

    def _node(self, address: Address) -> _Node:
        node = self._nodes.get(address)
        if node is None:
            node = self._nodes[address] = self._make_node(address)
        return node

    def _make_node(self, address: Address) -> _Node:
        name = f"{self._url.text} (server {address[0]}:{address[1]})"

        def lane(misplaced: Callable[[list[Refused]], None], **options: Any) -> Lane:
            opening = partial(connect, self._url, *address, scripts=self._scripts)
            return Lane(opening, name=name, scripts=self._scripts, misplaced=misplaced, **options)

        lanes = {
            Way.TURNS: lane(
                lambda refused: self._main_refused(node, refused),
                replicas=self._url.replicas,
                on_batch=self._hears.on_batch,
                together=True,
            ),
            Way.ASIDE: lane(lambda refused: self._others_refused(node, Way.ASIDE, refused)),
            Way.LEASE: lane(lambda refused: self._others_refused(node, Way.LEASE, refused)),
        }
        news = News(
            lambda: connect(self._url, *address, scripts=None),
            hear=self._hears.on_news,
            on_open=self._hears.on_open,
            on_close=self._hears.on_close,
            confirmed=self._confirmed,
            slot_of=_slot_of,
            moved=lambda channel: self._channel_moved(node, channel),
        )
        node: _Node = _Node(address, lanes, news)  # the lambdas above mean this one
        return node

    # -- commands of slots that change hands -----------------------------------------------------------------

    def _main_refused(self, node: _Node, refused: list[Refused]) -> None:
        groups: dict[int, list[Command]] = {}
        for command, exc in refused:
            if not self._is_lost(node, command, exc):
                groups.setdefault(command.slot, []).append(command)
        for slot, commands in groups.items():
            waiting = node.main.take(lambda command, slot=slot: command.slot == slot)  # type: ignore[misc]
            self._hold(slot, commands + waiting)

    def _others_refused(self, node: _Node, way: Way, refused: list[Refused]) -> None:
        for command, exc in refused:
            if not self._is_lost(node, command, exc):
                self._spawn(self._carry(command, way))

    def _is_lost(self, node: _Node, command: Command, exc: Exception) -> bool:
        """Look at a refusal; True when there is nobody to turn to, and the command has failed."""
        if isinstance(exc, MovedError):
            self._learn(node, exc)
        if not isinstance(exc, ClusterDownError):
            return False
        self._wake.set()
        self._fail(command, BackendUnavailable(self._url.text, explain(exc)))
        return True

    def _learn(self, node: _Node, exc: MovedError) -> None:
        """A server says whose a slot is. Where it names no host, it is its own."""
        address = exc.host or node.address[0], exc.port
        before = self._owner[exc.slot_id]
        if before != address:
            self._owner[exc.slot_id] = address
            if before is not None and (left := self._nodes.get(before)) is not None:
                self._clear(left)
        self._wake.set()

    def _clear(self, node: _Node) -> None:
        """Hold what waits at *node* for slots that are another's now; and what comes, while some of it is under way."""

        def is_misled(command: Command) -> bool:
            return command.slot >= 0 and not command.alone and self._owner[command.slot] != node.address

        for command in node.main.take(is_misled):
            self._hold(command.slot, [], [command])
        for command in node.main.flying:
            if is_misled(command):
                self._hold(command.slot, [])
        for way in (Way.ASIDE, Way.LEASE):
            for command in node.lanes[way].take(is_misled):
                self._spawn(self._carry(command, way))

    def _hold(self, slot: int, first: list[Command], last: list[Command] | None = None) -> None:
        """Hold *first* before, *last* behind what is held of *slot*, and all that comes."""
        held = self._held.get(slot)
        if held is None:
            held = self._held[slot] = []
            self._spawn(self._let_go(slot, held))
        held[:0] = first
        held += last or []
        for command in held:
            command.until = command.until or time.monotonic() + HOLD_S

    async def _let_go(self, slot: int, held: list[Command]) -> None:
        """Carry out what is held one by one; once the slot's own server sends none of it away, all the rest."""
        try:
            while (busy := self._who_has(slot)) is not None:
                await busy.main.wait_landed(ASK_S)
            while held:
                settled = await self._carry(held[0], Way.TURNS)
                del held[0]
                if settled:
                    break
        finally:
            del self._held[slot]
            for command in held:
                self.send(command)

    def _who_has(self, slot: int) -> _Node | None:
        """The server that commands of *slot* are on their way to."""
        nodes = (*self._nodes.values(), *self._leaving)
        return next((node for node in nodes if any(command.slot == slot for command in node.main.flying)), None)

    async def _carry(self, command: Command, way: Way) -> bool:
        """Carry *command* to whoever takes it, until its time is up; True when its slot's own server did, or failed."""
        command.until = command.until or time.monotonic() + HOLD_S
        asked: Address | None = None
        detours = 0
        while True:
            if self._closed:
                self._fail(command, BackendUnavailable(self._url.text, "the host is stopping"))
                return False
            try:
                node = self._node(asked) if asked is not None else await self._wait_node(command.slot)
                result = await self._try(node, command, way, asking=asked is not None)
            except (AskError, TryAgainError) as exc:
                if isinstance(exc, MovedError):
                    self._learn(node, exc)
                    asked = None
                elif isinstance(exc, AskError):
                    asked = exc.host or node.address[0], exc.port
                else:
                    asked = None
                    detours += 1
                refusal = str(exc)
            except ClusterDownError as exc:
                self._wake.set()
                self._fail(command, BackendUnavailable(self._url.text, explain(exc)))
                return True
            except BackendError as exc:
                self._fail(command, exc)
                return asked is None
            else:
                if not command.future.done():
                    command.future.set_result(result)
                return asked is None
            if time.monotonic() > command.until:
                moving = f"slot {command.slot} is being moved to another server, for {HOLD_S:g} s by now ({refusal})"
                self._fail(command, BackendUnavailable(self._url.text, moving))
                return False
            detours += 1
            if detours > 1:
                await asyncio.sleep(RETRY_S)

    async def _try(self, node: _Node, command: Command, way: Way, *, asking: bool) -> Any:
        attempt = Command(command.args, self._loop.create_future(), command.slot, command.writes)
        attempt.alone = True
        attempt.asking = asking
        node.lanes[way].send(attempt)
        return await attempt.future

    async def _wait_node(self, slot: int) -> _Node:
        """Whose *slot* is, by the first map there is. Raises `BackendUnavailable` when it is nobody's."""
        if not self._masters:
            await self._load()
        node = self._node_of(slot)
        if node is None:
            self._wake.set()
            raise BackendUnavailable(self._url.text, f"no server has slot {slot}")
        return node

    def _fail(self, command: Command, exc: Exception) -> None:
        command.fail(exc)

    # -- the map ---------------------------------------------------------------------------------------------

    async def _load(self) -> None:
        """Read the map; those who ask meanwhile wait for the same answer. Raises `BackendError`."""
        if self._closed:
            raise BackendUnavailable(self._url.text, "the host is stopping")
        if self._watching is None:
            self._watching = own_task(self._watch())
        if self._loading is None or self._loading.done():
            self._loading = own_task(self._read_map())
        loading = self._loading
        await asyncio.wait([loading])
        if loading.cancelled():
            raise BackendUnavailable(self._url.text, "the host is stopping")
        loading.result()

    async def _watch(self) -> None:
        """Read the map again whenever somebody was misled, and again and again while something is wrong."""
        read_at = time.monotonic()
        while True:
            try:
                async with asyncio.timeout(WATCH_S):
                    await self._wake.wait()
                woken = True
            except TimeoutError:
                woken = False
            self._wake.clear()
            for node in [self._node(address) for address in self._masters]:
                for lane in node.lanes.values():
                    if lane.down is not None:
                        ping = Command(("PING",), self._loop.create_future(), -1, False)
                        ping.future.add_done_callback(asyncio.Future.exception)  # the lane itself notes it
                        lane.send(ping)
            if woken or self._is_unwell() or time.monotonic() > read_at + CALM_S:
                read_at = time.monotonic()
                try:
                    await self._load()
                except BackendError:
                    pass  # `trouble` says so
                except Exception as exc:  # a map that can't be read must not end all watching
                    get_log().error("cluster_map_failed", exc_info=exc)
                await asyncio.sleep(RETRY_S)

    def _is_unwell(self) -> bool:
        return self._problem is not None or any(self._node(address).unwell for address in self._masters)

    async def _read_map(self) -> None:
        try:
            spans = await self._ask_around()
        except BackendError as exc:
            self._problem = exc.reason if isinstance(exc, BackendUnavailable) else str(exc)
            raise
        self._problem = None
        self._use_map(spans)

    async def _ask_around(self) -> list[Any]:
        """The map by the first server that says that all is well."""
        known = dict.fromkeys((*self._masters, *self._others, *self._url.hosts))
        candidates = sorted(known, key=lambda address: address in self._nodes and self._nodes[address].unwell)
        waiting: set[asyncio.Task[list[Any]]] = set()
        failed: list[BaseException] = []
        try:
            while candidates or waiting:
                if candidates:
                    waiting.add(own_task(self._ask(candidates.pop(0))))
                wait_s = HEDGE_S if candidates else ASK_S
                done, waiting = await asyncio.wait(waiting, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
                failed += [exc for one in done if (exc := one.exception()) is not None]
                good = [one.result() for one in done if one.exception() is None]
                if good:
                    return good[0]
                if not done and not candidates:
                    break
        finally:
            for one in waiting:
                one.cancel()
        for exc in failed:
            if not isinstance(exc, BackendUnavailable):
                raise exc
        reasons = dict.fromkeys(exc.reason for exc in failed if isinstance(exc, BackendUnavailable))
        raise BackendUnavailable(self._url.text, "; ".join(reasons) or "no server answers")

    async def _ask(self, address: Address) -> list[Any]:
        """What one server knows: spans of slots, with the addresses of their master and its replicas."""
        info = Command(("CLUSTER", "INFO"), self._loop.create_future(), -1, False)
        slots = Command(("CLUSTER", "SLOTS"), self._loop.create_future(), -1, False)
        for command in (info, slots):
            self._node(address).aside.send(command)
        try:
            said, spans = await asyncio.gather(info.future, slots.future)
        except BackendUnavailable:
            raise
        except BackendError as exc:
            remedy = (
                "; for a server that is no Cluster's write redis://" if "cluster support disabled" in str(exc) else ""
            )
            raise BackendError(f"{exc}{remedy}") from None
        if b"cluster_state:ok" not in said:
            # What it knows may be old: it may be cut off from the others.
            raise BackendUnavailable(self._url.text, f"the Cluster is down (CLUSTER INFO at {address[0]}:{address[1]})")
        return [(first, last, [_address(node, address[0]) for node in nodes]) for first, last, *nodes in spans]

    def _use_map(self, spans: list[tuple[int, int, list[Address]]]) -> None:
        owner: list[Address | None] = [None] * SLOTS
        masters: dict[Address, None] = {}
        others: dict[Address, None] = {}
        for first, last, (master, *replicas) in spans:
            owner[first : last + 1] = [master] * (last + 1 - first)
            masters[master] = None
            others.update(dict.fromkeys(replicas))
        self._owner, self._masters, self._others = owner, tuple(masters), tuple(others)
        nobody = owner.count(None)
        if nobody:
            self._problem = f"no server has {nobody} of the {SLOTS} slots"
        for node in tuple(self._nodes.values()):
            self._clear(node)
            if node.address not in masters:
                del self._nodes[node.address]
                self._leaving.add(node)
                self._spawn(self._retire(node))
        if self._hearing:
            for channel in self._channels:
                self._place(channel)

    async def _retire(self, node: _Node) -> None:
        reason = "the server has been replaced"
        await asyncio.gather(
            *(lane.aclose(reason, wait_s=RETIRE_S) for lane in node.lanes.values()), node.news.aclose()
        )
        self._leaving.discard(node)

    # -- channels --------------------------------------------------------------------------------------------

    def subscribe(self, channel: str) -> None:
        self._channels[channel] = _slot_of(channel)
        if self._hearing:
            self._place(channel)
            place = self._places.get(channel)
            if place is not None:
                place.news.subscribe(channel)

    def unsubscribe(self, channel: str) -> None:
        if self._channels.pop(channel, None) is None:
            return
        self._unheard.discard(channel)
        place = self._places.pop(channel, None)
        if place is not None:
            place.news.unsubscribe(channel)

    def _place(self, channel: str) -> None:
        """See that *channel* is subscribed to where its slot is."""
        node = self._node_of(self._channels[channel])
        place = self._places.get(channel)
        if node is place:
            return
        if place is not None:
            self._unheard.add(channel)
            place.news.forget(channel)
            del self._places[channel]
        if node is not None:
            self._places[channel] = node
            node.news.start()
            node.news.subscribe(channel)

    def _channel_moved(self, node: _Node, channel: str) -> None:
        """Its server says that *channel* is another's: the map says whose."""
        if self._places.get(channel) is node:
            del self._places[channel]
            self._unheard.add(channel)
            self._wake.set()

    def _confirmed(self, channel: str) -> None:
        self._hears.on_confirmed(channel)
        if channel in self._unheard:
            self._unheard.remove(channel)
            if self._resync is None and not self._closed:
                self._resync = self._loop.call_later(RESYNC_S, self._tell_resync)

    def _tell_resync(self) -> None:
        self._resync = None
        self._hears.on_open()

    def start_news(self) -> None:
        self._hearing = True
        for channel in self._channels:
            self._place(channel)

    async def wait_news(self) -> None:
        while (opening := self._opening()) is not None:
            await opening.news.wait_open()

    def _opening(self) -> _Node | None:
        return next((node for node in self._nodes.values() if node.news.wanted and not node.news.opened), None)

    # -- the rest --------------------------------------------------------------------------------------------

    def trouble(self) -> str | None:
        if self._problem is not None:
            return self._problem
        for address in self._masters:
            node = self._nodes.get(address)
            if node is not None and node.main.down is not None:
                return f"server {address[0]}:{address[1]}: {node.main.down}"
        return None

    def _spawn(self, coro: Coroutine[Any, Any, Any]) -> None:
        task = own_task(coro)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def aclose(self) -> None:
        self._closed = True
        if self._resync is not None:
            self._resync.cancel()
        for task in (self._watching, self._loading):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
        nodes = tuple(self._nodes.values())
        await asyncio.gather(*(node.main.aclose() for node in nodes))
        others = (lane for node in nodes for lane in node.lanes.values() if lane is not node.main)
        await asyncio.gather(*(lane.aclose() for lane in others), *(node.news.aclose() for node in nodes))
        while self._tasks:  # the lanes refuse by now, so whatever is carried or held ends at its next try
            await asyncio.wait(self._tasks)


def _slot_of(channel: str) -> int:
    slot: int = key_slot(channel.encode())
    return slot


def _address(node: list[Any], asked: str) -> Address:
    """Where a node of the map is. One that names no host is where *asked* is, or has its IP beside its name."""
    host, port = node[0], node[1]
    if host in (None, b"", b"?"):
        beside = node[3] if len(node) > 3 else []
        host = dict(zip(beside[::2], beside[1::2], strict=True)).get(b"ip", asked.encode())
    return host.decode(), port
