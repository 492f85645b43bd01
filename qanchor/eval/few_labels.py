"""What probes reach where labels are few, and whether the right question helps there.

From each scenario's train users a few with label 1 and as many with label 0 are drawn, again and
again, the same for all methods; each draw is judged on test users drawn with replacement. Features
are standardised over all train users, which takes no label. A method's regularisation is chosen
once per number of labels, by the average over scenarios and draws on valid.

Legend: U users, F features, N labels, C strengths, L numbers of labels, D draws.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegression
from tqdm import tqdm

from qanchor.eval.bootstrap import Bootstrap, interval
from qanchor.eval.config import EvalConfig
from qanchor.eval.metrics import auc, weighted_auc_ks
from qanchor.eval.probe import MAX_NEWTON_FEATURES, Features
from qanchor.eval.results import FewLabels, FewLabelsGain, FewLabelsScore
from qanchor.eval.splits import SPLITS, JudgedUsers, LabelledSplit

log = logging.getLogger(__name__)

STRENGTHS = (0.001, 0.01, 0.1)
Doubles = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def few_labels(
    tables: Mapping[str, Sequence[Sequence[Features]]],
    judged: JudgedUsers,
    settings: EvalConfig,
    bootstrap: Bootstrap,
) -> FewLabels | None:
    """Judge methods with few labels; gains are those of the first method over each other.

    Numbers of labels that a scenario's train users do not have are left out; None where all are.
    `tables`: by method, for each scenario in order, one or several tables [U, F] whose AUCs are
    averaged.
    """
    most = min(len(splits["train"].labels) for splits in judged.by_scenario.values())
    counts = [count for count in settings.label_counts if count <= most]
    if len(counts) < len(settings.label_counts):
        log.warning("few labels: a scenario has %d train users, more labels are left out", most)
    if not counts:
        return None
    num_draws = min(settings.label_draws, settings.num_draws)
    drawn = {
        name: [
            [
                _draw(splits["train"], count, (settings.seed, 7, count, draw))
                for draw in range(num_draws)
            ]
            for count in counts
        ]
        for name, splits in judged.by_scenario.items()
    }
    found = {}
    num_probes = sum(len(one) for method in tables.values() for one in method)
    with tqdm(total=num_probes, desc="probing with few labels", unit="table") as bar:
        for method, of_scenarios in tables.items():
            by_scenario = []
            for name, of_scenario in zip(judged.by_scenario, of_scenarios, strict=True):
                by_table = []
                for table_UF in of_scenario:
                    by_table.append(_Table.of(table_UF, judged, name).judge(drawn[name], bootstrap))
                    bar.update()
                by_scenario.append(np.mean(by_table, axis=0))
            found[method] = _chosen(np.nanmean(by_scenario, axis=0))
    first = next(iter(found))
    return FewLabels(
        num_draws=num_draws,
        scores=tuple(
            FewLabelsScore(
                method=method,
                num_labels=count,
                auc=float(auc_LD[index].mean()),
                auc_interval=interval(auc_LD[index]),
            )
            for index, count in enumerate(counts)
            for method, auc_LD in found.items()
        ),
        gains=tuple(
            FewLabelsGain(
                method=first,
                over=method,
                num_labels=count,
                auc=float((found[first] - auc_LD)[index].mean()),
                auc_interval=interval((found[first] - auc_LD)[index]),
            )
            for index, count in enumerate(counts)
            for method, auc_LD in found.items()
            if method != first
        ),
    )


@dataclass(frozen=True, slots=True)
class _Split:
    """One split's users who have the scenario's label, features standardised."""

    features_NF: Doubles
    labels_N: IntArray


@dataclass(frozen=True, slots=True)
class _Table:
    """One scenario's splits of a table of features."""

    train: _Split
    valid: _Split
    test: _Split
    test_places: IntArray
    """Of the labelled ones among all test users."""

    @classmethod
    def of(cls, table_UF: Features, judged: JudgedUsers, scenario: str) -> "_Table":
        splits = judged.by_scenario[scenario]
        train_NF = table_UF[splits["train"].rows].astype(np.float64)
        mean_F, spread_F = train_NF.mean(axis=0), train_NF.std(axis=0)
        spread_F[spread_F == 0] = 1
        train, valid, test = (
            _Split((table_UF[splits[name].rows] - mean_F) / spread_F, splits[name].labels)
            for name in SPLITS
        )
        return cls(train, valid, test, np.searchsorted(judged.test_rows, splits["test"].rows))

    def judge(self, drawn: Sequence[Sequence[IntArray]], bootstrap: Bootstrap) -> Doubles:
        """[2, C, L, D]: AUC on valid, and on a draw of test users."""
        found: Doubles = np.empty((2, len(STRENGTHS), len(drawn), len(drawn[0])))
        for count, draws in enumerate(drawn):
            for draw, picks_N in enumerate(draws):
                weights_FC = self._fitted(picks_N)
                valid_NC = self.valid.features_NF @ weights_FC
                test_NC = self.test.features_NF @ weights_FC
                users_1U = bootstrap.weights_BU[draw : draw + 1]
                for place in range(len(STRENGTHS)):
                    found[0, place, count, draw] = auc(self.valid.labels_N, valid_NC[:, place])
                    auc_1, _ = weighted_auc_ks(
                        self.test.labels_N, test_NC[:, place], users_1U, self.test_places
                    )
                    found[1, place, count, draw] = auc_1[0]
        return found

    def _fitted(self, picks_N: IntArray) -> Doubles:
        """Weights [F, C]; a bias would not change an order."""
        features_NF, labels_N = self.train.features_NF[picks_N], self.train.labels_N[picks_N]
        is_narrow = features_NF.shape[1] <= MAX_NEWTON_FEATURES
        solver = "newton-cholesky" if is_narrow else "lbfgs"
        model = LogisticRegression(solver=solver, warm_start=True, max_iter=1000)
        found = [
            model.set_params(C=strength).fit(features_NF, labels_N).coef_[0].copy()
            for strength in STRENGTHS
        ]
        return np.stack(found, axis=1)


def _draw(train: LabelledSplit, count: int, seed: tuple[int, ...]) -> IntArray:
    """Places of `count` labelled train users, half of each class; of a rare class all there are."""
    rng = np.random.default_rng(seed)
    yes, no = (rng.permutation(np.flatnonzero(train.labels == label)) for label in (1, 0))
    num_yes = min(count // 2, len(yes))
    num_yes = max(num_yes, count - len(no))
    return np.concatenate([yes[:num_yes], no[: count - num_yes]])


def _chosen(auc_2CLD: Doubles) -> Doubles:
    """AUC on test [L, D] with the strength that is best on valid for each number of labels."""
    best_L = auc_2CLD[0].mean(axis=-1).argmax(axis=0)
    found: Doubles = auc_2CLD[1][best_L, np.arange(len(best_L))]
    return found
