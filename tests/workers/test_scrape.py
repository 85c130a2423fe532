"""One scrape answers for all workers: put together right, and no slower for one that does not answer."""

from __future__ import annotations

from collections import defaultdict

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from tests.workers.desk import WorkerDesk

from hotdesk.web.scrape import merge_scrapes, render_scrape

Samples = dict[str, dict[frozenset[tuple[str, str]], float]]


def parsed(text: str) -> Samples:
    """Every sample by name and labels, as Prometheus' own parser reads it; a name or sample that comes twice fails."""
    found: Samples = defaultdict(dict)
    names = set()
    for family in text_string_to_metric_families(text):
        assert (family.name, family.type) not in names, f"{family.name} comes twice"
        names.add((family.name, family.type))  # the parser takes the `_total` from a counter's name
        for sample in family.samples:
            labels = frozenset(sample.labels.items())
            assert labels not in found[sample.name], f"{sample} comes twice"
            found[sample.name][labels] = sample.value
    return found


def registry_of(worker: int) -> CollectorRegistry:
    registry = CollectorRegistry()
    counter = Counter("said", 'What was "said"\nhere', ["door"], registry=registry)
    counter.labels('a "door" \\ of\n# HELP said_total none').inc(worker + 1)
    histogram = Histogram("took_seconds", "How long", ["hook"], buckets=(0.1, 1.0), registry=registry)
    histogram.labels("respond").observe(0.5 * (worker + 1))
    Gauge("open", "Without labels", registry=registry).set(worker * 10)
    return registry


def test_a_merged_scrape_has_every_sample_of_every_worker_once() -> None:
    """Counters, their creation times, histograms and gauges read back as each worker had them, with its label added."""
    registries = {worker: registry_of(worker) for worker in range(3)}
    merged = parsed(merge_scrapes({worker: render_scrape(one, worker) for worker, one in registries.items()}).decode())
    expected: Samples = defaultdict(dict)
    for worker, registry in registries.items():
        for name, samples in parsed(generate_latest(registry).decode()).items():
            for labels, value in samples.items():
                expected[name][labels | {("worker", str(worker))}] = value
    expected["hotdesk_worker_up"] = {frozenset({("worker", str(worker))}): 1.0 for worker in registries}
    assert merged == expected
    assert {"said_total", "said_created", "took_seconds_bucket", "took_seconds_count", "open"} <= set(merged)


def test_each_family_has_one_head() -> None:
    """The format allows one HELP and one TYPE line a name, with its samples right behind them."""
    text = merge_scrapes({worker: render_scrape(registry_of(worker), worker) for worker in range(3)}).decode()
    heads = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE ")]
    assert len(heads) == len(set(heads))
    current, seen = "", set()
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            current = line.split()[2]
            assert current not in seen
            seen.add(current)
        elif not line.startswith("#"):
            assert line.startswith(current)


def test_a_worker_that_does_not_answer_is_down_and_the_rest_is_there() -> None:
    scrapes = {0: render_scrape(registry_of(0), 0), 1: None}
    merged = parsed(merge_scrapes(scrapes).decode())
    assert merged["hotdesk_worker_up"] == {frozenset({("worker", "0")}): 1.0, frozenset({("worker", "1")}): 0.0}
    assert merged["open"] == {frozenset({("worker", "0")}): 0.0}


def test_a_metric_that_is_of_another_type_elsewhere_breaks_no_scrape() -> None:
    """In the moment of a swap a plugin's counter may be a gauge in another worker: the first worker's type holds."""
    first, second = CollectorRegistry(), CollectorRegistry()
    Gauge("mood", "A gauge", registry=first).set(1)
    Histogram("mood", "A histogram", registry=second).observe(1)
    merged = parsed(merge_scrapes({0: render_scrape(first, 0), 1: render_scrape(second, 1)}).decode())
    assert merged["mood"] == {frozenset({("worker", "0")}): 1.0}
    assert "mood_bucket" not in merged


def test_a_label_of_a_plugins_own_is_kept_beside_the_workers() -> None:
    """As Prometheus does it: what was called `worker` is `exported_worker`."""
    registry = CollectorRegistry()
    Gauge("load", "By worker", ["worker"], registry=registry).labels("bee").set(3)
    assert parsed(render_scrape(registry, 2).decode())["load"] == {
        frozenset({("worker", "2"), ("exported_worker", "bee")}): 3.0
    }


async def test_any_worker_answers_a_scrape_for_all(desk_of_two: WorkerDesk) -> None:
    """What visitors did at any door is in each worker's answer."""
    _, text = await desk_of_two.ask("GET", "/metrics")
    before = sum(parsed(text)["hotdesk_messages_total"].values())
    for number in range(12):
        await desk_of_two.say("hello", f"scraped-{number}")
    answers = await desk_of_two.on_each("GET", "/metrics")
    assert len(answers) == 2
    both = [frozenset({("worker", "0")}), frozenset({("worker", "1")})]
    for status, text in answers.values():
        assert status == 200
        samples = parsed(text)
        assert sum(samples["hotdesk_messages_total"].values()) - before == 12
        assert samples["hotdesk_worker_up"] == dict.fromkeys(both, 1.0)
        assert set(samples["process_cpu_seconds_total"]) == set(both)
        assert set(samples["hotdesk_turn_seconds_count"]) == set(both)
        assert frozenset({("plugin", "who"), ("worker", "1")}) in samples["hotdesk_plugin_generation"]
