"""The watched folders by name: which sources a plugin has there, and what stat says of them."""

from __future__ import annotations

from pathlib import Path

from ..errors import ConfigError
from .sources import Signature, Source, find_sources, name_of, signature

__all__ = ["Places", "joined"]


class Places:
    """The plugin folders of one host, in the operator's order."""

    def __init__(self, folders: tuple[str, ...]) -> None:
        self.roots = [Path(folder).absolute() for folder in folders]

    def check(self) -> None:
        """Raises `ConfigError` when a folder is not there."""
        for root in self.roots:
            if not root.is_dir():
                raise ConfigError("plugins", str(root), "start", "there is no such folder; `hotdesk init` makes one")

    def names(self) -> set[str]:
        """Everything that is a plugin now."""
        return {name for root in self.roots for name in find_sources(root)}

    def names_of(self, path: Path) -> set[str]:
        """Which plugins a changed *path* belongs to; empty where that can't be said from its name."""
        return {name for root in self.roots if (name := name_of(path, root))}

    def sources_of(self, name: str) -> dict[Source, Signature]:
        """Where plugin *name* is now, first folder first, and what stat says of it. More than one is a clash."""
        found = {}
        for root in self.roots:
            for kind, path in (("py", root / f"{name}.py"), ("folder", root / name), ("wasm", root / f"{name}.wasm")):
                source = Source(name, path, kind)
                if (rows := signature(source)) is not None:
                    found[source] = rows
        return found

    def owns(self, source: Source | None) -> bool:
        """Whether *source* is in one of the folders, and not installed."""
        return source is not None and any(source.path.is_relative_to(root) for root in self.roots)


def joined(found: dict[Source, Signature]) -> Signature | None:
    """One signature for all sources of a name."""
    return tuple(row for rows in found.values() for row in rows) or None
