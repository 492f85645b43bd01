"""The statistics loss: past and future have their shares, and what varies together counts once."""

import numpy as np
import pytest
import torch
from torch import Tensor

from qanchor.data.statistics import StatisticSpace
from qanchor.errors import ConfigError
from qanchor.losses import LossConfig
from qanchor.statistics_head import StatisticsHead

SPACE = StatisticSpace(categories=(("", ""),), numeric=("age",), one_hot=(), future_days=7)
NUM_COLUMNS = SPACE.num_past + SPACE.num_future


@pytest.fixture
def head() -> StatisticsHead:
    torch.manual_seed(0)
    return StatisticsHead(8, SPACE)


@pytest.mark.parametrize(
    ("future_share", "group"), [(0.0, slice(0, SPACE.num_past)), (1.0, slice(SPACE.num_past, None))]
)
def test_a_share_of_all_is_the_mean_of_its_columns(
    head: StatisticsHead, future_share: float, group: slice
) -> None:
    anchor_QZ, wanted_QF = torch.randn(5, 8), torch.randn(5, NUM_COLUMNS)
    error_QF = (head.linear(anchor_QZ * 8**0.5) - wanted_QF).square()
    found = head.loss(anchor_QZ, wanted_QF, future_share)
    torch.testing.assert_close(found, error_QF[:, group].mean())


def test_what_is_not_known_does_not_count(head: StatisticsHead) -> None:
    anchor_QZ, wanted_QF = torch.randn(5, 8), torch.randn(5, NUM_COLUMNS)
    wanted_QF[:, SPACE.num_past + 1 :] = torch.nan
    first = head.linear(anchor_QZ * 8**0.5)[:, SPACE.num_past] - wanted_QF[:, SPACE.num_past]
    found = head.loss(anchor_QZ, wanted_QF, future_share=1.0)
    torch.testing.assert_close(found, first.square().mean())


@pytest.mark.parametrize(("whitening", "ratio"), [(0.0, SPACE.num_past - 1), (1.0, 1.0)])
def test_columns_that_repeat_each_other_count_once_when_whitened(
    head: StatisticsHead, whitening: float, ratio: float
) -> None:
    """All columns of the past but the last are one and the same."""
    rng = np.random.default_rng(0)
    rows = np.repeat(rng.choice([-1.0, 1.0], size=(4000, 1)), NUM_COLUMNS, axis=1)
    rows[:, SPACE.num_past - 1] = rng.choice([-1.0, 1.0], size=4000)
    head.set_scale(rows.astype(np.float16), whitening)
    torch.nn.init.zeros_(head.linear.weight)
    torch.nn.init.zeros_(head.linear.bias)

    def lost(columns: slice) -> Tensor:
        """What it costs to be wrong about these columns alone."""
        wanted_F = torch.zeros(NUM_COLUMNS)
        wanted_F[columns] = 1.0
        wanted_F = wanted_F * head.spread_F + head.mean_F
        return head.loss(torch.randn(1, 8), wanted_F[None], future_share=0.0).detach()

    repeated, single = slice(0, SPACE.num_past - 1), slice(SPACE.num_past - 1, SPACE.num_past)
    assert float(lost(repeated) / lost(single)) == pytest.approx(ratio, rel=0.15)


def test_a_statistic_that_never_varies_has_nothing_to_tell(head: StatisticsHead) -> None:
    rows = np.random.default_rng(0).normal(size=(9, NUM_COLUMNS))
    rows[:, 0] = 3.0
    head.set_scale(rows.astype(np.float16), whitening=0.5)
    anchor_QZ, wanted_QF = torch.ones(9, 8), torch.from_numpy(rows.astype(np.float32))
    before = head.loss(anchor_QZ, wanted_QF, future_share=0.2)
    wanted_QF[:, 0] = 4.0
    torch.testing.assert_close(head.loss(anchor_QZ, wanted_QF, future_share=0.2), before)


@pytest.mark.parametrize("name", ["statistics_future_share", "statistics_whitening"])
def test_shares_and_powers_are_from_0_to_1(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        LossConfig(**{name: 1.5})
