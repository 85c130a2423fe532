"""Metrics of plugins, made through `ctx.metric`.

Two generations overlap for a moment, so a metric outlives the one that opened it first: it goes when its last
user has gone.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

__all__ = ["PluginMetric", "PluginMetrics"]

_KINDS: dict[str, Any] = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}
_NAME = re.compile(r"[a-z][a-z0-9_]*\Z")


class PluginMetric:
    """See `hotdesk_sdk.Metric`."""

    __slots__ = ("_labelled", "_metric")

    def __init__(self, metric: Any, labelled: bool) -> None:
        self._metric = metric
        self._labelled = labelled

    def _child(self, labels: dict[str, str]) -> Any:
        return self._metric.labels(**labels) if self._labelled else self._metric

    def inc(self, amount: float = 1, **labels: str) -> None:
        self._child(labels).inc(amount)

    def set(self, value: float, **labels: str) -> None:
        self._child(labels).set(value)

    def observe(self, value: float, **labels: str) -> None:
        self._child(labels).observe(value)


class PluginMetrics:
    """The metrics that plugins opened, on the host's registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._open: dict[str, tuple[Any, tuple[str, tuple[str, ...]], int]] = {}

    def open(
        self, plugin: str, kind: str, name: str, help: str, labels: tuple[str, ...]
    ) -> tuple[PluginMetric, Callable[[], None]]:
        """The metric and how to let go of it. Raises `ValueError` on an unknown kind, a bad name, or another shape."""
        if kind not in _KINDS:
            raise ValueError(f"metric {name!r}: kind is {kind!r}; there are {', '.join(_KINDS)}")
        if not _NAME.match(name):
            raise ValueError(f"metric {name!r}: a name is lower-case letters, digits and _")
        full = f"hotdesk_plugin_{re.sub('[^a-z0-9]', '_', plugin.lower())}_{name}"
        shape = (kind, tuple(labels))
        metric, known, users = self._open.get(full, (None, shape, 0))
        if metric is not None and known != shape:
            self._registry.unregister(metric)
            metric, users = None, 0
        if metric is None:
            metric = _KINDS[kind](full, help or name, labels, registry=self._registry)
        self._open[full] = (metric, shape, users + 1)

        def let_go() -> None:
            current, kept, count = self._open.get(full, (None, shape, 0))
            if current is not metric:
                return
            if count > 1:
                self._open[full] = (current, kept, count - 1)
            else:
                del self._open[full]
                self._registry.unregister(current)

        return PluginMetric(metric, bool(labels)), let_go
