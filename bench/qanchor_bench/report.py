"""Results as Markdown: one table per group of points, figures with their targets, checks."""

import math
from collections.abc import Sequence

from qanchor_bench.result import Point, Result, meets, shown
from qanchor_bench.spread import median, quartiles


def markdown(result: Result) -> str:
    """Everything a reader needs of one result."""
    scenario, findings = result.scenario, result.findings
    lines = [f"## {scenario.name}", "", scenario.about, "", _conditions(result), ""]
    for group in dict.fromkeys(point.group for point in findings.points):
        points = [point for point in findings.points if point.group == group]
        lines += [f"### {group}", "", *_table(points), ""]
    if findings.figures:
        lines += ["### figures", "", *_figures(result), ""]
    lines += [
        f"- {'right' if c.is_ok else 'WRONG'}: {c.name} ({c.detail})" for c in findings.checks
    ]
    lines += [f"- {note}" for note in findings.notes]
    if findings.counts:
        counts = ", ".join(f"{count} {name}" for name, count in findings.counts.items())
        lines.append(f"- counted: {counts}")
    return "\n".join(lines)


def amount(value: float, unit: str) -> str:
    """A quantity for people.

    >>> amount(0.0123, "s"), amount(3 << 30, "bytes"), amount(math.inf, "s")
    ('12.3 ms', '3.00 GiB', 'beyond the deadline')
    """
    if math.isnan(value):
        return "-"
    if math.isinf(value):
        return "beyond the deadline"
    if unit == "s":
        scaled, name = (value, "s") if value >= 10 else (1e3 * value, "ms")
        return f"{scaled:.3g} {name}" if scaled < 1000 else f"{scaled:.0f} {name}"
    if unit == "bytes":
        for name, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
            if value >= size:
                return f"{value / size:.2f} {name}"
    if unit == "1" and value != round(value):
        return f"{value:.4f}"
    return f"{value:.0f}{'/s' if unit == '1/s' else ''}"


def _conditions(result: Result) -> str:
    env, machine, rates = result.environment, result.machine, result.findings.rates
    dirty = " with uncommitted changes" if env.is_dirty else ""
    scenario = result.scenario
    gpu = f"{machine.gpu}; " if machine.gpu else ""
    text = (
        f"{gpu}{env.cpu}, {env.cores} cores, {machine.threads} threads "
        f"({' '.join(machine.cpu_flags)}; governor {machine.governor}); {_model(result)}; "
        f"commit {env.commit}{dirty}, {machine.started_at}. Other processes used "
        f"{machine.cpu_share_of_others:.0%} of the machine."
    )
    if rates:
        kind = scenario.precision if scenario.is_on_gpu else "float32"
        text += f" Rates: {kind} {rates['gemm_flops'] / 1e9:.0f} GFLOP/s, "
        if rates["int8_gemm_flops"]:
            text += f"int8 {rates['int8_gemm_flops'] / 1e9:.0f}, "
        text += f"reading {rates['read_bytes'] / 1e9:.1f} GB/s."
    return text


def _model(result: Result) -> str:
    """What ran: weights, types, engine."""
    scenario = result.scenario
    if not result.model_id:
        return "no bundle"
    weights = scenario.bundle or scenario.checkpoint or f"random {scenario.shape}"
    return f"{weights}, {scenario.precision}, {scenario.engine}"


def _table(points: Sequence[Point]) -> list[str]:
    has_floor = any(point.floor for point in points)
    has_cpu = any(point.cpu_seconds for point in points)
    head = ["", "median", "middle half", "worst", "repeats"]
    head += ["floor", "x floor"] if has_floor else []
    head += ["CPU"] if has_cpu else []
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for point in points:
        values = point.finite_or_inf
        low, high = quartiles(values)
        worst = max(values) if point.better == "less" else min(values)
        cells = [
            point.name,
            amount(point.median, point.unit),
            f"{amount(low, point.unit)} to {amount(high, point.unit)}",
            amount(worst, point.unit),
            str(len(values)),
        ]
        if has_floor:
            cells += _over_floor(point)
        if has_cpu:
            cells.append(amount(median(point.cpu_seconds), "s"))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _over_floor(point: Point) -> list[str]:
    if not point.floor:
        return ["", ""]
    return [amount(point.floor, point.unit), f"{point.median / point.floor:.2f}"]


def _figures(result: Result) -> list[str]:
    scenario = result.scenario
    lines = ["| figure | value | target |", "|---|---|---|"]
    figures = result.findings.figures
    lines += [
        f"| {name} | not run here | |" for name in result.findings.not_run if name not in figures
    ]
    for name, value in figures.items():
        targets = [
            f"{word} {bounds[name]:g}: "
            + ("met" if meets(value, bounds[name], is_upper=word == "at most") else "MISSED")
            for word, bounds in (("at most", scenario.at_most), ("at least", scenario.at_least))
            if name in bounds
        ]
        lines.append(f"| {name} | {shown(value)} | {'; '.join(targets)} |")
    return lines
