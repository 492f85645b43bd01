"""Questions about the future: what is asked, of whom, and in which words."""

import re
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

from qanchor.data.activity import collect
from qanchor.data.dataset import open_dataset
from qanchor.data.future_answers import FutureUser
from qanchor.data.futures import FutureQuestions
from qanchor.data.topics import load_topics
from tests.unit.data.conftest import AS_OF_S, ask_everything, event_of, history_of


def test_at_least_is_asked_with_a_number_of_days(write_tiny: Any) -> None:
    dataset = open_dataset(write_tiny())
    pool = load_topics(dataset.path, "tiny", dataset.schema, ())
    later = collect([event_of(day, "home") for day in range(0, 12, 2)], AS_OF_S, 0, 14)
    numbers = dict(zip(("one", "two", "three", "four", "five", "six"), range(1, 7), strict=True))
    numbers |= {"eight": 8, "ten": 10, "twelve": 12}
    numbers |= {str(number): number for number in numbers.values()}
    told = set()
    for seed in range(200):
        for each in ask_everything(history_of(event_of(-1, "home")), later, pool, seed):
            asked = re.search(r"(?:at least|minimum of|no fewer than) (\w+) ", each.query)
            if asked and asked[1] in numbers and "_at_least_" in each.topic:
                answer = re.fullmatch(r"(Yes|No): (\d+) of \d+ days\.", each.answer)
                assert answer
                is_so = int(answer[2]) >= numbers[asked[1]]
                assert is_so == (answer[1] == "Yes"), each.query
                told.add((asked[1].isdigit(), is_so))
    assert len(told) == 4


def test_a_future_of_one_day_can_be_asked_about(write_tiny: Any) -> None:
    dataset = open_dataset(write_tiny())
    pool = load_topics(dataset.path, "tiny", dataset.schema, ())
    answers = ask_everything(history_of(), collect([event_of(0, "home")], AS_OF_S, 0, 1), pool)
    told = {each.topic: each.answer for each in answers}
    assert told["future_at_least_visit_1d"] == "Yes: 1 of 1 days."


def test_fewer_than_is_one_more_than_at_most(write_tiny: Any) -> None:
    dataset = open_dataset(write_tiny())
    pool = load_topics(dataset.path, "tiny", dataset.schema, ())
    later = collect([event_of(day, "home") for day in range(5)], AS_OF_S, 0, 14)
    bounds = {r"at most (\d+) days": 5, r"no more than (\d+) days": 5}
    bounds |= {r"[Ff]ewer than (\d+) days": 6, r"[Uu]nder (\d+)": 6, r"less than (\d+) days": 6}
    told = set()
    for seed in range(60):
        for each in ask_everything(history_of(event_of(-1, "home")), later, pool, seed):
            for words, least in bounds.items():
                number = re.search(words, each.query)
                if number and re.match("future_at_most_(visit|overall)", each.topic):
                    is_yes = int(number[1]) >= least
                    said = f"{'Yes' if is_yes else 'No'}: 5 of "
                    assert each.answer.startswith(said), each.query
                    told.add((words, is_yes))
    assert len(told) > len(bounds)


def test_levels_asked_for_lie_about_low_and_high_and_never_below_nothing(write_tiny: Any) -> None:
    path = write_tiny()
    (path / "topics.toml").write_text('[values.order]\nunit = "sum"\nlow = 60\nhigh = 140\n')
    pool = load_topics(path, "tiny", open_dataset(path).schema, ())
    sample = [FutureUser(history=history_of(), future=collect([], AS_OF_S, 0, 14))]
    questions = FutureQuestions(pool, {"order": ()}, sample)
    levels = {
        one.numbers[1]
        for seed in range(60)
        for one in questions.drawn(14, 999, Random(seed))
        if one.question[0] == "value_below"
    }
    assert levels == set(range(0, 200, 20))


def test_each_event_type_is_asked_about_unless_something_else_asks_about_it(
    write_tiny: Any,
) -> None:
    path = write_tiny()
    (path / "topics.toml").write_text(
        'passive = ["refused"]\n[words]\nhome = "front page"\n'
        '[synonyms]\n"front page" = ["entrance"]\n'
        '[[topics]]\nname = "shopping"\naggregate = "frequency"\nabout = "shopping"\n'
        'modality = "visit"\nevent_types = ["shop"]\n'
    )
    pool = load_topics(path, "tiny", open_dataset(path).schema, ())
    types = {"visit": ("home", "shop"), "order": ("buy", "refused")}
    later = collect([event_of(3, "home"), event_of(9, "home")], AS_OF_S, 0, 14)
    asked: dict[str, set[str]] = {}
    for seed in range(60):
        for each in ask_everything(history_of(event_of(-1, "home")), later, pool, seed, types):
            asked.setdefault(each.topic, set()).add(each.query)
            if each.topic == "future_stop_visit_home_14d":
                assert each.answer == "No, sometimes: 2 of 14 days."
            if each.topic == "future_stop_order_buy_14d":
                assert each.answer == "Yes, never in 14 days."
    for words in ("front page", "entrance"):
        assert any(words in query for query in asked["future_stop_visit_home_14d"])
    for name in ("visit_shop", "order_refused"):
        assert not [topic for topic in asked if topic.startswith(f"future_stop_{name}")], name


def test_what_is_asked_does_not_hang_on_what_comes(write_tiny: Any) -> None:
    """Else who has never ordered would be asked about orders only where some come."""
    dataset = open_dataset(write_tiny())
    pool = load_topics(dataset.path, "tiny", dataset.schema, ())
    history = history_of(event_of(-1, "home"))
    without, with_order = (
        {each.topic for each in ask_everything(history, collect(later, AS_OF_S, 0, 14), pool)}
        for later in ([event_of(1, "home")], [event_of(1, "home"), event_of(2, "buy")])
    )
    assert without == with_order
    assert "future_stop_order_14d" in without


def test_questions_vary_in_words_but_not_in_what_they_ask(write_tiny: Any) -> None:
    path = write_tiny()
    (path / "topics.toml").write_text('[synonyms]\nvisit = ["browsing", "page view"]\n')
    dataset = open_dataset(path)
    pool = load_topics(path, "tiny", dataset.schema, ())
    later = collect([event_of(0, "home")], AS_OF_S, 0, 14)
    asked = {
        each.query: each.answer
        for seed in range(400)
        for each in ask_everything(history_of(event_of(-1, "home")), later, pool, seed)
        if each.topic == "future_stop_visit_14d"
    }
    for words in ("visit", "browsing", "page view", "14 days", "two weeks", "fortnight"):
        assert any(words in query for query in asked), words
    assert sum(any(name in query for query in asked) for name in pool.subjects) > 1
    # As many as a query encoder is to read, and no more.
    assert 30 < len(asked) <= 40
    assert set(asked.values()) == {"No, rarely: 1 of 14 days."}


def test_what_users_differ_in_is_asked_more_often(write_tiny: Any) -> None:
    dataset = open_dataset(write_tiny())
    pool = load_topics(dataset.path, "tiny", dataset.schema, ())
    types = {"visit": ("home", "shop"), "order": ("buy",)}
    # Everybody sees the home page on two days, half of them shop, nobody buys.
    sample = [
        FutureUser(
            history=history_of(),
            future=collect(
                [event_of(0, "home"), event_of(1, "home"), *([event_of(2, "shop")] * half)],
                AS_OF_S,
                0,
                30,
            ),
        )
        for half in (0, 1)
    ]
    questions = FutureQuestions(pool, types, sample)
    drawn = [one for seed in range(300) for one in questions.drawn(30, 20, Random(seed))]
    asked = Counter((one.question[0], one.question[1].name) for one in drawn)
    assert asked["stop", "visit_shop"] > 5 * asked["stop", "visit_home"]
    assert asked["stop", "visit_home"] > 0
    assert asked["stop", "order_buy"] > 0
    # On two or on three days: it is at least three that tells them apart.
    counts = Counter(
        one.numbers[0]
        for one in drawn
        if (one.question[0], one.question[1].name) == ("at_least", "overall")
    )
    assert counts[3] > 0.5 * counts.total()
    assert set(counts) > {3}


def test_the_most_active_are_the_top_quarter_of_the_sample(write_tiny: Any) -> None:
    dataset = open_dataset(write_tiny())
    pool = load_topics(dataset.path, "tiny", dataset.schema, ())
    # Eight users are on the site on 10 to 17 of 30 days, and shop on 0 to 7 of them.
    sample = [
        FutureUser(
            history=history_of(),
            future=collect(
                [
                    *(event_of(day, "home") for day in range(10 + place)),
                    *(event_of(day, "shop") for day in range(place)),
                ],
                AS_OF_S,
                0,
                30,
            ),
        )
        for place in range(8)
    ]
    questions = FutureQuestions(pool, {"visit": ("home", "shop")}, sample)
    bounds = {
        (one.question[0], one.question[1].name): one.numbers[0]
        for seed in range(200)
        for one in questions.drawn(30, 20, Random(seed))
        if one.question[2] == 30
    }
    assert bounds["busy", "overall"] == bounds["heavy", "visit_home"] == 16
    assert bounds["heavy", "visit_shop"] == 6
    # The most that one of the first four shops is three days, and six of thirty are often.
    few = FutureQuestions(pool, {"visit": ("home", "shop")}, sample[:4])
    assert few._top_quarter(few._overall, 30) == 13
    assert few._top_quarter(few._types[1], 30) == 6
    nobody = FutureQuestions(pool, {"visit": ("home", "shop")}, ())
    assert nobody._top_quarter(nobody._overall, 30) == 12


def test_two_event_types_of_a_modality_are_asked_about_together(write_tiny: Any) -> None:
    dataset = open_dataset(write_tiny())
    pool = load_topics(dataset.path, "tiny", dataset.schema, ())
    later = collect([event_of(0, "home"), event_of(4, "shop")], AS_OF_S, 0, 14)
    types = {"visit": ("home", "shop"), "order": ("buy",)}
    told = {
        each.topic: each for each in ask_everything(history_of(), later, pool, known_types=types)
    }
    assert "home or shop" in told["future_stop_visit_pair_14d"].query.lower()
    assert told["future_often_visit_pair_14d"].answer == "No: 2 of 14 days."
    assert not [topic for topic in told if "order_pair" in topic]


def test_values_are_asked_of_each_event_type(write_tiny: Any) -> None:
    path = write_tiny()
    (path / "topics.toml").write_text('[values.order]\nunit = "sum"\nlow = 60\nhigh = 140\n')
    pool = load_topics(path, "tiny", open_dataset(path).schema, ())
    later = [event_of(0, "buy", "tea", 100.0), event_of(1, "refused", "tea", 20.0)]
    told = {
        each.topic: each.answer
        for each in ask_everything(
            history_of(),
            collect(later, AS_OF_S, 0, 14),
            pool,
            known_types={"order": ("buy", "refused")},
        )
    }
    assert told["future_value_order_14d"] == "Medium, 60 on average."
    assert told["future_value_order_buy_14d"] == "Medium, 100 on average."
    assert told["future_value_order_refused_14d"] == "Low, 20 on average."


def test_words_made_for_a_modality_do_not_ask_about_one_of_its_event_types(
    write_tiny: Any,
) -> None:
    path = write_tiny()
    (path / "topics.toml").write_text(
        '[values.order]\nunit = "sum"\nlow = 60\nhigh = 140\n'
        '[futures]\nlow = ["Cheap orders for {days} days?", "Cheap {about} for {days} days?"]\n'
    )
    pool = load_topics(path, "tiny", open_dataset(path).schema, ())
    later = collect([event_of(0, "buy", "tea", 100.0)], AS_OF_S, 0, 14)
    asked: dict[str, set[str]] = {}
    for seed in range(60):
        for each in ask_everything(history_of(), later, pool, seed, {"order": ("buy",)}):
            asked.setdefault(each.topic, set()).add(each.query)
    assert {"Cheap orders for 14 days?", "Cheap order for 14 days?"} <= asked[
        "future_low_order_14d"
    ]
    assert "Cheap buy for 14 days?" in asked["future_low_order_buy_14d"]
    assert "Cheap orders for 14 days?" not in asked["future_low_order_buy_14d"]


_ORDERS = """
subject = "buyer"
[synonyms]
buyer = ["shopper"]
[values.order]
unit = "sum"
low = 10
high = 100
[futures]
low = ["Will the {subject} spend little in the next {period}?"]
[[topics]]
name = "tea"
aggregate = "frequency"
about = "tea"
modality = "order"
event_types = ["buy"]
[topics.futures]
stop = ["Is the {subject} off tea for {days} days?"]
"""


def test_a_data_set_asks_in_words_of_its_own_too(write_tiny: Any) -> None:
    path = write_tiny()
    (path / "topics.toml").write_text(_ORDERS)
    pool = load_topics(path, "tiny", open_dataset(path).schema, ())
    history = history_of(event_of(-1, "home"))
    asked: dict[str, set[str]] = {}
    told: dict[str, set[str]] = {}
    for value in (5.0, 50.0, 500.0):
        later = collect([event_of(0, "buy", f"tea, {value} euro", value)], AS_OF_S, 0, 14)
        for seed in range(30):
            for each in ask_everything(history, later, pool, seed):
                asked.setdefault(each.topic, set()).add(each.query)
                told.setdefault(each.topic, set()).add(each.answer)
    assert any("off tea" in query for query in asked["future_stop_tea_14d"])
    everything = {query for queries in asked.values() for query in queries}
    for subject in ("buyer", "shopper", "customer", "user"):
        assert any(subject in query for query in everything), subject
    assert not any("off tea" in query for query in asked["future_stop_overall_14d"])
    # Half of such questions are the generic ones.
    assert len([query for query in asked["future_stop_tea_14d"] if "off tea" not in query]) > 5
    assert any("spend little" in query for query in asked["future_low_order_14d"])
    assert any("sum" in query for query in asked["future_low_order_14d"])
    assert told["future_low_order_14d"] == {
        "Yes: 5 on average.", "No: 50 on average.", "No: 500 on average.",
    }  # fmt: skip
    assert told["future_high_order_14d"] == {
        "No: 5 on average.", "No: 50 on average.", "Yes: 500 on average.",
    }  # fmt: skip


_LATE = """
passive = ["refused"]
history_only = ["visit"]
[[topics]]
name = "refusal"
aggregate = "frequency"
about = "refused parcel"
modality = "order"
event_types = ["refused"]
[topics.futures]
stop = ["Will the {subject} accept every parcel for {days} days?"]
"""


def _answers_of(path: Path, *later: Any) -> dict[str, tuple[str, str]]:
    pool = load_topics(path, "tiny", open_dataset(path).schema, ())
    future = collect([event_of(day, kind) for day, kind in later], AS_OF_S, 0, 14)
    types = {"visit": ("home",), "order": ("buy", "refused")}
    answered = ask_everything(history_of(event_of(-1, "buy")), future, pool, known_types=types)
    return {each.topic: (each.query, each.answer) for each in answered}


def test_what_befalls_a_user_is_no_activity_of_its_modality(write_tiny: Any) -> None:
    path = write_tiny()
    (path / "topics.toml").write_text(_LATE)
    idle = _answers_of(path, (1, "refused"), (2, "refused"))
    assert idle["future_stop_order_14d"][1] == "Yes, never in 14 days."
    assert idle["future_stop_overall_14d"][1] == "Yes, never in 14 days."
    asked, told = idle["future_stop_refusal_14d"]
    assert re.fullmatch(r"Will the .* accept every parcel for (14|fourteen) days\?", asked)
    assert told == "No, sometimes: 2 of 14 days."
    # Of what befalls nothing is asked in words for what is done.
    kinds = {topic.split("_")[1] for topic in idle if "refusal" in topic}
    assert kinds == {"stop"}


def test_nothing_is_asked_of_a_future_the_data_do_not_have(write_tiny: Any) -> None:
    path = write_tiny()
    (path / "topics.toml").write_text(_LATE)
    assert not [topic for topic in _answers_of(path, (1, "home")) if "visit" in topic]
