"""Counts for Prometheus: requests and their times, and whatever the engine counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)


class Metrics:
    """One server's metrics.

    Args:
        stats: the engine's; names that end in `_total` only grow.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, stats: Callable[[], Mapping[str, float]]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "mmchat_http_requests", "Requests that were answered", ["route", "status"], registry=self.registry
        )
        self.request_s = Histogram(
            "mmchat_completion_seconds",
            "From a chat completion's head to its last byte",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.first_s = Histogram(
            "mmchat_first_piece_seconds",
            "From a chat completion's head to the first text of its answer",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.registry.register(_OfEngine(stats))

    def text(self) -> bytes:
        """What a scrape gets."""
        return generate_latest(self.registry)


class _OfEngine(Collector):
    def __init__(self, stats: Callable[[], Mapping[str, float]]) -> None:
        self.stats = stats

    def collect(self) -> Iterator[Metric]:
        for name, value in self.stats().items():
            said = f"The engine's {name.removesuffix('_total').replace('_', ' ')}"
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            yield kind(f"mmchat_engine_{name}", said, value=value)
