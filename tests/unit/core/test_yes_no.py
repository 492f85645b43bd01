"""The yes/no loss: whose answer says yes, and which way it pulls."""

import math

import pytest
import torch
from torch.nn import functional

from qanchor.checkpoint import Checkpoint
from qanchor.train.batches import Segment
from qanchor.train.yes_no import yes_no_loss, yes_no_of


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("Yes, often: 12 of 30 days.", 1.0),
        ("yes: 5 of 14 days.", 1.0),
        ("No, never in 14 days.", 0.0),
        ("no: 3 after 5.", 0.0),
        ("Yes", 1.0),
        ("no", 0.0),
        ("No forum activity in the next 60 days; it stops.", math.nan),
        ("Nothing new.", math.nan),
        ("Yesterday, once.", math.nan),
        ("", math.nan),
    ],
)
def test_what_an_answer_says(checkpoint: Checkpoint, answer: str, wanted: float) -> None:
    segment = Segment((), checkpoint.encode_answer(answer))
    found = yes_no_of(checkpoint).wanted([segment])
    torch.testing.assert_close(found, torch.tensor([wanted]), equal_nan=True)


def test_loss_by_hand() -> None:
    yes_AZ, no_AZ = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, -1.0]])
    anchor_QZ = torch.tensor([[0.6, 0.8], [0.0, 1.0], [1.0, 0.0]])
    wanted_Q = torch.tensor([1.0, 0.0, math.nan])
    found = yes_no_loss(anchor_QZ, yes_AZ, no_AZ, wanted_Q, 0.5)
    half = 0.5**0.5
    scores = [(0.6 * half + 0.8 * (half + 1)) / 0.5, (half + 1) / 0.5]
    expected = (math.log1p(math.exp(-scores[0])) + math.log1p(math.exp(scores[1]))) / 2
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_no_answer_says_either() -> None:
    anchor_QZ = functional.normalize(torch.randn(3, 4), dim=1).requires_grad_()
    loss = yes_no_loss(anchor_QZ, torch.eye(4), -torch.eye(4), torch.full((3,), math.nan), 0.07)
    loss.backward()
    assert loss.item() == 0
    assert anchor_QZ.grad is not None
    assert not anchor_QZ.grad.any()


def test_a_step_along_the_gradient_turns_u_to_its_answer() -> None:
    torch.manual_seed(0)
    anchor_QZ = functional.normalize(torch.randn(2, 4), dim=1).requires_grad_()
    yes_AZ, no_AZ = torch.eye(4)[:1], torch.eye(4)[1:2]
    yes_no_loss(anchor_QZ, yes_AZ, no_AZ, torch.tensor([1.0, 0.0]), 0.5).backward()
    assert anchor_QZ.grad is not None
    moved = -(anchor_QZ.grad @ (yes_AZ - no_AZ)[0])
    assert moved[0] > 0 > moved[1]
