"""Probes: fitted on train, hyper-parameter chosen on valid, judged on test."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from qanchor.eval.metrics import Scores, auc, ks

Features = npt.NDArray[np.float32]

LINEAR_STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)
BOOSTING_LEAVES = (7, 15, 31)


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
    score: Callable[[Features], Scores]
    """Features [U, F] to probabilities of label 1 [U]."""


def linear_probe(splits: Mapping[str, SplitData]) -> ProbeResult:
    """Logistic regression on standardised features; inverse strength C chosen on valid."""
    return _choose(
        splits,
        LINEAR_STRENGTHS,
        lambda strength: make_pipeline(
            StandardScaler(), LogisticRegression(C=strength, max_iter=1000)
        ),
    )


def boosting_probe(splits: Mapping[str, SplitData]) -> ProbeResult:
    """Gradient-boosted trees with early stopping; leaves per tree chosen on valid."""
    return _choose(
        splits,
        BOOSTING_LEAVES,
        lambda leaves: HistGradientBoostingClassifier(
            max_leaf_nodes=int(leaves),
            learning_rate=0.05,
            max_iter=400,
            early_stopping=True,
            random_state=0,
        ),
    )


def _choose(
    splits: Mapping[str, SplitData], settings: tuple[float, ...], build: Callable[[float], Any]
) -> ProbeResult:
    best: ProbeResult | None = None
    for setting in settings:
        score = _scores(build(setting).fit(splits["train"].features, splits["train"].labels))
        valid_auc = auc(splits["valid"].labels, score(splits["valid"].features))
        if best is None or valid_auc > best.valid_auc:
            test_scores, labels = score(splits["test"].features), splits["test"].labels
            best = ProbeResult(
                auc(labels, test_scores), ks(labels, test_scores), setting, valid_auc, score
            )
    assert best is not None
    return best


def _scores(model: Any) -> Callable[[Features], Scores]:
    def score(features: Features) -> Scores:
        probabilities: Scores = model.predict_proba(features)[:, 1]
        return probabilities

    return score
