"""The joint loss against a second, slow, written-out formula."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from qanchor.losses import LossConfig, contrastive_loss, next_token_loss


def unit_vectors(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(count, 6, generator=generator), dim=-1)


def written_out(u: Tensor, v: Tensor, config: LossConfig) -> float:
    """Eq. (3)-(5) pair by pair, as the paper prints them."""
    tau, total = config.temperature, 0.0
    for i in range(len(u)):
        positive = float(u[i] @ v[i])
        z = math.exp(positive / tau)
        for j in range(len(u)):
            if j == i:
                continue
            pairs = {
                "anchor_semantic": float(u[i] @ v[j]),
                "anchor_anchor": float(u[i] @ u[j]),
                "semantic_semantic": float(v[i] @ v[j]),
                "semantic_anchor": float(v[i] @ u[j]),
            }
            limit = math.inf if config.margin is None else positive + config.margin
            near = max(pairs["anchor_semantic"], pairs["anchor_anchor"]) > limit
            for term in config.terms:
                dropped = near if config.mask == "joint" else pairs[term] > limit
                z += 0.0 if dropped else math.exp(pairs[term] / tau)
        total += -math.log(math.exp(positive / tau) / z)
    return total / len(u)


@pytest.mark.parametrize(
    "config",
    [
        LossConfig(),
        LossConfig(margin=None),
        LossConfig(mask="per_term"),
        LossConfig(terms=("anchor_semantic", "anchor_anchor", "semantic_anchor"), mask="per_term"),
        LossConfig(terms=("anchor_semantic",), temperature=0.5, margin=0.0),
    ],
    ids=["paper", "no mask", "per term", "authors' code", "one term"],
)
def test_contrastive_loss_equals_the_written_out_sum(config: LossConfig) -> None:
    u, v = unit_vectors(7, 1), unit_vectors(7, 2)
    assert float(contrastive_loss(u, v, config)) == pytest.approx(
        written_out(u, v, config), rel=1e-5
    )


def test_equal_answers_can_be_dropped_as_negatives() -> None:
    u, v = unit_vectors(3, 1), unit_vectors(3, 2)
    equal = torch.eye(3, dtype=torch.bool)
    equal[0, 2] = equal[2, 0] = True
    config = LossConfig(margin=None, terms=("anchor_semantic",), drop_equal_answers=True)
    s = (u @ v.T / config.temperature).exp()
    kept = [s[0, 0] + s[0, 1], s[1].sum(), s[2, 1] + s[2, 2]]
    expected = -sum(torch.log(s[i, i] / kept[i]) for i in range(3)) / 3
    assert float(contrastive_loss(u, v, config, equal_QQ=equal)) == pytest.approx(float(expected))


def test_the_mask_can_be_held_back() -> None:
    u, v = unit_vectors(7, 1), unit_vectors(7, 2)
    unmasked = contrastive_loss(u, v, LossConfig(margin=None))
    assert contrastive_loss(u, v, LossConfig(), is_masked=False) == unmasked
    assert contrastive_loss(u, v, LossConfig()) < unmasked


def test_collapsed_users_would_be_masked_out_altogether() -> None:
    """Why recipes hold the mask back: equal users, unlike answers, no loss, so no gradient."""
    u = functional.normalize(torch.ones(4, 6), dim=-1)
    v = functional.normalize(torch.eye(6)[:4], dim=-1)
    assert float(contrastive_loss(u, v, LossConfig())) == 0.0
    assert float(contrastive_loss(u, v, LossConfig(), is_masked=False)) > 1.0


def test_next_token_loss_is_mean_cross_entropy() -> None:
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    expected = [-math.log(math.exp(2) / (math.exp(2) + 2)), -math.log(1 / (math.e + 2))]
    loss = float(next_token_loss(logits, torch.tensor([0, 2])))
    assert loss == pytest.approx(sum(expected) / 2)


def test_next_token_loss_of_no_answers_is_zero() -> None:
    assert float(next_token_loss(torch.empty(0, 3), torch.empty(0, dtype=torch.long))) == 0.0
