"""The ten OULAD labels, from what happened on day T and later.

Each function returns labels by user: 1, 0, or -1 where the user is not eligible. The questions
and definitions are in `oulad_scenarios.json`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from qanchor.data.adapters.oulad_clicks import Clicks, Sites
from qanchor.data.adapters.oulad_people import People, T, split_of_student
from qanchor.data.adapters.oulad_tables import IntArray
from qanchor.data.adapters.oulad_work import HandIns, Work

_MONTH = 30
_LIVE_ROOMS = ("oucollaborate", "ouelluminate")
_NO_LATER_DATA = "2014J"
_DAYS_PER_KEY = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcomes:
    """Everything labels are computed from."""

    people: People
    clicks: Clicks
    """All clicks of the users, before and after T."""
    sites: Sites
    hand_ins: HandIns
    work: Work

    def active_days(self, first_day: int, activities: tuple[str, ...] = ()) -> IntArray:
        """Distinct days with a click in the 30 days from `first_day` on, by user."""
        keep = (self.clicks.day >= first_day) & (self.clicks.day < first_day + _MONTH)
        if activities:
            is_wanted = np.array([activity in activities for activity in self.sites.activity])
            keep &= is_wanted[self.clicks.site]
        keys = np.unique(self.clicks.user[keep] * _DAYS_PER_KEY + self.clicks.day[keep])
        counts: IntArray = np.bincount(keys // _DAYS_PER_KEY, minlength=len(self.people))
        return counts

    def above_quantile(self, values: IntArray, quantile: float) -> IntArray:
        """1 where a value is above the quantile of the user's presentation."""
        label: IntArray = np.zeros(len(values), dtype=np.int64)
        for number in np.unique(self.people.presentation):
            cohort = self.people.presentation == number
            label[cohort] = values[cohort] > np.quantile(values[cohort], quantile)
        return label


def _as_label(is_positive: npt.NDArray[np.bool_]) -> IntArray:
    label: IntArray = is_positive.astype(np.int64)
    return label


def _dormant(outcomes: Outcomes) -> IntArray:
    return _as_label(outcomes.active_days(T) == 0)


def _heavy(outcomes: Outcomes) -> IntArray:
    return outcomes.above_quantile(outcomes.active_days(T), 0.75)


def _drop(outcomes: Outcomes) -> IntArray:
    before, after = outcomes.active_days(T - _MONTH), outcomes.active_days(T)
    return np.where(before >= 4, _as_label(after < 0.5 * before), -1)


def _forum(outcomes: Outcomes) -> IntArray:
    return _as_label(outcomes.active_days(T, ("forumng",)) >= 3)


def _withdraw(outcomes: Outcomes) -> IntArray:
    results = outcomes.people.info("final_result")
    return np.array([result == "Withdrawn" for result in results], dtype=np.int64)


def _fail(outcomes: Outcomes) -> IntArray:
    results = outcomes.people.info("final_result")
    codes = {"Withdrawn": -1, "Fail": 1}
    return np.array([codes.get(str(result), 0) for result in results], dtype=np.int64)


def _missed_deadline(outcomes: Outcomes) -> IntArray:
    """Tutor-marked work due in 60 days that comes over a week late or never."""
    people, work, hand_ins = outcomes.people, outcomes.work, outcomes.hand_ins
    day_of: dict[tuple[int, int], float] = {}
    days = np.where(hand_ins.is_banked, -np.inf, hand_ins.day)
    for user, index, day in zip(
        hand_ins.user.tolist(), hand_ins.work.tolist(), days.tolist(), strict=True
    ):
        day_of[user, index] = day
    label = np.full(len(people), -1, dtype=np.int64)
    for index in np.flatnonzero(work.is_tutor_marked).tolist():
        deadline = int(work.deadline[index])
        if not T <= deadline < T + 60:
            continue
        for user in np.flatnonzero(people.presentation == work.presentation[index]).tolist():
            day = day_of.get((user, index), np.inf)
            if day >= T:
                label[user] = max(label[user], int(day > deadline + 7))
    return label


def _reenrol(outcomes: Outcomes) -> IntArray:
    label = np.zeros(len(outcomes.people), dtype=np.int64)
    for user, others in enumerate(outcomes.people.others):
        number = outcomes.people.presentation[user]
        is_late = outcomes.people.presentations.name[number].endswith(_NO_LATER_DATA)
        if is_late or any(c.start > 0 and c.registered <= T for c in others):
            label[user] = -1
        else:
            label[user] = any(T < c.registered <= T + 365 for c in others)
    return label


def _live_session(outcomes: Outcomes) -> IntArray:
    label = _as_label(outcomes.active_days(T, _LIVE_ROOMS) > 0)
    for number in np.unique(outcomes.people.presentation):
        cohort = outcomes.people.presentation == number
        if label[cohort].mean() < 0.05:
            label[cohort] = -1
    return label


def _explore(outcomes: Outcomes) -> IntArray:
    clicks, num_sites = outcomes.clicks, len(outcomes.sites.activity)
    key = clicks.user * num_sites + clicks.site
    later = np.unique(key[(clicks.day >= T) & (clicks.day < T + _MONTH)])
    fresh = np.setdiff1d(later, key[clicks.day < T])
    counts = np.bincount(fresh // num_sites, minlength=len(outcomes.people))
    return outcomes.above_quantile(counts, 0.70)


_LABELS: dict[str, Callable[[Outcomes], IntArray]] = {
    "eng_dormant_30d": _dormant,
    "eng_heavy_30d": _heavy,
    "eng_drop_30d": _drop,
    "eng_forum_30d": _forum,
    "risk_withdraw": _withdraw,
    "risk_fail": _fail,
    "risk_missed_deadline_60d": _missed_deadline,
    "mkt_reenrol_365d": _reenrol,
    "mkt_live_session_30d": _live_session,
    "mkt_explore_30d": _explore,
}


def label_table(outcomes: Outcomes) -> pa.Table:
    """The content of labels.parquet: eligible users, none of split holdout."""
    students = outcomes.people.student.tolist()
    is_open = np.array([split_of_student(student) != "holdout" for student in students], dtype=bool)
    parts = []
    for scenario, compute in _LABELS.items():
        label = compute(outcomes)
        users = np.flatnonzero(is_open & (label >= 0))
        parts.append(
            pa.table(
                {
                    "user_id": users,
                    "scenario": pa.array([scenario] * len(users), pa.string()),
                    "asof_day": np.full(len(users), T, dtype=np.int16),
                    "label": label[users].astype(np.int8),
                }
            )
        )
    return pa.concat_tables(parts)
