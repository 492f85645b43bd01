"""The yes/no loss: u points from "no" to "yes" where the answer says yes, the other way for no.

A scenario known as a question alone is scored along that direction (qanchor.eval.zero_shot), which
the contrastive loss leaves open: beside "Yes, often: 12 of 30 days." it is the 12 that tells one
user's answer from another's. Not in the paper.

Legend: Q pairs, A answer texts of one side, Z embedding_dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from qanchor.checkpoint import Checkpoint
from qanchor.eval.config import AnswerTexts
from qanchor.train.batches import Segment

_WORDS = {1.0: ("Yes", "yes"), 0.0: ("No", "no")}
_MARKS = (".", ",", ":", ";", "!")
"""What stands behind the word where it is the answer: "No forum activity." is none."""


@dataclass(frozen=True, slots=True)
class YesNo:
    """What the loss takes from a checkpoint's tokenizer."""

    yes: tuple[Segment, ...]
    """The texts that zero-shot scoring takes for yes, as answers; `no` likewise."""
    no: tuple[Segment, ...]
    openings: tuple[tuple[tuple[int, ...], float], ...]
    """Token ids an answer may begin with, and 1 for yes, 0 for no."""
    alone: dict[tuple[int, ...], float]
    """Token ids that are a whole answer, likewise."""

    def wanted(self, segments: Sequence[Segment]) -> Tensor:
        """1 where the answer begins with yes, 0 with no, nan with neither [Q], on the CPU."""
        signs = (self.sign(segment) for segment in segments)
        return torch.tensor([float("nan") if sign is None else sign for sign in signs])

    def sign(self, segment: Segment) -> float | None:
        """1 where the answer begins with yes, 0 with no, else None."""
        answer = segment.answer
        found = (sign for ids, sign in self.openings if answer[: len(ids)] == ids)
        return next(found, self.alone.get(answer))


def yes_no_of(checkpoint: Checkpoint) -> YesNo:
    """Tokenise the answer texts and the openings."""
    texts = AnswerTexts()
    return YesNo(
        yes=tuple(Segment((), checkpoint.encode_answer(text)) for text in texts.yes),
        no=tuple(Segment((), checkpoint.encode_answer(text)) for text in texts.no),
        openings=tuple(
            (checkpoint.encode_answer(word + mark), sign)
            for sign, words in _WORDS.items()
            for word in words
            for mark in _MARKS
        ),
        alone={
            checkpoint.encode_answer(word): sign for sign, words in _WORDS.items() for word in words
        },
    )


def yes_no_loss(
    anchor_QZ: Tensor, yes_AZ: Tensor, no_AZ: Tensor, wanted_Q: Tensor, temperature: float
) -> Tensor:
    """Mean cross-entropy of sigmoid(u (yes - no) / tau), nan left out; a scalar, 0 without any.

    `yes_AZ`, `no_AZ`: unit rows, the mean of each side being brought to length 1.
    """
    direction_Z = functional.normalize(yes_AZ.mean(dim=0), dim=0)
    direction_Z = direction_Z - functional.normalize(no_AZ.mean(dim=0), dim=0)
    is_known_Q = ~wanted_Q.isnan()
    scores_Q = (anchor_QZ @ direction_Z / temperature)[is_known_Q]
    if not len(scores_Q):
        return scores_Q.sum()
    return functional.binary_cross_entropy_with_logits(scores_Q, wanted_Q[is_known_Q])
