"""Hosts that follow one shelf, and somebody who pushes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from conftest import Desk, wait_until
from hotdesk.backend import open_shelf
from hotdesk.backend.redis_shelf import RedisShelf
from hotdesk.runtime import shelf as shelves
from hotdesk.runtime.shelf import Record
from hotdesk.runtime.stands import read_reports, stands_of

__all__ = ["Fleet", "open_fleet", "own_conversation"]


@dataclass
class Fleet:
    """Some hosts, and the shelf that they follow."""

    desks: list[Desk]
    shelf: RedisShelf

    async def push(self, name: str, files: Mapping[str, str | bytes], *, version: str = "") -> tuple[Record, bool]:
        """Publish a folder with these files, as `hotdesk push` does; whether there was anything to publish."""
        found = {path: data if isinstance(data, bytes) else data.encode() for path, data in files.items()}
        packed = shelves.pack(name, found)
        return await shelves.publish(self.shelf, name, packed, files=len(files), version=version, by="a test")

    async def serve(self, name: str, files: Mapping[str, str | bytes]) -> Record:
        """Push, and wait until every host serves it."""
        record, _ = await self.push(name, files)
        await self.wait_stands(record, *["serves"] * len(self.desks))
        return record

    async def stands(self, record: Record) -> dict[str, tuple[str | None, str]]:
        """How each host stands to *record*, and why, by its URL."""
        found = stands_of(read_reports(await self.shelf.reports()), record.name, record)
        by_port = {stand.host.rpartition(":")[2]: stand for stand in found}
        urls = {desk.url.rpartition(":")[2]: desk.url for desk in self.desks}
        return {urls[port]: (stand.stand, stand.why) for port, stand in by_port.items() if port in urls}

    async def wait_stands(self, record: Record, *words: str) -> list[str]:
        """Wait until the hosts, in their order, stand so; what each says of why."""
        stands: dict[str, tuple[str | None, str]] = {}

        async def so() -> bool:
            nonlocal stands
            stands = await self.stands(record)
            return [stands.get(desk.url, (None, ""))[0] for desk in self.desks] == list(words)

        try:
            await wait_until(so, f"{record.name} {words}")
        except AssertionError as exc:
            raise AssertionError(f"{exc}; they stand {stands}") from None
        return [stands[desk.url][1] for desk in self.desks]

    def generations(self, name: str) -> list[int | None]:
        """Which generation of a plugin each host serves; None where it serves none."""
        found = []
        for desk in self.desks:
            current = next((entry.current for entry in desk.host.plugins.entries if entry.name == name), None)
            found.append(current.number if current is not None else None)
        return found

    def events(self, kind: str) -> list[dict[str, Any]]:
        """The events of a kind, of all hosts."""
        return [event for desk in self.desks for event in desk.events if event["kind"] == kind]


@asynccontextmanager
async def open_fleet(url: str, *desks: Desk) -> AsyncIterator[Fleet]:
    shelf = await open_shelf(url)
    try:
        yield Fleet([*desks], shelf)
    finally:
        await shelf.aclose()


def own_conversation(desk: Desk) -> str:
    """A conversation whose turns run at *desk*."""
    return next(name for name in (f"c{number}" for number in range(10_000)) if desk.host.backend.owns(name))
