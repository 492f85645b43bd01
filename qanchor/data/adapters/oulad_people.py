"""OULAD users: who is kept, their attributes, and their dealings with other courses."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from qanchor.data.adapters.oulad_rows import listed_events
from qanchor.data.adapters.oulad_tables import Enrolments, IntArray, Presentations

T = 75
"""As-of day of every user."""

_SOCIAL_SCIENCES = ("AAA", "BBB", "GGG")
_PASSED = ("Pass", "Distinction")


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherCourse:
    """Another enrolment of a user's student; days are on the user's own calendar."""

    name: str
    """Like AAA/2013J."""
    start: int
    end: int
    registered: float
    """NaN if unknown."""
    withdrew: float
    """NaN if the student did not."""
    result: str


@dataclass(frozen=True, slots=True, kw_only=True)
class People:
    """Users by place (the number in `user` columns); a user is one kept enrolment."""

    enrolment: IntArray
    """Index into `enrolments`."""
    enrolments: Enrolments
    presentations: Presentations
    others: tuple[tuple[OtherCourse, ...], ...]

    def __len__(self) -> int:
        return len(self.enrolment)

    @property
    def presentation(self) -> IntArray:
        """Presentation number of each user."""
        return self.enrolments.presentation[self.enrolment]

    @property
    def student(self) -> IntArray:
        """Student number of each user."""
        return self.enrolments.student[self.enrolment]

    def info(self, column: str) -> list[str | int | None]:
        """A column of studentInfo.csv, by user."""
        values: list[str | int | None] = (
            self.enrolments.info[column].take(pa.array(self.enrolment)).to_pylist()
        )
        return values


def candidates(enrolments: Enrolments) -> IntArray:
    """Enrolments registered and not withdrawn at T, and whose day of withdrawal is known."""
    result = np.array(enrolments.info["final_result"].to_pylist(), dtype=object)
    is_registered = enrolments.registered < T
    is_there = np.isnan(enrolments.unregistered) | (enrolments.unregistered >= T)
    is_vague = (result == "Withdrawn") & np.isnan(enrolments.unregistered)
    return np.flatnonzero(is_registered & is_there & ~is_vague)


def make_people(
    enrolment: IntArray, enrolments: Enrolments, presentations: Presentations
) -> People:
    """Number the users in an order that tells nothing: by a hash of the enrolment."""
    hashes = [hashlib.md5(str(key).encode()).digest() for key in enrolments.key[enrolment]]
    ordered = enrolment[sorted(range(len(hashes)), key=hashes.__getitem__)]
    return People(
        enrolment=ordered,
        enrolments=enrolments,
        presentations=presentations,
        others=tuple(_others(ordered, enrolments, presentations)),
    )


def _others(
    enrolment: IntArray, enrolments: Enrolments, presentations: Presentations
) -> Iterator[tuple[OtherCourse, ...]]:
    of_student: dict[int, list[int]] = {}
    for place, student in enumerate(enrolments.student.tolist()):
        of_student.setdefault(student, []).append(place)
    results = enrolments.info["final_result"].to_pylist()
    for own in enrolment.tolist():
        start = presentations.start_day[enrolments.presentation[own]]
        found = []
        for other in of_student[int(enrolments.student[own])]:
            if other == own:
                continue
            number = enrolments.presentation[other]
            shift = int(presentations.start_day[number] - start)
            found.append(
                OtherCourse(
                    name=presentations.name[number],
                    start=shift,
                    end=shift + int(presentations.length_days[number]),
                    registered=float(enrolments.registered[other] + shift),
                    withdrew=float(enrolments.unregistered[other] + shift),
                    result=results[other],
                )
            )
        yield tuple(found)


def split_of_student(student: int) -> str:
    """60/20/10/10 by the md5 of the student's number: no student is in two splits."""
    place = int(hashlib.md5(str(student).encode()).hexdigest(), 16) % 100
    names = ((60, "train"), (80, "valid"), (90, "test"), (100, "holdout"))
    return next(name for limit, name in names if place < limit)


def domain_of(module: str) -> str:
    """Field of study of a module, as published."""
    return "Social Sciences" if module in _SOCIAL_SCIENCES else "STEM"


def user_table(people: People, num_events: IntArray) -> pa.Table:
    """The content of users.parquet."""
    names = [people.presentations.name[number].split("/") for number in people.presentation]
    starts = people.presentations.start_day[people.presentation]
    dates = (starts + T - 719_163).astype("datetime64[D]")  # ordinal of 1 January 1970
    running = [[c for c in others if c.start <= T < c.end] for others in people.others]
    ended = [[c.result for c in others if c.end <= T] for others in people.others]
    return pa.table(
        {
            "user_id": np.arange(len(people)),
            "split": [split_of_student(student) for student in people.student.tolist()],
            "asof_day": pa.array([T] * len(people), pa.int16()),
            "asof_date_approx": dates.astype(str).tolist(),
            "module": [module for module, _ in names],
            "presentation": [term for _, term in names],
            "module_domain": [domain_of(module) for module, _ in names],
            "start_month": ["February" if term[-1] == "B" else "October" for _, term in names],
            "course_length_days": people.presentations.length_days[people.presentation],
            "gender": ["male" if code == "M" else "female" for code in people.info("gender")],
            "age_band": people.info("age_band"),
            "region": people.info("region"),
            "highest_education": people.info("highest_education"),
            "deprivation_band": people.info("imd_band"),
            "disability": [code == "Y" for code in people.info("disability")],
            "previous_attempts": people.info("num_of_prev_attempts"),
            "credits_studied": people.info("studied_credits"),
            "registration_day": people.enrolments.registered[people.enrolment],
            "other_courses_now": [
                sum(c.registered < T and not c.withdrew < T for c in courses) for courses in running
            ],
            "earlier_courses_passed": [
                sum(result in _PASSED for result in results) for results in ended
            ],
            "earlier_courses_not_passed": [
                sum(result not in _PASSED for result in results) for results in ended
            ],
            "n_events": num_events,
        }
    )


def registration_events(people: People, first_day: int, last_day: int) -> pa.Table:
    """The user's own registration, and registrations and withdrawals elsewhere."""
    rows = []
    registered = people.enrolments.registered[people.enrolment].tolist()
    for user, (own_day, others) in enumerate(zip(registered, people.others, strict=True)):
        text = f"registered for this course {_start_phrase(int(own_day))}"
        found = [(own_day, "register", text)]
        for course in others:
            module, term = course.name.split("/")
            where = f"another course (module {module}, {domain_of(module)}, presentation {term})"
            found.append((course.registered, "register_other", f"registered for {where}"))
            found.append((course.withdrew, "withdraw_other", f"withdrew from {where}"))
        rows += [
            (user, int(day), kind, text, np.nan)
            for day, kind, text in found
            if first_day <= day <= last_day
        ]
    return listed_events(rows, "registration")


def _start_phrase(day: int) -> str:
    if day == 0:
        return "on its start day"
    unit = "day" if abs(day) == 1 else "days"
    return f"{abs(day)} {unit} {'before it starts' if day < 0 else 'after it started'}"
