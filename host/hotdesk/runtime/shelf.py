"""Plugins that were pushed: what is said of each, how its files are packed, and what of a package is believed.

Owns the form of all that; where it is kept is a `Shelf`, which the backend has, and knows nothing of what it keeps.
A plugin is packed as a folder, also one that is a single file, so that one rename puts all of it in its place.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Mapping
from typing import Protocol

import msgspec

from hotdesk_sdk import HotdeskError, ManifestInvalid, parse_manifest

from ..errors import LoadFailed
from .sources import MAX_FILES, MAX_SOURCE_BYTES, Source, belongs

__all__ = [
    "MAX_PACKED_BYTES",
    "PushConflict",
    "Record",
    "Shelf",
    "Version",
    "folder_of",
    "hash_of",
    "pack",
    "publish",
    "push_back",
    "read_record",
    "read_records",
    "remove",
    "unpack",
]

MAX_PACKED_BYTES = 65 * 1024 * 1024
"""The largest component there may be, and some for its manifest."""

MAX_PATH_BYTES = 400
"""Of one file's path within its plugin, for there is a path in front of it."""

MAX_NAME_BYTES = 255
"""Of one part of it: file systems take no longer one."""

KEEP = 5
"""Versions of a plugin that stay on the shelf, the newest among them."""

TRIES = 5
"""How often a push begins anew because somebody else pushed the same plugin meanwhile."""


class Shelf(Protocol):
    """Where plugins are pushed for all hosts. Every coroutine raises `BackendUnavailable` when it can't be reached.

    Records and reports are this room's own bytes to it.
    """

    async def read(self) -> tuple[dict[str, bytes], bool]:
        """The record of every plugin, and whether this worker's report is there."""

    async def fetch(self, name: str, hash: str, size: int) -> bytes | None:
        """The bytes of one version, at most about *size*; None when they are not there. Nobody has checked them."""

    async def publish(
        self, name: str, record: bytes, *, over: bytes, hash: str, data: bytes, keep: Collection[str]
    ) -> bool:
        """Put *data* there, then *record* in the place of *over*, and tell every host; False: somebody was quicker.

        Of the plugin's versions only those in *keep* stay, and this one.
        """

    def follow(self, heard: Callable[[str], None]) -> None:
        """Have *heard* called with the name of each plugin that is published, and with "" where some may have been."""

    async def report(self, body: bytes) -> None:
        """Put down how this worker's plugins stand, in the place of its report before."""

    async def retire(self) -> None:
        """Take this worker's report away."""

    async def reports(self) -> dict[str, bytes | None]:
        """The report of each worker that is alive; None where it has not made one."""


class PushConflict(HotdeskError):
    """A push that others got in the way of, again and again, or that has nothing to go back to."""


class Version(msgspec.Struct, frozen=True, kw_only=True):
    """One version of a plugin on the shelf: `at` is when it was pushed (Unix seconds), `by` whom, as they say."""

    hash: str = ""
    size: int = 0
    files: int = 0
    version: str = ""
    at: float = 0.0
    by: str = ""
    signature: None = None
    """The place of what is to come."""


class Record(Version, frozen=True, kw_only=True):
    """What all hosts should serve as *name*. A plugin that was `removed` has a record too, for only that unloads it."""

    name: str
    removed: bool = False
    before: tuple[Version, ...] = ()
    """Versions that can be pushed back, newest first."""


_decode = msgspec.json.Decoder(Record).decode
_encode = msgspec.json.Encoder().encode
_unpack = msgspec.msgpack.Decoder(dict[str, bytes]).decode


def read_record(name: str, raw: bytes) -> Record:
    """The record of plugin *name*. Raises `LoadFailed` when it can't be one."""
    try:
        parse_manifest(name, None)
        record = _decode(raw)
    except ManifestInvalid as exc:
        raise LoadFailed(name[:64], "verify", "no plugin can be called so") from exc
    except msgspec.DecodeError as exc:
        raise LoadFailed(name, "verify", f"its record can't be read: {exc}") from exc
    if record.name != name:
        raise LoadFailed(name, "verify", f"its record is that of {record.name[:64]!r}")
    if not record.removed and (len(record.hash) != 64 or set(record.hash) - set("0123456789abcdef")):
        raise LoadFailed(name, "verify", "its record names no hash")
    if not 0 <= record.size <= MAX_PACKED_BYTES:
        raise LoadFailed(name, "verify", f"it has {record.size:,} bytes; a plugin may have {MAX_PACKED_BYTES:,}")
    return record


def read_records(raws: Mapping[str, bytes]) -> tuple[dict[str, Record], list[LoadFailed]]:
    """All records that can be read, and why the others can't."""
    records, refused = {}, []
    for name, raw in raws.items():
        try:
            records[name] = read_record(name, raw)
        except LoadFailed as exc:
            refused.append(exc)
    return records, refused


# -- packages ----------------------------------------------------------------------------------------------------


def folder_of(source: Source, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files of a plugin as they would be if it were a folder."""
    if source.kind == "folder":
        return dict(files)
    names = {source.path.name: "plugin.wasm" if source.kind == "wasm" else "__init__.py"}
    names[source.manifest_path.name] = "plugin.toml"
    return {names[name]: data for name, data in files.items()}


def pack(name: str, files: Mapping[str, bytes]) -> bytes:
    """The one form in which these files travel. Raises `LoadFailed` when no host would take them."""
    _check(name, files)
    data = _packed(files)
    if len(data) > MAX_PACKED_BYTES:
        raise LoadFailed(name, "verify", f"it has {len(data):,} bytes; a plugin may have {MAX_PACKED_BYTES:,}")
    return data


def _packed(files: Mapping[str, bytes]) -> bytes:
    return msgspec.msgpack.encode(dict(sorted(files.items())))


def hash_of(data: bytes) -> str:
    """The hash that packed files go by."""
    return hashlib.sha256(data).hexdigest()


def unpack(name: str, data: bytes, hash: str) -> dict[str, bytes]:
    """The files of a package. Raises `LoadFailed` unless its bytes have the *hash*, and are a plugin's and no more.

    Nothing of it is looked at before the hash was found right.
    """
    found = hash_of(data)
    if found != hash:
        raise LoadFailed(name, "verify", f"its bytes have the hash {found[:12]}… and not {hash[:12]}…")
    try:
        files = _unpack(data)
    except msgspec.DecodeError as exc:
        raise LoadFailed(name, "verify", f"it can't be unpacked: {exc}") from exc
    _check(name, files)
    if _packed(files) != data:
        raise LoadFailed(name, "verify", "it is packed in another way than any plugin")
    return files


def _check(name: str, files: Mapping[str, bytes]) -> None:
    """Raises `LoadFailed` unless *files* are a plugin's, whose paths stay within its folder."""
    if len(files) > MAX_FILES:
        raise LoadFailed(name, "verify", f"it has over {MAX_FILES} files")
    folders = {path[:place] for path in files for place, letter in enumerate(path) if letter == "/"}
    for path, data in files.items():
        problem = _problem(path)
        if problem is None and path in folders:
            problem = "is a file and a folder"
        if problem is None and path.endswith(".py") and len(data) > MAX_SOURCE_BYTES:
            problem = f"has {len(data):,} bytes; a source may have {MAX_SOURCE_BYTES:,}"
        if problem is not None:
            raise LoadFailed(name, "verify", f"its file {path[:80]!r} {problem}")
    if "__init__.py" not in files:
        if "plugin.wasm" not in files:
            raise LoadFailed(name, "verify", "it has neither __init__.py nor plugin.wasm")
        if more := set(files) - {"plugin.wasm", "plugin.toml"}:
            problem = f"a component is plugin.wasm and plugin.toml, and not {min(more)[:80]!r} too"
            raise LoadFailed(name, "verify", problem)


def _problem(path: str) -> str | None:
    """Why a plugin may have no file at *path*."""
    if not path.isprintable() or "\\" in path:
        return "has a name that not every system can show"
    try:
        if len(path.encode()) > MAX_PATH_BYTES:
            return "has too long a path"
    except UnicodeEncodeError:
        return "has a name that is no text"
    *folders, name = path.split("/")
    if any(part in ("", ".", "..") or len(part.encode()) > MAX_NAME_BYTES for part in (*folders, name)):
        return "does not lie in its folder"
    if any(folder.startswith(".") or folder == "__pycache__" for folder in folders) or not belongs(name):
        return "is no part of a plugin"
    return None


# -- pushing -----------------------------------------------------------------------------------------------------


async def publish(shelf: Shelf, name: str, data: bytes, *, files: int, version: str, by: str) -> tuple[Record, bool]:
    """Have all hosts serve the package *data* as plugin *name*; False where they were told so before.

    Raises `PushConflict`, and what a shelf raises.
    """
    fresh = Version(hash=hash_of(data), size=len(data), files=files, version=version, at=time.time(), by=by)
    for _ in range(TRIES):
        old, raw = await _read_one(shelf, name)
        same = old is not None and not old.removed and old.hash == fresh.hash
        if old is not None and same and await shelf.fetch(name, old.hash, old.size) == data:
            return old, False
        record = _record(name, fresh, old)
        if await _put(shelf, record, raw, data):
            return record, True
    raise PushConflict(f"plugin '{name}' was pushed by somebody else again and again; look who does, and push it anew")


async def push_back(shelf: Shelf, name: str, by: str) -> Record:
    """Have all hosts serve the version that was pushed before, which is pushed as the newest. Raises `PushConflict`.

    What is left goes behind all others, so that who goes back again comes to the one before, and round in the end.
    """
    for _ in range(TRIES):
        old, raw = await _read_one(shelf, name)
        for version in old.before if old is not None else ():
            data = await shelf.fetch(name, version.hash, version.size)
            if data is not None and hash_of(data) == version.hash:
                record = _record(name, msgspec.structs.replace(version, at=time.time(), by=by), old)
                if old is not None and not old.removed:
                    left, *others = record.before
                    record = msgspec.structs.replace(record, before=(*others, left))
                if await _put(shelf, record, raw, data):
                    return record
                break
        else:
            raise PushConflict(f"no other version of plugin '{name}' is on the shelf")
    raise PushConflict(f"plugin '{name}' was pushed by somebody else again and again; look who does, and try anew")


async def remove(shelf: Shelf, name: str, by: str) -> Record:
    """Have all hosts unload plugin *name*, also those that are away. Raises `PushConflict` when it was not pushed."""
    for _ in range(TRIES):
        old, raw = await _read_one(shelf, name)
        if not raw or (old is not None and old.removed):
            raise PushConflict(f"plugin '{name}' was not pushed; one in a host's own folder is removed there")
        record = msgspec.structs.replace(_record(name, Version(at=time.time(), by=by), old), removed=True)
        if await _put(shelf, record, raw, b""):
            return record
    raise PushConflict(f"plugin '{name}' was pushed by somebody else again and again; look who does, and try anew")


async def _read_one(shelf: Shelf, name: str) -> tuple[Record | None, bytes]:
    """The record of *name*, None where there is none that can be read; and its bytes, for what takes its place."""
    raw = (await shelf.read())[0].get(name, b"")
    try:
        return read_record(name, raw) if raw else None, raw
    except LoadFailed:
        return None, raw


def _record(name: str, newest: Version, old: Record | None) -> Record:
    before: list[Version] = []
    if old is not None:
        left = () if old.removed else (Version(**{field: getattr(old, field) for field in Version.__struct_fields__}),)
        before = [one for one in (*left, *old.before) if one.hash != newest.hash][: KEEP - 1]
    fields = {field: getattr(newest, field) for field in Version.__struct_fields__}
    return Record(name=name, before=tuple(before), **fields)


async def _put(shelf: Shelf, record: Record, over: bytes, data: bytes) -> bool:
    keep = [version.hash for version in record.before]
    return await shelf.publish(record.name, _encode(record), over=over, hash=record.hash, data=data, keep=keep)
