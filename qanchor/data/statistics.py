"""Behaviour statistics: how much, how often and how recently, as numbers. Torch-free.

For all behaviour, per modality and per event type: recency, mean and last value, counts, value
sums and active days within some days; for all behaviour and per modality: active days by week;
attributes as numbers or one column per value. It is what a feature engineer would build by hand:
the baseline of evaluation, and what training may ask an embedding to tell
(`loss.statistics_weight`).
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import accumulate
from operator import attrgetter

import numpy as np
import numpy.typing as npt

from qanchor.config import Config
from qanchor.data.dataset import Dataset
from qanchor.data.profile import DAY_SECONDS, Event, Profile
from qanchor.errors import ConfigError

PAST_DAYS = (7, 30, 90)
FUTURE_DAYS = (7, 14, 30, 60)
NUM_WEEKS = 13
NEVER_DAYS = 999.0
LONG_DAYS = 30
"""What comes later than this many days, or never, is all the same."""
MAX_ATTRIBUTE_VALUES = 40
SPACE_USERS = 4096
_NEIGHBOURS = 16
"""Users read together, being neighbours in the file of events."""
_MAX_DRAWN = np.finfo(np.float16).max
"""The root of a value of some billions is larger."""

Row = npt.NDArray[np.float32]
_Category = tuple[str, str]
_Records = list[tuple[int, float | None]]
"""(day, value where it has one), days ascending."""


class StatisticSpace(Config, frozen=True, kw_only=True):
    """Which categories and attribute values have columns; learnt from train users."""

    categories: tuple[tuple[str, str], ...]
    """(modality, event type); event type "" stands for the whole modality, both "" for all."""
    numeric: tuple[str, ...]
    one_hot: tuple[tuple[str, str], ...]
    future_days: int = 0
    """Days of recorded future; 0: no columns of what comes."""

    @property
    def num_past(self) -> int:
        """Columns of `past_statistics`."""
        of_events = sum(len(_past_columns([], category)) for category in self.categories)
        return of_events + len(self.numeric) + len(self.one_hot)

    @property
    def num_future(self) -> int:
        """Columns of `future_statistics`."""
        spans = len(self.future_spans)
        return len(self.categories) * (2 + 3 * spans) if spans else 0

    @property
    def future_spans(self) -> tuple[int, ...]:
        """Days from the as-of moment that future columns cover."""
        return tuple(days for days in FUTURE_DAYS if days <= self.future_days)


def learn_space(profiles: Iterable[Profile], future_days: int = 0) -> StatisticSpace:
    """Columns seen in `profiles`; attributes with too many values are left out."""
    categories: set[_Category] = set()
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
    whole = {(modality, "") for modality, _ in categories} | {("", "")}
    one_hot = [
        (name, value)
        for name, found in sorted(values.items())
        if len(found) <= MAX_ATTRIBUTE_VALUES
        for value in sorted(found)
    ]
    return StatisticSpace(
        categories=tuple(sorted(categories | whole)),
        numeric=tuple(sorted(numeric)),
        one_hot=tuple(one_hot),
        future_days=future_days,
    )


def training_space(dataset: Dataset, *, with_future: bool) -> StatisticSpace:
    """Columns for training, from SPACE_USERS train users or all if they are fewer.

    Raises ConfigError if futures are asked for and the data set records too few days of them.
    """
    future_days = dataset.config.future_days if with_future else 0
    if with_future and future_days < FUTURE_DAYS[0]:
        raise ConfigError(
            "loss.statistics_future_share",
            f"more than 0 with future_days={future_days}",
            f"the data set must record at least {FUTURE_DAYS[0]} days after the as-of day",
            "set it to 0: the past is learnt from alone",
        )
    users = _spread(dataset.user_ids("train"))
    return learn_space(dataset.profiles(user_ids=users), future_days)


def _spread(users: list[str]) -> list[str]:
    """At most SPACE_USERS of `users`, from the first to the last alike.

    Ids often follow the day of signing up: event types that are new are missing in the first ones.
    """
    if len(users) <= SPACE_USERS:
        return users
    starts = np.linspace(0, len(users) - _NEIGHBOURS, SPACE_USERS // _NEIGHBOURS, dtype=int)
    return [user for start in starts for user in users[start : start + _NEIGHBOURS]]


def past_statistics(profile: Profile, space: StatisticSpace) -> Row:
    """One row [num_past] about the history; mean and last value nan where no value is known."""
    by_category = _by_category(profile.events, profile.as_of_s, backwards=True)
    columns: list[float] = []
    for category in space.categories:
        columns.extend(_past_columns(by_category.get(category, []), category))
    columns.extend(float(profile.attributes.get(name, 0.0)) for name in space.numeric)
    columns.extend(float(profile.attributes.get(name) == value) for name, value in space.one_hot)
    return np.array(columns, dtype=np.float32)


def future_statistics(
    after: Iterable[Event], as_of_s: int, known_days: int, space: StatisticSpace
) -> Row:
    """One row [num_future] about what came; nan where `known_days` days do not tell."""
    by_category = _by_category(after, as_of_s, backwards=False)
    columns: list[float] = []
    for category in space.categories if space.future_spans else ():
        records = [record for record in by_category.get(category, []) if record[0] < known_days]
        first = records[0][0] if records else known_days
        is_known = bool(records) or known_days >= LONG_DAYS
        columns.append(float(min(first, LONG_DAYS)) if is_known else np.nan)
        columns.append(_mean_value(records))
        told = _within(records, [days - 1 for days in space.future_spans])
        for place, days in enumerate(space.future_spans):
            columns.extend(told[3 * place : 3 * place + 3] if days <= known_days else [np.nan] * 3)
    return np.array(columns, dtype=np.float32)


def log_statistics(
    profile: Profile, after: Iterable[Event], known_days: int, space: StatisticSpace
) -> npt.NDArray[np.float16]:
    """Past and future statistics [num_past + num_future], drawn together to like size.

    Logarithms, but roots of mean and last values: a logarithm hardly tells a score of 60 from 80.
    """
    future = future_statistics(after, profile.as_of_s, known_days, space)
    row = np.concatenate([past_statistics(profile, space), future])
    size = np.abs(row)
    drawn = np.sign(row) * np.where(_holds_value(space), np.sqrt(size), np.log1p(size))
    logs: npt.NDArray[np.float16] = drawn.clip(-_MAX_DRAWN, _MAX_DRAWN).astype(np.float16)
    return logs


@cache
def _holds_value(space: StatisticSpace) -> npt.NDArray[np.bool_]:
    """Which columns [num_past + num_future] hold the size of values, not a count or a time."""
    holds = np.zeros(space.num_past + space.num_future, dtype=bool)
    start = 0
    for category in space.categories:
        holds[start + 2 : start + 4] = True
        start += len(_past_columns([], category))
    if space.future_spans:
        holds[space.num_past + 1 :: space.num_future // len(space.categories)] = True
    return holds


def _by_category(
    events: Iterable[Event], as_of_s: int, *, backwards: bool
) -> dict[_Category, _Records]:
    """Records of each event type, each modality and all; days counted from the as-of moment."""
    found: dict[_Category, _Records] = {}
    for event in sorted(events, key=attrgetter("time_s"), reverse=backwards):
        away_s = as_of_s - event.time_s if backwards else event.time_s - as_of_s
        record = (away_s // DAY_SECONDS, event.value)
        for category in ((event.modality, event.event_type), (event.modality, ""), ("", "")):
            found.setdefault(category, []).append(record)
    return found


def _past_columns(records: _Records, category: _Category) -> list[float]:
    values = [value for _, value in records if value is not None]
    columns = [
        float(records[0][0]) if records else NEVER_DAYS,
        float(bool(values)),
        _mean_value(records),
        values[0] if values else np.nan,
        *_within(records, PAST_DAYS),
    ]
    if not category[1]:
        weeks = [0.0] * NUM_WEEKS
        for day in {day for day, _ in records}:
            weeks[max(min((day - 1) // 7, NUM_WEEKS - 1), 0)] += 1.0
        columns.extend(weeks)
    return columns


def _mean_value(records: _Records) -> float:
    values = [value for _, value in records if value is not None]
    return sum(values) / len(values) if values else np.nan


def _within(records: _Records, limits: Sequence[int]) -> list[float]:
    """Count, value sum and active days up to and with each day of `limits`.

    >>> _within([(0, 2.0), (0, 1.0), (5, 4.0)], [0, 9])
    [2.0, 3.0, 1.0, 3.0, 7.0, 2.0]
    """
    days = [day for day, _ in records]
    totals = list(accumulate((value or 0.0 for _, value in records), initial=0.0))
    is_new = (not place or day != days[place - 1] for place, day in enumerate(days))
    active = list(accumulate(is_new, initial=0))
    columns: list[float] = []
    for limit in limits:
        cut = bisect_right(days, limit)
        columns.extend((float(cut), totals[cut], float(active[cut])))
    return columns
