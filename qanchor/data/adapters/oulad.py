"""OULAD (Open University Learning Analytics Dataset) as a data set directory.

A user is one enrolment; the as-of day is 75 days after the start of the presentation. Two kinds
of source: the publisher's seven CSV tables, or a directory of Parquet files already derived from
them in the format of `qanchor.data.dataset`.
"""

import shutil
from importlib import resources
from pathlib import Path

import msgspec
import pyarrow.parquet as pq

from qanchor.config import save
from qanchor.data import dataset
from qanchor.data.dataset import DatasetConfig
from qanchor.data.validate import validate_dataset
from qanchor.data.writer import make_directory, write_table
from qanchor.errors import DataError

CSV_FILES = (
    "studentInfo.csv",
    "studentRegistration.csv",
    "studentVle.csv",
    "studentAssessment.csv",
    "assessments.csv",
    "courses.csv",
    "vle.csv",
)
_REQUIRED = (dataset.EVENTS_FILE, dataset.USERS_FILE)
_OPTIONAL = (dataset.LABELS_FILE, dataset.FUTURE_FILE)


def import_oulad(source: str | Path, destination: str | Path) -> Path:
    """Make a data set directory at `destination` and return it.

    The result is validated. Raises DataError for a source that is neither kind or that breaks a
    rule, and for a destination that is not empty.
    """
    origin, target = Path(source), Path(destination)
    if all((origin / name).is_file() for name in _REQUIRED):
        make_directory(target)
        _copy_parquet(origin, target)
    elif any((origin / name).is_file() for name in CSV_FILES):
        from qanchor.data.adapters.oulad_csv import convert_csv

        make_directory(target)
        convert_csv(origin, target)
    else:
        rule = f"must hold {' and '.join(_REQUIRED)}, or the publisher's {', '.join(CSV_FILES)}"
        raise DataError("source", str(origin), rule, "unpack the download there")
    save(oulad_config(), target / dataset.SCHEMA_FILE)
    report = validate_dataset(target, max_problems=1)
    if not report.is_valid:
        found = report.problems[0]
        field = f"{found.file}, row {found.row}, column {found.column}"
        raise DataError(field, found.value, found.rule, "list all: qanchor data validate")
    return target


def oulad_config() -> DatasetConfig:
    """The data set's schema: modalities, limits, templates, attributes, licence."""
    raw = resources.files(__package__).joinpath("oulad_schema.json").read_bytes()
    return msgspec.json.decode(raw, type=DatasetConfig)


def _copy_parquet(origin: Path, target: Path) -> None:
    """Copy, in row groups that can be read one at a time."""
    for name in (*_REQUIRED, *_OPTIONAL):
        if (origin / name).is_file():
            write_table(pq.read_table(origin / name), target / name)
    if (origin / dataset.SCENARIOS_FILE).is_file():
        shutil.copyfile(origin / dataset.SCENARIOS_FILE, target / dataset.SCENARIOS_FILE)
