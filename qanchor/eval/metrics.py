"""AUC and KS of binary scores, plain and over many weightings of the users at once; their means.

Legend: N users, B weightings, G groups of users with equal score.
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from sklearn.metrics import roc_auc_score, roc_curve

Labels = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float64]

CELLS_PER_PIECE = 2**20
"""Users times weightings that are worked off at once, some 60 bytes each."""


def auc(labels: Labels, scores: Scores) -> float:
    """Area under the ROC curve; 0.5 is chance."""
    return float(roc_auc_score(labels, scores))


def ks(labels: Labels, scores: Scores) -> float:
    """Kolmogorov-Smirnov statistic: the largest gap between true- and false-positive rate."""
    false_rate, true_rate, _ = roc_curve(labels, scores)
    return float(np.max(true_rate - false_rate))


def weighted_auc_ks(
    labels_N: Labels,
    scores_N: Scores,
    weights_BU: npt.NDArray[np.uint8] | npt.NDArray[np.float32],
    rows_N: npt.NDArray[np.int64] | None = None,
) -> tuple[Floats, Floats]:
    """AUC [B] and KS [B], user n counting `weights_BU[:, rows_N[n]]` times.

    `rows_N`: all users in order by default. NaN where a weighting leaves users of one class only.
    Memory is bounded: some weightings at a time.
    """
    order_N = np.argsort(scores_N, kind="stable")
    sorted_N = scores_N[order_N]
    starts_G = np.flatnonzero(np.concatenate([[True], sorted_N[1:] != sorted_N[:-1]]))
    is_positive_N = labels_N[order_N] == 1
    columns_N = order_N if rows_N is None else rows_N[order_N]
    auc_B, ks_B = np.empty(len(weights_BU)), np.empty(len(weights_BU))
    num_rows = max(CELLS_PER_PIECE // len(order_N), 1)
    for start in range(0, len(weights_BU), num_rows):
        piece = slice(start, start + num_rows)
        sorted_BN = weights_BU[piece, columns_N].astype(np.float64)
        auc_B[piece], ks_B[piece] = _auc_ks(sorted_BN, is_positive_N, starts_G)
    return auc_B, ks_B


def _auc_ks(
    weights_BN: Floats, is_positive_N: npt.NDArray[np.bool_], starts_G: npt.NDArray[np.int64]
) -> tuple[Floats, Floats]:
    """The same of users in ascending order of score; equal scores begin at `starts_G`."""
    positive_BG = np.add.reduceat(weights_BN * is_positive_N, starts_G, axis=1)
    negative_BG = np.add.reduceat(weights_BN * ~is_positive_N, starts_G, axis=1)
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


def known_mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are known; None where none is.

    >>> known_mean([0.5, None, 1.0]), known_mean([None])
    (0.75, None)
    """
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
