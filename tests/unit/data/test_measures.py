"""The numbers beside an event's text, each derived by hand."""

import math

import numpy as np
import pytest

from qanchor.config import ModalitySpec, ProfileSchema
from qanchor.data.measures import FIXED, NUM_MEASURES, attribute_measures, event_measures
from qanchor.data.prefix import content_digest, with_measures
from qanchor.data.profile import DAY_SECONDS, MAX_VALUE, Event, Profile
from qanchor.data.render import RenderedProfile, render_profile

AS_OF_S = 100 * DAY_SECONDS
SPEC = ModalitySpec(
    name="visit", max_events=5, max_event_tokens=9, group_by="week", template="{weeks_ago}",
    measured_types=("home", "shop"), summary_template="all {num_events}",
)  # fmt: skip


def visit(days_ago: int, event_type: str, value: float | None) -> Event:
    return Event(
        time_s=AS_OF_S - days_ago * DAY_SECONDS,
        modality="visit",
        event_type=event_type,
        text="",
        value=value,
    )


EVENTS = (visit(3, "home", 4.0), visit(5, "shop", None), visit(5, "else", 2.0))


def log(number: float) -> float:
    return math.log1p(number) / 4


def test_a_row_tells_age_counts_values_and_types() -> None:
    row = event_measures(EVENTS, SPEC, AS_OF_S)
    named = dict(zip(FIXED, row, strict=False))
    assert named == pytest.approx(
        {
            "recency_3d": math.exp(-1), "recency_14d": math.exp(-3 / 14), "age": 3 / 30,
            "num_events": log(3), "num_days": log(2), "total_value": log(6.0),
            "mean_value": log(3.0), "mean_value_linear": 0.03, "has_value": 1.0,
            "num_days_7": 0.0, "num_days_30": 0.0,
            "is_summary": 0.0,
        }
    )  # fmt: skip
    # An event without value counts 1; types that are not measured have no number.
    assert row[len(FIXED) :] == pytest.approx((log(4.0), log(1.0), 0, 0, 0, 0, 0, 0))
    assert len(row) == NUM_MEASURES


def test_a_summary_tells_days_of_the_last_week_and_month() -> None:
    row = event_measures((*EVENTS, visit(20, "home", 1.0)), SPEC, AS_OF_S, is_summary=True)
    named = dict(zip(FIXED, row, strict=False))
    assert named["num_days_7"] == pytest.approx(2 / 7)
    assert named["num_days_30"] == pytest.approx(3 / 30)
    assert named["is_summary"] == 1.0


@pytest.mark.parametrize(
    ("value", "number", "has_value"), [(-3.0, -log(3), 1.0), (True, log(1), 1.0), ("gold", 0, 0)]
)
def test_an_attribute_tells_its_number(value: object, number: float, has_value: float) -> None:
    row = dict(zip(FIXED, attribute_measures(value), strict=False))  # type: ignore[arg-type]
    assert (row["total_value"], row["has_value"]) == pytest.approx((number, has_value))


def test_rows_stand_beside_their_texts_and_weeks_are_counted_from_yesterday() -> None:
    """Days 1 to 7 ago are week 0, day 8 is week 1; what happened today belongs to week 0."""
    events = tuple(visit(days, "home", 1.0) for days in (0, 1, 7, 8))
    profile = Profile(user_id="u", as_of_s=AS_OF_S, events=events)
    rendered = render_profile(profile, ProfileSchema(modalities=(SPEC,), has_measures=True))
    assert rendered.texts == (("all 4", "1", "0"),)
    num_events = [math.expm1(4 * row[FIXED.index("num_events")]) for row in rendered.measures[0]]
    assert num_events == pytest.approx([4, 1, 3])


def test_values_stored_before_there_was_a_bound_count_as_the_bound() -> None:
    """Sums of finite values can be infinite, and an infinite one cannot be put into words."""
    spec = ModalitySpec(
        name="visit", max_events=5, max_event_tokens=9, group_by="week", template="{items}",
        measured_types=("home",), summary_template="{total_value} {mean_value}",
    )  # fmt: skip
    schema = ProfileSchema(modalities=(spec,), has_measures=True)

    def rendered(value: float) -> RenderedProfile:
        events = (visit(1, "home", value),) * 20
        return render_profile(Profile(user_id="u", as_of_s=AS_OF_S, events=events), schema)

    assert rendered(-1e308) == rendered(-MAX_VALUE) != rendered(-MAX_VALUE / 2)
    assert rendered(-1e308).texts == (("-2e+16 -1e+15", "home 20x -2e+16"),)
    assert np.isfinite(rendered(1e308).flat_measures()).all()


def test_measures_stand_behind_the_event_vectors_and_belong_to_the_identity() -> None:
    row = tuple(float(place) for place in range(NUM_MEASURES))
    rendered = RenderedProfile((("a",), ()), ((row,), ()))
    joined = with_measures(np.full((1, 2), 7, dtype=np.float32), rendered)
    assert joined[0].tolist() == [7.0, 7.0, *row]
    plain = RenderedProfile(rendered.texts)
    assert with_measures(joined, plain) is joined
    other = RenderedProfile(rendered.texts, ((row[::-1],), ()))
    digests = {content_digest(each, "model") for each in (rendered, plain, other)}
    assert len(digests) == 3


def test_a_user_without_events_has_vectors_of_full_width() -> None:
    nobody = RenderedProfile(((), ()), ((), ()))
    assert with_measures(np.zeros((0, 2), np.float32), nobody).shape == (0, 2 + NUM_MEASURES)
