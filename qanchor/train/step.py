"""The joint loss of one global batch, Q-Anchor Eq. (3)-(6), on one or several processes.

The batch may lie on several processes (qanchor.train.distributed) and be worked off in pieces; the
losses are those of the whole batch at once. qanchor.train.gradient_cache has their gradient.

Legend: Q pairs of a piece, J pairs of all processes, Z embedding_dim.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from qanchor.losses import LossConfig, contrastive_loss, next_token_loss
from qanchor.towers import QAnchorModel
from qanchor.train.batches import Segment, anchor_batch, answer_batch
from qanchor.train.distributed import Processes
from qanchor.train.source import Picked


@dataclass(frozen=True, slots=True)
class StepLosses:
    """Loss terms of a global batch (scalar tensors), with u and v [J, Z] beside them."""

    contrastive: Tensor
    next_token: Tensor
    statistics: Tensor
    anchor: Tensor
    semantic: Tensor


@dataclass(frozen=True, slots=True)
class TowerRows:
    """What one piece contributes, on the model's device.

    `anchor_QZ`, `semantic_QZ`: float32 unit vectors. `answer_key_Q`: int64, equal exactly where
    answers are. Float32 scalars: `next_token`, the mean over the piece's answer tokens,
    `num_tokens` of them; `statistics`, the mean over its pairs.
    """

    anchor_QZ: Tensor
    semantic_QZ: Tensor
    answer_key_Q: Tensor
    next_token: Tensor
    num_tokens: Tensor
    statistics: Tensor

    @property
    def num_pairs(self) -> Tensor:
        """Q, a float32 scalar."""
        return self.num_tokens.new_tensor(len(self.anchor_QZ))


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """How a run turns batches into losses and gradients."""

    model: QAnchorModel
    loss: LossConfig
    dtype: Literal["float32", "bfloat16"] = "float32"
    users_per_piece: int = 0
    processes: Processes = Processes()

    def losses(self, picked: Picked, *, is_masked: bool) -> StepLosses:
        """Losses of a global batch; every process takes its share and gets the same result."""
        return self.joined([self.rows(piece) for piece in self.pieces(picked)], is_masked)

    def total(self, losses: StepLosses) -> Tensor:
        """The weighted sum that is minimised."""
        return (
            self.loss.contrastive_weight * losses.contrastive
            + self.loss.next_token_weight * losses.next_token
            + self.loss.statistics_weight * losses.statistics
        )

    def rows(self, piece: Picked, *, with_row_losses: bool = True) -> TowerRows:
        """Both towers on a piece, under autocast if the recipe says so.

        `with_row_losses=False` leaves out what needs no other piece: `next_token` (with the
        vocabulary projection) and `statistics` are then 0.
        """
        device = self.model.head.up.weight.device
        # One context per pass: the weights it casts are kept for it alone, with or without graph.
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.dtype == "bfloat16"):
            flat = [segment for of_user in piece.segments for segment in of_user]
            answers_QA, answer_len_Q = answer_batch(flat, piece.corpus.tokens)
            num_tokens = answer_len_Q.sum().float()
            answers_QA, answer_len_Q = answers_QA.to(device), answer_len_Q.to(device)
            batch = anchor_batch(piece.corpus, piece.users, self._asked(piece)).to(device)
            anchor_QZ, states_BSD = self.model.anchor(batch)
            semantic_QZ = self.model.semantic(answers_QA, answer_len_Q)
            next_token = anchor_QZ.new_zeros(())
            if with_row_losses and self.loss.next_token_weight:
                logits_KV, labels_K = (
                    self.model.logits_from_embedding(anchor_QZ, answers_QA, answer_len_Q)
                    if self._answers_apart
                    else self.model.answer_logits(states_BSD, batch.labels_BS)
                )
                next_token = next_token_loss(logits_KV, labels_K)
            statistics = anchor_QZ.new_zeros(())
            if with_row_losses and self.loss.statistics_weight:
                statistics = self._statistics(piece, anchor_QZ)
        keys_Q = answer_keys(flat).to(device)
        num_tokens = num_tokens.to(device)
        return TowerRows(anchor_QZ, semantic_QZ, keys_Q, next_token, num_tokens, statistics)

    def _statistics(self, piece: Picked, anchor_QZ: Tensor) -> Tensor:
        head, known_US = self.model.statistics_head, piece.corpus.rendered.statistics
        assert head is not None, "This is a bug: the recipe wants statistics."
        assert known_US is not None, "This is a bug: the recipe wants statistics."
        of_pair_Q = np.repeat(piece.users, [len(of_user) for of_user in piece.segments])
        wanted_QS = torch.from_numpy(known_US[of_pair_Q]).to(anchor_QZ.device)
        return head.loss(anchor_QZ, wanted_QS, self.loss.statistics_future_share)

    @property
    def _answers_apart(self) -> bool:
        return self.loss.next_token_context == "embedding"

    def _asked(self, piece: Picked) -> Sequence[Sequence[Segment]]:
        """The piece's segments as they stand behind the prefix: with their answers or without."""
        if not self._answers_apart:
            return piece.segments
        return [[replace(each, answer=()) for each in of_user] for of_user in piece.segments]

    def contrastive(
        self, anchor_QZ: Tensor, semantic_QZ: Tensor, keys_Q: Tensor, *, is_masked: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """L_cl (0 if its weight is) and u, v [J, Z] over the rows of all processes."""
        gather = self.processes.gather
        anchor_JZ, semantic_JZ = gather(anchor_QZ), gather(semantic_QZ)
        if not self.loss.contrastive_weight:
            return anchor_JZ.new_zeros(()), anchor_JZ, semantic_JZ
        equal_JJ = None
        if self.loss.drop_equal_answers:
            keys_J = gather(keys_Q)
            equal_JJ = keys_J[:, None] == keys_J
        # Outside autocast: a bfloat16 similarity would be off by a tenth of its own over tau.
        contrastive = contrastive_loss(
            anchor_JZ, semantic_JZ, self.loss, is_masked=is_masked, equal_QQ=equal_JJ
        )
        return contrastive, anchor_JZ, semantic_JZ

    def shares(self, counts: Sequence[Tensor]) -> list[Tensor]:
        """Weight of each piece's mean over `counts` rows or tokens.

        So weighted, the sum over pieces and processes is the mean over all.
        """
        everywhere = self.processes.total(torch.stack(list(counts)).sum()).clamp(min=1)
        return [here / everywhere for here in counts]

    def pieces(self, picked: Picked) -> list[Picked]:
        """This process's share of a global batch, in pieces of `users_per_piece` users."""
        own = self.processes.share(range(len(picked.users)))
        return picked.part(own).pieces(self.users_per_piece)

    def joined(self, rows: Sequence[TowerRows], is_masked: bool) -> StepLosses:
        """Losses over the given pieces of every process."""
        next_token = self._mean(
            [piece.next_token for piece in rows], [piece.num_tokens for piece in rows]
        )
        statistics = self._mean(
            [piece.statistics for piece in rows], [piece.num_pairs for piece in rows]
        )
        contrastive, anchor_JZ, semantic_JZ = self.contrastive(
            torch.cat([piece.anchor_QZ for piece in rows]),
            torch.cat([piece.semantic_QZ for piece in rows]),
            torch.cat([piece.answer_key_Q for piece in rows]),
            is_masked=is_masked,
        )
        return StepLosses(contrastive, next_token, statistics, anchor_JZ, semantic_JZ)

    def _mean(self, means: Sequence[Tensor], counts: Sequence[Tensor]) -> Tensor:
        """The mean over all pieces of every process, from each piece's."""
        shares = self.shares(counts)
        weighted = [mean * share for mean, share in zip(means, shares, strict=True)]
        return self.processes.total(torch.stack(weighted).sum())


def answer_keys(segments: Sequence[Segment]) -> Tensor:
    """An int64 key per answer [Q], on the CPU: its content's hash, the same on every process."""
    digests = [
        hashlib.blake2b(np.array(segment.answer, dtype=np.int64).tobytes(), digest_size=8).digest()
        for segment in segments
    ]
    return torch.from_numpy(np.frombuffer(b"".join(digests), dtype=np.int64).copy())
