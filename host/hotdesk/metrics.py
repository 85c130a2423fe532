"""Every Prometheus metric of the host, on a registry passed in.

Owns names, labels and the cheap counting behind the hot ones: a call into a plugin is counted in plain
Python numbers, which a collector turns into a histogram when somebody scrapes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

__all__ = ["CallStats", "Metrics"]

BUCKETS_S = (
    0.0001,
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
)


LIFECYCLE = frozenset({"setup", "teardown", "configure", "probe", "export_state", "import_state", "tools"})
"""Hooks that are called for a generation and not for what visitors do."""


class CallStats:
    """The calls of one hook of one plugin, over all its generations. Not thread-safe: the loop's own."""

    __slots__ = ("buckets", "count", "failures", "total_s")

    def __init__(self) -> None:
        self.buckets = [0] * (len(BUCKETS_S) + 1)
        self.count = 0
        self.failures = 0
        self.total_s = 0.0

    def observe(self, seconds: float) -> None:
        self.buckets[bisect_left(BUCKETS_S, seconds)] += 1
        self.count += 1
        self.total_s += seconds


class _Observed(Collector):
    """Reads at scrape time what is counted elsewhere in plain numbers."""

    def __init__(self) -> None:
        self.calls: dict[tuple[str, str], CallStats] = {}
        self.turns = CallStats()
        self.gauges: dict[str, tuple[str, Callable[[], float]]] = {}

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(
            "hotdesk_call_seconds",
            "Calls into plugins, without the time spent further in",
            labels=["plugin", "hook"],
        )
        for (plugin, hook), stats in list(self.calls.items()):
            family.add_metric([plugin, hook], _cumulative(stats), stats.total_s)
        yield family
        turns = HistogramMetricFamily("hotdesk_turn_seconds", "From accepted to the turn's end on disk")
        turns.add_metric([], _cumulative(self.turns), self.turns.total_s)
        yield turns
        for name, (text, read) in self.gauges.items():
            gauge = GaugeMetricFamily(name, text)
            gauge.add_metric([], read())
            yield gauge


def _cumulative(stats: CallStats) -> list[tuple[str, float]]:
    total = 0
    rows: list[tuple[str, float]] = []
    for bound, count in zip((*map(str, BUCKETS_S), "+Inf"), stats.buckets, strict=True):
        total += count
        rows.append((bound, total))
    return rows


class Metrics:
    """All metrics; one instance a host."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self._observed = _Observed()
        registry.register(self._observed)
        self.messages = Counter("hotdesk_messages_total", "Messages accepted", ["door"], registry=registry)
        self.duplicates = Counter(
            "hotdesk_duplicates_total", "Messages whose id had been accepted before", registry=registry
        )
        self.spooled = Counter(
            "hotdesk_spooled_total", "Messages put on this machine's disk, for the journal was away", registry=registry
        )
        self.turns = Counter("hotdesk_turns_total", "Turns that ended", ["outcome"], registry=registry)
        self.reruns = Counter("hotdesk_reruns_total", "Turns run again after a rollback", registry=registry)
        self.errors = Counter("hotdesk_errors_total", "Errors that a door answered", ["code"], registry=registry)
        self.failures = Counter(
            "hotdesk_call_failures_total",
            "Calls into plugins that failed",
            ["plugin", "hook", "kind"],
            registry=registry,
        )
        self.swaps = Counter(
            "hotdesk_swaps_total", "Changes to the plugin set", ["plugin", "outcome"], registry=registry
        )
        self.swap_steps = Histogram(
            "hotdesk_swap_step_seconds", "The steps of a swap", ["step"], buckets=BUCKETS_S, registry=registry
        )
        self.leftovers = Counter(
            "hotdesk_leftovers_total", "What generations left behind", ["plugin", "kind"], registry=registry
        )
        self.generation = Gauge(
            "hotdesk_plugin_generation", "The generation that serves", ["plugin"], registry=registry
        )
        self.breaker_open = Gauge(
            "hotdesk_breaker_open",
            "1 while a plugin's breaker keeps calls from it",
            ["plugin"],
            registry=registry,
        )
        self.connections = Gauge("hotdesk_connections", "Open visitor connections", ["door"], registry=registry)
        self.passed_connections = Counter(
            "hotdesk_connections_passed_total",
            "New connections passed on to the worker that runs their conversation's turns",
            registry=registry,
        )
        self.slow_readers = Counter(
            "hotdesk_slow_readers_total",
            "Connections closed because they read too slowly",
            ["door"],
            registry=registry,
        )
        self.stalls = Counter(
            "hotdesk_loop_stalls_total", "Times the event loop was held", ["plugin"], registry=registry
        )
        self.loop_lag = Gauge("hotdesk_loop_lag_seconds", "How late the loop's heartbeat was", registry=registry)
        self.commits = Histogram(
            "hotdesk_backend_commit_seconds", "Commits of the journal", buckets=BUCKETS_S, registry=registry
        )
        self.commit_rows = Counter("hotdesk_backend_writes_total", "Writes that were committed", registry=registry)
        self.backend_errors = Counter("hotdesk_backend_errors_total", "Commits that failed", registry=registry)
        self.dead_letters = Counter(
            "hotdesk_dead_letters_total", "Messages that were given up after max_tries", registry=registry
        )
        self.refused_writes = Counter(
            "hotdesk_backend_refused_writes_total",
            "Writes of a worker that owned the conversation no longer",
            registry=registry,
        )
        self.images = Counter("hotdesk_images_total", "Images of messages", ["outcome"], registry=registry)
        self.deliveries = Counter(
            "hotdesk_deliveries_total",
            "Replies handed to a channel",
            ["plugin", "outcome"],
            registry=registry,
        )
        self.llm_requests = Counter(
            "hotdesk_llm_requests_total", "Requests to language models", ["model", "outcome"], registry=registry
        )
        self.llm_first_token = Histogram(
            "hotdesk_llm_first_token_seconds",
            "From asking a language model to its first text, with queues, retries and fallbacks",
            ["model"],
            buckets=BUCKETS_S,
            registry=registry,
        )
        self.llm_tokens = Counter(
            "hotdesk_llm_tokens_total", "Tokens as the provider counts them", ["model", "direction"], registry=registry
        )
        self.llm_cost = Counter(
            "hotdesk_llm_cost_total", "Tokens by the prices in the settings, in their currency", ["model"],
            registry=registry,
        )  # fmt: skip
        self.llm_retries = Counter(
            "hotdesk_llm_retries_total", "Requests that were sent again", ["model"], registry=registry
        )
        self.llm_fallbacks = Counter(
            "hotdesk_llm_fallbacks_total", "Times the next model was asked instead", ["model"], registry=registry
        )

        self.tool_calls = Counter(
            "hotdesk_tool_calls_total", "Calls that a model made", ["tool", "outcome"], registry=registry
        )

    def call_stats(self, plugin: str, hook: str) -> CallStats:
        """The counting of one hook of one plugin; the same object every time."""
        return self._observed.calls.setdefault((plugin, hook), CallStats())

    @property
    def turn_stats(self) -> CallStats:
        return self._observed.turns

    def watch_gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A gauge whose value is read at scrape time."""
        self._observed.gauges[name] = (text, read)

    def calls(self, plugin: str) -> tuple[int, int]:
        """How many calls into *plugin* there were for messages and requests, and how many failed."""
        rows = [
            stats for (name, hook), stats in self._observed.calls.items() if name == plugin and hook not in LIFECYCLE
        ]
        return sum(row.count for row in rows), sum(row.failures for row in rows)

    def forget(self, plugin: str) -> None:
        """Drop the counts of a plugin that is gone."""
        for key in [key for key in self._observed.calls if key[0] == plugin]:
            del self._observed.calls[key]
