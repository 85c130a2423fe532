"""Looks into a component before anything is compiled: is it one, is it whole, what does it import and export.

Reads no more than the outer sections' headers, and the names in the import and export sections (the component model's
binary format, Binary.md). What is inside is wasmtime's to validate.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from ..errors import LoadFailed
from .wit_binary import Cut, read_number
from .wit_contract import EXPORTS, IMPORTS, PACKAGE, VERSIONS

__all__ = ["Inspected", "inspect_component"]

MAGIC = b"\0asm"
COMPONENT = b"\x0d\0\x01\0"
MODULE = b"\x01\0\0\0"
IMPORT_SECTION, EXPORT_SECTION = 10, 11
LAST_SECTION = 12
"""The highest section that wasmtime 50 knows is 11; 12 is `value`, which it refuses itself."""

MAX_NAMES = 2000
MAX_NAME = 1000
"""Bytes of one name."""

_versioned = re.compile(r"([a-z0-9:-]+)/([a-z0-9-]+)(?:@(\d+)\.(\d+)\.(\d+)\S*)?\Z")

BUILD_HINT = "build it as a component: see the README of sdk/ for the language, or `wasm-tools component new`"


@dataclass(frozen=True, slots=True)
class Inspected:
    """What a component's names say. Interfaces are those of the contract, without package and version."""

    version: str
    exports: tuple[str, ...]
    imports: tuple[str, ...]
    foreign: tuple[str, ...]
    """Imports of packages that are not the contract's, by their whole names: WASI."""


def inspect_component(plugin: str, data: bytes, *, file: str, max_bytes: int) -> Inspected:
    """What the component in *data* is. Raises `LoadFailed`, which says what is wrong with it and what to do."""

    def wrong(problem: str, step: str = "inspect") -> LoadFailed:
        return LoadFailed(plugin, step, problem, file=file)

    if len(data) > max_bytes:
        raise wrong(f"it has {len(data):,} bytes; a component may have {max_bytes:,}: strip its debug information")
    if not data:
        raise wrong("the file is empty", "parse")
    if data[:4] != MAGIC[: len(data)]:
        raise wrong("it is not WebAssembly: its first bytes are not \\0asm", "parse")
    if data[4:8] == MODULE:
        raise wrong(f"it is a core module, and a plugin is a component; {BUILD_HINT}")
    if len(data) < 8:
        raise wrong("it is cut off within its first 8 bytes; copy it again", "parse")
    if data[4:8] != COMPONENT:
        raise wrong(f"it is WebAssembly of an unknown kind (bytes 4 to 7 are {data[4:8].hex()}); {BUILD_HINT}")
    imports: list[str] = []
    exports: list[str] = []
    try:
        for number, start, end in _sections(data):
            if number == IMPORT_SECTION:
                imports += _names(data, start, end, is_export=False)
            elif number == EXPORT_SECTION:
                exports += _names(data, start, end, is_export=True)
    except Cut as exc:
        raise wrong(f"it is cut off: {exc}; copy it again, whole", "parse") from None
    except (ValueError, UnicodeDecodeError) as exc:
        raise wrong(f"it is no valid component: {exc}", "parse") from None
    return _judge(imports, exports, wrong)


def _judge(imports: list[str], exports: list[str], wrong: Callable[..., LoadFailed]) -> Inspected:
    versions: set[str] = set()
    own_imports, own_exports, foreign = [], [], []
    for name in exports:
        package, interface, version = _split(name)
        if package != PACKAGE:
            continue  # what a toolchain adds of its own, such as _initialize or wasi:cli/run
        _check_version(name, version, wrong)
        if interface == "types":
            continue
        if interface not in EXPORTS:
            raise wrong(_unknown(interface, "export", EXPORTS))
        versions.add(version)
        own_exports.append(interface)
    for name in imports:
        package, interface, version = _split(name)
        if package != PACKAGE:
            foreign.append(name)
            continue
        _check_version(name, version, wrong)
        if interface == "types":
            continue
        if interface not in IMPORTS:
            raise wrong(_unknown(interface, "import", IMPORTS))
        versions.add(version)
        own_imports.append(interface)
    if not own_exports:
        raise wrong(f"it exports no interface of {PACKAGE}; a plugin exports at least one of {', '.join(EXPORTS)}")
    strange = [name for name in foreign if not name.startswith("wasi:")]
    if strange:
        raise wrong(
            f"it imports '{strange[0]}', which no host offers;"
            f" there are {', '.join(IMPORTS)} of {PACKAGE}@{VERSIONS[-1]}"
        )
    if len(versions) > 1:
        raise wrong(f"it mixes versions of the contract: {', '.join(sorted(versions))}; build it against one")
    return Inspected(versions.pop(), tuple(own_exports), tuple(own_imports), tuple(foreign))


def _check_version(name: str, version: str, wrong: Callable[..., LoadFailed]) -> None:
    if version in VERSIONS:
        return
    if not version:
        raise wrong(f"it names '{name}' without a version; this host speaks {PACKAGE}@{', '.join(VERSIONS)}")
    newer = tuple(map(int, version.split("."))) > tuple(map(int, VERSIONS[-1].split(".")))
    remedy = "update hotdesk, or build it against an older one" if newer else "build it anew with the SDK of this host"
    age = "newer" if newer else "older"
    raise wrong(
        f"it was built against {PACKAGE}@{version}, which is {age} than what this host speaks"
        f" ({', '.join(VERSIONS)}): {remedy}"
    )


def _unknown(name: str, what: str, known: Iterable[str]) -> str:
    names = list(known)
    near = difflib.get_close_matches(name, names, 1)
    hint = f"; did you mean '{near[0]}'?" if near else f"; there are {', '.join(names)}"
    return f"it {what}s the interface '{name}', which the contract does not have{hint}"


def _split(name: str) -> tuple[str, str, str]:
    found = _versioned.match(name)
    if found is None:
        return "", name, ""
    package, interface, *version = found.groups()
    return package, interface, ".".join(version) if version[0] is not None else ""


def _sections(data: bytes) -> Iterator[tuple[int, int, int]]:
    at = 8
    while at < len(data):
        number = data[at]
        size, start = read_number(data, at + 1, len(data))
        end = start + size
        if number > LAST_SECTION:
            raise ValueError(f"there is no section {number} (at byte {at:,})")
        if end > len(data):
            raise Cut(f"section {number} at byte {at:,} has {size:,} bytes, of which {len(data) - start:,} are there")
        yield number, start, end
        at = end


def _names(data: bytes, at: int, end: int, *, is_export: bool) -> Iterator[str]:
    """The names in an import or export section."""
    count, at = read_number(data, at, end)
    if count > MAX_NAMES:
        raise ValueError(f"it has {count:,} imports or exports; {MAX_NAMES:,} are allowed")
    for _ in range(count):
        name, at = _name(data, at, end)
        yield name
        if is_export:
            at = _sort_index(data, at, end)
            flag, at = read_number(data, at, end)
            if flag:
                at = _describes(data, at, end)
        else:
            at = _describes(data, at, end)


def _name(data: bytes, at: int, end: int) -> tuple[str, int]:
    """An `importname` or `exportname`: a tag, the name, and for tag 1 or 2 possibly what follows it."""
    tag = _byte(data, at, end)
    size, at = read_number(data, at + 1, end)
    if at + size > end:
        raise Cut(f"a name is missing at byte {at:,}")
    if size > MAX_NAME:
        raise ValueError(f"a name of {size:,} bytes at byte {at:,}; {MAX_NAME:,} are allowed")
    name, at = data[at : at + size].decode(), at + size
    if tag == 2:  # a suffix of the version, by which canonical names differ
        size, at = read_number(data, at, end)
        name, at = name + data[at : at + size].decode(), at + size
    elif tag > 1:
        raise ValueError(f"a name of unknown kind {tag} at byte {at:,}")
    return name, at


def _sort_index(data: bytes, at: int, end: int) -> int:
    if _byte(data, at, end) == 0:
        at += 1
    return read_number(data, at + 1, end)[1]


def _describes(data: bytes, at: int, end: int) -> int:
    """Skip an `externdesc`."""
    kind = _byte(data, at, end)
    at += 1
    if kind == 0:  # a core module, by its type
        return read_number(data, at + 1, end)[1]
    if kind in (1, 4, 5):  # a function, component or instance, by its type
        return read_number(data, at, end)[1]
    if kind == 3:  # a type: equal to another, or a resource
        return read_number(data, at + 1, end)[1] if _byte(data, at, end) == 0 else at + 1
    raise ValueError(f"an import or export of unknown kind {kind} at byte {at - 1:,}")


def _byte(data: bytes, at: int, end: int) -> int:
    if at >= end:
        raise Cut(f"a byte is missing at {at:,}")
    return data[at]
