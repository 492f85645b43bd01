"""Two results of one scenario: what got slower, beyond their spread; noise is not called slower."""

import math
from dataclasses import dataclass

from qanchor.errors import ConfigError
from qanchor_bench.report import amount
from qanchor_bench.result import Point, Result
from qanchor_bench.spread import is_beyond_noise, quartiles

DEFAULT_TOLERANCE = 0.05


@dataclass(frozen=True, slots=True)
class Change:
    """One point in both results."""

    before: Point
    after: Point
    verdict: str
    """`slower`, `faster`, or `same` where the difference is within tolerance or spread."""

    @property
    def ratio(self) -> float:
        """How many times worse the second result's median is; below 1 it is better."""
        old, new = self.before.median, self.after.median
        worse, better = (new, old) if self.before.better == "less" else (old, new)
        return worse / better if better and math.isfinite(better) else math.inf


def changes(before: Result, after: Result, tolerance: float = DEFAULT_TOLERANCE) -> list[Change]:
    """Points of both results by name, in the first one's order.

    Raises ConfigError when the results are of different scenarios.
    """
    if before.scenario.name != after.scenario.name:
        raise ConfigError(
            "results",
            f"{before.scenario.name} and {after.scenario.name}",
            "must be of one scenario",
            "compare like with like",
        )
    others = {point.name: point for point in after.findings.points}
    return [
        Change(point, others[point.name], _verdict(point, others[point.name], tolerance))
        for point in before.findings.points
        if point.name in others
    ]


def _verdict(before: Point, after: Point, tolerance: float) -> str:
    if not is_beyond_noise(before.finite_or_inf, after.finite_or_inf, tolerance):
        return "same"
    is_worse = (after.median > before.median) == (before.better == "less")
    return "slower" if is_worse else "faster"


def warnings(before: Result, after: Result) -> list[str]:
    """Reasons to doubt a comparison: other machines, threads, settings, models, busy cores."""
    pairs = {
        "cpu": (before.environment.cpu, after.environment.cpu),
        "cores": (before.environment.cores, after.environment.cores),
        "gpu": (before.machine.gpu, after.machine.gpu),
        "threads": (before.machine.threads, after.machine.threads),
        "packages": (before.environment.packages, after.environment.packages),
        "scenario": (before.scenario, after.scenario),
        "model": (before.model_id, after.model_id),
    }
    found = [f"{name} differs" for name, (old, new) in pairs.items() if old != new]
    for name, result in (("first", before), ("second", after)):
        share = result.machine.cpu_share_of_others
        if share > 0.1:
            found.append(f"other processes used {share:.0%} of the machine in the {name} run")
    return found


def markdown(found: list[Change]) -> str:
    """The changes as a table, medians with their middle halves."""
    lines = [
        "| point | before | after | x worse | verdict |",
        "|---|---|---|---|---|",
    ]
    for change in found:
        sides = " | ".join(_side(point) for point in (change.before, change.after))
        lines.append(f"| {change.before.name} | {sides} | {change.ratio:.3f} | {change.verdict} |")
    return "\n".join(lines)


def _side(point: Point) -> str:
    low, high = quartiles(point.finite_or_inf)
    middle = f"{amount(low, point.unit)} to {amount(high, point.unit)}"
    return f"{amount(point.median, point.unit)} ({middle})"
