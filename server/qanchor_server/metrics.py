"""Prometheus metrics on an HTTP port of their own.

Counts are read when somebody asks; only times are noted per reply. Base units, prefix `qanchor_`,
no user id anywhere. Must not know grpc.
"""

import time
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from qanchor.errors import ConfigError
from qanchor_server.admission import Admission
from qanchor_server.answers import Answer, WorkerStats
from qanchor_server.worker import Worker

# From a fast device's suffix step to an encoding that waited behind others.
BUCKETS_S = (
    0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0
)  # fmt: skip
_COUNTERS = {
    "num_answered": ("qanchor_requests", "Requests answered with vectors or a warm prefix."),
    "num_encoded": ("qanchor_prefixes_encoded", "Prefixes encoded."),
    "num_suffix_steps": ("qanchor_suffix_steps", "Suffix steps run."),
    "num_prefill_steps": ("qanchor_prefill_steps", "Prefill steps run."),
    "num_restore_steps": ("qanchor_restore_steps", "Prefixes copied to the device."),
    "num_expired": ("qanchor_requests_expired", "Requests that expired in the queue."),
    "num_cancelled": ("qanchor_requests_cancelled", "Requests cancelled in the queue."),
}
_TIER_GAUGES = {
    "used_bytes": ("qanchor_tier_used_bytes", "Bytes of keys and values in use."),
    "budget_bytes": ("qanchor_tier_budget_bytes", "Most bytes the tier may hold."),
    "num_users": ("qanchor_tier_users", "Users whose prefix is held."),
}
_TIER_COUNTERS = {
    "num_hits": ("qanchor_tier_hits", "Prefixes found here by those who needed them."),
    "num_evicted": ("qanchor_tier_evictions", "Prefixes that had to make room."),
    "num_failed": ("qanchor_tier_failures", "Copies, writes and reads that failed."),
}


class Metrics:
    """Times of replies, and an HTTP server that shows them beside the counts."""

    def __init__(
        self, address: str, *, worker: Worker[Any], admission: Admission, model_id: str
    ) -> None:
        """`address`: host:port. Raises ConfigError when it cannot be listened on."""
        registry = CollectorRegistry()
        registry.register(_Counts(worker, admission, model_id))
        self._times = {
            name: Histogram(
                f"qanchor_{name}", help_text, ("cache_state",), buckets=BUCKETS_S, registry=registry
            )
            for name, help_text in (
                ("queue_seconds", "Time of a request in which nothing ran for it."),
                ("prefill_seconds", "Device time of encoding or copying a request waited for."),
                ("suffix_seconds", "Device time of the suffix steps a request was part of."),
            )
        }
        host, _, port = address.rpartition(":")
        try:
            self._server, self._thread = start_http_server(int(port), host, registry)
        except (OSError, ValueError) as error:
            raise ConfigError(
                "metrics_address", address, f"cannot be listened on: {error}", "use another port"
            ) from None

    @property
    def port(self) -> int:
        """The bound port."""
        return int(self._server.server_port)

    def note(self, answer: Answer) -> None:
        """Note the times of a reply. Any thread."""
        for name, histogram in self._times.items():
            histogram.labels(answer.found.value).observe(getattr(answer, name))

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Counts(Collector):
    """Reads the worker's latest counts; values are replaced as a whole, so any thread may."""

    def __init__(self, worker: Worker[Any], admission: Admission, model_id: str) -> None:
        self._worker = worker
        self._admission = admission
        self._model_id = model_id
        self._start_s = time.time()

    def collect(self) -> Iterator[Metric]:
        """All families."""
        stats: WorkerStats = self._worker.stats
        yield InfoMetricFamily("qanchor_model", "What is served.", {"model_id": self._model_id})
        yield GaugeMetricFamily(
            "qanchor_start_time_seconds", "Start of the server in Unix time.", self._start_s
        )
        yield GaugeMetricFamily(
            "qanchor_queued_queries",
            "Queries between arrival and reply.",
            self._admission.num_queued,
        )
        yield CounterMetricFamily(
            "qanchor_requests_overloaded",
            "Requests refused because the queue was full.",
            self._admission.num_overloaded,
        )
        for field, (name, text) in _COUNTERS.items():
            yield CounterMetricFamily(name, text, getattr(stats, field))
        for families, kind in (
            (_TIER_GAUGES, GaugeMetricFamily),
            (_TIER_COUNTERS, CounterMetricFamily),
        ):
            for field, (name, text) in families.items():
                family = kind(name, text, labels=("tier",))
                for found, use in stats.tiers.items():
                    family.add_metric((found.value,), getattr(use, field))
                yield family
