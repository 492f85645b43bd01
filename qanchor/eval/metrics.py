"""AUC and KS of binary scores, plain and over many weightings of the users at once.

Legend: N users, B weightings, G groups of users with equal score.
"""

import numpy as np
import numpy.typing as npt
from sklearn.metrics import roc_auc_score, roc_curve

Labels = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float64]


def auc(labels: Labels, scores: Scores) -> float:
    """Area under the ROC curve; 0.5 is chance."""
    return float(roc_auc_score(labels, scores))


def ks(labels: Labels, scores: Scores) -> float:
    """Kolmogorov-Smirnov statistic: the largest gap between true- and false-positive rate."""
    false_rate, true_rate, _ = roc_curve(labels, scores)
    return float(np.max(true_rate - false_rate))


def weighted_auc_ks(
    labels_N: Labels, scores_N: Scores, weights_BN: npt.NDArray[np.float32]
) -> tuple[Floats, Floats]:
    """AUC [B] and KS [B], user n counting `weights_BN[:, n]` times.

    NaN where a weighting leaves users of one class only.
    """
    order_N = np.argsort(scores_N, kind="stable")
    sorted_N = scores_N[order_N]
    starts_G = np.flatnonzero(np.concatenate([[True], sorted_N[1:] != sorted_N[:-1]]))
    sorted_BN = weights_BN[:, order_N].astype(np.float64)
    is_positive_N = labels_N[order_N] == 1
    positive_BG = np.add.reduceat(sorted_BN * is_positive_N, starts_G, axis=1)
    negative_BG = np.add.reduceat(sorted_BN * ~is_positive_N, starts_G, axis=1)
    below_BG = np.cumsum(negative_BG, axis=1)
    num_positive_B, num_negative_B = positive_BG.sum(axis=1), below_BG[:, -1]
    # A tie counts half, as in the area under the ROC curve.
    wins_B = (positive_BG * (below_BG - negative_BG / 2)).sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        auc_B = wins_B / (num_positive_B * num_negative_B)
        gap_BG = (
            below_BG / num_negative_B[:, None]
            - np.cumsum(positive_BG, axis=1) / num_positive_B[:, None]
        )
        ks_B = np.maximum(gap_BG.max(axis=1), 0.0)
    return auc_B, ks_B
