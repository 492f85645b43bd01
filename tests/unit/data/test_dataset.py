"""Reading a data set directory: profiles, labels, futures, and what is refused."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qanchor.config import save
from qanchor.data import event_stream
from qanchor.data.dataset import DatasetConfig, open_dataset
from qanchor.data.event_stream import places_of
from qanchor.data.profile import DAY_SECONDS
from qanchor.errors import ConfigError, DataError


def test_profiles_come_ascending_with_ages_in_days(write_tiny: Any) -> None:
    dataset = open_dataset(write_tiny())
    profiles = list(dataset.profiles())
    assert [profile.user_id for profile in profiles] == ["10", "20", "30", "40"]
    ages = [(profiles[0].as_of_s - event.time_s) / DAY_SECONDS for event in profiles[0].events]
    assert ages == [74, 1, 1]
    assert profiles[2].events[0].value is None
    assert profiles[1].events == profiles[3].events == ()


def test_null_and_nan_attributes_are_left_out_and_types_kept(write_tiny: Any) -> None:
    attributes = [dict(profile.attributes) for profile in open_dataset(write_tiny()).profiles()]
    assert attributes == [
        {"plan": "gold", "age": 31.0, "is_new": True},
        {"age": 40.0, "is_new": False},
        {"plan": "basic", "is_new": False},
        {"plan": "basic", "age": 22.0},
    ]


def test_the_as_of_time_is_the_calendar_date_where_there_is_one(write_tiny: Any) -> None:
    dates = ["1970-01-02", "1970-01-03", "1970-01-04", "1970-01-05"]
    dataset = open_dataset(write_tiny(users={"asof_date_approx": dates}))
    assert [profile.as_of_s // DAY_SECONDS for profile in dataset.profiles()] == [1, 2, 3, 4]


def test_a_date_that_is_none_is_told_with_its_place(write_tiny: Any) -> None:
    path = write_tiny(users={"asof_date_approx": ["2024-01-01", None, "2024-01-01", "2024-01-01"]})
    with pytest.raises(DataError, match=r"users\.parquet\.asof_date_approx=None: must be an ISO"):
        open_dataset(path)
    schema = path / "schema.json"
    schema.write_text(schema.read_text().replace("2024-01-01", "01.02.2024"))
    with pytest.raises(ConfigError, match=r"schema\.json: day_zero='01\.02\.2024'.*2024-01-31"):
        open_dataset(path)


def test_users_are_chosen_by_split_or_by_name(write_tiny: Any) -> None:
    dataset = open_dataset(write_tiny())
    assert dataset.user_ids("train") == ["10", "40"]
    assert dataset.user_ids() == ["10", "20", "30", "40"]
    assert [profile.user_id for profile in dataset.profiles(split="test")] == ["30"]
    assert [profile.user_id for profile in dataset.profiles(["30", "10"])] == ["10", "30"]
    assert list(dataset.profiles([])) == []
    with pytest.raises(DataError, match="did you mean 'train'"):
        dataset.user_ids("trian")
    with pytest.raises(DataError, match="unknown user"):
        list(dataset.profiles(["11"]))


def test_string_ids_are_read_like_numbers(write_tiny: Any) -> None:
    path = write_tiny(
        users={"user_id": ["b", "c", "a", "d"]},
        events={"user_id": ["a", "a", "a", "b"]},
        labels={"user_id": ["a", "b", "c"]},
        future_events_train={"user_id": ["b", "b"]},
    )
    dataset = open_dataset(path)
    counts = {profile.user_id: len(profile.events) for profile in dataset.profiles()}
    assert counts == {"a": 3, "b": 1, "c": 0, "d": 0}


@pytest.mark.parametrize(
    ("file", "ids"),
    [
        ("events", ["10", "10", "10", "30"]),
        ("labels", ["10", "20", "30"]),
        ("future_events_train", ["10", "10"]),
    ],
)
def test_ids_that_are_sorted_otherwise_than_the_users_are_refused(
    write_tiny: Any, file: str, ids: list[str]
) -> None:
    path = write_tiny(**{file: {"user_id": ids}})
    told = rf"{file}\.parquet\.user_id='string': users\.parquet has int64: .*; cast the column"
    with pytest.raises(DataError, match=told):
        open_dataset(path)


def test_ids_of_another_width_are_the_same_ids(write_tiny: Any) -> None:
    path = write_tiny(users={"user_id": [10, 20, 30, 400]})
    whole = list(open_dataset(path).profiles())
    events = pq.read_table(path / "events.parquet")
    narrow = events.set_column(0, "user_id", events["user_id"].cast(pa.int8()))
    pq.write_table(narrow, path / "events.parquet")
    assert list(open_dataset(path).profiles()) == whole


@pytest.mark.parametrize("batch_rows", [1, 2, 3])
def test_users_that_span_batches_stay_whole(
    write_tiny: Any, monkeypatch: pytest.MonkeyPatch, batch_rows: int
) -> None:
    dataset = open_dataset(write_tiny())
    whole = list(dataset.profiles())
    monkeypatch.setattr(event_stream, "_BATCH_ROWS", batch_rows)
    assert list(dataset.profiles()) == whole


def test_row_groups_are_skipped_without_losing_anyone(write_tiny: Any) -> None:
    path = write_tiny()
    dataset = open_dataset(path)
    whole = list(dataset.profiles())
    table = pq.read_table(path / "events.parquet")
    pq.write_table(table, path / "events.parquet", row_group_size=1)
    assert list(dataset.profiles()) == whole
    assert list(dataset.profiles(["30"])) == [whole[2]]


@pytest.mark.parametrize("as_ids", [list, lambda numbers: [f"u{each}" for each in numbers]])
def test_a_batch_is_looked_up_among_the_users_it_spans(as_ids: Any) -> None:
    everybody = pa.array(as_ids(range(100, 200, 2)))

    def among(numbers: list[int]) -> list[Any]:
        spanned: list[Any] = everybody[places_of(pa.array(as_ids(numbers)), everybody)].to_pylist()
        return spanned

    assert among([108, 104, 104]) == as_ids([104, 106, 108])
    assert among([103, 107]) == as_ids([104, 106])
    assert among([101]) == among([500]) == []
    assert len(everybody[places_of(pa.nulls(2, everybody.type), everybody)]) == 0


def test_unsorted_events_are_refused(write_tiny: Any) -> None:
    dataset = open_dataset(write_tiny(events={"user_id": [10, 30, 30, 10]}))
    with pytest.raises(DataError, match=r"events\.parquet\.user_id.*sort by user_id, day"):
        list(dataset.profiles())


def test_labels_are_those_of_eligible_users(write_tiny: Any) -> None:
    dataset = open_dataset(write_tiny())
    users, labels = dataset.labels("will_buy")
    assert users == ["10", "20", "30"]
    assert labels.tolist() == [1, 0, 0]
    with pytest.raises(DataError, match="did you mean 'will_buy'"):
        dataset.labels("will_by")


def test_only_train_users_have_a_future(write_tiny: Any) -> None:
    dataset = open_dataset(write_tiny())
    futures = dict(dataset.future(["40", "10"]))
    assert [event.text for event in futures["10"]] == ["home page", "tea, 5 euro"]
    assert futures["40"] == ()
    as_of_s = next(iter(dataset.profiles(["10"]))).as_of_s
    assert [event.time_s - as_of_s for event in futures["10"]] == [0, 5 * DAY_SECONDS]
    for user_id in ("20", "30", "99"):
        with pytest.raises(DataError, match="futures exist for train users only"):
            dataset.future(["10", user_id])


def test_what_is_missing_is_named(write_tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"schema\.json"):
        open_dataset(tmp_path)
    path = write_tiny(users={"plan": None})
    with pytest.raises(DataError, match=r"users\.parquet\.plan.*column missing"):
        open_dataset(path)
    (path / "users.parquet").unlink()
    with pytest.raises(DataError, match=r"users\.parquet.*file missing"):
        open_dataset(path)


def test_an_event_column_that_is_missing_is_named(write_tiny: Any) -> None:
    dataset = open_dataset(write_tiny(events={"value": None}))
    with pytest.raises(DataError, match=r"events\.parquet\.value.*column missing"):
        list(dataset.profiles())


def test_an_unknown_schema_key_is_refused(write_tiny: Any) -> None:
    path = write_tiny()
    (path / "schema.json").write_text('{"name": "x", "attribute": []}')
    with pytest.raises(ConfigError, match="did you mean 'attributes'"):
        open_dataset(path)


def test_the_schema_survives_being_saved(write_tiny: Any, tmp_path: Path) -> None:
    config = open_dataset(write_tiny()).config
    save(config, tmp_path / "schema.json")
    assert isinstance(config, DatasetConfig)
    assert b'"future_days": 30' in (tmp_path / "schema.json").read_bytes()


def test_a_dictionary_column_reads_like_a_plain_one(write_tiny: Any) -> None:
    path = write_tiny()
    plain = list(open_dataset(path).profiles())
    table = pq.read_table(path / "events.parquet")
    for name in ("modality", "event_type", "text"):
        place = table.column_names.index(name)
        table = table.set_column(place, name, pa.chunked_array(table[name]).dictionary_encode())
    pq.write_table(table, path / "events.parquet")
    assert list(open_dataset(path).profiles()) == plain
