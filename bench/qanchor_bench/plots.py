"""Plots of a result, drawn from its JSON alone: sweeps beside floors, percentiles, bars."""

from pathlib import Path
from typing import Any

from qanchor_bench.result import Point, Result

_SWEPT = {
    "num_queries": "queries of one user",
    "query_len": "tokens per query",
    "prefix_len": "prefix positions",
    "num_users": "users in one step",
}


def draw(result: Result, path: Path) -> Path | None:
    """Write a PNG; None for a suite that has nothing to draw."""
    # Only here: a run without plots needs no matplotlib, and no window is ever opened.
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawers = {"engine": _engine, "serve": _serve, "peers": _peers, "cache": _cache}
    if result.scenario.suite not in drawers:
        return None
    figure = drawers[result.scenario.suite](result, plt)
    machine = result.machine
    figure.suptitle(
        f"{result.scenario.name}: {result.environment.cpu}, {machine.threads} threads, "
        f"{result.scenario.precision}",
        fontsize=10,
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _engine(result: Result, plt: Any) -> Any:
    """One panel per varied size: measured median with its extremes, and the floor."""
    steps = [point for point in result.findings.points if point.group == "suffix step"]
    figure, axes = plt.subplots(1, len(_SWEPT), figsize=(14, 3.6), layout="constrained")
    for axis, (name, title) in zip(axes, _SWEPT.items(), strict=True):
        points = sorted(_sweep(steps, name), key=lambda point: point.labels[name])
        places = [point.labels[name] for point in points]
        medians = [1e3 * point.median for point in points]
        low = [m - 1e3 * min(p.finite_or_inf) for m, p in zip(medians, points, strict=True)]
        high = [1e3 * max(p.finite_or_inf) - m for m, p in zip(medians, points, strict=True)]
        axis.errorbar(places, medians, yerr=[low, high], marker="o", capsize=3, label="measured")
        axis.plot(places, [1e3 * (p.floor or 0) for p in points], "--", label="floor")
        axis.set(xlabel=title, ylabel="suffix step, ms", ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend()
    return figure


def _sweep(points: list[Point], name: str) -> list[Point]:
    """The base (the first point) and those that differ from it in `name` alone."""
    base = points[0].labels
    return [
        point
        for point in points
        if all(point.labels[other] == base[other] for other in _SWEPT if other != name)
    ]


def _serve(result: Result, plt: Any) -> Any:
    """Left: latency percentiles per load. Right: requests per second."""
    points = result.findings.points
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    ranks = ("p50", "p90", "p99", "p99.9")
    loads = dict.fromkeys(p.group for p in points if p.labels.get("percentile") in ranks)
    for load in loads:
        by_rank = {p.labels.get("percentile"): p for p in points if p.group == load}
        left.plot(ranks, [1e3 * by_rank[rank].median for rank in ranks], marker="o", label=load)
    for name, style in (("engine step", ":"), ("empty round trip", "--")):
        (value,) = [1e3 * point.median for point in points if point.name == name]
        left.axhline(value, linestyle=style, color="gray", label=name)
    left.set(ylabel="latency of hits from intended send time, ms", yscale="log")
    left.grid(alpha=0.3, which="both")
    left.legend(fontsize=8)
    rates = [point for point in points if point.unit == "1/s"]
    _bars(right, [point.name for point in rates], [point.median for point in rates])
    right.set(xlabel="requests per second")
    return figure


def _peers(result: Result, plt: Any) -> Any:
    """Two panels, one query and all queries; shorter is better."""
    figure, axes = plt.subplots(2, 1, figsize=(10, 5), layout="constrained")
    _panels(axes, result, ("one query", "all queries"))
    return figure


def _cache(result: Result, plt: Any) -> Any:
    """Left: a user coming back. Right: the trace's latencies by where a user was found."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 3.6), layout="constrained")
    _panels(axes, result, ("a user comes back", "trace: latency"))
    return figure


def _panels(axes: Any, result: Result, groups: tuple[str, ...]) -> None:
    """One group of points in milliseconds per panel."""
    for axis, group in zip(axes, groups, strict=True):
        points = [point for point in result.findings.points if point.group == group]
        _bars(axis, [point.name for point in points], [1e3 * point.median for point in points])
        axis.set(xlabel="ms, logarithmic", xscale="log", title=group)


def _bars(axis: Any, names: list[str], values: list[float]) -> None:
    bars = axis.barh(names, values)
    axis.bar_label(bars, fmt="%.3g", padding=3)
    axis.invert_yaxis()
    axis.margins(x=0.15)
