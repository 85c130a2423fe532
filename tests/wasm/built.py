"""The reference plugin of each language, built by its README's command: once for the bytes that it is built from."""

from __future__ import annotations

import hashlib
import importlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.wasm.toolchains import Unavailable
from tests.wasm.toolchains.installing import install_once

__all__ = ["EXAMPLES", "LANGUAGES", "ROOT", "built", "source_of"]

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
LANGUAGES = ("c", "go", "js", "python", "python_wasm", "rust", "zig")
SUFFIXES = {".c", ".go", ".js", ".py", ".rs", ".zig"}

_tried: dict[str, Path | Unavailable] = {}


def built(language: str) -> Path:
    """The plugin as its author ships it: a folder called `orders`, or Python's file. Raises `Unavailable`."""
    if language == "python":
        return EXAMPLES / "orders_python" / "orders.py"
    if language not in _tried:
        try:
            _tried[language] = _build(language)
        except Unavailable as exc:  # once is enough: the next case would wait for the same installation
            _tried[language] = exc
    found = _tried[language]
    if isinstance(found, Unavailable):
        raise found
    return found


def source_of(language: str) -> Path:
    """The file that the author of the example wrote."""
    [source] = [path for path in (EXAMPLES / f"orders_{language}").iterdir() if path.name in _sources()]
    return source


def _sources() -> set[str]:
    return {f"plugin{suffix}" for suffix in SUFFIXES} | {"orders.py"}


def _build(language: str) -> Path:
    environment = importlib.import_module(f"tests.wasm.toolchains.{language}").ensure()
    inputs = [*_inputs(language)]
    digest = hashlib.sha256()
    for path in inputs:
        digest.update(f"{path.relative_to(ROOT)} {path.stat().st_size}\n".encode() + path.read_bytes())

    def build(folder: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="hotdesk-build-") as name:
            tree = Path(name)
            for path in inputs:
                target = tree / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
            example = tree / "examples" / f"orders_{language}"
            made = subprocess.run(
                ["make"],
                cwd=example,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
            )
            assert made.returncode == 0, f"make in {example.name}:\n{made.stdout}{made.stderr}"
            (folder / "orders").mkdir()
            for file in ("plugin.wasm", "plugin.toml"):
                shutil.copy(example / file, folder / "orders")

    return install_once(f"built-{language}-{digest.hexdigest()[:16]}", build) / "orders"


def _inputs(language: str) -> Iterator[Path]:
    """What the example is built from, without what an author's own `make` left there; and what installs its tools."""
    for folder in (EXAMPLES / f"orders_{language}", ROOT / "sdk" / language.replace("_", "-"), ROOT / "sdk" / "wit"):
        ignored = _ignored(folder)
        for path in sorted(folder.rglob("*")):
            inside = path.relative_to(folder).as_posix()
            hidden = any(part.startswith(".") or part == "__pycache__" for part in path.relative_to(folder).parts)
            if path.is_file() and not hidden and not f"/{inside}".startswith(ignored):
                yield path
    yield from sorted((ROOT / "tests" / "wasm" / "toolchains").glob("*.py"))


def _ignored(folder: Path) -> tuple[str, ...]:
    """What git is told to ignore there, as the beginnings of paths."""
    listed = folder / ".gitignore"
    lines = listed.read_text().split() if listed.exists() else []
    return tuple(line.rstrip("*") for line in lines if line.startswith("/"))
