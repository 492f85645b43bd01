"""Percentiles, spread, and whether two sets of repeats differ by more than their noise."""

import math
from collections.abc import Sequence

import numpy as np

PERCENTILES = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p99.9": 99.9}


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` of all values do not exceed (nearest rank).

    An observed value, never one in between, so that an infinite one (a request that was never
    answered) stays where it stands. NaN of no values.

    >>> percentile([3.0, 1.0, 2.0], 50.0), percentile([1.0, float("inf")], 99.0)
    (2.0, inf)
    """
    if not values:
        return math.nan
    ordered = sorted(values)
    # Rounded first: 99.9 % of 1000 values is rank 999, not 999.0000000000001.
    rank = math.ceil(round(percent / 100 * len(ordered), 9))
    return ordered[max(1, rank) - 1]


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p90, p99 and p99.9."""
    return {name: percentile(values, percent) for name, percent in PERCENTILES.items()}


def median(values: Sequence[float]) -> float:
    """Median; NaN of no values."""
    return float(np.median(values)) if values else math.nan


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """First and third quartile, nearest rank."""
    return percentile(values, 25.0), percentile(values, 75.0)


def is_beyond_noise(before: Sequence[float], after: Sequence[float], tolerance: float) -> bool:
    """Whether the medians differ by more than `tolerance` and the middle halves do not overlap.

    With few repeats and a busy machine the middle halves are wide: such a change is not told.
    """
    old, new = median(before), median(after)
    if not (math.isfinite(old) and math.isfinite(new)):
        return old != new and not (math.isnan(old) and math.isnan(new))
    if abs(new - old) <= tolerance * abs(old):
        return False
    old_low, old_high = quartiles(before)
    new_low, new_high = quartiles(after)
    return new_low > old_high or new_high < old_low
