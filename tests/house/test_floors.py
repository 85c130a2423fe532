"""The building holds: imports go down, each heavy library has one importer, exports are what `__all__` says."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOST = ROOT / "host" / "hotdesk"
SDK = ROOT / "sdk" / "python" / "hotdesk_sdk"

FLOORS = {
    "cli": 7, "__main__": 7, "testing": 7,
    "workers": 6,
    "app": 5,
    "web": 4,
    "chat": 3,
    "runtime": 2, "backend": 2, "llm": 2,
    "config": 1, "errors": 0, "metrics": 1, "logs": 1,
}  # fmt: skip
"""A room may import what is below it, and itself; on one floor nobody knows the other."""

SIDEWAYS = {("__main__", "cli")}
"""What may look at its neighbour all the same."""

ONE_IMPORTER = {
    "sqlite3": ("backend/sqlite*.py",),
    "watchfiles": ("runtime/watch.py",),
    "redis": ("backend/redis*.py",),
    "wasmtime": ("runtime/wasm.py", "runtime/wit_*.py"),
    "openai": ("llm/official.py",),
    "httpx2": ("llm/official.py",),
    "httptools": ("llm/connection.py",),
    "jsonschema_rs": ("runtime/tools.py",),
    "pluggy": ("runtime/*.py",),
    "uvloop": ("workers/loop.py",),
    "click": ("cli/*.py",),
    "jwt": ("web/access.py",),
    "PIL": ("chat/image_content.py",),
}
HEAVY_IN_SDK = {"pluggy", "msgspec"}


def modules(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*.py") if "templates" not in path.parts)


def imports(path: Path, package: str, root: Path) -> Iterator[tuple[str, int]]:
    """Every module that *path* imports, by its full name, with the line."""
    parts = [package, *path.relative_to(root).with_suffix("").parts]
    if parts[-1] == "__init__":
        parts.append("")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = ".".join(parts[: -node.level])
            if node.module:
                yield f"{base}.{node.module}", node.lineno
            else:
                for alias in node.names:
                    yield f"{base}.{alias.name}", node.lineno
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node.lineno


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def test_every_room_has_a_floor() -> None:
    """A new room or module at the top says first where it stands."""
    rooms = {path.stem for path in HOST.glob("*.py")} | {path.parent.name for path in HOST.glob("*/__init__.py")}
    assert rooms - {"__init__"} <= set(FLOORS)


def test_imports_go_down() -> None:
    """No room imports one above it, or another on its own floor."""
    wrong = []
    for path in modules(HOST):
        room = room_of(".".join(["hotdesk", *path.relative_to(HOST).with_suffix("").parts]))
        if room == "__init__":
            continue
        for name, line in imports(path, "hotdesk", HOST):
            target = room_of(name) if name.split(".")[0] == "hotdesk" else ""
            if not target or target == room or (room, target) in SIDEWAYS:
                continue
            if target not in FLOORS or FLOORS[target] >= FLOORS[room]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert wrong == []


@pytest.mark.parametrize("library", ONE_IMPORTER)
def test_each_heavy_library_has_one_importer(library: str) -> None:
    """A library is imported where its own errors and habits are known, and nowhere else."""
    wrong = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in modules(HOST)
        for name, line in imports(path, "hotdesk", HOST)
        if name.split(".")[0] == library
        and not any(fnmatch(str(path.relative_to(HOST)), pattern) for pattern in ONE_IMPORTER[library])
    ]
    assert wrong == []


def test_the_sdk_knows_nothing_of_the_host() -> None:
    """hotdesk_sdk imports the standard library, pluggy and msgspec, and nothing of hotdesk."""
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in modules(SDK)
        for name, line in imports(path, "hotdesk_sdk", SDK)
        if (top := name.split(".")[0]) not in HEAVY_IN_SDK | {"hotdesk_sdk"} and top not in sys.stdlib_module_names
    ]
    assert wrong == []


def names_of(tree: ast.Module) -> set[str]:
    """The public names that a module defines at its top."""
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
    return {name for name in found if not name.startswith("_")}


@pytest.mark.parametrize(
    "module",
    [
        ".".join([package, *path.relative_to(root).with_suffix("").parts]).removesuffix(".__init__")
        for package, root in (("hotdesk", HOST), ("hotdesk_sdk", SDK))
        for path in modules(root)
        if path.name != "__main__.py"
    ],
)
def test_exports_are_what_all_says(module: str) -> None:
    """`__all__` is there where anything is public, is sorted, and each name in it exists."""
    loaded = importlib.import_module(module)
    assert loaded.__file__ is not None
    exported = getattr(loaded, "__all__", None)
    if exported is None:
        assert not names_of(ast.parse(Path(loaded.__file__).read_text())), f"{module} has no __all__"
        return
    assert list(exported) == sorted(exported, key=lambda name: (not name.isupper(), not name[0].isupper(), name))
    assert [name for name in exported if not hasattr(loaded, name)] == []


def test_every_module_says_what_it_owns() -> None:
    """Every module begins with a docstring."""
    silent = [
        path for root in (HOST, SDK) for path in modules(root) if not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert silent == []
