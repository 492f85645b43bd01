"""The statistics loss: a user's behaviour statistics told by a linear map of the embedding.

Labels are read from embeddings by linear probes, so what training keeps of a user should lie on
directions. Answers in words alone do not see to it: a small decoder trained with them alone forgets
whatever no question asks for. Not in the paper. Of use in training only.

Legend: Q pairs, Z embedding_dim, U users, F statistics (columns of the past, then of the future).
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


class StatisticsHead(nn.Module):
    """Linear(Z, F), and the scale its targets are brought to."""

    mean_F: Tensor
    spread_F: Tensor

    def __init__(self, embedding_dim: int, space: StatisticSpace) -> None:
        super().__init__()
        num_columns = space.num_past + space.num_future
        self.num_past = space.num_past
        self.linear = nn.Linear(embedding_dim, num_columns)
        self.register_buffer("mean_F", torch.zeros(num_columns))
        self.register_buffer("spread_F", torch.ones(num_columns))

    def set_scale(self, statistics_UF: npt.NDArray[np.float16]) -> None:
        """Take mean and standard deviation from users' statistics (nan: unknown)."""
        rows_UF = statistics_UF[:_SCALE_USERS].astype(np.float32)
        known_UF = ~np.isnan(rows_UF)
        counts_F = known_UF.sum(axis=0).clip(min=1)
        mean_F = np.where(known_UF, rows_UF, 0).sum(axis=0) / counts_F
        away_UF = np.where(known_UF, rows_UF - mean_F, 0)
        spread_F = np.sqrt((away_UF**2).sum(axis=0) / counts_F)
        self.mean_F.copy_(torch.from_numpy(mean_F))
        # A statistic that never varies has nothing to tell.
        self.spread_F.copy_(torch.from_numpy(np.where(spread_F < _MIN_SPREAD, np.inf, spread_F)))

    def loss(self, anchor_QZ: Tensor, statistics_QF: Tensor, future_share: float) -> Tensor:
        """Mean squared error over the Q rows in standard deviations, nan left out; a scalar.

        `statistics_QF`: as `log_statistics`. Past columns together weigh 1 - `future_share`,
        future columns `future_share`.
        """
        with torch.autocast(anchor_QZ.device.type, enabled=False):
            # Components of a unit vector are of the order of 1 / sqrt(Z).
            told_QF = self.linear(anchor_QZ.float() * anchor_QZ.shape[1] ** 0.5)
            known_QF = ~statistics_QF.isnan()
            wanted_QF = (statistics_QF.float() - self.mean_F) / self.spread_F
            wanted_QF = wanted_QF.nan_to_num().clamp(-MAX_DEVIATION, MAX_DEVIATION)
            error_QF = (told_QF - wanted_QF).square() * known_QF

            past = _mean(error_QF[:, : self.num_past], known_QF[:, : self.num_past])
            future = _mean(error_QF[:, self.num_past :], known_QF[:, self.num_past :])
            return (1 - future_share) * past + future_share * future


def _mean(error_QF: Tensor, known_QF: Tensor) -> Tensor:
    """Mean over rows of each row's mean over what is known of it."""
    mean: Tensor = (error_QF.sum(dim=1) / known_QF.sum(dim=1).clamp(min=1)).mean()
    return mean
