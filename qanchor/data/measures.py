"""Numbers that stand beside an event's text: time since, counts, values. Torch-free.

A text encoder reads "5d" and "6d" as two words; as numbers they are neighbours. Every text of a
prefix has one row of NUM_MEASURES numbers of the order of 1, the same row whether it is trained,
exported or served. Not in the paper, which has a tabular modality of its own.
"""

import math
from collections.abc import Sequence

from qanchor.config import MAX_MEASURED_TYPES, ModalitySpec, ProfileSchema
from qanchor.data.profile import DAY_SECONDS, Event

Measures = tuple[float, ...]

FIXED = (
    "recency_3d", "recency_14d", "age", "num_events", "num_days", "total_value", "mean_value",
    "mean_value_linear", "has_value", "num_days_7", "num_days_30", "is_summary",
)  # fmt: skip
NUM_MEASURES = len(FIXED) + MAX_MEASURED_TYPES
"""Numbers per text: those named in FIXED, then one per measured event type of the modality."""

_DAYS_SCALE = 30.0
_LOG_SCALE = 4.0
_MAX_LINEAR = 3.0


def num_measures(schema: ProfileSchema) -> int:
    """Numbers beside each event vector under a schema."""
    return NUM_MEASURES if schema.has_measures else 0


def event_measures(
    events: Sequence[Event], spec: ModalitySpec, as_of_s: int, *, is_summary: bool = False
) -> Measures:
    """The row of a text that speaks of `events` (at least one) of one modality.

    Ages in units of 30 days, counts and values as logarithms, the mean value in hundreds too.
    """
    days = {(as_of_s - event.time_s) // DAY_SECONDS for event in events}
    newest = min(days)
    values = [event.value for event in events if event.value is not None]
    total = sum(values)
    row = [
        math.exp(-newest / 3),
        math.exp(-newest / 14),
        newest / _DAYS_SCALE,
        _log(len(events)),
        _log(len(days)),
        _log(total),
        _log(total / len(values)) if values else 0.0,
        # A logarithm hardly tells a score of 60 from one of 80.
        max(-_MAX_LINEAR, min(total / len(values) / 100, _MAX_LINEAR)) if values else 0.0,
        float(bool(values)),
        sum(day <= 7 for day in days) / 7 if is_summary else 0.0,
        sum(day <= 30 for day in days) / _DAYS_SCALE if is_summary else 0.0,
        float(is_summary),
    ]
    amounts = dict.fromkeys(spec.measured_types, 0.0)
    for event in events:
        if event.event_type in amounts:
            amounts[event.event_type] += 1.0 if event.value is None else event.value
    row.extend(_log(amount) for amount in amounts.values())
    return tuple(row + [0.0] * (NUM_MEASURES - len(row)))


def attribute_measures(value: str | float | bool) -> Measures:
    """The row of an attribute's text: its number where it has one."""
    is_number = not isinstance(value, str)
    number = _log(float(value)) if is_number else 0.0
    row = [0.0] * NUM_MEASURES
    row[FIXED.index("total_value")] = number
    row[FIXED.index("has_value")] = float(is_number)
    return tuple(row)


def _log(number: float) -> float:
    return math.copysign(math.log1p(abs(number)), number) / _LOG_SCALE
