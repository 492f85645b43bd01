"""What answers to questions about the future say."""

from typing import Any

import pytest

from qanchor.data.activity import collect
from qanchor.data.dataset import open_dataset
from qanchor.data.future_answers import Asked, FutureUser, Subject, answer
from qanchor.data.topics import load_topics
from tests.unit.data.conftest import AS_OF_S, ask_everything, event_of, history_of


def test_a_future_answer_tells_days_categories_and_change(write_tiny: Any) -> None:
    dataset = open_dataset(write_tiny())
    pool = load_topics(dataset.path, "tiny", dataset.schema, ())
    history = history_of(*(event_of(day, "home") for day in range(-28, 0)), event_of(-3, "shop"))
    later = [event_of(day, "home") for day in (0, 1, 9)] + [event_of(2, "buy", "tea, 5 euro", 5.0)]
    future = collect(later, AS_OF_S, 0, 14)
    answered = ask_everything(history, future, pool)
    answers = {
        each.topic: each.answer
        for each in answered
        if "_at_" not in each.topic and each.topic.endswith("_14d")
    }
    assert answers == {
        "future_outlook_overall_14d": "Often active, on 4 of 14 days: week 1 home and buy; "
        "week 2 home. No shop.",
        "future_change_overall_14d": "Begins: buy; stops: shop; falls: home. Often active, on 4 "
        "of 14 days.",
        "future_novelty_overall_14d": "Little new: 1 new thing, mostly buy. Often active, on 4 of "
        "14 days.",
        "future_detail_visit_14d": "Often, on 3 of 14 days: home often. Visit activity falls "
        "sharply.",
        "future_detail_order_14d": "Rarely, on 1 of 14 days: buy rarely. Order activity begins.",
        "future_frequency_overall_14d": "Yes, often: 4 of 14 days.",
        "future_frequency_visit_14d": "Yes, often: 3 of 14 days.",
        "future_frequency_order_14d": "Yes, rarely: 1 of 14 days.",
        "future_often_overall_14d": "Yes: 4 of 14 days.",
        "future_often_visit_14d": "Yes: 3 of 14 days.",
        "future_often_order_14d": "No: 1 of 14 days.",
        "future_heavy_overall_14d": "Yes: 4 of 14 days.",
        "future_heavy_visit_14d": "Yes: 3 of 14 days.",
        "future_heavy_order_14d": "No: 1 of 14 days.",
        "future_busy_overall_14d": "Yes: 4 of 14 days.",
        "future_stop_overall_14d": "No, often: 4 of 14 days.",
        "future_stop_visit_14d": "No, often: 3 of 14 days.",
        "future_stop_order_14d": "No, rarely: 1 of 14 days.",
        "future_fade_overall_14d": "No: last on day 10 of 14.",
        "future_fade_visit_14d": "No: last on day 10 of 14.",
        "future_fade_order_14d": "Yes: last on day 3 of 14.",
        "future_fall_overall_14d": "Yes: 4 after 14.",
        "future_fall_visit_14d": "Yes: 3 after 14.",
        "future_fall_order_14d": "No: 1 after 0.",
        "future_grow_overall_14d": "No: 4 after 14.",
        "future_grow_visit_14d": "No: 3 after 14.",
        "future_grow_order_14d": "Yes: 1 after 0.",
        "future_trend_overall_14d": "It falls sharply: 4 after 14.",
        "future_trend_visit_14d": "It falls sharply: 3 after 14.",
        "future_trend_order_14d": "It begins: 1 after 0.",
        "future_next_overall_14d": "Within 1 day.",
        "future_next_visit_14d": "Within 1 day.",
        "future_next_order_14d": "Within 3 days.",
        "future_explore_overall_14d": "No: 1 new thing.",
        "future_repeat_overall_14d": "Yes: 1 new thing.",
        "future_churn_overall_14d": "No: last on day 10 of 14.",
    }


@pytest.mark.parametrize(
    ("kind", "count", "level", "told"),
    [
        ("at_least", 3, 0.0, "yes: 3 of 14 days."),
        ("at_least", 4, 0.0, "no: 3 of 14 days."),
        ("at_most", 3, 0.0, "yes: 3 of 14 days."),
        ("at_most", 2, 0.0, "no: 3 of 14 days."),
        ("value_at_least", 1, 20.0, "yes: 20 on average."),
        ("value_at_least", 1, 21.0, "no: 20 on average."),
        ("value_below", 1, 20.0, "no: 20 on average."),
        ("value_below", 1, 21.0, "yes: 20 on average."),
    ],
)
def test_a_number_in_a_question_is_a_bound_that_counts_itself(
    write_tiny: Any, kind: str, count: int, level: float, told: str
) -> None:
    dataset = open_dataset(write_tiny())
    pool = load_topics(dataset.path, "tiny", dataset.schema, ())
    later = [event_of(day, "buy", value=value) for day, value in ((0, 10.0), (3, 20.0), (9, 30.0))]
    user = FutureUser(history=history_of(), future=collect(later, AS_OF_S, 0, 14))
    asked = Asked(subject=Subject("order", "orders", "order"), count=count, level=level)
    assert answer(kind, user, pool, asked) == told


_GRADES = """
passive = ["refused"]
[values.order]
unit = "grade"
low = 60
high = 80
pass_mark = 40
as_zero = ["refused"]
"""


@pytest.mark.parametrize(
    ("grades", "num_refused", "answer"),
    [
        ((40.0,), 0, "No: 40 on average."),
        ((39.0,), 0, "Yes: 39 on average."),
        ((70.0,), 1, "Yes: 35 on average."),
        ((), 1, "Yes: 0 on average."),
        ((), 0, "None."),
    ],
)
def test_failing_is_a_mean_below_the_pass_mark_with_0_for_what_was_not_done(
    write_tiny: Any, grades: tuple[float, ...], num_refused: int, answer: str
) -> None:
    path = write_tiny()
    (path / "topics.toml").write_text(_GRADES)
    pool = load_topics(path, "tiny", open_dataset(path).schema, ())
    later = [event_of(0, "buy", "work", grade) for grade in grades]
    later += [event_of(1, "refused")] * num_refused
    future = collect([*later, event_of(2, "home")], AS_OF_S, 0, 14)
    history = history_of(event_of(-1, "buy"))
    told = {each.topic: each for each in ask_everything(history, future, pool)}
    assert told["future_fail_order_14d"].answer == answer


@pytest.mark.parametrize(
    ("days", "answer"),
    [
        ((), "Yes, never in 30 days."),
        ((0, 14), "Yes: last on day 15 of 30."),
        ((0, 15), "No: last on day 16 of 30."),
    ],
)
def test_who_does_nothing_in_the_second_half_has_left(
    write_tiny: Any, days: tuple[int, ...], answer: str
) -> None:
    dataset = open_dataset(write_tiny())
    pool = load_topics(dataset.path, "tiny", dataset.schema, ())
    future = collect([event_of(day, "home") for day in days], AS_OF_S, 0, 30)
    answers = ask_everything(history_of(event_of(-1, "home")), future, pool)
    told = {each.topic: each.answer for each in answers}
    assert told["future_churn_overall_30d"] == answer


@pytest.mark.parametrize(
    ("num_days", "num_new", "explore", "repeat"),
    [
        (14, 1, "No: 1 new thing.", "Yes: 1 new thing."),
        (14, 2, "No: 2 new things.", "No: 2 new things."),
        (14, 4, "No: 4 new things.", "No: 4 new things."),
        (14, 5, "Yes: 5 new things.", "No: 5 new things."),
        (30, 9, "No: 9 new things.", "No: 9 new things."),
        (30, 10, "Yes: 10 new things.", "No: 10 new things."),
    ],
)
def test_how_much_is_new_counts_by_the_days_asked_about(
    write_tiny: Any, num_days: int, num_new: int, explore: str, repeat: str
) -> None:
    dataset = open_dataset(write_tiny())
    pool = load_topics(dataset.path, "tiny", dataset.schema, ())
    later = [event_of(0, "home", f"page {number}") for number in range(num_new)]
    future = collect(later, AS_OF_S, 0, num_days)
    answers = ask_everything(history_of(event_of(-1, "home")), future, pool)
    told = {each.topic: each.answer for each in answers}
    assert told[f"future_explore_overall_{num_days}d"] == explore
    assert told[f"future_repeat_overall_{num_days}d"] == repeat


def test_nothing_valued_is_neither_low_nor_high(write_tiny: Any) -> None:
    path = write_tiny()
    (path / "topics.toml").write_text('[values.order]\nunit = "sum"\nlow = 10\nhigh = 100\n')
    pool = load_topics(path, "tiny", open_dataset(path).schema, ())
    later = collect([event_of(0, "buy")], AS_OF_S, 0, 14)
    answers = {
        each.topic: each.answer
        for each in ask_everything(history_of(event_of(-1, "home")), later, pool)
    }
    assert answers["future_low_order_14d"] == answers["future_high_order_14d"] == "None."


def test_an_empty_future_says_so(write_tiny: Any) -> None:
    dataset = open_dataset(write_tiny())
    pool = load_topics(dataset.path, "tiny", dataset.schema, ())
    nothing = collect([], AS_OF_S, 0, 14)
    answers = ask_everything(history_of(event_of(-1, "home")), nothing, pool)
    asked = {each.topic: each.answer for each in answers}
    assert asked["future_frequency_visit_14d"] == "No, never in 14 days."
    assert asked["future_next_visit_14d"] == "Not in 14 days."
    assert asked["future_trend_visit_14d"] == "It stops: 0 after 1."
    assert asked["future_stop_visit_14d"] == "Yes, never in 14 days."
    assert asked["future_fall_visit_14d"] == "Yes: 0 after 1."
    turned = ("trend", "stop", "fade", "fall", "churn")
    others = [
        answer
        for topic, answer in asked.items()
        if topic.split("_")[1] not in turned and "at_most" not in topic
    ]
    assert all("no" in answer.lower() for answer in others)
