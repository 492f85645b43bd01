"""Events read from Parquet and handed out user by user, in bounded memory.

Works on column slices: within a batch a text that occurs often is one Python string.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from operator import methodcaller
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qanchor.data.profile import DAY_SECONDS, Event
from qanchor.errors import DataError

EVENT_COLUMNS = ("user_id", "day", "modality", "event_type", "text", "value")

_BATCH_ROWS = 1 << 16
_Columns = list[npt.NDArray[Any]]


def id_order(kind: pa.DataType) -> pa.DataType:
    """The type in whose order a column of ids ascends: one for all strings, one for integers."""
    if pa.types.is_large_string(kind):
        return pa.string()
    return pa.int64() if pa.types.is_integer(kind) and kind != pa.uint64() else kind


def places_of(ids: pa.Array, ascending: pa.Array) -> slice:
    """The part of `ascending` (same type, no null) that can hold any of `ids`.

    A batch holds few users of millions: only these are worth hashing to look the batch up.
    """
    bounds = pc.min_max(ids).as_py()
    return _between(ascending, bounds["min"], bounds["max"])


def _between(ascending: pa.Array, low: Any, high: Any) -> slice:
    """Places of the values from `low` to `high`; none where these are None."""
    if low is None:
        return slice(0, 0)
    value = methodcaller("as_py")
    return slice(bisect_left(ascending, low, key=value), bisect_right(ascending, high, key=value))


def stream_events(
    path: Path, user_ids: Sequence[str], as_of: Mapping[str, tuple[int, int]]
) -> Iterator[tuple[str, tuple[Event, ...]]]:
    """Yield (user, events) for each of `user_ids`, which are in the file's ascending order.

    `as_of` maps a user to (as-of day, as-of time in Unix seconds). A user without rows yields
    no events. Raises DataError for a missing file or column, or rows not sorted by user_id.
    """
    pending = iter(user_ids)
    for user_id, (_, days, *columns) in _user_rows(_batches(path, user_ids)):
        for expected in pending:
            if expected == user_id:
                break
            yield expected, ()
        else:
            rule = "rows of one user must stand together, users ascending"
            raise DataError(f"{path.name}.user_id", user_id, rule, "sort by user_id, day")
        asof_day, asof_s = as_of[user_id]
        times_s = asof_s + (days.astype(np.int64) - asof_day) * DAY_SECONDS
        rows = zip(times_s.tolist(), *(column.tolist() for column in columns), strict=True)
        yield (
            user_id,
            tuple(
                Event(time_s=time_s, modality=modality, event_type=kind, text=text, value=value)
                for time_s, modality, kind, text, value in rows
            ),
        )
    for expected in pending:
        yield expected, ()


def _batches(path: Path, user_ids: Sequence[str]) -> Iterator[_Columns]:
    """Rows of the wanted users, batch by batch; row groups without any of them are not read."""
    if not path.is_file():
        raise DataError(path.name, str(path), "file missing", "see qanchor/data/dataset.py")
    with pq.ParquetFile(path) as file:
        present = file.schema_arrow.names
        for name in EVENT_COLUMNS:
            if name not in present:
                raise DataError(f"{path.name}.{name}", present, "column missing", "add it")
        order = id_order(file.schema_arrow.field("user_id").type)
        wanted = pa.array(user_ids, pa.string()).cast(order)
        groups = _row_groups(file, wanted)
        for batch in file.iter_batches(_BATCH_ROWS, row_groups=groups, columns=EVENT_COLUMNS):
            ids = batch["user_id"].cast(order)
            rows = batch.filter(pc.is_in(ids, wanted[places_of(ids, wanted)]))
            if rows.num_rows:
                yield _decode(rows)


def _row_groups(file: pq.ParquetFile, wanted: pa.Array) -> list[int]:
    """Row groups whose statistics admit one of the `wanted` ids (ascending)."""
    column = file.schema_arrow.names.index("user_id")
    chosen = []
    for group in range(file.num_row_groups):
        statistics = file.metadata.row_group(group).column(column).statistics
        has_bounds = statistics is not None and statistics.has_min_max
        if not has_bounds or wanted[_between(wanted, statistics.min, statistics.max)]:
            chosen.append(group)
    return chosen


def _decode(rows: pa.RecordBatch) -> _Columns:
    """user_id (str), day, modality, event_type, text and value (None where null) as arrays."""
    value = rows["value"]
    values = value.to_numpy(zero_copy_only=False).astype(object)
    values[value.is_null(nan_is_null=True).to_numpy(zero_copy_only=False)] = None
    return [
        _strings(rows["user_id"].cast(pa.string())),
        rows["day"].to_numpy(),
        *(_strings(rows[name]) for name in ("modality", "event_type", "text")),
        values,
    ]


def _strings(column: pa.Array) -> npt.NDArray[np.object_]:
    encoded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    words: npt.NDArray[np.object_] = np.array([*encoded.dictionary.to_pylist(), ""], dtype=object)
    indices: npt.NDArray[np.int32] = encoded.indices.fill_null(len(words) - 1).to_numpy()
    return words[indices]


def _user_rows(batches: Iterator[_Columns]) -> Iterator[tuple[str, _Columns]]:
    """Cut batches at user boundaries; a user may span batches."""
    held: _Columns | None = None
    for batch in batches:
        columns = batch
        if held is not None:
            columns = [np.concatenate(pair) for pair in zip(held, batch, strict=True)]
        ids = columns[0]
        starts = [0, *(np.flatnonzero(ids[1:] != ids[:-1]) + 1).tolist()]
        for start, stop in pairwise(starts):
            yield ids[start], [column[start:stop] for column in columns]
        held = [column[starts[-1] :] for column in columns]
    if held is not None:
        yield held[0][0], held
