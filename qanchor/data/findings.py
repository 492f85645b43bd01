"""What is wrong with a data set: problems that name file, row, column, value, rule and remedy."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One broken rule at one place."""

    file: str
    row: int | None
    """Counted from 0; None where the whole file or column is meant."""
    column: str
    value: object
    rule: str
    remedy: str

    def __str__(self) -> str:
        shown = repr(self.value)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        place = self.file if self.row is None else f"{self.file}, row {self.row}"
        return f"{place}, column {self.column}: {shown}: {self.rule}; {self.remedy}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Outcome of a validation."""

    path: Path
    problems: tuple[Problem, ...]
    """The first ones found, at most as many as asked for."""
    num_problems: int
    """All of them."""
    num_rows: dict[str, int]
    """Rows read, by file."""

    @property
    def is_valid(self) -> bool:
        """Whether nothing was found."""
        return self.num_problems == 0


@dataclass(slots=True)
class Findings:
    """Collects problems while a validation runs: counts all, keeps the first `max_problems`."""

    max_problems: int
    problems: list[Problem] = field(default_factory=list)
    num_problems: int = 0
    num_rows: dict[str, int] = field(default_factory=dict)

    def add(
        self, file: str, column: str, value: object, rule: str, remedy: str, row: int | None = None
    ) -> None:
        """Note one problem."""
        self.num_problems += 1
        if len(self.problems) < self.max_problems:
            self.problems.append(
                Problem(file=file, row=row, column=column, value=value, rule=rule, remedy=remedy)
            )


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of one file under inspection, beginning at row `first` of the file."""

    file: str
    first: int
    table: pa.Table
    findings: Findings

    def flag(self, column: str, is_wrong: pa.Array, rule: str, remedy: str) -> None:
        """Note every row where `column` has a value and the mask is true."""
        mask = pc.and_(pc.fill_null(is_wrong, False), pc.is_valid(self.table[column]))
        self._note(column, mask, rule, remedy)

    def flag_nulls(self, columns: Sequence[str]) -> None:
        """Note every null in columns that must not have one."""
        for column in columns:
            mask = pc.is_null(self.table[column])
            self._note(column, mask, "must not be null", "fill it or drop the row")

    def _note(self, column: str, mask: pa.Array, rule: str, remedy: str) -> None:
        count = pc.sum(mask).as_py() or 0
        if not count:
            return
        room = max(0, self.findings.max_problems - len(self.findings.problems))
        places = pc.indices_nonzero(mask)[:room].to_pylist()
        for place in places:
            value = self.table[column][place].as_py()
            self.findings.add(self.file, column, value, rule, remedy, row=self.first + place)
        self.findings.num_problems += count - len(places)


def is_word(kind: pa.DataType) -> bool:
    """Whether a column holds strings, plain or dictionary-encoded."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def is_id(kind: pa.DataType) -> bool:
    """Whether a column can hold user ids."""
    return bool(
        pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)
    )


def is_number(kind: pa.DataType) -> bool:
    """Whether a column holds numbers."""
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind))


def is_whole(kind: pa.DataType) -> bool:
    """Whether a column holds whole numbers."""
    return bool(pa.types.is_integer(kind))


def is_attribute(kind: pa.DataType) -> bool:
    """Whether a column can hold an attribute; one of type null has no value for anybody."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    is_plain = pa.types.is_boolean(kind) or pa.types.is_null(kind)
    return is_plain or is_word(kind) or is_number(kind)


COUNT_DAYS = (
    "write whole days since an epoch; a date or time stamp becomes that by "
    ".cast(pa.date32()).cast(pa.int32()), with day_zero 1970-01-01 in schema.json"
)

_CAST = "cast the column"
_TYPES = {
    "user_id": (is_id, "an integer or a plain string", _CAST),
    "split": (is_word, "a string", _CAST),
    "asof_day": (is_whole, "an integer", COUNT_DAYS),
    "day": (is_whole, "an integer", COUNT_DAYS),
    "modality": (is_word, "a string", _CAST),
    "event_type": (is_word, "a string", _CAST),
    "text": (is_word, "a string", _CAST),
    "value": (is_number, "a number", _CAST),
    "scenario": (is_word, "a string", _CAST),
    "label": (is_whole, "an integer", _CAST),
}
_ATTRIBUTE = (is_attribute, "a string, a number or a boolean", _CAST)


def open_table(path: Path, columns: Sequence[str], findings: Findings) -> pq.ParquetFile | None:
    """Open a Parquet file if it is there, readable, and has the columns in the right types."""
    if not path.is_file():
        findings.add(path.name, "-", str(path), "file missing", "see qanchor/data/dataset.py")
        return None
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        findings.add(path.name, "-", str(error), "not a Parquet file", "write it anew")
        return None
    before = findings.num_problems
    for column in columns:
        if column not in file.schema_arrow.names:
            remedy = f"it has {', '.join(file.schema_arrow.names)}"
            findings.add(path.name, column, None, "column missing", remedy)
            continue
        has_type, wanted, remedy = _TYPES.get(column, _ATTRIBUTE)
        kind = file.schema_arrow.field(column).type
        if not has_type(kind):
            findings.add(path.name, column, str(kind), f"must be {wanted}", remedy)
    findings.num_rows[path.name] = file.metadata.num_rows
    return file if findings.num_problems == before else None
