"""Hand-made features of a profile: what a feature engineer would build without this project.

Per modality and event type: counts, value sums and active days in 7, 30 and 90 days, recency,
mean value; per modality: activity by week; attributes as numbers or one column per value.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qanchor.data.profile import DAY_SECONDS, Profile

WINDOWS_DAYS = (7, 30, 90)
NUM_WEEKS = 13
NEVER_DAYS = 999.0
MAX_ATTRIBUTE_VALUES = 40

Features = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class FeatureSpace:
    """Which categories and attribute values have columns; learnt from train users."""

    categories: tuple[tuple[str, str], ...]
    """(modality, event type); event type "" stands for the whole modality."""
    numeric: tuple[str, ...]
    one_hot: tuple[tuple[str, str], ...]


def learn_space(profiles: Sequence[Profile]) -> FeatureSpace:
    """Columns seen in `profiles`; attributes with too many values are left out."""
    categories: set[tuple[str, str]] = set()
    values: dict[str, set[str]] = {}
    numeric: set[str] = set()
    for profile in profiles:
        for event in profile.events:
            categories.add((event.modality, event.event_type))
        for name, value in profile.attributes.items():
            if isinstance(value, str):
                values.setdefault(name, set()).add(value)
            else:
                numeric.add(name)
    whole = {(modality, "") for modality, _ in categories}
    one_hot = [
        (name, value)
        for name, found in sorted(values.items())
        if len(found) <= MAX_ATTRIBUTE_VALUES
        for value in sorted(found)
    ]
    return FeatureSpace(tuple(sorted(categories | whole)), tuple(sorted(numeric)), tuple(one_hot))


def features(profile: Profile, space: FeatureSpace) -> Features:
    """One row [F] of features, missing numbers as 0."""
    by_category: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for event in profile.events:
        row = ((profile.as_of_s - event.time_s) // DAY_SECONDS, event.value or 0.0)
        by_category.setdefault((event.modality, event.event_type), []).append(row)
        by_category.setdefault((event.modality, ""), []).append(row)
    columns: list[float] = []
    for category in space.categories:
        columns.extend(_category_features(by_category.get(category, []), is_whole=not category[1]))
    columns.extend(float(profile.attributes.get(name, 0.0)) for name in space.numeric)
    columns.extend(float(profile.attributes.get(name) == value) for name, value in space.one_hot)
    return np.array(columns, dtype=np.float32)


def _category_features(rows: list[tuple[int, float]], is_whole: bool) -> list[float]:
    num_features = 3 * len(WINDOWS_DAYS) + 2 + (NUM_WEEKS if is_whole else 0)
    if not rows:
        return [NEVER_DAYS, *([0.0] * (num_features - 1))]
    days, values = np.array(rows, dtype=np.float64).T
    result = [float(days.min()), float(values.mean())]
    for window in WINDOWS_DAYS:
        inside = days <= window
        active_days = len(np.unique(days[inside]))
        result.extend((float(inside.sum()), float(values[inside].sum()), float(active_days)))
    if is_whole:
        weeks = np.minimum((days - 1) // 7, NUM_WEEKS - 1).clip(min=0).astype(np.int64)
        result.extend(np.bincount(weeks, minlength=NUM_WEEKS).astype(float).tolist())
    return result
