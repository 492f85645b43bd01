"""Behaviour statistics: what came after the as-of moment, and what is not known of it.

The columns of the past are tested beside the probes of evaluation, whose baseline they are.
"""

import math
from typing import Any

import msgspec
import numpy as np
import pytest

from qanchor.config import save
from qanchor.data import statistics
from qanchor.data.dataset import open_dataset
from qanchor.data.profile import DAY_SECONDS, Event, Profile
from qanchor.data.statistics import (
    StatisticSpace,
    future_statistics,
    learn_space,
    log_statistics,
    past_statistics,
    training_space,
)
from qanchor.errors import ConfigError
from qanchor.statistics_head import StatisticsHead

AS_OF_S = 50 * DAY_SECONDS


def _event(day: int, event_type: str = "open", value: float | None = None) -> Event:
    time_s = AS_OF_S + day * DAY_SECONDS
    return Event(time_s=time_s, modality="app", event_type=event_type, text="", value=value)


def _space(future_days: int) -> StatisticSpace:
    history = Profile(user_id="a", as_of_s=AS_OF_S, events=(_event(-3), _event(-4, "buy")))
    return learn_space([history], future_days)


def test_a_future_has_first_day_mean_value_counts_sums_and_active_days() -> None:
    after = [_event(20), _event(9, "buy", 4.0), _event(9, "buy", 2.0), _event(3, "buy", 1.0)]
    row = future_statistics(after, AS_OF_S, 30, _space(30)).tolist()
    everything, whole, buy, opened = (row[start : start + 11] for start in (0, 11, 22, 33))
    assert buy == [3, pytest.approx(7 / 3), 1, 1, 1, 3, 7, 2, 3, 7, 2]
    assert opened[0] == 20
    assert math.isnan(opened[1]), "an event without a value says nothing of values"
    assert opened[2:] == [0, 0, 0, 0, 0, 0, 1, 0, 1]
    assert whole == everything == [3, pytest.approx(7 / 3), 1, 1, 1, 3, 7, 2, 4, 7, 3]


def test_what_lies_beyond_the_record_is_unknown_and_not_nothing() -> None:
    row = future_statistics([_event(10, "buy")], AS_OF_S, 14, _space(30)).tolist()
    buy, opened = row[22:33], row[33:]
    assert buy[2:8] == [0, 0, 0, 1, 0, 1]
    assert all(map(math.isnan, buy[8:]))
    assert math.isnan(opened[0]), "it may still come within the days that count"
    assert opened[2:8] == [0] * 6
    # Thirty days without one say enough.
    assert future_statistics([], AS_OF_S, 30, _space(30))[0] == 30


def test_a_row_holds_the_columns_its_space_counts(write_tiny: Any) -> None:
    dataset = open_dataset(write_tiny())
    space = training_space(dataset, with_future=False)
    profile = next(dataset.profiles(user_ids=dataset.user_ids("train")))
    assert len(past_statistics(profile, space)) == space.num_past
    assert len(log_statistics(profile, (), 0, space)) == space.num_past
    assert space.num_future == 0
    for future_days in (7, 60):
        row = future_statistics([], AS_OF_S, future_days, _space(future_days))
        assert len(row) == _space(future_days).num_future > 0


def test_times_and_counts_become_logarithms_and_values_roots() -> None:
    history = Profile(
        user_id="a", as_of_s=AS_OF_S, events=(_event(-3, "buy", 36.0), _event(-5, "buy", 64.0))
    )
    space = learn_space([history], 7)
    drawn = log_statistics(history, [_event(2, "buy", 81.0)], 7, space).astype(float)
    in_buy = drawn[space.num_past - 13 : space.num_past]
    expected = [math.log1p(3), math.log1p(1), 50**0.5, 36**0.5, math.log1p(2), math.log1p(100)]
    np.testing.assert_allclose(in_buy[:6], expected, rtol=1e-3)
    to_come = drawn[-space.num_future // 3 :]
    np.testing.assert_allclose(
        to_come, [math.log1p(2), 9, math.log1p(1), math.log1p(81), math.log1p(1)], rtol=1e-3
    )


@pytest.mark.parametrize("num_users", [12, 13, 37, 64])
def test_columns_are_learnt_from_users_of_all_ages(
    write_tiny: Any, monkeypatch: pytest.MonkeyPatch, num_users: int
) -> None:
    monkeypatch.setattr(statistics, "SPACE_USERS", 8)
    monkeypatch.setattr(statistics, "_NEIGHBOURS", 2)
    numbers, words = list(range(num_users)), ["x"] * num_users
    path = write_tiny(
        users={
            "user_id": numbers, "split": ["train"] * num_users, "asof_day": [75] * num_users,
            "plan": words, "age": numbers, "is_new": [True] * num_users,
        },
        events={
            "user_id": numbers, "day": [70] * num_users, "modality": ["visit"] * num_users,
            "event_type": [f"{number:02d}" for number in numbers], "text": words,
            "value": [1.0] * num_users,
        },
    )  # fmt: skip
    space = training_space(open_dataset(path), with_future=False)
    found = [int(event_type) for _, event_type in space.categories if event_type]
    assert len(found) == 8
    assert found[:2] == [0, 1]
    assert found[-2:] == [num_users - 2, num_users - 1]
    assert max(np.diff(found)) <= num_users // 3


@pytest.mark.parametrize("value", [5e9, -5e9, 3e38])
def test_a_huge_value_is_a_large_statistic_and_finite(value: float) -> None:
    users = [
        Profile(user_id="a", as_of_s=AS_OF_S, events=(_event(-3, "buy", each),))
        for each in (value, 20.0, None)
    ]
    space = learn_space(users)
    rows = np.stack([log_statistics(user, (), 0, space) for user in users])
    assert not np.isinf(rows).any()
    assert np.nanmax(np.abs(rows[0])) == np.finfo(np.float16).max
    head = StatisticsHead(8, space)
    head.set_scale(rows, 0.25)
    assert all(buffer.isfinite().all() for buffer in (head.mean_F, head.past_PP))


def test_futures_need_a_record_of_them(write_tiny: Any) -> None:
    directory = write_tiny()
    short = msgspec.structs.replace(open_dataset(directory).config, future_days=3)
    save(short, directory / "schema.json")
    dataset = open_dataset(directory)
    with pytest.raises(ConfigError, match="statistics_future_share"):
        training_space(dataset, with_future=True)
