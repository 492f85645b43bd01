"""A data set directory of user profiles, opened for reading. Knows no labels' meaning and no model.

    schema.json                  DatasetConfig: name, attribute columns, modalities
    users.parquet                user_id, split, asof_day, [asof_date_approx], attributes ...
    events.parquet               user_id, day, modality, event_type, text, value; by user_id, day
    labels.parquet               user_id, scenario, label (0 or 1)                     optional
    scenarios.json               list of {name, domain, question, definition}          optional
    future_events_train.parquet  as events, days from the as-of day on, train only     optional
    topics.toml                  words and topics for UserU triples (qanchor.data.topics)  optional

`day` is an integer in the data set's own calendar. A user's as-of moment is the start of the
as-of day, so that an event on day 74 of a user with as-of day 75 is one day old. `value` lies
between -1e15 and 1e15 or is null. `user_id` may be an integer or a string on disk, the same in all
files, and is always a `str` here. `qanchor data validate` checks a directory in full; reading
checks only what it relies on.
"""

import datetime
import hashlib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qanchor.bundle.reader import file_sha256
from qanchor.config import Config, ProfileSchema, Scenario, load, nearest, to_json
from qanchor.data.event_stream import id_order, stream_events
from qanchor.data.profile import DAY_SECONDS, Event, Profile
from qanchor.errors import ConfigError, DataError, InvalidInput

SCHEMA_FILE = "schema.json"
USERS_FILE = "users.parquet"
EVENTS_FILE = "events.parquet"
LABELS_FILE = "labels.parquet"
SCENARIOS_FILE = "scenarios.json"
FUTURE_FILE = "future_events_train.parquet"
TRAINING_FILES = (SCHEMA_FILE, USERS_FILE, EVENTS_FILE, FUTURE_FILE)
"""What pre-training reads."""
SPLITS = ("train", "valid", "test", "holdout")
CALENDAR_COLUMN = "asof_date_approx"


class DatasetConfig(Config, frozen=True, kw_only=True):
    """Content of `schema.json`."""

    name: str
    """Short lower-case identifier; also selects the topic file of the same name."""
    profile: ProfileSchema
    """Modalities, window and templates."""
    attributes: tuple[str, ...] = ()
    """Columns of users.parquet (strings, numbers or booleans) that become attribute texts, in this
    order; null is left out."""
    future_days: int = 0
    """Days from the as-of day on that future_events_train.parquet covers; 0: there is none."""
    day_zero: str = "2024-01-01"
    """ISO date of day 0 where users.parquet has no asof_date_approx; only differences matter."""
    note: str = ""
    """Origin, licence and limits of the data, for people."""

    def __post_init__(self) -> None:
        _midnight_s("day_zero", self.day_zero, ConfigError)


@dataclass(frozen=True, slots=True)
class Dataset:
    """An opened data set directory. Made by `open_dataset`; every method reads from disk anew."""

    path: Path
    config: DatasetConfig
    scenarios: tuple[Scenario, ...]
    split_of: Mapping[str, str]
    """Split of every user, in ascending order of the stored user_id."""
    _users: pa.Table
    _as_of: Mapping[str, tuple[int, int]]

    @property
    def name(self) -> str:
        """Name of the data set."""
        return self.config.name

    @property
    def schema(self) -> ProfileSchema:
        """How a profile becomes a prefix."""
        return self.config.profile

    def user_ids(self, split: str | None = None) -> list[str]:
        """Users of a split (all users for None), ascending. Raises DataError for another word."""
        if split is None:
            return list(self.split_of)
        if split not in SPLITS:
            remedy = nearest(split, list(SPLITS))
            raise DataError("split", split, f"must be one of {', '.join(SPLITS)}", remedy)
        return [user for user, name in self.split_of.items() if name == split]

    def profiles(
        self, user_ids: Collection[str] | None = None, split: str | None = None
    ) -> Iterator[Profile]:
        """Stream profiles of the given users (default: all of `split`), ascending by user_id.

        A user without events yields a profile without events. Raises DataError for an unknown
        user, and for an events file that is not sorted by user_id.
        """
        wanted = self._ascending(self.user_ids(split) if user_ids is None else user_ids)
        attributes = self._attributes(wanted)
        for user_id, events in stream_events(self.path / EVENTS_FILE, wanted, self._as_of):
            yield Profile(
                user_id=user_id,
                as_of_s=self._as_of[user_id][1],
                events=events,
                attributes=attributes[user_id],
            )

    def labels(self, scenario: str) -> tuple[list[str], npt.NDArray[np.int64]]:
        """Users eligible for a scenario and their labels [num_users], 0 or 1.

        Raises DataError for an unknown scenario or a data set without labels.
        """
        names = [known.name for known in self.scenarios]
        if scenario not in names:
            rule = "must be a scenario of this data set"
            raise DataError("scenario", scenario, rule, nearest(scenario, names))
        table = _read(
            self.path / LABELS_FILE,
            columns=["user_id", "label"],
            filters=pc.field("scenario") == scenario,
        )
        users = table["user_id"].cast(pa.string()).to_pylist()
        return users, table["label"].to_numpy().astype(np.int64)

    def future(self, user_ids: Collection[str]) -> Iterator[tuple[str, tuple[Event, ...]]]:
        """Stream each user's events from the as-of moment on, ascending by user_id.

        The future of any user outside split `train` never enters anything: one such user, or an
        unknown one, raises DataError before anything is read.
        """
        for user_id in user_ids:
            split = self.split_of.get(user_id)
            if split != "train":
                rule = f"futures exist for train users only; this user's split is {split}"
                raise DataError("future.user_id", user_id, rule, "ask for train users")
        wanted = self._ascending(user_ids)
        return stream_events(self.path / FUTURE_FILE, wanted, self._as_of)

    def contents_sha256(self, files: Iterable[str]) -> str:
        """One hash of the contents of these files, by name; one may be missing, which counts."""
        paths = {name: self.path / name for name in files}
        found = {name: file_sha256(path) for name, path in paths.items() if path.is_file()}
        return hashlib.sha256(to_json(found)).hexdigest()

    def _ascending(self, user_ids: Collection[str]) -> list[str]:
        chosen = set(user_ids)
        unknown = chosen - self.split_of.keys()
        if unknown:
            rule = f"unknown user; {USERS_FILE} does not have it"
            raise DataError("user_id", min(unknown), rule, "see user_ids()")
        return [user for user in self.split_of if user in chosen]

    def _attributes(self, user_ids: list[str]) -> dict[str, dict[str, str | float | bool]]:
        """Attribute values of users; null and NaN are left out."""
        names = self.config.attributes
        rows = self._users.filter(pc.is_in(self._users["user_id"], pa.array(user_ids, pa.string())))
        columns = [rows[name].to_pylist() for name in names]
        found: dict[str, dict[str, str | float | bool]] = {}
        for user_id, *values in zip(rows["user_id"].to_pylist(), *columns, strict=True):
            found[user_id] = {
                name: value
                for name, value in zip(names, values, strict=True)
                if not (value is None or (isinstance(value, float) and math.isnan(value)))
            }
        return found


def open_dataset(path: str | Path) -> Dataset:
    """Open a data set directory: reads schema, scenarios and the user table, not the events.

    Raises ConfigError for a schema that does not fit, DataError for a missing file or column and
    for user ids that are integers in one file and strings in another.
    """
    directory = Path(path)
    if not (directory / SCHEMA_FILE).is_file():
        rule = f"not a data set directory: it has no {SCHEMA_FILE}"
        raise DataError("path", str(directory), rule, "make one: qanchor data import | wallet")
    config = load(DatasetConfig, directory / SCHEMA_FILE)
    users = _read_users(directory / USERS_FILE, config)
    users_type = _id_type(directory / USERS_FILE)
    for path in (directory / name for name in (EVENTS_FILE, FUTURE_FILE, LABELS_FILE)):
        if path.is_file():
            check_id_type(path, _id_type(path), users_type)
    ids = users["user_id"].to_pylist()
    days = users["asof_day"].to_pylist()
    as_of = zip(days, _as_of_seconds(users, config), strict=True)
    return Dataset(
        path=directory,
        config=config,
        scenarios=_read_scenarios(directory / SCENARIOS_FILE),
        split_of=dict(zip(ids, users["split"].cast(pa.string()).to_pylist(), strict=True)),
        _users=users,
        _as_of=dict(zip(ids, as_of, strict=True)),
    )


def check_id_type(path: Path, kind: pa.DataType, users_type: pa.DataType) -> None:
    """Raise DataError unless user ids of type `kind`, in `path`, ascend as those of the users do.

    10 comes after 9, but "10" before "9": users would be looked for where they are not.
    """
    if id_order(kind) != id_order(users_type):
        rule = f"{USERS_FILE} has {users_type}: all files need user_id of the same type"
        remedy = "cast the column in one of them, then sort events by user_id, day"
        raise DataError(f"{path.name}.user_id", str(kind), rule, remedy)


def _id_type(path: Path) -> pa.DataType:
    try:
        schema = pq.read_schema(path)
    except pa.ArrowInvalid as error:
        raise DataError(path.name, str(error), "not a Parquet file", "write it anew") from None
    if "user_id" not in schema.names:
        raise DataError(f"{path.name}.user_id", schema.names, "column missing", "add it")
    return schema.field("user_id").type


def _read_users(path: Path, config: DatasetConfig) -> pa.Table:
    """The user table in ascending order of the stored id, the id then as a string."""
    table = _read(path)
    for name in ("user_id", "split", "asof_day", *config.attributes):
        if name not in table.column_names:
            remedy = nearest(name, table.column_names)
            raise DataError(f"{path.name}.{name}", table.column_names, "column missing", remedy)
    table = table.sort_by("user_id")
    return table.set_column(
        table.column_names.index("user_id"), "user_id", table["user_id"].cast(pa.string())
    )


def _as_of_seconds(users: pa.Table, config: DatasetConfig) -> list[int]:
    """Start of each user's as-of day in Unix seconds, UTC."""
    if CALENDAR_COLUMN in users.column_names:
        dates = users[CALENDAR_COLUMN].cast(pa.string())
        where = f"{USERS_FILE}.{CALENDAR_COLUMN}"
        seconds = {text: _midnight_s(where, text) for text in dates.unique().to_pylist()}
        return [seconds[text] for text in dates.to_pylist()]
    zero_s = _midnight_s("day_zero", config.day_zero)
    return [zero_s + day * DAY_SECONDS for day in users["asof_day"].to_pylist()]


def _midnight_s(field: str, date: str, error: type[InvalidInput] = DataError) -> int:
    try:
        moment = datetime.datetime.fromisoformat(date).replace(tzinfo=datetime.UTC)
    except (TypeError, ValueError):
        raise error(field, date, "must be an ISO date", "write 2024-01-31") from None
    return int(moment.timestamp())


def _read_scenarios(path: Path) -> tuple[Scenario, ...]:
    if not path.is_file():
        return ()
    return load_scenarios(path)


def load_scenarios(path: Path) -> tuple[Scenario, ...]:
    """Read a JSON list of scenarios. Raises ConfigError."""
    return load(tuple[Scenario, ...], path)


def _read(path: Path, **options: Any) -> pa.Table:
    if not path.is_file():
        raise DataError(path.name, str(path), "file missing", "see qanchor/data/dataset.py")
    return pq.read_table(path, **options)
