"""Bootstrap over test users: how sure a score is, and the difference between two methods.

Users are drawn, with replacement, from all test users at once, and the same draws serve every
scenario and method: averages over scenarios keep the users' correlation, and differences are
paired.

Legend: B draws, U test users, N users of them that have a label.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qanchor.config import Config
from qanchor.eval.metrics import Floats, Labels, Scores, weighted_auc_ks

LEVEL = 0.95
IntArray = npt.NDArray[np.int64]


class Interval(Config, frozen=True, kw_only=True):
    """The middle 95 % of the draws (percentile bootstrap)."""

    low: float
    high: float

    @property
    def is_above_zero(self) -> bool:
        """Whether the whole interval lies above zero."""
        return self.low > 0


@dataclass(frozen=True, slots=True)
class TestScores:
    """What a method says of the test users that have a scenario's label."""

    # pytest takes any class called Test... for one of its own.
    __test__ = False

    rows: IntArray
    """Places among all test users [N]."""
    labels: Labels
    scores: Scores


@dataclass(frozen=True, slots=True)
class Draws:
    """AUC and KS of one method under each draw, [B, scenarios]."""

    auc: Floats
    ks: Floats

    @property
    def average(self) -> tuple[Floats, Floats]:
        """AUC [B] and KS [B] averaged over scenarios; those without both classes are left out."""
        return over_scenarios(self.auc), over_scenarios(self.ks)


class Bootstrap:
    """The draws of one set of test users; equal arguments give equal draws."""

    def __init__(self, num_users: int, num_draws: int = 1000, seed: int = 0) -> None:
        rng = np.random.default_rng([seed, 5])
        even = np.full(num_users, 1 / num_users)
        # A byte each: that a user is drawn more than 255 times does not happen.
        self.weights_BU = np.empty((num_draws, num_users), dtype=np.uint8)
        for draw_U in self.weights_BU:
            draw_U[:] = rng.multinomial(num_users, even)

    def draws(self, scenarios: Sequence[TestScores]) -> Draws:
        """AUC and KS of every scenario under every draw."""
        pairs = [
            weighted_auc_ks(one.labels, one.scores, self.weights_BU, one.rows) for one in scenarios
        ]
        return Draws(*(np.stack(columns, axis=1) for columns in zip(*pairs, strict=True)))


def over_scenarios(values_BS: Floats) -> Floats:
    """Mean of each draw over the scenarios that have a number in it; NaN where none has."""
    with np.errstate(invalid="ignore"):
        found: Floats = np.nansum(values_BS, axis=1) / (~np.isnan(values_BS)).sum(axis=1)
    return found


def interval(values_B: Floats) -> Interval:
    """The interval of a quantity from its values under the draws; NaN draws do not count."""
    tail = 50 * (1 - LEVEL)
    low, high = np.nanpercentile(values_B, [tail, 100 - tail])
    return Interval(low=float(low), high=float(high))
