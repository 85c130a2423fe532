"""`/admin/…`: the operator's JSON, behind the admin token. Any worker answers for all."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any
from urllib.parse import quote

import msgspec
from aiohttp import web
from msgspec import Meta

from hotdesk_sdk import HotdeskError

from ..config import Config
from ..errors import DOOR_ERRORS, DoorError, UnknownPlugin
from ..metrics import Metrics
from ..runtime.active import Generation
from ..runtime.entries import Entry
from ..runtime.events import Events
from ..runtime.generations import Maker
from ..runtime.pushed import Pushed
from ..runtime.reload import NothingToRollBackTo, PluginDisabled, Plugins
from ..runtime.shelf import Record
from ..runtime.stands import Report, stands_of
from .access import Access
from .agreement import merge_plugin, merge_plugins
from .siblings import Siblings, Told
from .wire import SSE_HEADERS, conversation_of, decode, json_response, sse

__all__ = ["Admin"]

MAX_BEHIND = 1000
"""Events kept for a listener that reads slowly; then its stream ends."""

ACT_S = 60.0
"""How long siblings have to carry out what the operator asked for: a load waits for a slow `setup`."""

ACTIONS = ("reload", "enable", "disable", "rollback")

_encode = msgspec.json.Encoder(enc_hook=str).encode


class TokenRequest(msgspec.Struct, frozen=True):
    conversation: str
    visitor: Annotated[str, Meta(min_length=1, max_length=256)]
    seconds: Annotated[int, Meta(ge=1, le=7 * 86400)] | None = None


_token = msgspec.json.Decoder(TokenRequest).decode


class Admin:
    """The admin door. *facts* is what `GET /admin/workers` tells of this process; *pushed* knows of other hosts."""

    def __init__(
        self,
        config: Config,
        *,
        plugins: Plugins,
        maker: Maker,
        events: Events,
        access: Access,
        metrics: Metrics,
        siblings: Siblings,
        pushed: Pushed | None,
        facts: Callable[[], dict[str, Any]],
    ) -> None:
        self._config = config
        self._plugins = plugins
        self._maker = maker
        self._events = events
        self._access = access
        self._metrics = metrics
        self._siblings = siblings
        self._pushed = pushed
        self._facts = facts
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        self._stopping.set()

    def describe(self, entry: Entry) -> dict[str, Any]:
        """A plugin as `GET /admin/plugins` shows it."""
        current, slot = entry.current, entry.slot
        calls, failures = self._metrics.calls(entry.name)
        manifest = current.manifest if current else None
        return {
            "name": entry.name,
            "state": entry.state().value,
            "enabled": not entry.disabled,
            "generation": current.number if current else None,
            "version": manifest.version if manifest else None,
            "source": str(entry.source.path) if entry.source else None,
            "order": slot.order if slot else None,
            "order_from": slot.order_from if slot else None,
            "timeout_ms": round(slot.timeout_s * 1000) if slot else None,
            "on_failure": slot.on_failure if slot else None,
            "hooks": list(current.hooks) if current else [],
            "tools": [tool.name for tool in current.tools] if current else [],
            "component": _component(current),
            "capabilities": {
                "asked": list(manifest.capabilities) if manifest else [],
                "granted": sorted(self._maker.granted(current)) if current else [],
            },
            "requires": list(manifest.requires) if manifest else [],
            "waiting_for": entry.waiting_for if current is None else None,
            "breaker": slot.breaker.state if slot else "closed",
            "calls": calls,
            "failures": failures,
            "last_failure": _last_failure(current),
            "probation_left": current.probation_left if current else 0,
            "pending": entry.pending,
            "error": entry.problem.public() if entry.problem else None,
            "receipt": entry.receipt.public() if entry.receipt else None,
            "kept": [kept.public() for kept in entry.kept],
            "leftovers": entry.leftovers,
        }

    # -- this worker's own, which its siblings ask for too -------------------------------------------------------

    def describe_all(self) -> dict[str, Any]:
        """What `GET /admin/plugins` answers, in a host that is one process."""
        slots = {entry.name: entry.slot for entry in self._plugins.entries}
        ordered = sorted(
            self._plugins.entries,
            key=lambda entry: (slots[entry.name] is None, entry.slot.order if entry.slot else 0, entry.name),
        )
        return {"plugins": [self.describe(entry) for entry in ordered], "watch": self._plugins.watch_mode}

    def describe_one(self, name: str) -> dict[str, Any]:
        """What `GET /admin/plugins/{name}` answers. Raises `DoorError`."""
        try:
            entry = self._plugins.entry(name)
        except UnknownPlugin as exc:
            raise DoorError("plugin_not_found", str(exc)) from exc
        return self.describe(entry) | {"config": self._maker.config_of(entry.current) if entry.current else {}}

    async def act_here(self, name: str, action: str) -> None:
        """Do *action* to a plugin of this worker. Raises `DoorError`."""
        if action not in ACTIONS:
            raise DoorError("not_found", f"there is no action {action[:40]!r}; there are {', '.join(ACTIONS)}")
        try:
            await getattr(self._plugins, action)(name)
        except UnknownPlugin as exc:
            raise DoorError("plugin_not_found", str(exc)) from exc
        except (NothingToRollBackTo, PluginDisabled) as exc:
            raise DoorError("conflict", str(exc)) from exc
        except HotdeskError as exc:
            raise DoorError("unprocessable", str(exc)) from exc

    def describe_worker(self) -> dict[str, Any]:
        """This process, for `GET /admin/workers`."""
        return {"worker": self._siblings.worker or 0, "pid": os.getpid(), "state": "ready", **self._facts()}

    # -- for the operator ----------------------------------------------------------------------------------------

    async def list(self, request: web.Request) -> web.StreamResponse:
        self._access.check_admin(request)
        body = self.describe_all()
        if self._siblings.worker is not None:
            told = await self._siblings.ask("GET", "/admin/plugins")
            body["plugins"] = merge_plugins(self._siblings.worker, os.getpid(), body["plugins"], told)
        reports = await self._reports()
        for plugin in body["plugins"]:
            plugin |= self._over_hosts(plugin["name"], reports)
        known = {plugin["name"] for plugin in body["plugins"]}
        names = {name for report in reports for name in report.plugins} | {
            name for name, record in self._records.items() if not record.removed
        }
        elsewhere = [{"name": name} | self._over_hosts(name, reports) for name in sorted(names - known)]
        return _json(body | {"elsewhere": elsewhere})

    async def show(self, request: web.Request) -> web.StreamResponse:
        self._access.check_admin(request)
        return _json(await self._shown(request.match_info["name"]))

    async def _shown(self, name: str) -> dict[str, Any]:
        shown = self.describe_one(name)
        if self._siblings.worker is not None:
            told = await self._siblings.ask("GET", f"/admin/plugins/{quote(name, safe='')}")
            shown = merge_plugin(self._siblings.worker, os.getpid(), shown, told)
        return shown | self._over_hosts(name, await self._reports())

    @property
    def _records(self) -> Mapping[str, Record]:
        return self._pushed.records if self._pushed is not None else {}

    async def _reports(self) -> Sequence[Report]:
        return await self._pushed.reports() if self._pushed is not None else []

    def _over_hosts(self, name: str, reports: Sequence[Report]) -> dict[str, Any]:
        """What was pushed of a plugin, and how each host stands to it."""
        record = self._records.get(name)
        pushed = None
        if record is not None:
            pushed = {
                "hash": record.hash, "version": record.version, "at": record.at, "by": record.by,
                "removed": record.removed,
            }  # fmt: skip
        return {"pushed": pushed, "hosts": [stand.public() for stand in stands_of(reports, name, record)]}

    async def act(self, request: web.Request) -> web.StreamResponse:
        """Do it here, then in all other workers; what any of them refuses is an error, though it is done elsewhere.

        Here first: what is to outlast a restart is then kept before the others are looked up, so that one which starts
        meanwhile either reads it or is asked.
        """
        self._access.check_admin(request)
        name, action = request.match_info["name"], request.match_info["action"]
        if self._siblings.worker is None:
            await self.act_here(name, action)
            return _json(await self._shown(name))
        refusals: dict[int, DoorError] = {}
        try:
            await self.act_here(name, action)
        except DoorError as exc:
            if exc.code in ("not_found", "plugin_not_found"):
                raise
            refusals[self._siblings.worker] = exc
        path = f"/admin/plugins/{quote(name, safe='')}/{action}"
        for told in await self._siblings.ask("POST", path, timeout_s=ACT_S):
            if told.status != 200:
                refusals[told.row.worker] = _refusal(told)
        if refusals:
            raise _joined(refusals, len(self._siblings.others()) + 1)
        return _json(await self._shown(name))

    async def workers(self, request: web.Request) -> web.StreamResponse:
        """`GET /admin/workers`: every process of this desk, and how the last restart of all went."""
        self._access.check_admin(request)
        own = self.describe_worker()
        if self._siblings.alone:
            return _json({"workers": [own], "restart": None})
        facts = {told.row.name: told.data or {} for told in await self._siblings.ask("GET", "/admin/workers")}
        facts[self._siblings.name] = own
        state = self._siblings.state
        rows = [
            {
                "connections": None, "turns": None, **facts.get(row.name, {}), "worker": row.worker, "pid": row.pid,
                "state": row.state, "since": row.since, "restarts": row.restarts,
            }
            for row in sorted(state.workers, key=lambda row: (row.worker, row.state == "leaving"))
        ]  # fmt: skip
        return _json({"workers": rows, "restart": msgspec.to_builtins(state.roll)})

    async def restart(self, request: web.Request) -> web.StreamResponse:
        """`POST /admin/restart`: have all workers replaced, one by one."""
        self._access.check_admin(request)
        return json_response(await self._siblings.restart(), 202)

    async def events(self, request: web.Request) -> web.StreamResponse:
        self._access.check_admin(request)
        response = web.StreamResponse(headers=SSE_HEADERS)
        await response.prepare(request)
        queue: deque[dict[str, Any]] = deque(maxlen=MAX_BEHIND)
        wake = asyncio.Event()

        def hear(event: dict[str, Any]) -> None:
            queue.append(event)
            wake.set()

        own = self._siblings.worker
        stops = [
            self._events.listen(hear if own is None else lambda event: hear({**event, "worker": own})),
            self._siblings.listen(hear),
        ]
        stopping = asyncio.ensure_future(self._stopping.wait())
        try:
            await response.write(b": listening\n\n")
            while not stopping.done():
                while queue:
                    event = queue.popleft()
                    await response.write(sse(event["kind"], _encode(event)))
                wake.clear()
                woken = asyncio.ensure_future(wake.wait())
                done, _ = await asyncio.wait({woken, stopping}, timeout=15.0, return_when=asyncio.FIRST_COMPLETED)
                woken.cancel()
                if not done:
                    await response.write(b": still here\n\n")
        except ConnectionResetError:
            pass
        finally:
            for stop in stops:
                stop()
            stopping.cancel()
        return response

    async def token(self, request: web.Request) -> web.StreamResponse:
        """`POST /admin/tokens`: a visitor token."""
        self._access.check_admin(request)
        wanted = decode(_token, await request.read())
        token, expires = self._access.issue(
            conversation_of(wanted.conversation), wanted.visitor, wanted.seconds or self._config.visitor_token_s
        )
        return json_response({"token": token, "expires": expires}, 201)


def _json(body: Any) -> web.Response:
    return web.Response(body=_encode(body), content_type="application/json")


def _refusal(told: Told) -> DoorError:
    """What a sibling refused, in its own words."""
    error = (told.data or {}).get("error") or {}
    code = error.get("code")
    if code not in DOOR_ERRORS:
        return DoorError("unprocessable", "it did not answer; it may have been done all the same")
    return DoorError(code, str(error.get("message", "")), error.get("hint"))


def _joined(refusals: dict[int, DoorError], count: int) -> DoorError:
    """One error for what several workers refused: in the words of one where all say the same."""
    first = refusals[min(refusals)]
    if len(refusals) == count and len({exc.message for exc in refusals.values()}) == 1:
        return first
    words = "; ".join(f"worker {worker}: {refusals[worker].message}" for worker in sorted(refusals))
    done = count - len(refusals)
    return DoorError(first.code, words, f"done in {done} of {count} workers" if done else first.hint)


def _last_failure(current: Generation | None) -> dict[str, Any] | None:
    if current is None or current.last_failure is None:
        return None
    at, problem = current.last_failure
    return {"at": at, "problem": problem}


def _component(current: Generation | None) -> dict[str, Any] | None:
    """What a WebAssembly component says of itself; None for Python."""
    found = current.bundle.component if current is not None else None
    if found is None or current is None:
        return None
    instances = current.guest.instances if current.guest is not None else 0
    return {
        "contract": found.version,
        "exports": list(found.exports),
        "imports": list(found.imports),
        "instances": instances,
    }
