"""The one place that sees all rooms: builds each from a `Config`, opens them in order and closes them in reverse."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from .backend import Backend, open_backend
from .backend.images import ImageStore
from .backend.lock import FolderLock
from .chat.assistant import Assistant
from .chat.background import Background
from .chat.dispatch import Dispatch
from .chat.elsewhere import Elsewhere
from .chat.images import Images
from .chat.intake import Intake
from .chat.outbox import Outbox
from .chat.recent import Recent
from .chat.spool import Spool
from .chat.summaries import Summaries
from .chat.tools import Toolbox
from .chat.turns import Turns
from .config import Config, LlmSettings, read_llm_settings
from .llm.client import Llm
from .logs import get_log
from .metrics import Metrics
from .runtime.active import Active, Snapshot
from .runtime.archive import Archive
from .runtime.call import Calls
from .runtime.capabilities import CapabilityDoors
from .runtime.events import Events
from .runtime.generations import Maker
from .runtime.guards import Guards, host_task
from .runtime.plugin_metrics import PluginMetrics
from .runtime.pushed import Pushed
from .runtime.pushed_files import PushedFiles
from .runtime.python import PythonLoader
from .runtime.release import Release
from .runtime.reload import Plugins
from .runtime.settings_file import follow_settings
from .runtime.stalls import StallWatch
from .runtime.stands import Report
from .runtime.wasm_loader import WasmLoader
from .web.access import Access, keep_admin_token
from .web.admin import Admin
from .web.application import Doors, make_application
from .web.connections import Site
from .web.conversations import Conversations
from .web.dead_letters import DeadLetters
from .web.departure import Departure
from .web.images import ImageDoor
from .web.inner import serve_inner
from .web.plugin_pages import PluginPages, compile_routes
from .web.port import BACKLOG, bind_port
from .web.probes import Probes
from .web.seat import Seat
from .web.siblings import Siblings
from .web.steering import SteeredSite
from .web.webhooks import Webhooks
from .web.websocket import WebSockets
from .web.wire import Wire

__all__ = ["Host", "open_host"]

HOST_KEYS = "the host"
"""The name under which the host itself keeps keys beside those of plugins. It is reserved by the space in it."""

PURGE_EVERY_S = 3600.0


@dataclass(slots=True)
class Host:
    """A running host. Opened by `open_host`."""

    config: Config
    url: str
    backend: Backend
    intake: Intake
    turns: Turns
    elsewhere: Elsewhere
    plugins: Plugins
    events: Events
    metrics: Metrics
    new_admin_token: str | None
    resumed: int
    images: Images
    llm: Llm
    purge: Callable[[float], Awaitable[None]]
    """Delete what nobody has touched since a time (Unix seconds), here and in memory; by itself once an hour, where
    `retention_days` is set."""
    catch_up: Callable[[], Awaitable[None]]
    """For a worker that the others know of from now on: take what commands did in them while it was starting."""


@contextlib.asynccontextmanager
async def open_host(
    config: Config,
    *,
    listen: Callable[[dict[str, Any]], None] | None = None,
    log_events: bool = True,
    serve: bool = True,
    seat: Seat | None = None,
) -> AsyncIterator[Host]:
    """Run a host while the context is open. *listen* hears every plugin event, which the log has too
    unless *log_events* is False; *serve* False opens no port. *seat* is a worker's, whose supervisor has the folder
    and the port.

    Raises `ConfigError` or `BackendError` when it can't start. Leaving the context stops taking messages, lets
    what runs finish within `stop_timeout_s`, and leaves the rest in the journal.
    """
    log = get_log()
    registry = CollectorRegistry()
    for collector in (GCCollector, PlatformCollector, ProcessCollector):
        collector(registry=registry)
    metrics = Metrics(registry)
    events = Events(log if log_events else None)
    if listen is not None:
        events.listen(listen)
    async with contextlib.AsyncExitStack() as stack:
        if seat is None:
            lock = FolderLock(Path(config.data))
            lock.acquire()
            stack.callback(lock.release)
        sock = seat.sock if seat is not None else bind_port(config) if serve else None
        if sock is not None:
            stack.callback(sock.close)
        siblings = seat.siblings if seat is not None else Siblings()
        access = Access(config, seat.keys if seat is not None else None)
        backend = await open_backend(config.backend_url, metrics)
        stack.push_async_callback(backend.aclose)
        images = Images(
            ImageStore(Path(config.data) / "images"),
            backend=backend,
            metrics=metrics,
            max_bytes=config.max_image_bytes,
            hosts=config.image_hosts,
        )
        stack.push_async_callback(images.aclose)
        await images.open()
        guards = Guards(asyncio.get_running_loop())
        stack.callback(guards.remove)
        loader = PythonLoader()
        loader.install()
        stack.callback(loader.remove)

        calls = Calls(metrics, log)
        dispatch = Dispatch(calls)

        def compile_snapshot(snapshot: Snapshot) -> Any:
            snapshot.tools = Toolbox(snapshot)
            return dispatch.compile(snapshot)

        active = Active(compile_snapshot)
        llm = Llm(config.llm, metrics)
        stack.push_async_callback(llm.aclose)
        await llm.open()
        recent = Recent(backend, eager=bool(config.llm.models))
        summaries = Summaries(llm, log)
        stack.push_async_callback(summaries.aclose)
        assistant = Assistant(llm, recent=recent, images=images, calls=calls, metrics=metrics, summaries=summaries)
        outbox = Outbox()
        background = Background(active, calls, backend, metrics, log)
        turns = Turns(
            active=active,
            calls=calls,
            backend=backend,
            recent=recent,
            outbox=outbox,
            background=background,
            metrics=metrics,
            log=log,
            max_reply_chars=config.max_reply_chars,
            max_tries=config.max_tries,
            log_turns=config.log_level == "debug",
            log_text=config.log_text,
        )
        elsewhere = Elsewhere(
            backend=backend, turns=turns, recent=recent, outbox=outbox, background=background, log=log
        )
        stack.push_async_callback(elsewhere.aclose)
        spool = _make_spool(config, seat, backend, metrics)
        intake = Intake(
            backend=backend,
            images=images,
            turns=turns,
            elsewhere=elsewhere,
            recent=recent,
            outbox=outbox,
            background=background,
            metrics=metrics,
            max_turns=config.max_turns,
            spool=spool,
        )

        def denied(plugin: str, generation: int, capability: str) -> None:
            events.tell("capability_denied", plugin=plugin, generation=generation, capability=capability)

        wasm = WasmLoader(config, log)
        stack.push_async_callback(wasm.aclose)
        maker = Maker(
            calls=calls,
            loader=loader,
            wasm=wasm,
            release=Release(loader),
            metrics=metrics,
            plugin_metrics=PluginMetrics(registry),
            doors=CapabilityDoors(backend, assistant.for_plugin, denied, frozenset(config.http_hosts)),
            send=intake.say,
            compile_routes=compile_routes,
            log=log,
            setup_timeout_s=config.setup_timeout_s,
        )

        async def remember(enabled: dict[str, bool]) -> None:
            await backend.kv_set(HOST_KEYS, "enabled", msgspec.json.encode(enabled))

        async def recall() -> dict[str, bool]:
            kept = await backend.kv_get(HOST_KEYS, "enabled")
            return msgspec.json.decode(kept, type=dict[str, bool]) if kept else {}

        async def catch_up() -> None:
            await plugins.take_overrides(await recall())

        shelf = backend.shelf
        pushed_files = PushedFiles(Path(config.data).absolute() / "pushed")
        plugins = Plugins(
            config,
            active=active,
            calls=calls,
            maker=maker,
            metrics=metrics,
            events=events,
            log=log,
            archive=Archive(Path(config.data) / "plugins", log),
            remember=remember,
            number=seat.number if seat is not None else None,
            joining=seat.joining if seat is not None else "",
            pushed=pushed_files.plugins if shelf is not None else None,
        )
        metrics.watch_gauge("hotdesk_turns_live", "Turns accepted and not ended", lambda: turns.live)
        metrics.watch_gauge(
            "hotdesk_spool_messages", "Messages that wait on this machine's disk", lambda: spool.count if spool else 0
        )
        metrics.watch_gauge("hotdesk_generations_alive", "Generations not proven gone", lambda: maker.alive)
        metrics.watch_gauge("hotdesk_wasm_stores", "Stores of components that are alive", lambda: wasm.instances)
        stalls = _watch_stalls(config, maker, events, metrics)
        stack.callback(stalls.close)
        stack.push_async_callback(plugins.aclose)
        gc.collect()
        gc.freeze()  # what lives as long as the host need not be looked at by every collection; plugins come after
        stack.callback(gc.unfreeze)
        pushed: Pushed | None = None
        if shelf is not None:
            about = Report(host=_host_name(sock), pid=os.getpid(), worker=seat.worker if seat is not None else None)
            pushed = Pushed(shelf, pushed_files, plugins=plugins, events=events, log=log, about=about)
            await pushed.catch_up()
        await plugins.start(await recall())
        if pushed is not None:
            await pushed.start()
            stack.push_async_callback(pushed.aclose)
        stack.push_async_callback(background.aclose, config.stop_timeout_s)
        stack.push_async_callback(turns.aclose, config.stop_timeout_s)
        resumed = await intake.resume()
        if spool is not None:
            stack.push_async_callback(spool.aclose, config.stop_timeout_s)
            await spool.open()
        wire = Wire(metrics, log)
        runners: list[web.AppRunner] = []
        doors = Doors(
            wire=wire,
            access=access,
            conversations=Conversations(
                config,
                intake=intake,
                turns=turns,
                elsewhere=elsewhere,
                outbox=outbox,
                backend=backend,
                access=access,
                metrics=metrics,
            ),
            images=ImageDoor(images, access),
            websockets=WebSockets(
                config,
                intake=intake,
                turns=turns,
                elsewhere=elsewhere,
                outbox=outbox,
                backend=backend,
                access=access,
                metrics=metrics,
                wire=wire,
            ),
            webhooks=Webhooks(intake=intake, background=background),
            pages=PluginPages(active, calls),
            admin=Admin(
                config,
                plugins=plugins,
                maker=maker,
                events=events,
                access=access,
                metrics=metrics,
                siblings=siblings,
                pushed=pushed,
                facts=lambda: {"connections": sum(map(_connections, runners)), "turns": turns.live},
            ),
            dead_letters=DeadLetters(backend, access),
            probes=Probes(
                backend=backend,
                registry=registry,
                ready=lambda: intake.ready,
                facts=lambda: {
                    "watch": plugins.watch_mode,
                    "plugins": sum(e.current is not None for e in plugins.entries),
                },
                siblings=siblings,
                spool=spool,
            ),
        )
        if seat is not None:
            stop_inner = await serve_inner(
                seat.path, worker=seat.worker, admin=doors.admin, registry=registry, wire=wire
            )
            stack.push_async_callback(stop_inner)

        async def leave() -> None:
            """Finish what runs here, hand the rest to other workers, and wait for what was accepted here."""
            until = time.monotonic() + config.stop_timeout_s
            handing = asyncio.create_task(backend.hand_over(config.stop_timeout_s))
            await turns.wait_idle(config.stop_timeout_s)
            await handing
            await elsewhere.wait_idle(until - time.monotonic())
            if turns.live or elsewhere.live:
                log.warning("stop_timed_out", left_open=turns.live, waited_for_elsewhere=elsewhere.live)

        url = ""
        if sock is not None:
            departure = seat.departure if seat is not None else None

            def open_site(runner: web.AppRunner, sock: socket.socket) -> web.BaseSite:
                if seat is None:
                    return Site(runner, sock, backlog=BACKLOG)
                return SteeredSite(
                    runner,
                    sock,
                    entrance=seat.entrance,
                    find=lambda conversation: siblings.entrance_to(backend.home(conversation)),
                    passed=metrics.passed_connections.inc,
                )

            runners.append(await _serve(config, sock, doors, intake, turns, leave, stack, departure, open_site))
            url = _url(config, sock)
        if not serve:
            stack.callback(intake.stop)

        async def purge(before: float) -> None:
            if deleted := await backend.purge(before):
                recent.forget_all()
                summaries.forget_all()
                log.info("conversations_purged", count=deleted)
            if deleted := await images.purge(before):
                log.info("images_purged", count=deleted)

        if config.retention_days:
            purging = asyncio.create_task(_keep_purging(purge, config.retention_days, log))
            stack.callback(purging.cancel)
        if config.file:

            async def take_models(settings: LlmSettings) -> None:
                if settings != llm.settings:
                    await llm.configure(settings)
                    plugins.grant_llm(settings.grant)
                    events.tell("llm_configured", models=list(llm.models), message=llm.describe())

            def read_models(file: str) -> LlmSettings:
                return read_llm_settings(file, config.llm.environ)

            following = host_task(follow_settings(Path(config.file), read_models, take_models, events))
            stack.callback(following.cancel)
        if seat is None:
            keep_admin_token(config, access.keys)
        intake.open()
        yield Host(
            config,
            url,
            backend,
            intake,
            turns,
            elsewhere,
            plugins,
            events,
            metrics,
            access.keys.new_admin_token,
            resumed,
            images,
            llm,
            purge,
            catch_up,
        )


def _make_spool(config: Config, seat: Seat | None, backend: Backend, metrics: Metrics) -> Spool | None:
    """The spool of this worker; also where it is not to take anything, while messages of before wait in one."""
    folder = Path(config.data) / "spool"
    if not config.spool and not Spool.is_left(folder):
        return None
    spool = Spool(
        folder,
        seat.name if seat is not None else "host",
        taking=config.spool,
        max_bytes=config.spool_mb * 2**20,
        backend=backend,
        metrics=metrics,
        log=get_log(),
    )
    if seat is not None:
        seat.on_buried.append(lambda name: spool.look())
    return spool


def _watch_stalls(config: Config, maker: Maker, events: Events, metrics: Metrics) -> StallWatch:
    def report(module: str | None, stack: str, seconds: float) -> None:
        plugin = maker.plugin_of(module)
        metrics.stalls.labels(plugin or "").inc()
        events.tell("loop_stalled", plugin=plugin, ms=round(seconds * 1000), stack=stack)

    stalls = StallWatch(config.stall_ms / 1000, report, metrics.loop_lag.set)
    stalls.start()
    return stalls


async def _serve(
    config: Config,
    sock: socket.socket,
    doors: Doors,
    intake: Intake,
    turns: Turns,
    leave: Callable[[], Awaitable[None]],
    stack: contextlib.AsyncExitStack,
    departure: Departure | None,
    open_site: Callable[[web.AppRunner, socket.socket], web.BaseSite],
) -> web.AppRunner:
    """Listen; on the way out, leave the port to the other workers, where there are any; stop taking messages, then
    tell everyone connected to come back."""
    runner = web.AppRunner(
        make_application(config, doors, departure),
        handle_signals=False,
        shutdown_timeout=config.stop_timeout_s,
    )
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    await open_site(runner, sock).start()

    async def stop() -> None:
        if departure is not None:
            await departure.close_port(runner)
            if not departure.hurried:
                await doors.websockets.send_off(turns.runs_in)
            await departure.answer_all(runner, config.stop_timeout_s)
        intake.stop()
        await leave()
        doors.conversations.stop()
        doors.admin.stop()
        await doors.websockets.aclose()

    stack.push_async_callback(stop)
    return runner


def _url(config: Config, sock: socket.socket) -> str:
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"http://{host}:{sock.getsockname()[1]}"


def _host_name(sock: socket.socket | None) -> str:
    """What hosts that share a journal tell this one by."""
    return f"{socket.gethostname()}:{sock.getsockname()[1] if sock is not None else os.getpid()}"


def _connections(runner: web.AppRunner) -> int:
    return len(runner.server.connections) if runner.server is not None else 0


async def _keep_purging(purge: Callable[[float], Awaitable[None]], days: int, log: Any) -> None:
    while True:
        try:
            await purge(time.time() - days * 86400)
        except Exception as exc:  # a purge that fails is tried again at its next time
            log.error("purge_failed", problem=str(exc))
        await asyncio.sleep(PURGE_EVERY_S)
