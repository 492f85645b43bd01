"""Checks of a whole data set directory: everything a reader or trainer will rely on.

Reads every file once, column-wise and in bounded memory; the format is described in `dataset`.
"""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qanchor.config import load, nearest
from qanchor.data import dataset
from qanchor.data.dataset import SPLITS, DatasetConfig
from qanchor.data.event_stream import EVENT_COLUMNS, id_order, places_of
from qanchor.data.findings import COUNT_DAYS, Findings, Report, Rows, is_number, open_table
from qanchor.data.profile import MAX_TEXT_CHARS, MAX_VALUE, VALUE_RULE
from qanchor.data.topics import TOPICS_FILE, load_topics
from qanchor.errors import ConfigError, DataError

_BATCH_ROWS = 1 << 17
_MAX_DAYS = datetime.date.max.toordinal()
"""From the year 1 to 9999: what is larger counts no days."""


def validate_dataset(path: str | Path, *, max_problems: int = 100) -> Report:
    """Check a data set directory; never raises for what it finds in the files.

    A file with wrong columns is reported as such and its rows are not looked into.
    """
    directory, findings = Path(path), Findings(max_problems)
    config = _check_schema(directory, findings)
    if config is not None:
        users = _check_users(directory / dataset.USERS_FILE, config, findings)
        if users is not None:
            event_types = _check_all_events(directory, config, users, findings)
            _check_topics(directory, config, event_types, findings)
            scenarios = _check_scenarios(directory / dataset.SCENARIOS_FILE, findings)
            labels = directory / dataset.LABELS_FILE
            if labels.is_file() and scenarios is not None:
                _check_labels(labels, scenarios, users, findings)
    return Report(
        path=directory,
        problems=tuple(findings.problems),
        num_problems=findings.num_problems,
        num_rows=findings.num_rows,
    )


@dataclass(frozen=True, slots=True)
class _Users:
    """What rows of other files are held against; all three have one entry per user."""

    user_id: pa.Array
    """Ascending, without null."""
    asof_day: pa.Array
    split: pa.Array
    id_type: pa.DataType
    """As the file has it."""

    def open(self, path: Path, columns: Sequence[str], findings: Findings) -> pq.ParquetFile | None:
        """As `open_table`, for a file whose user ids must be of the users' type."""
        file = open_table(path, columns, findings)
        if file is None:
            return None
        try:
            dataset.check_id_type(path, file.schema_arrow.field("user_id").type, self.id_type)
        except DataError as error:
            findings.add(path.name, "user_id", error.value, error.rule, error.remedy)
            file.close()
            return None
        return file

    def place(self, rows: Rows) -> pa.Array:
        """Index of each row's user, null and flagged where there is none."""
        ids = rows.table["user_id"].combine_chunks().cast(self.user_id.type)
        part = places_of(ids, self.user_id)
        place = pc.add(pc.index_in(ids, self.user_id[part]), part.start)
        rule = f"must be a user of {dataset.USERS_FILE}"
        rows.flag("user_id", pc.is_null(place), rule, "add the user or drop the row")
        return place


def _check_schema(directory: Path, findings: Findings) -> DatasetConfig | None:
    path = directory / dataset.SCHEMA_FILE
    if not path.is_file():
        remedy = "make a data set with qanchor data import or wallet"
        findings.add(path.name, "-", str(path), "file missing", remedy)
        return None
    try:
        return load(DatasetConfig, path)
    except ConfigError as error:
        findings.add(path.name, error.field, error.value, error.rule, error.remedy)
        return None


def _check_users(path: Path, config: DatasetConfig, findings: Findings) -> _Users | None:
    file = open_table(path, ("user_id", "split", "asof_day", *config.attributes), findings)
    if file is None:
        return None
    with file:
        table = file.read()
    rows = Rows(path.name, 0, table, findings)
    rows.flag_nulls(("user_id", "split", "asof_day"))
    asof_day = _check_days(rows, "asof_day")
    for name in config.attributes:
        if is_number(table[name].type):
            _check_size(rows, name)
    id_type = table["user_id"].type
    ids = table["user_id"].combine_chunks().cast(id_order(id_type))
    seen_before = pc.not_equal(pc.index_in(ids, ids), pa.array(range(len(ids)), pa.int32()))
    rows.flag("user_id", seen_before, "must be unique", "drop one of the rows")
    split = table["split"].combine_chunks().cast(pa.string())
    is_unknown = pc.invert(pc.is_in(split, pa.array(SPLITS)))
    rows.flag("split", is_unknown, f"must be one of {', '.join(SPLITS)}", "correct it")
    if not pc.any(pc.equal(split, "train")).as_py():
        rule = "at least one user must be of split train"
        remedy = "put most users there: training and probes learn from them alone"
        findings.add(path.name, "split", split.unique().to_pylist(), rule, remedy)
    if dataset.CALENDAR_COLUMN in table.column_names:
        rows.flag_nulls((dataset.CALENDAR_COLUMN,))
        dates = table[dataset.CALENDAR_COLUMN].cast(pa.string())
        wrong = [text for text in dates.unique().to_pylist() if not _is_date(text)]
        is_wrong = pc.is_in(dates, pa.array(wrong, pa.string()))
        rows.flag(dataset.CALENDAR_COLUMN, is_wrong, "must be an ISO date", "write 2024-01-31")
    # Nulls come last.
    ascending = pc.sort_indices(ids)[: len(ids) - ids.null_count]
    ids, asof_day, split = (column.take(ascending) for column in (ids, asof_day, split))
    return _Users(ids, asof_day, split, id_type)


def _is_date(text: str | None) -> bool:
    try:
        datetime.date.fromisoformat(text or "")
    except ValueError:
        return False
    return True


def _check_all_events(
    directory: Path, config: DatasetConfig, users: _Users, findings: Findings
) -> set[str]:
    """Check history and future; the event types there are."""
    event_types = _check_events(directory / dataset.EVENTS_FILE, config, users, findings)
    path = directory / dataset.FUTURE_FILE
    if path.is_file():
        event_types |= _check_events(path, config, users, findings)
    elif config.future_days:
        rule = f"future_days is {config.future_days} but the file is missing"
        findings.add(path.name, "-", str(path), rule, "add it or set future_days to 0")
    return event_types


def _check_events(path: Path, config: DatasetConfig, users: _Users, findings: Findings) -> set[str]:
    """Check one file of events; the event types in it."""
    event_types: set[str] = set()
    file = users.open(path, EVENT_COLUMNS, findings)
    if file is None:
        return event_types
    is_future = path.name == dataset.FUTURE_FILE
    first, last_row = 0, None
    with file:
        for batch in file.iter_batches(_BATCH_ROWS, columns=EVENT_COLUMNS):
            table = pa.Table.from_batches([batch])
            rows = Rows(path.name, first, table, findings)
            rows.flag_nulls(("user_id", "day", "modality", "event_type", "text"))
            day = _check_days(rows, "day")
            _check_words(rows, config)
            event_types.update(
                table["event_type"].cast(pa.string()).unique().drop_null().to_pylist()
            )
            _check_order(rows, last_row)
            place = users.place(rows)
            asof_day = pc.take(users.asof_day, place)
            if is_future:
                _check_future_days(rows, day, asof_day, config.future_days)
                not_train = pc.not_equal(pc.take(users.split, place), "train")
                rule = "only users of split train may have future events here"
                rows.flag("user_id", not_train, rule, "drop the row")
            else:
                is_late = pc.greater_equal(day, asof_day)
                rule = "must lie before the user's as-of day"
                rows.flag("day", is_late, rule, "drop the row: it is in the future")
            first += batch.num_rows
            last_row = table.slice(batch.num_rows - 1) if batch.num_rows else last_row
    return event_types


def _check_topics(
    directory: Path, config: DatasetConfig, event_types: set[str], findings: Findings
) -> None:
    """The data set's own words and questions, if it has any."""
    if not (directory / TOPICS_FILE).is_file():
        return
    try:
        pool = load_topics(directory, config.name, config.profile, config.attributes)
    except ConfigError as error:
        findings.add(TOPICS_FILE, error.field, error.value, error.rule, error.remedy)
        return
    named = [("passive", name) for name in pool.words.passive]
    named += [(topic.name, name) for topic in pool.words.topics for name in topic.event_types]
    for where, name in named:
        # None at all: the events could not be read, which is a problem of its own.
        if event_types and name not in event_types:
            rule = "must be an event type of some event"
            findings.add(TOPICS_FILE, where, name, rule, nearest(name, sorted(event_types)))


def _check_words(rows: Rows, config: DatasetConfig) -> None:
    """Modality, text and value of events."""
    table = rows.table
    valid = [spec.name for spec in config.profile.modalities if spec.kind == "events"]
    modality = table["modality"].combine_chunks().cast(pa.string())
    is_unknown = pc.invert(pc.is_in(modality, pa.array(valid, pa.string())))
    rule = f"must be an events modality of {dataset.SCHEMA_FILE}: {', '.join(valid)}"
    rows.flag("modality", is_unknown, rule, "correct it or add the modality")
    text = table["text"].combine_chunks().cast(pa.string())
    length = pc.utf8_length(text)
    is_long = pc.greater(length, MAX_TEXT_CHARS)
    rows.flag("text", is_long, f"at most {MAX_TEXT_CHARS} characters", "shorten it")
    event_type = table["event_type"].combine_chunks().cast(pa.string())
    is_empty = pc.and_(pc.equal(length, 0), pc.equal(pc.utf8_length(event_type), 0))
    rows.flag("text", is_empty, "text or event_type is required", "describe the event")
    _check_size(rows, "value")


def _check_size(rows: Rows, column: str) -> None:
    numbers = rows.table[column].combine_chunks().cast(pa.float64(), safe=False)
    is_huge = pc.greater(pc.abs(numbers), MAX_VALUE)
    rows.flag(column, is_huge, VALUE_RULE, "leave it null if unknown")


def _check_order(rows: Rows, last_row: pa.Table | None) -> None:
    """Rows ascend by user, then day; `last_row` ends the batch before."""
    table = rows.table if last_row is None else pa.concat_tables([last_row, rows.table])
    ids = table["user_id"]
    if pa.types.is_dictionary(ids.type):
        ids = ids.cast(pa.string())
    ids, days = ids.combine_chunks(), table["day"].combine_chunks()
    fewer = len(table) - 1
    is_less = pc.less(ids[1:], ids[:fewer])
    is_earlier = pc.and_(pc.equal(ids[1:], ids[:fewer]), pc.less(days[1:], days[:fewer]))
    # The first row of the file has none before it.
    start = pa.nulls(len(rows.table) - fewer, pa.bool_())
    for column, wrong in (("user_id", is_less), ("day", is_earlier)):
        mask = pa.concat_arrays([start, wrong])
        rows.flag(column, mask, "rows must be sorted by user_id, then day", "sort the file")


def _check_days(rows: Rows, column: str) -> pa.Array:
    """A column of days as 64-bit integers."""
    day = rows.table[column].combine_chunks().cast(pa.int64())
    is_absurd = pc.or_(pc.less(day, -_MAX_DAYS), pc.greater(day, _MAX_DAYS))
    rows.flag(column, is_absurd, f"must lie within {_MAX_DAYS} days of day 0", COUNT_DAYS)
    return day


def _check_future_days(rows: Rows, day: pa.Array, asof_day: pa.Array, future_days: int) -> None:
    is_early = pc.less(day, asof_day)
    rule = "must not lie before the user's as-of day"
    rows.flag("day", is_early, rule, f"move it to {dataset.EVENTS_FILE}")
    is_late = pc.greater_equal(pc.subtract(day, asof_day), future_days)
    rule = f"must lie within future_days={future_days} of the as-of day"
    rows.flag("day", is_late, rule, f"drop the row or raise future_days in {dataset.SCHEMA_FILE}")


def _check_scenarios(path: Path, findings: Findings) -> list[str] | None:
    """Names of the scenarios; none if there is no file, None if it cannot be read."""
    if not path.is_file():
        return []
    try:
        scenarios = dataset.load_scenarios(path)
    except ConfigError as error:
        findings.add(path.name, error.field, error.value, error.rule, error.remedy)
        return None
    names = [scenario.name for scenario in scenarios]
    for row, scenario in enumerate(scenarios):
        if scenario.name in names[:row]:
            findings.add(path.name, "name", scenario.name, "must be unique", "rename one", row)
        if not scenario.question.strip():
            rule = "must not be empty"
            findings.add(path.name, "question", scenario.question, rule, "ask something", row)
    return names


def _check_labels(path: Path, scenarios: list[str], users: _Users, findings: Findings) -> None:
    file = users.open(path, ("user_id", "scenario", "label"), findings)
    if file is None:
        return
    with file:
        table = file.read(columns=["user_id", "scenario", "label"])
    rows = Rows(path.name, 0, table, findings)
    rows.flag_nulls(("user_id", "scenario", "label"))
    is_wrong = pc.invert(
        pc.is_in(table["label"].combine_chunks().cast(pa.int64()), pa.array([0, 1]))
    )
    rows.flag("label", is_wrong, "must be 0 or 1", "correct it or drop the row")
    scenario = table["scenario"].combine_chunks().cast(pa.string())
    is_unknown = pc.invert(pc.is_in(scenario, pa.array(scenarios, pa.string())))
    rule = f"must be a scenario of {dataset.SCENARIOS_FILE}"
    rows.flag("scenario", is_unknown, rule, "add the scenario or drop the row")
    place = users.place(rows)
    is_holdout = pc.equal(pc.take(users.split, place), "holdout")
    rows.flag("user_id", is_holdout, "users of split holdout have no labels", "drop the row")
    ids = table["user_id"].combine_chunks().cast(pa.string())
    key = pc.binary_join_element_wise(ids, scenario, "\x1f")
    seen_before = pc.not_equal(pc.index_in(key, key), pa.array(range(len(key)), pa.int32()))
    rows.flag("user_id", seen_before, "one label per user and scenario", "drop one of the rows")
