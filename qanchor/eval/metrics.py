"""AUC and KS of binary scores."""

import numpy as np
import numpy.typing as npt
from sklearn.metrics import roc_auc_score, roc_curve

Labels = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float64]


def auc(labels: Labels, scores: Scores) -> float:
    """Area under the ROC curve; 0.5 is chance."""
    return float(roc_auc_score(labels, scores))


def ks(labels: Labels, scores: Scores) -> float:
    """Kolmogorov-Smirnov statistic: the largest gap between true- and false-positive rate."""
    false_rate, true_rate, _ = roc_curve(labels, scores)
    return float(np.max(true_rate - false_rate))
