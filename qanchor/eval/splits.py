"""Users and labels of a data set by split, as rows of one table of users."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qanchor.data.dataset import Dataset
from qanchor.errors import DataError
from qanchor.eval.bootstrap import TestScores
from qanchor.eval.metrics import Scores
from qanchor.eval.probe import Features, SplitData

SPLITS = ("train", "valid", "test")
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
    """Scenario to split to labels."""
    test_rows: IntArray
    """Rows of the test users, labelled or not: what the bootstrap draws from."""

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
    """The first `max_users` users of each split (0: all)."""
    return [user for split in SPLITS for user in dataset.user_ids(split)[: max_users or None]]


def judged_users(dataset: Dataset, users: Sequence[str]) -> JudgedUsers:
    """Labels of all scenarios for `users`.

    Raises DataError when the data set has no scenario, or a split does not have both classes.
    """
    if not dataset.scenarios:
        raise DataError(
            "scenarios.json", str(dataset.path), "the data set has no scenarios", "add them"
        )
    row_of = {user: row for row, user in enumerate(users)}
    by_scenario = {
        scenario.name: _by_split(dataset, scenario.name, row_of) for scenario in dataset.scenarios
    }
    is_test = [dataset.split_of[user] == "test" for user in users]
    return JudgedUsers(tuple(users), by_scenario, np.flatnonzero(is_test))


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
        chosen = labels[picks].astype(np.int64)
        if len(np.unique(chosen)) < 2:
            raise DataError(
                "labels.parquet",
                scenario,
                f"split {split} needs users of both classes, has {len(picks)} users",
                "evaluate more users",
            )
        rows = np.array([row_of[labelled[index]] for index in picks], dtype=np.int64)
        found[split] = LabelledSplit(rows, chosen)
    return found
