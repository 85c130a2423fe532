"""Builds one generation beside what serves, and ends one: setup, state, probe; teardown, undo, sweep."""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import msgspec

from ..config import PluginSettings
from ..errors import CallFailed, LoadFailed
from ..logs import Logger
from ..metrics import Metrics
from .active import BoundHook, Breaker, Generation, PluginState, Slot
from .call import Calls, Clock, blame
from .capabilities import CapabilityDoors
from .entries import merged, slot_for
from .guards import host_task
from .plugin_metrics import PluginMetrics
from .python import PythonLoader, bind_hooks
from .release import Leftover, Release
from .scope import Context, Scope, Sender
from .sources import Bundle
from .tools import load_tools
from .wasm_loader import WasmLoader

__all__ = ["Maker", "Prepared"]


@dataclass(slots=True)
class Prepared:
    """A generation that is ready to serve and does not yet."""

    generation: Generation
    slot: Slot
    module: ModuleType | None


@dataclass(slots=True)
class _Inside:
    """What the host keeps beside a generation; gone with it."""

    module: ModuleType | None
    ctx: Context
    scope: Scope


class Maker:
    """Makes and ends generations. `compile_routes` turns what `routes` returned into something that web can serve."""

    def __init__(
        self,
        *,
        calls: Calls,
        loader: PythonLoader,
        wasm: WasmLoader,
        release: Release,
        metrics: Metrics,
        plugin_metrics: PluginMetrics,
        doors: CapabilityDoors,
        send: Sender,
        compile_routes: Callable[[Any], Any],
        log: Logger,
        setup_timeout_s: float,
    ) -> None:
        self.release = release
        self._calls = calls
        self._loader = loader
        self._wasm = wasm
        self._metrics = metrics
        self._plugin_metrics = plugin_metrics
        self._doors = doors
        self._send = send
        self._compile_routes = compile_routes
        self._log = log
        self._setup_timeout_s = setup_timeout_s
        self._inside: dict[Generation, _Inside] = {}

    @property
    def alive(self) -> int:
        """Generations that serve, drain, or were released but are not proven gone."""
        return len(self._inside) + self.release.unproven

    async def make(
        self,
        bundle: Bundle,
        number: int,
        *,
        old: Generation | None,
        settings: PluginSettings,
        modules: dict[str, Any],
        breaker: Breaker,
        steps: dict[str, float],
    ) -> Prepared:
        """Load, set up, hand over state, probe. Raises `LoadFailed`; then nothing of it is left."""
        generation = Generation(bundle.manifest.name, number, bundle, bundle.manifest)
        generation.move(PluginState.LOADING)
        log = self._log.bind(plugin=generation.plugin, generation=number)
        generation.scope = scope = Scope(generation, log)
        started = time.monotonic()
        ctx = Context(
            generation,
            scope=scope,
            config=copy.deepcopy(merged(bundle.manifest.config, settings.config)),
            granted=frozenset(settings.grant),
            doors=self._doors,
            metrics=self._plugin_metrics,
            send=self._send,
            modules=modules,
            log=log,
        )
        inside = self._inside[generation] = _Inside(None, ctx, scope)
        try:
            if bundle.component is not None:
                generation.hooks = await self._wasm.load(generation, ctx, self._metrics.call_stats)
            else:
                inside.module = await self._loader.load(generation, self._setup_timeout_s)
                generation.hooks = bind_hooks(generation, inside.module, ctx, self._metrics.call_stats)
            steps["load_ms"] = (time.monotonic() - started) * 1000
            await self._bring_up(generation, old, steps)
        except BaseException:
            await self._undo(generation)
            raise
        return Prepared(generation, slot_for(generation, settings, breaker), inside.module)

    async def _bring_up(self, generation: Generation, old: Generation | None, steps: dict[str, float]) -> None:
        started = time.monotonic()
        await self._lifecycle(generation, "setup")
        if old is not None and "export_state" in old.hooks and "import_state" in generation.hooks:
            state = await self._lifecycle(old, "export_state")
            try:
                state = msgspec.json.decode(msgspec.json.encode(state))
            except (TypeError, ValueError, RecursionError) as exc:
                raise LoadFailed(generation.plugin, "export_state", f"the old state is not JSON-able: {exc}") from exc
            await self._lifecycle(generation, "import_state", state, old.manifest.version)
        try:
            generation.tools = load_tools(await self._lifecycle(generation, "tools"))
        except ValueError as exc:
            raise LoadFailed(generation.plugin, "tools", str(exc)) from exc
        if "routes" in generation.hooks:
            try:
                generation.routes = self._compile_routes(await self._lifecycle(generation, "routes"))
            except (TypeError, ValueError) as exc:
                raise LoadFailed(generation.plugin, "routes", str(exc)) from exc
        probing = time.monotonic()
        steps["setup_ms"] = (probing - started) * 1000
        await self._lifecycle(generation, "probe")
        steps["probe_ms"] = (time.monotonic() - probing) * 1000

    async def _lifecycle(self, generation: Generation, name: str, *args: Any) -> Any:
        """Call a hook of the generation itself. Raises `LoadFailed`.

        In a task of its own: an exception that a plugin keeps holds the frames below it, and with them their
        variables, the generation before among them.
        """
        hook = generation.hooks.get(name)
        if hook is None:
            return None
        return await host_task(self._call_lifecycle(generation, hook, args))

    async def _call_lifecycle(self, generation: Generation, hook: BoundHook, args: tuple[Any, ...]) -> Any:
        slot = Slot(generation, 0, "", self._setup_timeout_s, "skip", Breaker(20, 1.0, lambda state: None))
        clock = Clock(asyncio.current_task())
        self._calls.start(clock)
        try:
            return await self._calls.call(slot, hook, clock, hook.call, *args)
        except CallFailed as exc:
            file, line = _where(exc, generation)
            problem = exc.problem.removesuffix(f" ({file}:{line})")
            raise LoadFailed(generation.plugin, hook.name, problem, file=file, line=line) from None
        finally:
            self._calls.stop(clock)

    async def configure(self, generation: Generation, config: dict[str, Any]) -> bool:
        """Offer *config* to the `configure` hook; True when it was taken."""
        hook = generation.hooks.get("configure")
        inside = self._inside.get(generation)
        if hook is None or inside is None:
            return False
        taken = bool(await self._lifecycle(generation, "configure", copy.deepcopy(config)))
        if taken:
            inside.ctx.config = copy.deepcopy(config)
        return taken

    def config_of(self, generation: Generation) -> dict[str, Any]:
        inside = self._inside.get(generation)
        return inside.ctx.config if inside else {}

    def granted(self, generation: Generation) -> frozenset[str]:
        inside = self._inside.get(generation)
        return inside.ctx.granted if inside else frozenset()

    def grant(self, generation: Generation, settings: PluginSettings) -> None:
        self._inside[generation].ctx.granted = frozenset(settings.grant)

    def module_of(self, generation: Generation) -> ModuleType | None:
        return self._inside[generation].module

    def plugin_of(self, module_name: str | None) -> str | None:
        """Which plugin a module's name belongs to, for a report."""
        for generation in self._inside:
            if generation.module_name == module_name:
                return generation.plugin
        return None

    def hand_over(self, old: Generation | None, new: Generation) -> None:
        """Let the timed jobs of *new* run instead of those of *old*: never both at once."""
        if old is not None:
            old.scope.pause()
        new.scope.take_over(old.scope.jobs if old is not None else None)

    def pause(self, generation: Generation) -> None:
        """Let a generation's timed jobs rest."""
        generation.scope.pause()

    async def discard(self, made: Prepared) -> None:
        """Undo a generation that never served."""
        await self._undo(made.generation)

    async def _undo(self, generation: Generation) -> None:
        generation.move(PluginState.FAILED)
        for what in await self.release_all(generation):
            self._log.info("plugin_undone", plugin=generation.plugin, generation=generation.number, what=what)
        generation.move(PluginState.CLOSED)

    async def tear_down(self, generation: Generation) -> list[str]:
        """Run `teardown` and undo all that came through `ctx`; return what went wrong, in words."""
        problems = []
        try:
            await self._lifecycle(generation, "teardown")
        except LoadFailed as exc:
            problems.append(f"teardown {exc.problem}")
        inside = self._inside.get(generation)
        return [*problems, *(await inside.scope.aclose() if inside else [])]

    async def release_all(self, generation: Generation) -> list[str]:
        """Sweep a generation that nobody uses any more; return what it left, in words."""
        inside = self._inside.pop(generation, None)
        if inside is None:
            return []
        problems = await inside.scope.aclose()
        guest, generation.guest = generation.guest, None
        if guest is not None:
            problems += [f"{what} (still there)" for what in await guest.aclose()]
        left: list[Leftover] = await self.release.sweep(generation, *([] if guest is None else [guest]))
        return [*problems, *map(str, left)]


def _where(exc: CallFailed, generation: Generation) -> tuple[str | None, int | None]:
    cause = exc.__cause__
    if cause is None:
        return next(iter(generation.bundle.paths), None), None
    _, file, line = blame(cause, generation)
    if file is None and generation.bundle.component is not None:
        file = next(iter(generation.bundle.paths))
    return file, line
