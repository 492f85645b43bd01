"""Views: a train user as of another day knows what came before it and nothing else."""

from typing import Any

import pytest

from qanchor.data.dataset import open_dataset
from qanchor.data.profile import DAY_SECONDS
from qanchor.data.useru import TripleOptions, drawn_shifts, make_triples
from qanchor.data.views import View, stream_views
from qanchor.errors import DataError


def days(events: Any, as_of_s: int) -> list[int]:
    return [(event.time_s - as_of_s) // DAY_SECONDS for event in events]


@pytest.mark.parametrize(
    ("shift", "known", "later"),
    [
        (0, [-74, -1, -1], [0, 5]),
        (-1, [-73], [0, 0, 1, 6]),
        (3, [-77, -4, -4, -3], [2]),
    ],
)
def test_a_view_splits_a_users_events_at_its_own_day(
    write_tiny: Any, shift: int, known: list[int], later: list[int]
) -> None:
    """User 10 has events on days 1, 74, 74 and, after day 75, on days 75 and 80."""
    dataset = open_dataset(write_tiny())
    ((view, profile, after),) = stream_views(dataset, {"10": [shift]})
    assert view == View("10", shift)
    assert days(profile.events, profile.as_of_s) == known
    assert days(after, profile.as_of_s) == later
    assert profile.attributes == {"plan": "gold", "age": 31.0, "is_new": True}


@pytest.mark.parametrize("user", ["20", "30"])
def test_users_of_other_splits_have_no_other_day(write_tiny: Any, user: str) -> None:
    dataset = open_dataset(write_tiny())
    assert [view.shift for view, _, _ in stream_views(dataset, {user: [0]})] == [0]
    with pytest.raises(DataError, match="train users"):
        list(stream_views(dataset, {user: [0, -3]}))


def test_shifts_depend_on_seed_and_user_and_leave_a_week_to_predict() -> None:
    options = TripleOptions(views_per_user=40, max_shift_days=30)
    drawn = drawn_shifts("7", 20, options)
    assert drawn == drawn_shifts("7", 20, options)
    assert drawn[0] == 0
    assert min(drawn) >= -30
    assert max(drawn) <= 13
    assert drawn != drawn_shifts("8", 20, options)
    assert drawn_shifts("7", 20, TripleOptions()) == (0,)


def test_a_views_triples_promise_nothing_beyond_the_recorded_future(wallet: Any) -> None:
    """The wallet records 30 days: 20 days later only 10 are left to speak of."""
    dataset = open_dataset(wallet)
    options = TripleOptions(views_per_user=3, max_shift_days=20, per_user_future=99)
    shifted = [triple for triple in make_triples(dataset, options) if triple.asof_shift > 0]
    assert shifted
    for triple in shifted:
        if triple.kind == "future":
            assert int(triple.topic.rpartition("_")[2][:-1]) <= 30 - triple.asof_shift
