"""The publisher's seven OULAD tables, read from CSV and put on common keys and a calendar.

A presentation is one run of a course, named like "AAA/2013J" and numbered in the order of
courses.csv. Days count from its start; the calendar date of the start is approximate (the source
names only the month): the first Saturday of February (B) or October (J).
"""

import datetime
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from qanchor.errors import DataError

CSV_COLUMNS: dict[str, dict[str, pa.DataType]] = {
    "courses.csv": {
        "code_module": pa.string(),
        "code_presentation": pa.string(),
        "module_presentation_length": pa.int64(),
    },
    "vle.csv": {
        "id_site": pa.int64(),
        "code_module": pa.string(),
        "code_presentation": pa.string(),
        "activity_type": pa.string(),
        "week_from": pa.int64(),
        "week_to": pa.int64(),
    },
    "assessments.csv": {
        "code_module": pa.string(),
        "code_presentation": pa.string(),
        "id_assessment": pa.int64(),
        "assessment_type": pa.string(),
        "date": pa.int64(),
        "weight": pa.float64(),
    },
    "studentInfo.csv": {
        "code_module": pa.string(),
        "code_presentation": pa.string(),
        "id_student": pa.int64(),
        "gender": pa.string(),
        "region": pa.string(),
        "highest_education": pa.string(),
        "imd_band": pa.string(),
        "age_band": pa.string(),
        "num_of_prev_attempts": pa.int64(),
        "studied_credits": pa.int64(),
        "disability": pa.string(),
        "final_result": pa.string(),
    },
    "studentRegistration.csv": {
        "code_module": pa.string(),
        "code_presentation": pa.string(),
        "id_student": pa.int64(),
        "date_registration": pa.float64(),
        "date_unregistration": pa.float64(),
    },
    "studentAssessment.csv": {
        "id_assessment": pa.int64(),
        "id_student": pa.int64(),
        "date_submitted": pa.int64(),
        "is_banked": pa.int64(),
        "score": pa.float64(),
    },
    "studentVle.csv": {
        "code_module": pa.dictionary(pa.int32(), pa.string()),
        "code_presentation": pa.dictionary(pa.int32(), pa.string()),
        "id_student": pa.int64(),
        "id_site": pa.int64(),
        "date": pa.int64(),
        "sum_click": pa.int64(),
    },
}

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

_STUDENT_KEYS = 10**9
"""Student numbers are smaller; a presentation's number times this plus the student's is a key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Presentations:
    """All runs of all courses, by number."""

    name: tuple[str, ...]
    """Like AAA/2013J."""
    start_day: IntArray
    """Calendar day number (proleptic ordinal) of day 0; approximate."""
    length_days: IntArray

    def numbers(self, table: pa.Table, file: str) -> IntArray:
        """Presentation number of each row. Raises DataError for one that courses.csv lacks."""
        pairs = [name.split("/") for name in self.name]
        modules, terms = (sorted(set(column)) for column in zip(*pairs, strict=True))
        lookup = np.full((len(modules) + 1, len(terms) + 1), -1, dtype=np.int64)
        for number, (module, term) in enumerate(pairs):
            lookup[modules.index(module), terms.index(term)] = number
        codes = [
            pc.fill_null(
                pc.index_in(table[column].cast(pa.string()), pa.array(words)), len(words)
            ).to_numpy()
            for column, words in (("code_module", modules), ("code_presentation", terms))
        ]
        numbers: IntArray = lookup[codes[0], codes[1]]
        if (numbers < 0).any():
            row = int(np.argmax(numbers < 0))
            value = [table[column][row].as_py() for column in ("code_module", "code_presentation")]
            rule = "must be a presentation of courses.csv"
            raise DataError(f"{file}, row {row}", value, rule, "download the files together")
        return numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Enrolments:
    """All enrolments, ascending by key; one entry per row of studentInfo.csv."""

    key: IntArray
    student: IntArray
    presentation: IntArray
    registered: FloatArray
    """Day of registration; NaN if unknown."""
    unregistered: FloatArray
    """Day of withdrawal; NaN if none is known."""
    info: pa.Table
    """studentInfo.csv in the same order."""

    def find(self, presentation: IntArray, student: IntArray) -> IntArray:
        """Index of each (presentation, student), -1 where there is no such enrolment."""
        key = enrolment_key(presentation, student)
        place = np.minimum(np.searchsorted(self.key, key), len(self.key) - 1)
        found: IntArray = np.where(self.key[place] == key, place, -1)
        return found


def read_csv(directory: Path, file: str) -> pa.Table:
    """Read one table. Raises DataError naming file and column."""
    path = directory / file
    if not path.is_file():
        raise DataError(file, str(path), "file missing", "unpack all seven CSV files there")
    options = csv.ConvertOptions(
        column_types=CSV_COLUMNS[file],
        include_columns=list(CSV_COLUMNS[file]),
        null_values=["", "?"],
        strings_can_be_null=True,
    )
    try:
        return csv.read_csv(path, convert_options=options)
    except KeyError as error:
        raise DataError(file, str(error), "column missing", "use the publisher's file") from None
    except pa.ArrowInvalid as error:
        raise DataError(file, str(error), "cannot be read", "use the publisher's file") from None


def read_presentations(directory: Path) -> Presentations:
    """Read courses.csv."""
    table = read_csv(directory, "courses.csv")
    terms = table["code_presentation"].to_pylist()
    names = zip(table["code_module"].to_pylist(), terms, strict=True)
    return Presentations(
        name=tuple(f"{module}/{term}" for module, term in names),
        start_day=np.array([first_saturday(term).toordinal() for term in terms]),
        length_days=table["module_presentation_length"].to_numpy(),
    )


def first_saturday(term: str) -> datetime.date:
    """Approximate start of a presentation.

    >>> first_saturday("2013B").isoformat(), first_saturday("2014J").isoformat()
    ('2013-02-02', '2014-10-04')
    """
    months = {"B": 2, "J": 10}
    if len(term) != 5 or not term[:4].isdigit() or term[4] not in months:
        rule = "must be a year and B or J, like 2013J"
        raise DataError("courses.csv: code_presentation", term, rule, "use the publisher's file")
    first = datetime.date(int(term[:4]), months[term[4]], 1)
    return first + datetime.timedelta(days=(5 - first.weekday()) % 7)


def enrolment_key(presentation: IntArray, student: IntArray) -> IntArray:
    """One number per (presentation, student)."""
    key: IntArray = presentation * _STUDENT_KEYS + student
    return key


def read_enrolments(directory: Path, presentations: Presentations) -> Enrolments:
    """Read studentInfo.csv and studentRegistration.csv."""
    info = read_csv(directory, "studentInfo.csv")
    number, student = presentations.numbers(info, "studentInfo.csv"), _ints(info, "id_student")
    order = np.argsort(enrolment_key(number, student), kind="stable")
    enrolments = Enrolments(
        key=enrolment_key(number, student)[order],
        student=student[order],
        presentation=number[order],
        registered=np.full(len(order), np.nan),
        unregistered=np.full(len(order), np.nan),
        info=info.take(pa.array(order)),
    )
    dates = read_csv(directory, "studentRegistration.csv")
    number = presentations.numbers(dates, "studentRegistration.csv")
    place = enrolments.find(number, _ints(dates, "id_student"))
    for target, column in (
        (enrolments.registered, "date_registration"),
        (enrolments.unregistered, "date_unregistration"),
    ):
        target[place[place >= 0]] = dates[column].to_numpy()[place >= 0]
    return enrolments


def _ints(table: pa.Table, column: str) -> IntArray:
    values: IntArray = table[column].to_numpy()
    return values
