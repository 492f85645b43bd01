"""What a run leaves behind: one JSON file per scenario, the same form for every suite."""

import math
from pathlib import Path
from typing import Literal

import msgspec

from qanchor import config
from qanchor.config import Config
from qanchor.environment import Environment
from qanchor_bench.scenario import BenchScenario
from qanchor_bench.spread import median

RESULT_DIR = Path(__file__).resolve().parents[1] / "results"


class Point(Config, frozen=True, kw_only=True):
    """One measured quantity: a value per repeat."""

    name: str
    """Unique within the result; equal names in two results are compared."""
    group: str
    """Points of one group stand in one table and one plot."""
    labels: dict[str, str | float] = msgspec.field(default_factory=dict)
    """What was set, such as the number of queries."""
    unit: Literal["s", "bytes", "1/s", "1"]
    values: tuple[float | None, ...]
    """One per repeat; None: more than that share of the requests had no answer in time."""
    cpu_seconds: tuple[float, ...] = ()
    """CPU time of the process per repeat, all threads; empty where it was not taken."""
    floor: float | None = None
    """The least this machine could need, in the same unit, at rates measured in this run."""
    better: Literal["less", "more"] = "less"

    @property
    def median(self) -> float:
        """Median over the repeats; infinite where more than half had no answer."""
        return median(self.finite_or_inf)

    @property
    def finite_or_inf(self) -> tuple[float, ...]:
        """Values with None as infinity."""
        return tuple(math.inf if value is None else value for value in self.values)


class Check(Config, frozen=True, kw_only=True):
    """Whether what was measured was also right."""

    name: str
    is_ok: bool
    detail: str


class MachineState(Config, frozen=True, kw_only=True):
    """The machine while the scenario ran."""

    threads: int
    cpu_flags: tuple[str, ...]
    """Instruction sets that decide how fast matrix products can be."""
    governor: str
    """CPU frequency governor; `unknown` where the kernel does not tell."""
    memory_gib: float
    gpu: str = ""
    """Name, driver, memory and packages of the GPU that ran; empty: none did."""
    load_average_before: float
    load_average_after: float
    cpu_share_of_others: float
    """Share of all cores, 0 to 1, that other processes used during the measured rounds."""
    started_at: str
    """UTC, ISO 8601."""
    wall_seconds: float


class Findings(Config, frozen=True, kw_only=True):
    """What a suite found."""

    points: tuple[Point, ...]
    checks: tuple[Check, ...]
    figures: dict[str, float | None] = msgspec.field(default_factory=dict)
    """Derived numbers, most of them ratios; None where a percentile was infinite."""
    rates: dict[str, float] = msgspec.field(default_factory=dict)
    """Measured rates of the machine that floors are stated with: FLOP/s and bytes/s."""
    counts: dict[str, int] = msgspec.field(default_factory=dict)
    """Requests by what became of them, or other counts."""
    notes: tuple[str, ...] = ()
    """What was not run, and why; what is not counted."""
    not_run: tuple[str, ...] = ()
    """Figures that this machine cannot have; their targets are neither met nor missed."""


class Result(Config, frozen=True, kw_only=True):
    """One scenario's run."""

    scenario: BenchScenario
    environment: Environment
    machine: MachineState
    model_id: str
    """Of the bundle; empty: the suite runs none."""
    findings: Findings

    @property
    def missed(self) -> tuple[str, ...]:
        """Targets of the scenario that were not reached, in words."""
        targets = [(name, bound, True) for name, bound in self.scenario.at_most.items()]
        targets += [(name, bound, False) for name, bound in self.scenario.at_least.items()]
        return tuple(
            f"{name} {shown(self.findings.figures.get(name))}, wanted "
            f"{'at most' if is_upper else 'at least'} {bound:g}"
            for name, bound, is_upper in targets
            if name not in self.findings.not_run
            and not meets(self.findings.figures.get(name), bound, is_upper=is_upper)
        )

    @property
    def is_right(self) -> bool:
        """Whether every correctness check passed."""
        return bool(self.findings.checks) and all(check.is_ok for check in self.findings.checks)


def shown(value: float | None) -> str:
    """A number for people; None is a percentile beyond the deadline, or nothing measured."""
    return "no value" if value is None else f"{value:.4g}"


def meets(value: float | None, bound: float, *, is_upper: bool) -> bool:
    """Whether a figure keeps its bound; one that is missing or infinite does not."""
    return value is not None and (value <= bound if is_upper else value >= bound)


def finite(value: float) -> float | None:
    """None for what JSON cannot hold."""
    return value if math.isfinite(value) else None


def save_result(result: Result, directory: Path, hardware: str) -> Path:
    """Write `<theme>_<hardware>_<yyyymmdd>_<sha>.json`."""
    date = result.machine.started_at[:10].replace("-", "")
    commit = result.environment.commit + ("-dirty" if result.environment.is_dirty else "")
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{result.scenario.name}_{hardware}_{date}_{commit}.json"
    config.save(result, path)
    return path


def load_result(path: Path) -> Result:
    """Read a result file. Raises ConfigError for another kind of file."""
    return config.load(Result, path)
