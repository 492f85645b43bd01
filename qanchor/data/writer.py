"""Writing a data set directory: column types, row groups and JSON files in one place."""

from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import pyarrow as pa
import pyarrow.parquet as pq

from qanchor.config import save
from qanchor.data.dataset import SCENARIOS_FILE, SCHEMA_FILE, DatasetConfig
from qanchor.errors import DataError

ROW_GROUP_ROWS = 1 << 17

_WORD = pa.dictionary(pa.int32(), pa.string())
EVENT_SCHEMA = pa.schema(
    [
        ("user_id", pa.int64()),
        ("day", pa.int16()),
        ("modality", _WORD),
        ("event_type", _WORD),
        ("text", _WORD),
        ("value", pa.float32()),
    ]
)
LABEL_SCHEMA = pa.schema(
    [("user_id", pa.int64()), ("scenario", _WORD), ("asof_day", pa.int16()), ("label", pa.int8())]
)


class TableWriter:
    """Appends tables to one Parquet file, in row groups small enough to be read one at a time.

    The file appears under its name when the `with` block ends without an error, and not before.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._path = path
        self._partial = path.with_name(path.name + ".partial")
        self._schema = schema
        self._writer = pq.ParquetWriter(self._partial, schema, compression="zstd")

    def write(self, table: pa.Table) -> None:
        """Append rows; columns are cast to the file's types."""
        columns = table.select(self._schema.names).cast(self._schema)
        self._writer.write_table(columns, row_group_size=ROW_GROUP_ROWS)

    def __enter__(self) -> "TableWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._writer.close()
        if error is None:
            self._partial.replace(self._path)
        else:
            self._partial.unlink()


def write_table(table: pa.Table, path: Path) -> None:
    """Write one table as one Parquet file."""
    with TableWriter(path, table.schema) as writer:
        writer.write(table)


def write_description(
    directory: Path, config: DatasetConfig, scenarios: Iterable[dict[str, str]]
) -> None:
    """Write schema.json and scenarios.json."""
    save(config, directory / SCHEMA_FILE)
    save(list(scenarios), directory / SCENARIOS_FILE)


def make_directory(path: Path) -> None:
    """Create an empty data set directory. Raises DataError if it exists and is not empty."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        rule = "must not exist or be an empty directory"
        raise DataError("destination", str(path), rule, "choose another or remove it")
    path.mkdir(parents=True, exist_ok=True)
