"""Muon in float32 does what torch's does in bfloat16."""

import pytest
import torch
from torch import nn

from qanchor.train.optimizer import Muon, orthogonalized

NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)


@pytest.mark.parametrize("shape", [(24, 56), (56, 24), (32, 32)])
def test_matrices_move_as_torchs_muon_moves_them(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    start = torch.randn(shape)
    mine, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizers = (
        (Muon([mine], lr=0.02, weight_decay=0.1), mine),
        (
            torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
            theirs,
        ),
    )
    for _ in range(4):
        gradient = torch.randn(shape)
        for optimizer, matrix in optimizers:
            matrix.grad = gradient.clone()
            optimizer.step()
    moved, apart = (mine - start).norm(), (mine - theirs).norm()
    assert apart < 0.02 * moved
    # bfloat16 has 8 bits: were it the same arithmetic, they would be equal.
    assert apart > 0


@pytest.mark.parametrize("shape", [(16, 40), (40, 16)])
def test_orthogonalized_matrices_have_singular_values_of_about_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalized(torch.randn(shape), NEWTON_SCHULZ, 5))
    assert 0.5 < values.min() < values.max() < 1.5


def test_a_matrix_without_gradient_stays() -> None:
    matrix = nn.Parameter(torch.ones(4, 4))
    Muon([matrix], lr=0.1, weight_decay=0.1).step()
    assert torch.equal(matrix, torch.ones(4, 4))
