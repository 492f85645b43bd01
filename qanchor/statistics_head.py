"""The statistics loss: a user's behaviour statistics told by a linear map of the embedding.

Labels are read from embeddings by linear probes, so what training keeps of a user should lie on
directions. Answers in words alone do not see to it: a small decoder trained with them alone forgets
whatever no question asks for. Not in the paper. Of use in training only.

Columns of behaviour vary together: a few principal components hold most of their variance, and an
embedding that has to tell columns, each as important as the next, tells those components alone.
Whitening raises the weight of the others.

Legend: Q pairs, Z embedding_dim, U users, F statistics (columns of the past, then of the future),
P columns of one of the two.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from qanchor.data.statistics import StatisticSpace

MAX_DEVIATION = 5.0
"""Standard deviations from the mean beyond which a statistic counts as just as unusual."""
_MIN_SPREAD = 1e-6
_SCALE_USERS = 8192
_LEAST_VARIANCE = 0.1
"""Added to each component's variance before whitening: the least hold noise."""


class StatisticsHead(nn.Module):
    """Linear(Z, F), and the scale its targets are brought to."""

    mean_F: Tensor
    spread_F: Tensor
    past_PP: Tensor
    future_PP: Tensor

    def __init__(self, embedding_dim: int, space: StatisticSpace) -> None:
        super().__init__()
        num_columns = space.num_past + space.num_future
        self.num_past = space.num_past
        self.linear = nn.Linear(embedding_dim, num_columns)
        self.register_buffer("mean_F", torch.zeros(num_columns))
        self.register_buffer("spread_F", torch.ones(num_columns))
        self.register_buffer("past_PP", torch.eye(space.num_past))
        self.register_buffer("future_PP", torch.eye(space.num_future))

    def set_scale(self, statistics_UF: npt.NDArray[np.float16], whitening: float) -> None:
        """Take mean, standard deviation and components from users' statistics (nan: unknown).

        `whitening`: as `LossConfig.statistics_whitening`.
        """
        rows_UF = statistics_UF[:_SCALE_USERS].astype(np.float32)
        known_UF = ~np.isnan(rows_UF)
        counts_F = known_UF.sum(axis=0).clip(min=1)
        mean_F = np.where(known_UF, rows_UF, 0).sum(axis=0) / counts_F
        away_UF = np.where(known_UF, rows_UF - mean_F, 0)
        spread_F = np.sqrt((away_UF**2).sum(axis=0) / counts_F)
        self.mean_F.copy_(torch.from_numpy(mean_F))
        # A statistic that never varies has nothing to tell.
        spread_F = np.where(spread_F < _MIN_SPREAD, np.inf, spread_F)
        self.spread_F.copy_(torch.from_numpy(spread_F))
        standard_UF = (away_UF / spread_F).clip(-MAX_DEVIATION, MAX_DEVIATION)
        past_UP, future_UP = np.split(standard_UF, [self.num_past], axis=1)
        self.past_PP.copy_(_weighing(past_UP, whitening))
        self.future_PP.copy_(_weighing(future_UP, whitening))

    def loss(self, anchor_QZ: Tensor, statistics_QF: Tensor, future_share: float) -> Tensor:
        """Mean squared error over the Q rows in standard deviations, whitened; a scalar.

        `statistics_QF`: as `log_statistics`, nan left out. Past columns together weigh
        1 - `future_share`, future columns `future_share`.
        """
        with torch.autocast(anchor_QZ.device.type, enabled=False):
            # Components of a unit vector are of the order of 1 / sqrt(Z).
            told_QF = self.linear(anchor_QZ.float() * anchor_QZ.shape[1] ** 0.5)
            known_QF = ~statistics_QF.isnan()
            wanted_QF = (statistics_QF.float() - self.mean_F) / self.spread_F
            wanted_QF = wanted_QF.nan_to_num().clamp(-MAX_DEVIATION, MAX_DEVIATION)
            error_QF = (told_QF - wanted_QF) * known_QF

            error_past_QP, error_future_QP = error_QF.tensor_split([self.num_past], dim=1)
            known_past_QP, known_future_QP = known_QF.tensor_split([self.num_past], dim=1)
            past = _mean((error_past_QP @ self.past_PP).square(), known_past_QP)
            future = _mean((error_future_QP @ self.future_PP).square(), known_future_QP)
            return (1 - future_share) * past + future_share * future


def _weighing(standard_UP: npt.NDArray[np.float32], whitening: float) -> Tensor:
    """The matrix that multiplies errors: each principal component by a power of its variance.

    All together the components' variance counts as much as without whitening.
    """
    if not standard_UP.shape[1]:
        return torch.eye(0)
    wide_UP = standard_UP.astype(np.float64)
    variance_P, components_PP = np.linalg.eigh(wide_UP.T @ wide_UP / len(wide_UP))
    variance_P = variance_P.clip(min=0) + _LEAST_VARIANCE
    weight_P = variance_P**-whitening
    weight_P *= variance_P.sum() / (weight_P * variance_P).sum()
    return torch.from_numpy((components_PP * np.sqrt(weight_P)) @ components_PP.T).float()


def _mean(error_QF: Tensor, known_QF: Tensor) -> Tensor:
    """Mean over rows of each row's mean over what is known of it."""
    mean: Tensor = (error_QF.sum(dim=1) / known_QF.sum(dim=1).clamp(min=1)).mean()
    return mean
