"""What a replica counts, for Prometheus. Labels are bounded: outcomes, reasons, routes and configured encoders."""

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families

from craftor.serving.engine import Engine
from craftor.serving.library import Library
from craftor.serving.objects import ObjectEncoder
from craftor.serving.shelf import Shelf

_SHORT = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)
_LONG = (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120)


class Metrics:
    """An engine's observer, with a registry of its own: several may live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        kept: dict[str, Any] = {"registry": self.registry, "namespace": "craftor"}
        self.wait = Histogram("queue_wait_seconds", "From submission to the first step", buckets=_LONG, **kept)
        self.step = Histogram("step_seconds", "One UNet call", buckets=_SHORT, **kept)
        self.overhead = Histogram("step_overhead_seconds", "A step but for its UNet call", buckets=_SHORT, **kept)
        self.used = Counter("slots_used", "Slots of UNet calls that held a row", **kept)
        self.slots = Counter("slots", "Slots of UNet calls, padding included", **kept)
        self.stops = Counter("batch_stops", "Why no more rows joined a call", ["reason"], **kept)
        self.images = Counter("images", "Images by how they ended", ["outcome"], **kept)
        self.latency = Histogram("image_seconds", "From submission to a finished image", buckets=_LONG, **kept)
        self.rejects = Counter("rejects", "Requests refused with 429", ["reason"], **kept)
        self.references = Counter("references", "Uploaded pictures of objects", ["outcome"], **kept)
        self.requests = Counter("http_requests", "Answers", ["route", "status"], **kept)
        self.ongoing = Gauge("http_ongoing", "Requests in flight", **kept)

    def stepped(self, slots: int, bucket: int, seconds: float, overhead: float, reason: str) -> None:
        self.step.observe(seconds)
        self.overhead.observe(overhead)
        self.used.inc(slots)
        self.slots.inc(bucket)
        self.stops.labels(reason).inc()

    def started(self, waited: float) -> None:
        self.wait.observe(waited)

    def ended(self, outcome: str, seconds: float) -> None:
        self.images.labels(outcome).inc()
        if outcome == "completed":
            self.latency.observe(seconds)

    def watch(self, engine: Engine, library: Library, objects: Shelf[ObjectEncoder]) -> None:
        """Also tell, when asked, what these know themselves."""
        self.registry.register(_Known(engine, library, objects))

    def text(self) -> bytes:
        return generate_latest(self.registry)


def together(texts: Mapping[str, bytes]) -> bytes:
    """What several replicas say, by their ids, as one text: a scrape reaches one of them, and should tell of all."""
    families: dict[str, Metric] = {}
    for replica, text in texts.items():
        for own in text_string_to_metric_families(text.decode()):
            family = families.setdefault(own.name, Metric(own.name, own.documentation, own.type))
            for sample in own.samples:
                family.add_sample(sample.name, {**sample.labels, "replica": replica}, sample.value)
    merged = CollectorRegistry()
    merged.register(_Told(list(families.values())))
    return generate_latest(merged)


class _Told:
    def __init__(self, families: list[Metric]) -> None:
        self.families = families

    def collect(self) -> list[Metric]:
        return self.families


class _Known:
    """Read at the time of the scrape."""

    def __init__(self, engine: Engine, library: Library, objects: Shelf[ObjectEncoder]) -> None:
        self.engine, self.library, self.objects = engine, library, objects

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        load, cache = self.engine.load(), self.engine.embeddings
        work = GaugeMetricFamily("craftor_work_seconds", "Seconds of a full engine", labels=["state"])
        work.add_metric(["waiting"], load.waiting)
        work.add_metric(["running"], load.running)
        yield work
        found = CounterMetricFamily("craftor_prompt_cache", "Look-ups of prompt embeddings", labels=["result"])
        found.add_metric(["hit"], cache.hits)
        found.add_metric(["miss"], cache.misses)
        yield found
        served = GaugeMetricFamily(
            "craftor_encoder_info", "The version each name stands for", labels=["encoder", "version", "sha256"]
        )
        for name, encoder in self.library.table.items():
            served.add_metric([name, str(encoder.version or ""), encoder.sha256], 1)
        yield served
        eye = GaugeMetricFamily(
            "craftor_object_encoder_info", "The object encoder served", labels=["encoder", "version", "sha256"]
        )
        for one in self.objects.table.values():
            eye.add_metric([one.name, one.version or "", one.sha256], 1)
        yield eye
        problems = GaugeMetricFamily("craftor_encoder_problems", "Encoders whose newest version is not in use")
        problems.add_metric([], len(self.library.problems) + len(self.objects.problems))
        yield problems
