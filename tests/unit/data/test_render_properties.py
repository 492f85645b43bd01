"""Rendering keeps the newest events of each modality inside the window, in stable words."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qanchor import config
from qanchor.config import ModalitySpec, ProfileSchema
from qanchor.data.profile import DAY_SECONDS, Event, Profile
from qanchor.data.render import MAX_CHARS_PER_TOKEN, coarse_count, render_profile
from qanchor.errors import InvalidInput

AS_OF_S = 20_000 * DAY_SECONDS
SCHEMA = ProfileSchema(
    modalities=(
        ModalitySpec(name="bill", max_events=4, max_event_tokens=9),
        ModalitySpec(name="spm", max_events=3, max_event_tokens=9, group_by="day"),
        ModalitySpec(name="tabular", kind="attributes", max_events=2, max_event_tokens=9),
    ),
    window_days=90,
)

events = st.builds(
    lambda days_ago, modality, event_type, value: Event(
        time_s=AS_OF_S - days_ago * DAY_SECONDS,
        modality=modality,
        event_type=event_type,
        text=f"{event_type} text",
        value=value,
    ),
    st.integers(0, 120),
    st.sampled_from(["bill", "spm"]),
    st.sampled_from(["a", "b", "c"]),
    st.none() | st.floats(0, 500),
)


def _profile(found: list[Event]) -> Profile:
    attributes: dict[str, str | float | bool] = {"age_band": "18-24", "score": 3.5, "is_new": True}
    return Profile(user_id="u", as_of_s=AS_OF_S, events=tuple(found), attributes=attributes)


@pytest.mark.parametrize("group_by", ["none", "day"])
def test_all_fields_that_a_template_may_have_are_filled_in(group_by: Any) -> None:
    allowed = config._EVENT_FIELDS if group_by == "none" else config._PERIOD_FIELDS
    template, item, summary = (
        " ".join(f"{name}={{{name}}}" for name in fields)
        for fields in (allowed, config._ITEM_FIELDS, config._SUMMARY_FIELDS)
    )
    spec = ModalitySpec(
        name="bill", max_events=4, max_event_tokens=9, group_by=group_by,
        template=template, item_template=item, summary_template=summary,
    )  # fmt: skip
    paid = Event(time_s=AS_OF_S, modality="bill", event_type="pay", text="rent", value=2.0)
    ((told, paid_told),) = render_profile(_profile([paid]), ProfileSchema(modalities=(spec,))).texts
    assert told.endswith("days_since_last=0 total_value=2 mean_value=2")
    of_item = "event_type=pay num_events=1 total_value=2"
    assert (
        paid_told
        == {
            "none": "days_ago=0 text=rent event_type=pay value=2",
            "day": f"days_ago=0 weeks_ago=0 num_days=1 items={of_item} num_events=1 text={of_item}",
        }[group_by]
    )


@given(st.lists(events, max_size=40))
def test_counts_follow_limits_window_and_grouping(found: list[Event]) -> None:
    inside = [event for event in found if AS_OF_S - event.time_s <= 90 * DAY_SECONDS]
    num_bills = sum(event.modality == "bill" for event in inside)
    num_days = len({event.time_s for event in inside if event.modality == "spm"})
    assert render_profile(_profile(found), SCHEMA).num_events == (
        min(num_bills, 4),
        min(num_days, 3),
        2,
    )


@given(st.lists(events, max_size=30), st.randoms(use_true_random=False))
def test_order_of_the_input_does_not_matter(found: list[Event], random: object) -> None:
    shuffled = list(found)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    # Sums of floats depend on their order in the last digit; whole values do not.
    whole = [[_rounded(event) for event in each] for each in (found, shuffled)]
    first, second = (render_profile(_profile(each), SCHEMA) for each in whole)
    assert first == second


def _rounded(event: Event) -> Event:
    return Event(
        time_s=event.time_s,
        modality=event.modality,
        event_type=event.event_type,
        text=event.text,
        value=None if event.value is None else float(round(event.value)),
    )


def test_a_day_is_told_by_type_with_its_totals() -> None:
    day = AS_OF_S - 2 * DAY_SECONDS
    found = [
        Event(time_s=day, modality="spm", event_type=kind, text="", value=value)
        for kind, value in (("b", 2.0), ("a", 30.0), ("b", 3.0))
    ]
    (text,) = render_profile(_profile(found), SCHEMA).texts[1]
    assert text == "2 days ago: a 1x 30+, b 2x 5"


def test_a_text_of_megabytes_is_cut_to_what_is_tokenised() -> None:
    found = [
        Event(time_s=AS_OF_S, modality="spm", event_type=f"{number} " + "type " * 390, text="")
        for number in range(3000)
    ]
    profile = replace(_profile(found), attributes={"long": "word " * 400, "short": "word " * 100})
    _, (period,), (long, short) = render_profile(profile, SCHEMA).texts
    for text in (period, long):
        assert 0 <= len(text) - 9 * MAX_CHARS_PER_TOKEN < len("type ")
    assert period.startswith("0 days ago: 0 type type")
    assert short == "short: " + "word " * 100


def test_a_modality_that_the_schema_lacks_is_named_in_place_of_being_lost() -> None:
    typo = Event(time_s=AS_OF_S, modality="bil", event_type="a", text="a")
    with pytest.raises(InvalidInput, match=r"'bil'.*did you mean 'bill'"):
        render_profile(_profile([typo]), SCHEMA)


def test_attributes_are_told_in_their_order_and_cut() -> None:
    assert render_profile(_profile([]), SCHEMA).texts[2] == ("age band: 18-24", "score: 3.5")


@given(st.floats(0, 2000), st.floats(0, 2000))
def test_coarse_counts_never_overstate_and_keep_order(one: float, other: float) -> None:
    def shown(count: float) -> float:
        return float(coarse_count(count).rstrip("+"))

    low, high = sorted((one, other))
    assert shown(high) <= high + 0.05
    assert shown(low) <= shown(high)


def test_a_summary_speaks_of_the_whole_window_and_counts_as_an_event() -> None:
    """Events 1, 5, 8 and 40 days ago; the limit of 3 keeps the summary and the newest two."""
    spec = ModalitySpec(
        name="bill",
        max_events=3,
        max_event_tokens=9,
        template="{days_ago}",
        summary_template="{num_events} {num_days_7} {num_days_30} {num_days} {days_since_last} "
        "{total_value} {mean_value}",
    )
    as_of_s = 100 * DAY_SECONDS
    events = tuple(
        Event(
            time_s=as_of_s - days * DAY_SECONDS,
            modality="bill",
            event_type="pay",
            text="",
            value=value,
        )
        for days, value in ((1, 4.0), (5, 6.0), (8, None), (40, 3.0))
    )
    schema = ProfileSchema(modalities=(spec,))
    profile = Profile(user_id="u", as_of_s=as_of_s, events=events)
    assert render_profile(profile, schema).texts == (("4 2 3 4 1 13 4.3", "5", "1"),)
    nobody = Profile(user_id="v", as_of_s=as_of_s)
    assert render_profile(nobody, schema).texts == ((),)
