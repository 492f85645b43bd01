"""Probes: fitted on train, hyper-parameter chosen on valid, judged on test.

Legend: U users, F features.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from qanchor.eval.metrics import Scores, auc, ks

Features = npt.NDArray[np.float32]

LINEAR_STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)
BOOSTING_LEAVES = (7, 15, 31)
MAX_NEWTON_FEATURES = 256


@dataclass(frozen=True, slots=True)
class SplitData:
    """Features [U, F] and labels [U] of one split."""

    features: Features
    labels: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """Quality of one probe on test, the setting chosen on valid, and the fitted probe."""

    auc: float
    ks: float
    setting: float
    valid_auc: float
    test_scores: Scores
    """Probability of label 1 of every test user given."""
    score: Callable[[Features], Scores]
    """Features [U, F] to probabilities of label 1 [U]."""


def linear_probe(splits: Mapping[str, SplitData]) -> ProbeResult:
    """Logistic regression on standardised features; inverse strength C chosen on valid.

    Features are standardised once for all C, and each C starts from the weights of the one before.
    With few features a handful of Newton steps replace hundreds of first-order ones; with many
    their matrices cost more than they save. Both end at the same optimum.
    """
    scaler = StandardScaler().fit(splits["train"].features.astype(np.float64))
    scaled = {
        name: SplitData(scaler.transform(split.features.astype(np.float64)), split.labels)
        for name, split in splits.items()
    }
    is_narrow = splits["train"].features.shape[1] <= MAX_NEWTON_FEATURES
    solver = "newton-cholesky" if is_narrow else "lbfgs"
    model = LogisticRegression(solver=solver, warm_start=True, max_iter=1000)

    def fitted(strength: float) -> Callable[[Features], Scores]:
        model.set_params(C=strength).fit(scaled["train"].features, scaled["train"].labels)
        # A copy of the weights: the next C goes on from the model's own.
        weights_F, bias = model.coef_[0].copy(), float(model.intercept_[0])
        return lambda features: 1 / (1 + np.exp(-(features @ weights_F + bias)))

    chosen = _choose(scaled, LINEAR_STRENGTHS, fitted)

    def score(features: Features) -> Scores:
        return chosen.score(scaler.transform(features.astype(np.float64)))

    return ProbeResult(
        chosen.auc, chosen.ks, chosen.setting, chosen.valid_auc, chosen.test_scores, score
    )


def boosting_probe(splits: Mapping[str, SplitData]) -> ProbeResult:
    """Gradient-boosted trees with early stopping; leaves per tree chosen on valid."""

    def fitted(leaves: float) -> Callable[[Features], Scores]:
        model: Any = HistGradientBoostingClassifier(
            max_leaf_nodes=int(leaves),
            learning_rate=0.05,
            max_iter=400,
            early_stopping=True,
            random_state=0,
        ).fit(splits["train"].features, splits["train"].labels)
        return lambda features: np.asarray(model.predict_proba(features)[:, 1], dtype=np.float64)

    return _choose(splits, BOOSTING_LEAVES, fitted)


def _choose(
    splits: Mapping[str, SplitData],
    settings: tuple[float, ...],
    fitted: Callable[[float], Callable[[Features], Scores]],
) -> ProbeResult:
    best: tuple[float, float, Callable[[Features], Scores]] | None = None
    for setting in settings:
        score = fitted(setting)
        valid_auc = auc(splits["valid"].labels, score(splits["valid"].features))
        if best is None or valid_auc > best[0]:
            best = (valid_auc, setting, score)
    assert best is not None
    valid_auc, setting, score = best
    test_scores, labels = score(splits["test"].features), splits["test"].labels
    return ProbeResult(
        auc(labels, test_scores), ks(labels, test_scores), setting, valid_auc, test_scores, score
    )
