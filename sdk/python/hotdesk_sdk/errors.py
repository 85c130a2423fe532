"""The errors that a plugin can meet or raise. The host's own are built on these.

A class per situation that somebody handles differently; each carries what is at fault and builds its own text.
"""

from __future__ import annotations

__all__ = [
    "ApiUnsupported",
    "CapabilityDenied",
    "HotdeskError",
    "LlmError",
    "LlmRefused",
    "LlmTimeout",
    "LlmUnavailable",
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


class LlmError(HotdeskError):
    """The language model gave no answer. `model` is its name in the settings, `reason` the provider's own words.

    `code` is what a door says of it, `public` what a visitor may read. `shown` tells whether part of the answer was
    out already; then nothing was tried again.
    """

    code = "llm_unavailable"
    public = "the language model can't be reached now"

    def __init__(self, model: str, reason: str) -> None:
        self.model = model
        self.reason = reason
        self.shown = False
        super().__init__(f"language model '{model}': {reason}" if model else f"language model: {reason}")


class LlmUnavailable(LlmError):
    """It can't be reached, failed, is overloaded, or none is set. `retry_after_s` is the provider's wish, if any."""

    def __init__(self, model: str, reason: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(model, reason)
        self.retry_after_s = retry_after_s


class LlmRefused(LlmError):
    """It does not take this request: the key, the model's name, the content. Asking again is no use.

    `status` is the HTTP status, or None where the refusal came within an answer.
    """

    code = "llm_refused"
    public = "the language model refused this"

    def __init__(self, model: str, reason: str, *, status: int | None = None) -> None:
        super().__init__(model, reason)
        self.status = status


class LlmTimeout(LlmError):
    """A clock ran out: `phase` is `queue`, `connect`, `first token`, `gap` or `total`."""

    code = "llm_timeout"
    public = "the language model took too long"

    def __init__(self, model: str, phase: str, seconds: float) -> None:
        self.phase = phase
        self.seconds = seconds
        super().__init__(model, f"{phase}: nothing within {seconds:g} s")
