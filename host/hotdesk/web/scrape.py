"""One scrape for all workers: each renders its own samples with its place as a label, and they are put together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

__all__ = ["LABEL", "merge_scrapes", "render_scrape"]

LABEL = "worker"

UP = "hotdesk_worker_up"
UP_HEAD = f"# HELP {UP} 1 for a worker that answered this scrape\n# TYPE {UP} gauge\n"


class _Labelled(Collector):
    """The families of a registry, every sample with the label of its worker."""

    def __init__(self, registry: CollectorRegistry, worker: int) -> None:
        self._registry = registry
        self._worker = str(worker)

    def collect(self) -> Iterable[Metric]:
        for found in self._registry.collect():
            family = Metric(found.name, found.documentation, found.type, found.unit)
            family.samples = [sample._replace(labels=self._labels(sample)) for sample in found.samples]
            yield family

    def _labels(self, sample: Sample) -> dict[str, str]:
        labels = dict(sample.labels)
        if LABEL in labels:  # a plugin's own; as Prometheus does with labels that a target has already
            labels[f"exported_{LABEL}"] = labels.pop(LABEL)
        labels[LABEL] = self._worker
        return labels


def render_scrape(registry: CollectorRegistry, worker: int | None) -> bytes:
    """The registry in Prometheus' text format, with the label *worker* unless it is None."""
    return generate_latest(registry if worker is None else _Labelled(registry, worker))


def merge_scrapes(scrapes: Mapping[int, bytes | None]) -> bytes:
    """The texts that `render_scrape` gave in each worker, as one; None for a worker that did not answer.

    A family has one head and stands together, as the format wants it. Where a worker has a family of the same name and
    another type, as a plugin may in the moment of a swap, the first worker's type holds and the other samples are left
    out. Nothing is parsed number by number: that would hold the loop for 10 ms a thousand samples.
    """
    heads: dict[str, str] = {}
    bodies: dict[str, list[str]] = {}
    for worker in sorted(scrapes):
        text = scrapes[worker]
        for name, head, body in _families(text.decode() if text is not None else ""):
            if _type(heads.setdefault(name, head)) == _type(head):
                bodies.setdefault(name, []).append(body)
    parts = [part for name, head in heads.items() for part in (head, *bodies[name])]
    parts.append(UP_HEAD)
    parts += [f'{UP}{{{LABEL}="{worker}"}} {int(scrapes[worker] is not None)}\n' for worker in sorted(scrapes)]
    return "".join(parts).encode()


def _families(text: str) -> Iterable[tuple[str, str, str]]:
    """Each family's name, its two lines of head, and its samples. A line break in a label's value is escaped."""
    for block in f"\n{text}".split("\n# HELP ")[1:]:
        help_, kind, *samples = block.rstrip("\n").split("\n")
        yield block.split(" ", 1)[0], f"# HELP {help_}\n{kind}\n", "".join(f"{sample}\n" for sample in samples)


def _type(head: str) -> str:
    return head.rstrip().rpartition(" ")[2]
