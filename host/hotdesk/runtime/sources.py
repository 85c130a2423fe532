"""Where plugins live, and their bytes: found, settled, read whole and hashed.

A file that somebody still writes is never read as a version: one that came by rename is whole, any other must have
been quiet for a while; and Linux is asked whether anybody has it open for writing (a read lease, fcntl(2)).
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import signal
import stat as stat_module
import time
import tomllib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType

import msgspec

from hotdesk_sdk import Manifest, parse_manifest

from ..errors import LoadFailed
from .wit_inspect import Inspected, inspect_component

__all__ = [
    "Bundle",
    "Source",
    "belongs",
    "bundle_of",
    "find_entry_points",
    "find_sources",
    "name_of",
    "read_files",
    "settle",
    "signature",
    "source_of",
]

GRACE_S = 0.35
"""How long a file that is written in place must be quiet: half-writers seen in the field pause up to 300 ms, and the
half may well parse. A file that came by rename is whole at once."""

PACKAGE_QUIET_S = 0.04
"""A folder is read once none of its files changed for this long: tools write many files one after the other."""

GONE_S = 0.1
"""How long a file must be missing before it counts as deleted: some editors delete, then write."""

MAX_FILES = 1000
MAX_SOURCE_BYTES = 2 * 1024 * 1024
"""More than this is no plugin's source: compiling a 24 MB literal held the interpreter for twelve seconds."""

MAX_WASM_BYTES = 64 * 1024 * 1024
"""More than this is no plugin: a whole CPython as a component has 18 MiB."""

WRITER_LIMIT_S = 10.0
"""After this the file is read though somebody keeps it open for writing."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where one plugin is: a `.py` or `.wasm` file, a folder, or an installed package's entry point."""

    name: str
    path: Path
    kind: str

    @property
    def manifest_path(self) -> Path:
        return self.path / "plugin.toml" if self.kind == "folder" else self.path.with_suffix(".toml")

    @property
    def wasm_path(self) -> Path | None:
        """The component, if it is one: the file, or `plugin.wasm` in a folder without `__init__.py`."""
        if self.kind == "wasm":
            return self.path
        if self.kind == "folder" and not (self.path / "__init__.py").exists() and (self.path / "plugin.wasm").exists():
            return self.path / "plugin.wasm"
        return None

    def files(self) -> list[Path]:
        """Every file that belongs to it, in a stable order."""
        wasm = self.wasm_path
        if self.kind == "folder" and wasm is not None:  # its sources, and what built it, are beside it
            return [wasm, self.manifest_path] if self.manifest_path.exists() else [wasm]
        if self.kind == "folder":
            found: list[Path] = []
            seen: set[tuple[int, int]] = set()
            for folder, folders, names in os.walk(self.path, followlinks=True):
                stat = os.stat(folder)
                if (stat.st_dev, stat.st_ino) in seen or len(found) > MAX_FILES:  # a link in a circle, or out of it all
                    folders[:] = []
                    continue
                seen.add((stat.st_dev, stat.st_ino))
                folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__pycache__")
                found += [Path(folder, name) for name in sorted(names) if belongs(name)]
            return found
        manifest = self.manifest_path
        return [self.path, manifest] if manifest.exists() else [self.path]


def belongs(name: str) -> bool:
    """Whether a file that is called so is part of the plugin whose folder it is in: no test, no editor's leaving."""
    return not (
        name.startswith((".", "test_", "#"))
        or name.endswith(("~", ".pyc", ".swp", ".tmp", ".bak"))
        or name in ("4913", "conftest.py")
    )


@dataclass(frozen=True, slots=True)
class Bundle:
    """One version of a plugin: its bytes, read in one go, and what they hash to."""

    source: Source
    files: dict[str, bytes]
    manifest: Manifest
    digest: str
    """Of all that a swap is needed for."""
    config_digest: str
    """Of the manifest's `[config]` alone."""
    code: dict[str, CodeType] = field(compare=False)
    paths: dict[str, str]
    """The path that a traceback shows, to the name in `files`."""
    component: Inspected | None = None
    """What a WebAssembly component says of itself; None for Python."""
    wasm_digest: str = ""
    """Of the component's bytes alone."""

    def same_as(self, other: Bundle) -> bool:
        """Whether there is nothing to apply: neither code nor config differ."""
        return (self.digest, self.config_digest) == (other.digest, other.config_digest)


def name_of(path: Path, root: Path) -> str | None:
    """Which plugin of the folder *root* a changed *path* belongs to; None where it can't be said from the name."""
    try:
        first = path.relative_to(root).parts[0]
    except (ValueError, IndexError):
        return None
    if first.startswith((".", "_")):
        return None
    return Path(first).stem if first.endswith((".py", ".toml", ".wasm")) else first


def find_sources(root: Path) -> dict[str, list[Source]]:
    """The plugins in a folder, by name, in the order of their files. Two sources of one name are a clash."""
    found: dict[str, list[Source]] = {}
    try:
        names = sorted(os.listdir(root))
    except FileNotFoundError:
        return {}
    for name in names:
        path = root / name
        if name.startswith((".", "_")) or not belongs(name):
            continue
        if name.endswith((".py", ".wasm")) and _is_file(path):
            source = Source(path.stem, path, name.rpartition(".")[2])
        elif _is_plugin_folder(path):
            source = Source(name, path, "folder")
        else:
            continue
        found.setdefault(source.name, []).append(source)
    return found


def find_entry_points() -> dict[str, Source | LoadFailed]:
    """Installed plugins: the entry-point group `hotdesk`."""
    found: dict[str, Source | LoadFailed] = {}
    for entry in importlib.metadata.entry_points(group="hotdesk"):
        try:
            spec = importlib.util.find_spec(entry.module)
        except Exception:  # finding `a.b` runs the package `a`, which is foreign code
            spec = None
        if spec is None or not spec.origin or not spec.origin.endswith(".py"):
            found[entry.name] = LoadFailed(
                entry.name, "find", f"its entry point names {entry.module}, which is not there"
            )
        else:
            origin = Path(spec.origin)
            folder = origin.name == "__init__.py"
            found[entry.name] = Source(entry.name, origin.parent if folder else origin, "folder" if folder else "py")
    return found


SignatureRow = tuple[str, int, int, int, int]
"""What stat says of a file: path, inode, size, and when its bytes and its inode last changed, in ns."""

Signature = tuple[SignatureRow, ...]


def signature(source: Source) -> Signature | None:
    """What stat says of all its files: changes when any does. None when it is not there."""
    rows = []
    try:
        if source.kind == "folder":
            if not stat_module.S_ISDIR(os.stat(source.path).st_mode):
                return None
            os.listdir(source.path)
            if not _is_plugin_folder(source.path):
                return None
        else:
            os.stat(source.path)
        files = source.files()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as exc:
        return (_unreadable(source.path, exc),)
    for path in files:
        try:
            stat = path.stat()
        except FileNotFoundError:
            if path == source.path:
                return None
            continue  # a link beside it that leads nowhere
        except OSError as exc:
            rows.append(_unreadable(path, exc))
        else:
            rows.append((str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    return tuple(rows) or None


def _unreadable(path: Path, exc: OSError) -> SignatureRow:
    """It is there and can't be looked at: no reason to think that it is gone."""
    return (str(path), 0, 0, 0, -(exc.errno or 1))


def _is_plugin_folder(path: Path) -> bool:
    return _is_file(path / "__init__.py") or _is_file(path / "plugin.wasm")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False


async def settle(
    source: Source,
    read: dict[str, SignatureRow],
    whole: Collection[SignatureRow] = (),
    *,
    patient: bool = True,
) -> Bundle | None:
    """Wait until *source* is whole and quiet, and read it. None: it is gone.

    *read* is what stat said of its files when they were last read, and is brought up to date even when they can't be
    parsed; *whole* is what it said of those known to have come by rename:
    a file written in place counts as whole only after `GRACE_S`, for its writer may pause in the middle. Not
    *patient*: what nobody has open and what parses is taken as it is. Raises `LoadFailed` when its bytes are no plugin.
    """
    started = time.monotonic()
    missing_since: float | None = None
    while True:
        before = signature(source)
        now = time.monotonic()
        if before is None:
            read.clear()
            missing_since = missing_since or now
            if now - missing_since >= GONE_S:
                return None
            await asyncio.sleep(0.005)
            continue
        missing_since = None
        wait_s = _unsettled_s(source, before, read, whole) if patient and now - started < WRITER_LIMIT_S else 0.0
        if wait_s > 0:
            await asyncio.sleep(min(wait_s, 0.02))
            continue
        try:
            files = await _read_aside(source, now - started < WRITER_LIMIT_S)
        except FileNotFoundError:
            continue
        except BlockingIOError:
            await asyncio.sleep(0.005)
            continue
        except LoadFailed:
            read |= {row[0]: row for row in before}
            raise
        if signature(source) != before:
            continue
        read.clear()
        read |= {row[0]: row for row in before}
        return await asyncio.to_thread(bundle_of, source, files)


def _unsettled_s(
    source: Source, rows: Signature, read: Mapping[str, SignatureRow], whole: Collection[SignatureRow]
) -> float:
    """How long to wait until all files of *source* are quiet; 0 where they are.

    A file that was renamed into its place is whole at once: it has another inode than the one read before, or its
    inode changed after its bytes did.
    """
    now_ns = time.time_ns()
    waits = [0.0]
    for row in rows:
        path, inode, _, mtime_ns, ctime_ns = row
        old = read.get(path)
        age_s = (now_ns - max(mtime_ns, ctime_ns)) / 1e9
        if old == row or age_s < 0:
            continue
        renamed = row in whole or ctime_ns > mtime_ns or (old is not None and old[1] != inode)
        waits.append((PACKAGE_QUIET_S if source.kind == "folder" else 0.0) - age_s if renamed else GRACE_S - age_s)
    return max(waits)


async def read_files(source: Source) -> dict[str, bytes]:
    """The bytes of all its files as they are now, whoever writes them. Raises `LoadFailed`."""
    try:
        return await _read_aside(source, lease=False)
    except FileNotFoundError as exc:
        raise LoadFailed(source.name, "find", "its file is gone", file=exc.filename) from exc


async def _read_aside(source: Source, lease: bool) -> dict[str, bytes]:
    try:
        return await asyncio.to_thread(_read, source, lease=lease)
    except (FileNotFoundError, BlockingIOError):
        raise
    except OSError as exc:
        raise LoadFailed(source.name, "read", f"it can't be read: {exc.strerror}", file=str(source.path)) from exc


def _read(source: Source, *, lease: bool) -> dict[str, bytes]:
    """All files' bytes. With *lease* a `BlockingIOError` tells that somebody has one open for writing."""
    base = source.path if source.kind == "folder" else source.path.parent
    files = {}
    if source.kind == "folder":
        os.listdir(source.path)
    paths = source.files()
    if len(paths) > MAX_FILES:
        raise LoadFailed(source.name, "read", f"it has over {MAX_FILES} files", file=str(source.path))
    for path in paths:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe must not hold us
        except FileNotFoundError:
            if path != source.path and path.is_symlink():
                continue
            raise
        try:
            stat = os.fstat(fd)
            if not stat_module.S_ISREG(stat.st_mode):
                raise LoadFailed(source.name, "read", "it is no regular file", file=str(path))
            if path.suffix == ".wasm" and stat.st_size > MAX_WASM_BYTES:
                problem = f"it has {stat.st_size:,} bytes; a component may have {MAX_WASM_BYTES:,}"
                raise LoadFailed(source.name, "read", problem, file=str(path))
            if path.suffix == ".py" and stat.st_size > MAX_SOURCE_BYTES:
                problem = f"it has {stat.st_size} bytes; a source may have {MAX_SOURCE_BYTES}"
                raise LoadFailed(source.name, "read", problem, file=str(path))
            leased = lease and _lease(fd)
            with os.fdopen(os.dup(fd), "rb") as file:
                files[path.relative_to(base).as_posix()] = file.read()
            if leased:
                fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        finally:
            os.close(fd)
    return files


def _lease(fd: int) -> bool:
    """Take a read lease: the kernel grants it only while nobody has the file open for writing."""
    if not hasattr(fcntl, "F_SETLEASE"):
        return False
    try:
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)  # a broken lease's default signal would end the process
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def bundle_of(source: Source, files: dict[str, bytes]) -> Bundle:
    base = source.path if source.kind == "folder" else source.path.parent
    manifest_name = "plugin.toml" if source.kind == "folder" else source.manifest_path.name
    raw = files.get(manifest_name)
    manifest = parse_manifest(source.name, raw, file=str(base / manifest_name))
    main = "__init__.py" if source.kind == "folder" else source.path.name
    wasm = None  # told by what was read, and not by what lies there now
    if main.endswith(".wasm"):
        wasm = source.path
    elif source.kind == "folder" and main not in files:
        wasm = source.path / "plugin.wasm"
    if (main if wasm is None else wasm.name) not in files:
        raise LoadFailed(source.name, "find", "its file is gone", file=str(source.path))
    if wasm is not None:
        data = files[wasm.name]
        inspected = inspect_component(manifest.name, data, file=str(wasm), max_bytes=MAX_WASM_BYTES)
        component: Inspected | None = inspected
        digest = hashlib.sha256(data).hexdigest()
    else:
        component, digest = None, ""
    if wasm is None and not files[main].strip():
        raise LoadFailed(source.name, "parse", "the file is empty", file=str(base / main))
    code, paths = {}, {}
    for name, data in files.items():
        if name.endswith(".py"):
            path = str(base / name)
            paths[path] = name
            code[name] = _compile(source.name, data, path)
    return Bundle(
        source,
        files,
        manifest,
        _digest(source, files, manifest_name),
        _hash([msgspec.json.encode(manifest.config)]),
        code,
        {str(wasm): wasm.name} if wasm is not None else paths,
        component,
        digest,
    )


def source_of(files: Mapping[str, bytes], source: Source) -> Source:
    """Where a version with these *files* lived, of a plugin that lives at *source* now: it may have been of another
    kind."""
    folder = source.path.parent
    if "__init__.py" in files or "plugin.wasm" in files:
        return Source(source.name, folder / source.name, "folder") if source.kind != "folder" else source
    for kind in ("py", "wasm"):
        if f"{source.name}.{kind}" in files and source.kind != kind:
            return Source(source.name, folder / f"{source.name}.{kind}", kind)
    return source


def _compile(plugin: str, data: bytes, path: str) -> CodeType:
    try:
        return compile(data, path, "exec", dont_inherit=True)
    except SyntaxError as exc:
        raise LoadFailed(plugin, "parse", f"{type(exc).__name__}: {exc.msg}", file=path, line=exc.lineno) from exc
    except (ValueError, UnicodeDecodeError) as exc:
        raise LoadFailed(plugin, "parse", f"it is not Python source: {exc}", file=path) from exc
    except (RecursionError, MemoryError, OverflowError) as exc:
        raise LoadFailed(plugin, "parse", f"it is nested too deeply to compile: {exc}", file=path) from exc


def _digest(source: Source, files: dict[str, bytes], manifest_name: str) -> str:
    parts = []
    for name, data in sorted(files.items()):
        if name == manifest_name:
            document = tomllib.loads(data.decode())
            document.pop("config", None)
            data = msgspec.json.encode(document, order="deterministic")
        parts += [name.encode(), data]
    return _hash([source.kind.encode(), *parts])


def _hash(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()
