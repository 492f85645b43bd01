"""The validator finds each planted fault and names its file, row and column."""

import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qanchor.data import validate
from qanchor.data.profile import MAX_TEXT_CHARS
from qanchor.data.validate import validate_dataset

EVENTS, FUTURE = "events.parquet", "future_events_train.parquet"
USERS, LABELS = "users.parquet", "labels.parquet"

FAULTS: dict[str, tuple[dict[str, dict[str, Any]], tuple[str, int | None, str]]] = {
    "event on the as-of day": ({"events": {"day": [1, 74, 75, 79]}}, (EVENTS, 2, "day")),
    "days not ascending": ({"events": {"day": [2, 1, 74, 79]}}, (EVENTS, 1, "day")),
    "users not ascending": ({"events": {"user_id": [10, 10, 30, 10]}}, (EVENTS, 3, "user_id")),
    "event of an unknown user": ({"events": {"user_id": [10, 10, 10, 31]}}, (EVENTS, 3, "user_id")),
    "unknown modality": (
        {"events": {"modality": ["visit", "visitt", "order", "order"]}},
        (EVENTS, 1, "modality"),
    ),
    "attributes are no events": (
        {"events": {"modality": ["tabular", "visit", "order", "order"]}},
        (EVENTS, 0, "modality"),
    ),
    "long text": (
        {"events": {"text": ["a", "x" * (MAX_TEXT_CHARS + 1), "c", "d"]}},
        (EVENTS, 1, "text"),
    ),
    "no words at all": (
        {"events": {"text": ["a", "b", "", "d"], "event_type": ["a", "b", "", "d"]}},
        (EVENTS, 2, "text"),
    ),
    "infinite value": (
        {"events": {"value": [1.0, 2.0, float("inf"), None]}},
        (EVENTS, 2, "value"),
    ),
    "huge value": ({"events": {"value": [1.0, -1.1e15, 1e15, None]}}, (EVENTS, 1, "value")),
    "day in microseconds before an epoch": (
        {"events": {"day": [-1_706_659_200_000_000, 74, 74, 79]}},
        (EVENTS, 0, "day"),
    ),
    "as-of day in seconds": (
        {"users": {"asof_day": [75, 75, 1_706_659_200, 75]}},
        (USERS, 2, "asof_day"),
    ),
    "null day": ({"events": {"day": [1, None, 74, 79]}}, (EVENTS, 1, "day")),
    "text of a wrong type": ({"events": {"text": [1, 2, 3, 4]}}, (EVENTS, None, "text")),
    "day of a wrong type": ({"events": {"day": [1.0, 2.0, 3.0, 4.0]}}, (EVENTS, None, "day")),
    "missing column": ({"events": {"event_type": None}}, (EVENTS, None, "event_type")),
    "ids of another type": (
        {"events": {"user_id": ["10", "10", "10", "30"]}},
        (EVENTS, None, "user_id"),
    ),
    "ids of labels of another type": (
        {"labels": {"user_id": ["10", "20", "30"]}},
        (LABELS, None, "user_id"),
    ),
    "unknown split": (
        {"users": {"split": ["train", "vali", "test", "train"]}},
        (USERS, 1, "split"),
    ),
    "nobody to learn from": (
        {"users": {"split": ["test", "valid", "test", "valid"]}},
        (USERS, None, "split"),
    ),
    "user twice": ({"users": {"user_id": [10, 10, 30, 40]}}, (USERS, 1, "user_id")),
    "date as an attribute": (
        {"users": {"plan": [datetime.date(2024, 1, 31), None, None, None]}},
        (USERS, None, "plan"),
    ),
    "infinite attribute": (
        {"users": {"age": [31.0, float("-inf"), float("nan"), 22.0]}},
        (USERS, 1, "age"),
    ),
    "list as an attribute": ({"users": {"plan": [["a"], [], [], []]}}, (USERS, None, "plan")),
    "missing attribute": ({"users": {"plan": None}}, (USERS, None, "plan")),
    "wrong date": (
        {"users": {"asof_date_approx": ["2024-01-01", "soon", "2024-01-01", "2024-01-01"]}},
        (USERS, 1, "asof_date_approx"),
    ),
    "no date": (
        {"users": {"asof_date_approx": ["2024-01-01", "2024-01-01", None, "2024-01-01"]}},
        (USERS, 2, "asof_date_approx"),
    ),
    "label neither 0 nor 1": ({"labels": {"label": [1, 2, 0]}}, (LABELS, 1, "label")),
    "label of an unknown user": ({"labels": {"user_id": [10, 20, 99]}}, (LABELS, 2, "user_id")),
    "label of an unknown scenario": (
        {"labels": {"scenario": ["will_buy", "will_buy", "will_fly"]}},
        (LABELS, 2, "scenario"),
    ),
    "label twice": ({"labels": {"user_id": [10, 20, 10]}}, (LABELS, 2, "user_id")),
    "holdout label": (
        {"users": {"split": ["train", "valid", "holdout", "train"]}},
        (LABELS, 2, "user_id"),
    ),
    "future of a test user": (
        {"future_events_train": {"user_id": [10, 30], "day": [75, 81]}},
        (FUTURE, 1, "user_id"),
    ),
    "future before the as-of day": (
        {"future_events_train": {"day": [74, 80]}},
        (FUTURE, 0, "day"),
    ),
    "future beyond its span": ({"future_events_train": {"day": [75, 105]}}, (FUTURE, 1, "day")),
}


def test_a_valid_data_set_has_no_problem(write_tiny: Any, wallet: Path) -> None:
    report = validate_dataset(write_tiny())
    assert report.problems == ()
    assert report.is_valid
    assert report.num_rows == {USERS: 4, EVENTS: 4, FUTURE: 2, LABELS: 3}
    assert validate_dataset(wallet).problems == ()


@pytest.mark.parametrize("name", sorted(FAULTS))
def test_each_fault_is_found_where_it_is(write_tiny: Any, name: str) -> None:
    changes, place = FAULTS[name]
    report = validate_dataset(write_tiny(**changes))
    assert place in [(one.file, one.row, one.column) for one in report.problems]
    assert not report.is_valid
    assert all(one.rule and one.remedy for one in report.problems)


def test_attributes_may_be_encoded_words_numbers_truths_or_nothing(write_tiny: Any) -> None:
    path = write_tiny(users={"plan": [None] * 4, "age": [1, 2, 3, 4]})
    users = pq.read_table(path / USERS)
    words = pa.array(["new", None, "old", "new"]).dictionary_encode()
    place = users.column_names.index("is_new")
    pq.write_table(users.set_column(place, "is_new", words), path / USERS)
    assert validate_dataset(path).problems == ()


def test_the_remedy_for_time_stamps_gives_days(write_tiny: Any) -> None:
    path = write_tiny()
    events = pq.read_table(path / EVENTS)
    place = events.column_names.index("day")
    days = pa.array([1, 74, 74, 79], pa.int64())
    moments = pa.array([day * 86_400_000_000 + 1 for day in days.to_pylist()], pa.timestamp("us"))
    pq.write_table(events.set_column(place, "day", moments), path / EVENTS)
    (problem,) = validate_dataset(path).problems
    assert ".cast(pa.date32()).cast(pa.int32())" in problem.remedy
    assert moments.cast(pa.date32()).cast(pa.int32()).cast(pa.int64()) == days


@pytest.mark.parametrize("batch_rows", [1, 2, 3])
def test_rows_and_order_are_counted_across_batches(
    write_tiny: Any, monkeypatch: pytest.MonkeyPatch, batch_rows: int
) -> None:
    monkeypatch.setattr(validate, "_BATCH_ROWS", batch_rows)
    path = write_tiny(events={"user_id": [10, 10, 30, 10], "day": [3, 2, 79, 80]})
    found = {(one.row, one.column) for one in validate_dataset(path).problems}
    assert found == {(1, "day"), (3, "user_id"), (3, "day")}


@pytest.mark.parametrize("batch_rows", [1, 100])
def test_users_may_stand_in_any_order(
    write_tiny: Any, monkeypatch: pytest.MonkeyPatch, batch_rows: int
) -> None:
    monkeypatch.setattr(validate, "_BATCH_ROWS", batch_rows)
    path = write_tiny(events={"user_id": [10, 10, 25, 30], "day": [1, 75, 3, 79]})
    users = pq.read_table(path / USERS)
    pq.write_table(users.take([2, 0, 3, 1]), path / USERS)
    found = {(one.file, one.row, one.column) for one in validate_dataset(path).problems}
    assert found == {(EVENTS, 1, "day"), (EVENTS, 2, "user_id")}


def test_all_problems_are_counted_and_the_first_ones_listed(write_tiny: Any) -> None:
    path = write_tiny(labels={"label": [5, 6, 7]})
    report = validate_dataset(path, max_problems=2)
    assert (len(report.problems), report.num_problems) == (2, 3)
    assert str(report.problems[0]) == (
        "labels.parquet, row 0, column label: 5: must be 0 or 1; correct it or drop the row"
    )


def test_files_that_are_missing_or_broken_are_reported(write_tiny: Any, tmp_path: Path) -> None:
    (problem,) = validate_dataset(tmp_path / "nowhere").problems
    assert (problem.file, problem.rule) == ("schema.json", "file missing")
    path = write_tiny()
    (path / EVENTS).write_bytes(b"not parquet")
    (path / FUTURE).unlink()
    rules = {one.file: one.rule for one in validate_dataset(path).problems}
    assert rules[EVENTS] == "not a Parquet file"
    assert rules[FUTURE] == "future_days is 30 but the file is missing"


def test_scenarios_need_unique_names_and_a_question(write_tiny: Any) -> None:
    path = write_tiny()
    twice = '[{"name": "will_buy", "question": " "}, {"name": "will_buy", "question": "Q?"}]'
    (path / "scenarios.json").write_text(twice)
    found = {(one.row, one.column) for one in validate_dataset(path).problems}
    assert found == {(0, "question"), (1, "name")}


TOPIC = '[[topics]]\nname = "t"\naggregate = "trend"\nabout = "x"\n'


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('passive = ["hom"]\n', "hom"),
        (TOPIC + 'event_types = ["home", "bui"]\n', "bui"),
        (TOPIC + 'modality = "vist"\n', "vist"),
        (TOPIC + 'queries = ["Is {subject} {busy}?"]\n', "Is {subject} {busy}?"),
        (TOPIC + 'answers = ["It {trend", "so."]\n', "It {trend"),
    ],
)
def test_a_topic_file_is_held_against_the_data(write_tiny: Any, text: str, value: str) -> None:
    path = write_tiny()
    (path / "topics.toml").write_text('passive = ["home"]\n')
    assert validate_dataset(path).problems == ()
    (path / "topics.toml").write_text(text)
    (problem,) = validate_dataset(path).problems
    assert (problem.file, problem.value) == ("topics.toml", value)


def test_topics_are_not_blamed_for_events_that_cannot_be_read(write_tiny: Any) -> None:
    path = write_tiny()
    (path / "topics.toml").write_text('passive = ["home"]\n')
    (path / EVENTS).write_bytes(b"not parquet")
    (path / FUTURE).write_bytes(b"not parquet")
    assert {one.file for one in validate_dataset(path).problems} == {EVENTS, FUTURE}


def test_a_schema_that_cannot_be_read_is_one_problem(write_tiny: Any) -> None:
    path = write_tiny()
    (path / "schema.json").write_text("{")
    (problem,) = validate_dataset(path).problems
    assert "schema.json" in problem.file


def test_string_ids_are_checked_in_their_own_order(write_tiny: Any) -> None:
    path = write_tiny(
        users={"user_id": ["a", "b", "c", "d"]},
        events={"user_id": ["a", "a", "a", "c"]},
        labels={"user_id": ["a", "b", "c"]},
        future_events_train={"user_id": ["a", "a"]},
    )
    assert validate_dataset(path).problems == ()
    ids = pq.read_table(path / EVENTS)
    encoded = pa.chunked_array(ids["user_id"]).dictionary_encode()
    pq.write_table(ids.set_column(0, "user_id", encoded), path / EVENTS)
    (problem,) = validate_dataset(path).problems
    assert (problem.column, problem.rule) == ("user_id", "must be an integer or a plain string")
