"""The errors that a plugin can meet or raise. The host's own are built on these.

A class per situation that somebody handles differently; each carries what is at fault and builds its own text.
"""

from __future__ import annotations

__all__ = [
    "ApiUnsupported",
    "CapabilityDenied",
    "HotdeskError",
    "ManifestInvalid",
    "PluginError",
    "ScopeClosed",
]


class HotdeskError(Exception):
    """Everything that hotdesk raises on purpose."""


class PluginError(HotdeskError):
    """Something about one plugin; `generation` is None where it concerns no generation in particular."""

    def __init__(self, plugin: str, generation: int | None, problem: str) -> None:
        self.plugin = plugin
        self.generation = generation
        self.problem = problem
        which = f"plugin '{plugin}'" + (f" (generation {generation})" if generation is not None else "")
        super().__init__(f"{which}: {problem}")


class ManifestInvalid(PluginError):
    """A manifest that can't be used; `problem` names the file, the field and what would be right."""

    def __init__(self, plugin: str, problem: str) -> None:
        super().__init__(plugin, None, problem)


class ApiUnsupported(PluginError):
    """A manifest that asks for an API version which this host does not have."""

    def __init__(self, plugin: str, asked: str, supported: tuple[str, ...]) -> None:
        self.asked = asked
        self.supported = supported
        super().__init__(
            plugin, None, f"it is written for api {asked!r}; this host has {', '.join(map(repr, supported))}"
        )


class CapabilityDenied(PluginError):
    """A plugin used what it did not ask for, or what the operator did not grant."""

    def __init__(self, plugin: str, generation: int | None, capability: str, *, asked: bool) -> None:
        self.capability = capability
        self.asked = asked
        if asked:
            remedy = f'not granted; in hotdesk.toml: [plugins.{plugin}] grant = ["{capability}"]'
        else:
            remedy = f'not asked for; in its manifest: capabilities = ["{capability}"]'
        super().__init__(plugin, generation, f"capability '{capability}' is {remedy}")


class ScopeClosed(PluginError):
    """A generation that has ended asked its context for something new."""

    def __init__(self, plugin: str, generation: int | None, what: str) -> None:
        self.what = what
        super().__init__(plugin, generation, f"{what} was refused: this generation has ended")
