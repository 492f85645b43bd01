"""Users and labels of a data set by split, as rows of one table of users."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from qanchor.data.dataset import Dataset
from qanchor.errors import DataError
from qanchor.eval.bootstrap import TestScores
from qanchor.eval.metrics import Scores
from qanchor.eval.probe import Features, SplitData
from qanchor.eval.results import SkippedScenario

log = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")
USERS_SEED = 8
"""Of the users that a limit leaves."""
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class LabelledSplit:
    """Rows of the user table [N] that have a scenario's label, and the labels."""

    rows: IntArray
    labels: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class JudgedUsers:
    """The users of a judgement in the order of every feature table, with all labels."""

    users: tuple[str, ...]
    by_scenario: Mapping[str, Mapping[str, LabelledSplit]]
    """Scenario to split to labels; both classes are in each."""
    test_rows: IntArray
    """Rows of the test users, labelled or not: what the bootstrap draws from."""
    skipped: tuple[SkippedScenario, ...] = ()
    """The data set's other scenarios."""

    def narrowed(self, dataset: Dataset) -> Dataset:
        """The data set with the scenarios that are judged alone, in the order of `by_scenario`."""
        kept = [scenario for scenario in dataset.scenarios if scenario.name in self.by_scenario]
        return replace(dataset, scenarios=tuple(kept))

    def split_data(self, scenario: str, features: Features) -> dict[str, SplitData]:
        """A scenario's splits of a table of features [users, F]."""
        return {
            split: SplitData(features[part.rows], part.labels)
            for split, part in self.by_scenario[scenario].items()
        }

    def test_scores(self, scenario: str, scores: Scores) -> TestScores:
        """Scores of the scenario's labelled test users, placed among all test users."""
        part = self.by_scenario[scenario]["test"]
        return TestScores(np.searchsorted(self.test_rows, part.rows), part.labels, scores)


def chosen_users(dataset: Dataset, max_users: int) -> list[str]:
    """`max_users` users of each split (0: all) in the order of their ids.

    They are drawn at random, always the same, smaller limits within larger ones: the lowest ids
    are often the oldest users.
    """
    chosen = []
    for number, split in enumerate(SPLITS):
        users = dataset.user_ids(split)
        drawn = np.random.default_rng([USERS_SEED, number]).permutation(len(users))
        chosen += [users[place] for place in np.sort(drawn[: max_users or None])]
    return chosen


def judged_users(dataset: Dataset, users: Sequence[str]) -> JudgedUsers:
    """Labels for `users` of all scenarios that have both classes in every split.

    The others are skipped, with a warning. Raises DataError when none is left.
    """
    if not dataset.scenarios:
        raise DataError(
            "scenarios.json", str(dataset.path), "the data set has no scenarios", "add them"
        )
    row_of = {user: row for row, user in enumerate(users)}
    by_scenario, skipped = {}, []
    for scenario in dataset.scenarios:
        parts = _by_split(dataset, scenario.name, row_of)
        lacking = [_lacking(name, part.labels) for name, part in parts.items()]
        if reason := "; ".join(filter(None, lacking)):
            log.warning("scenario %s is not judged: %s", scenario.name, reason)
            skipped.append(SkippedScenario(scenario=scenario.name, reason=reason))
        else:
            by_scenario[scenario.name] = parts
    if not by_scenario:
        is_limited = len(users) < sum(split in SPLITS for split in dataset.split_of.values())
        raise DataError(
            "labels.parquet",
            f"{skipped[0].scenario}: {skipped[0].reason}",
            "no scenario has users of both classes in train, valid and test",
            "judge more users (--max-users)" if is_limited else "label users of the other class",
        )
    is_test = [dataset.split_of[user] == "test" for user in users]
    return JudgedUsers(tuple(users), by_scenario, np.flatnonzero(is_test), tuple(skipped))


def _by_split(
    dataset: Dataset, scenario: str, row_of: Mapping[str, int]
) -> dict[str, LabelledSplit]:
    labelled, labels = dataset.labels(scenario)
    found = {}
    for split in SPLITS:
        picks = [
            index
            for index, user in enumerate(labelled)
            if user in row_of and dataset.split_of[user] == split
        ]
        rows = np.array([row_of[labelled[index]] for index in picks], dtype=np.int64)
        found[split] = LabelledSplit(rows, labels[picks].astype(np.int64))
    return found


def _lacking(split: str, labels: npt.NDArray[np.int64]) -> str:
    """Why a split cannot be judged by these labels; empty where it can."""
    classes = np.unique(labels)
    if len(classes) > 1:
        return ""
    if not len(classes):
        return f"no user of {split} has a label"
    return f"all {len(labels)} labelled users of {split} have label {classes[0]}"
