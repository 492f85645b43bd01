"""OULAD assignments and tests: handed in, carried over, missed; in words."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from qanchor.data.adapters.oulad_rows import listed_events
from qanchor.data.adapters.oulad_tables import FloatArray, IntArray, Presentations, read_csv

MARKING_DAYS = 14
"""Assumed time until tutor-marked work has its score; the source has no return date."""

_WORK = {"TMA": "tutor-marked assignment", "CMA": "computer-marked test"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Tutor-marked assignments and computer-marked tests (not exams), ascending by id."""

    id_assessment: IntArray
    presentation: IntArray
    is_tutor_marked: npt.NDArray[np.bool_]
    deadline: IntArray
    phrase: tuple[str, ...]
    """`tutor-marked assignment 2 (12.5% of the grade)`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HandIns:
    """Work handed in by kept users, or carried over from an earlier attempt (banked)."""

    user: IntArray
    work: IntArray
    """Index into `Work`."""
    day: IntArray
    is_banked: npt.NDArray[np.bool_]
    score: FloatArray
    """0 to 100; NaN if unknown."""


def read_work(directory: Path, presentations: Presentations) -> Work:
    """Read assessments.csv; numbers count by deadline, then id, within type and presentation."""
    table = read_csv(directory, "assessments.csv")
    numbers = presentations.numbers(table, "assessments.csv")
    rows = [
        row | {"presentation": number}
        for row, number in zip(table.to_pylist(), numbers.tolist(), strict=True)
        if row["assessment_type"] in _WORK and row["date"] is not None
    ]
    rows.sort(key=lambda row: (row["date"], row["id_assessment"]))
    counted: dict[tuple[int, str], int] = {}
    for row in rows:
        kind = row["assessment_type"]
        counted[row["presentation"], kind] = counted.get((row["presentation"], kind), 0) + 1
        weight = f" ({row['weight']:g}% of the grade)" if row["weight"] else ""
        row["phrase"] = f"{_WORK[kind]} {counted[row['presentation'], kind]}{weight}"
    rows.sort(key=lambda row: row["id_assessment"])
    return Work(
        id_assessment=np.array([row["id_assessment"] for row in rows], dtype=np.int64),
        presentation=np.array([row["presentation"] for row in rows], dtype=np.int64),
        is_tutor_marked=np.array([row["assessment_type"] == "TMA" for row in rows], dtype=bool),
        deadline=np.array([row["date"] for row in rows], dtype=np.int64),
        phrase=tuple(row["phrase"] for row in rows),
    )


def hand_in_events(hand_ins: HandIns, work: Work, first_day: int, last_day: int) -> pa.Table:
    """Work handed in on days first..last, as known on day last + 1."""
    rows = []
    columns = (hand_ins.user, hand_ins.work, hand_ins.day, hand_ins.is_banked, hand_ins.score)
    for user, index, day, is_banked, score in zip(*(c.tolist() for c in columns), strict=True):
        if not first_day <= day <= last_day:
            continue
        is_tutor_marked = bool(work.is_tutor_marked[index])
        is_marked = is_banked or not is_tutor_marked or day < last_day + 1 - MARKING_DAYS
        known = score if is_marked else np.nan
        if is_banked:
            kind = "banked"
            result = "" if np.isnan(known) else f", score {known:g}"
            text = f"carried over an earlier result for {work.phrase[index]}{result}"
        else:
            kind = "submit_tma" if is_tutor_marked else "submit_cma"
            result = "not marked yet" if np.isnan(known) else f"score {known:g}"
            delay = _delay_phrase(day - int(work.deadline[index]))
            text = f"submitted {work.phrase[index]} {delay}, {result}"
        rows.append((user, day, kind, text, known))
    return listed_events(rows, "assessment")


def _delay_phrase(num_days: int) -> str:
    if num_days == 0:
        return "on the deadline day"
    unit = "day" if abs(num_days) == 1 else "days"
    return f"{abs(num_days)} {unit} {'late' if num_days > 0 else 'before the deadline'}"


def missed_events(
    user_presentation: IntArray, hand_ins: HandIns, work: Work, first_day: int, last_day: int
) -> pa.Table:
    """Deadlines by which nothing was handed in, dated the day after, on days first..last."""
    on_time = hand_ins.is_banked | (hand_ins.day <= work.deadline[hand_ins.work])
    done = set(zip(hand_ins.user[on_time].tolist(), hand_ins.work[on_time].tolist(), strict=True))
    rows = []
    for index, deadline in enumerate(work.deadline.tolist()):
        if not first_day <= deadline + 1 <= last_day:
            continue
        kind = "missed_tma" if work.is_tutor_marked[index] else "missed_cma"
        text = f"missed the deadline of {work.phrase[index]}"
        enrolled = np.flatnonzero(user_presentation == work.presentation[index]).tolist()
        late = [user for user in enrolled if (user, index) not in done]
        rows += [(user, deadline + 1, kind, text, np.nan) for user in late]
    return listed_events(rows, "assessment")
