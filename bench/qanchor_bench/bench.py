"""What a suite gets to work with, and rounds: every point once per round, so that a slow minute
of the machine hits all of them alike.
"""

import logging
import os
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qanchor.bundle.reader import Bundle
from qanchor.bundle.tolerance import Tolerances, tolerances
from qanchor_bench.engines import open_scenario_engine
from qanchor_bench.machine import Rates, measure_gpu_rates, measure_rates
from qanchor_bench.scenario import BenchScenario
from qanchor_bench.spread import median
from qanchor_server.engine import Engine

logger = logging.getLogger(__name__)

Road = Callable[[], Any]

_MIN_SAMPLE_SECONDS = 0.03
_SETTLE_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Bench:
    """A scenario and what it runs on."""

    scenario: BenchScenario
    opened: Bundle | None
    """None for a suite that runs no bundle."""
    threads: int
    scratch: Path
    """A directory that ends with the run."""

    @property
    def bundle(self) -> Bundle:
        """The bundle that is measured."""
        assert self.opened is not None, "This is a bug: this suite runs no bundle."
        return self.opened

    @property
    def allowed(self) -> Tolerances:
        """How far the bundle's answers may lie from torch's and from each other."""
        return tolerances(self.bundle.manifest)

    def engine(self) -> Engine[Any]:
        """The server's engine over the scenario's bundle, as the server makes it."""
        return open_scenario_engine(self.bundle, self.scenario, self.threads)

    def rates(self, num_rows: int) -> Rates:
        """What the device reaches with `num_rows` rows times the largest matrix of the model."""
        dims = self.bundle.manifest.dims
        inner, columns = dims.hidden_dim, dims.intermediate_dim
        if self.scenario.is_on_gpu:
            return measure_gpu_rates(num_rows, inner, columns, self.bundle.manifest.precision)
        return measure_rates(num_rows, inner, columns, self.threads)


@dataclass(slots=True)
class Samples:
    """Per road: one value per round, wall-clock and CPU seconds; all runs; and the last answer."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    cpu_seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    run_seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Every single run of the rounds that count."""
    answers: dict[str, Any] = field(default_factory=dict)


def run_rounds(
    roads: Mapping[str, Road],
    *,
    repeats: int,
    warmup: int,
    fewer: Mapping[str, int] | None = None,
) -> Samples:
    """Run every road once per round; a value is the median of as many runs as fill 30 ms.

    `fewer` gives roads that take long a smaller number of rounds; they are not warmed up.
    """
    fewer = fewer or {}
    samples = Samples()
    for turn in range(-warmup, repeats):
        for name, road in roads.items():
            if not (name in fewer and not 0 <= turn < fewer[name]):
                # Threads of another runtime may still spin; let them fall asleep.
                time.sleep(_SETTLE_SECONDS)
                _sample(name, road, samples, is_counted=turn >= 0)
        logger.info("round %d of %d%s", turn + 1, repeats, " (warm-up)" if turn < 0 else "")
    return samples


def _sample(name: str, road: Road, samples: Samples, *, is_counted: bool) -> None:
    seconds: list[float] = []
    cpu_start, end = time.process_time(), time.perf_counter() + _MIN_SAMPLE_SECONDS
    while not seconds or time.perf_counter() < end:
        start = time.perf_counter()
        answer = road()
        seconds.append(time.perf_counter() - start)
    if is_counted:
        samples.run_seconds[name] += seconds
        samples.seconds[name].append(median(seconds))
        samples.cpu_seconds[name].append((time.process_time() - cpu_start) / len(seconds))
        samples.answers[name] = answer


def num_threads(scenario: BenchScenario) -> int:
    """Threads of one operator."""
    return scenario.threads or os.cpu_count() or 1
