"""The joint loss of one global batch, Q-Anchor Eq. (3)-(6), on one or several processes.

The batch may lie on several processes (qanchor.train.distributed) and be worked off in pieces; the
losses are those of the whole batch at once. qanchor.train.gradient_cache has their gradient.

Legend: Q pairs of a piece, J pairs of all processes, Z embedding_dim, T terms of ROW_TERMS.
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
from qanchor.train.yes_no import YesNo, yes_no_loss

ROW_TERMS = ("next_token", "statistics", "yes_no")
"""Terms that need no other pair than their own, and so no other piece."""


@dataclass(frozen=True, slots=True)
class StepLosses:
    """Loss terms of a global batch: a scalar, and [T]; u and v [J, Z] beside them."""

    contrastive: Tensor
    row_losses_T: Tensor
    anchor: Tensor
    semantic: Tensor

    def by_name(self) -> dict[str, float]:
        """Every term by its name."""
        row_losses = dict(zip(ROW_TERMS, self.row_losses_T.tolist(), strict=True))
        return {"contrastive": self.contrastive.item(), **row_losses}


@dataclass(frozen=True, slots=True)
class TowerRows:
    """What one piece contributes, on the model's device.

    `anchor_QZ`, `semantic_QZ`: float32 unit vectors. `answer_key_Q`: int64, equal exactly where
    answers are. `row_losses_T`, float32: means over the piece's answer tokens, its pairs, and its
    answers that begin with yes or no; `counts_T` has how many these are.
    """

    anchor_QZ: Tensor
    semantic_QZ: Tensor
    answer_key_Q: Tensor
    row_losses_T: Tensor
    counts_T: Tensor


AutocastDType = Literal["float32", "bfloat16"]


def autocast_dtype(
    dtype: Literal["float32", "bfloat16", "auto"], device: torch.device
) -> AutocastDType:
    """`dtype`, with `auto` decided: bfloat16 where the device multiplies in it.

    A CPU that has to unpack it takes several times as long for a step as in float32.
    """
    if dtype != "auto":
        return dtype
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    found = torch.cpu.get_capabilities()
    is_native = any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return "bfloat16" if is_native else "float32"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """How a run turns batches into losses and gradients."""

    model: QAnchorModel
    loss: LossConfig
    dtype: AutocastDType = "float32"
    users_per_piece: int = 0
    processes: Processes = Processes()
    yes_no: YesNo | None = None
    """Needed where the loss has a `yes_no_weight`."""

    def losses(self, picked: Picked, *, is_masked: bool) -> StepLosses:
        """Losses of a global batch; every process takes its share and gets the same result."""
        return self.joined([self.rows(piece) for piece in self.pieces(picked)], is_masked)

    def total(self, losses: StepLosses) -> Tensor:
        """The weighted sum that is minimised."""
        return self.loss.contrastive_weight * losses.contrastive + self.weighted(
            losses.row_losses_T
        )

    def weighted(self, row_losses_T: Tensor) -> Tensor:
        """The part of the row terms in `total`."""
        weights = [getattr(self.loss, f"{name}_weight") for name in ROW_TERMS]
        return (row_losses_T * row_losses_T.new_tensor(weights)).sum()

    def rows(self, piece: Picked, *, with_row_losses: bool = True) -> TowerRows:
        """Both towers on a piece, under autocast if the recipe says so.

        `with_row_losses=False` leaves out what needs no other piece, the vocabulary projection
        among it: `row_losses_T` is then 0.
        """
        device = self.model.head.up.weight.device
        # One context per pass: the weights it casts are kept for it alone, with or without graph.
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.dtype == "bfloat16"):
            asked = [segment for of_user in piece.segments for segment in of_user]
            flat = [segment for segment in asked if not segment.is_yes_no_only]
            answers_QA, answer_len_Q = self._answers(flat, piece)
            batch = anchor_batch(piece.corpus, piece.users, self._asked(piece)).to(device)
            asked_QZ, states_BSD = self.model.anchor(batch)
            anchor_QZ = asked_QZ
            if len(flat) < len(asked):
                is_pair_Q = torch.tensor([not segment.is_yes_no_only for segment in asked])
                anchor_QZ = asked_QZ[is_pair_Q.to(device)]
            semantic_QZ = self.model.semantic(answers_QA, answer_len_Q)
            row_losses = dict.fromkeys(ROW_TERMS, anchor_QZ.new_zeros(()))
            if with_row_losses and self.loss.next_token_weight:
                logits_KV, labels_K = (
                    self.model.logits_from_embedding(anchor_QZ, answers_QA, answer_len_Q)
                    if self._answers_apart
                    else self.model.answer_logits(states_BSD, batch.labels_BS)
                )
                row_losses["next_token"] = next_token_loss(logits_KV, labels_K)
            if with_row_losses and self.loss.statistics_weight:
                row_losses["statistics"] = self._statistics(piece, anchor_QZ)
            num_signs = 0.0
            if self.loss.yes_no_weight:
                assert self.yes_no is not None, "This is a bug: the recipe wants yes or no."
                wanted_Q = self.yes_no.wanted(asked)
                num_signs = float((~wanted_Q.isnan()).sum())
                if with_row_losses:
                    row_losses["yes_no"] = self._yes_no(piece, asked_QZ, wanted_Q.to(device))
        counts = [float(answer_len_Q.sum()), float(len(flat)), num_signs]
        return TowerRows(
            anchor_QZ,
            semantic_QZ,
            answer_keys(flat).to(device),
            torch.stack([row_losses[name].float() for name in ROW_TERMS]),
            anchor_QZ.new_tensor(counts),
        )

    def _answers(self, segments: Sequence[Segment], piece: Picked) -> tuple[Tensor, Tensor]:
        """The segments' answers and their lengths, on the model's device."""
        answers_QA, answer_len_Q = answer_batch(segments, piece.corpus.tokens)
        device = self.model.head.up.weight.device
        return answers_QA.to(device), answer_len_Q.to(device)

    def _yes_no(self, piece: Picked, anchor_QZ: Tensor, wanted_Q: Tensor) -> Tensor:
        assert self.yes_no is not None, "This is a bug: the recipe wants yes or no."
        texts = (*self.yes_no.yes, *self.yes_no.no)
        vectors_AZ = self.model.semantic(*self._answers(texts, piece))
        yes_AZ, no_AZ = vectors_AZ.split([len(self.yes_no.yes), len(self.yes_no.no)])
        with torch.autocast(anchor_QZ.device.type, enabled=False):
            return yes_no_loss(anchor_QZ, yes_AZ, no_AZ, wanted_Q, self.loss.temperature)

    def _statistics(self, piece: Picked, anchor_QZ: Tensor) -> Tensor:
        head, known_US = self.model.statistics_head, piece.corpus.rendered.statistics
        assert head is not None, "This is a bug: the recipe wants statistics."
        assert known_US is not None, "This is a bug: the recipe wants statistics."
        num_pairs = [sum(not each.is_yes_no_only for each in of) for of in piece.segments]
        of_pair_Q = np.repeat(piece.users, num_pairs)
        wanted_QS = torch.from_numpy(known_US[of_pair_Q]).to(anchor_QZ.device)
        return head.loss(anchor_QZ, wanted_QS, self.loss.statistics_future_share)

    @property
    def _answers_apart(self) -> bool:
        return self.loss.next_token_context == "embedding"

    def _asked(self, piece: Picked) -> Sequence[Sequence[Segment]]:
        """The piece's segments as they stand behind the prefix: with their answers or without."""
        return [
            [
                replace(each, answer=()) if self._answers_apart or each.is_yes_no_only else each
                for each in of_user
            ]
            for of_user in piece.segments
        ]

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

    def shares(self, rows: Sequence[TowerRows]) -> list[Tensor]:
        """Weight [T] of each piece's means by what they are means over.

        So weighted, the sum over pieces and processes is the mean over all.
        """
        here_T = torch.stack([piece.counts_T for piece in rows]).sum(dim=0)
        everywhere_T = self.processes.total(here_T).clamp(min=1)
        return [piece.counts_T / everywhere_T for piece in rows]

    def pieces(self, picked: Picked) -> list[Picked]:
        """This process's share of a global batch, in pieces of `users_per_piece` users."""
        own = self.processes.share(range(len(picked.users)))
        return picked.part(own).pieces(self.users_per_piece)

    def joined(self, rows: Sequence[TowerRows], is_masked: bool) -> StepLosses:
        """Losses over the given pieces of every process."""
        shares = self.shares(rows)
        told = [piece.row_losses_T * share_T for piece, share_T in zip(rows, shares, strict=True)]
        contrastive, anchor_JZ, semantic_JZ = self.contrastive(
            torch.cat([piece.anchor_QZ for piece in rows]),
            torch.cat([piece.semantic_QZ for piece in rows]),
            torch.cat([piece.answer_key_Q for piece in rows]),
            is_masked=is_masked,
        )
        row_losses_T = self.processes.total(torch.stack(told).sum(dim=0))
        return StepLosses(contrastive, row_losses_T, anchor_JZ, semantic_JZ)


def answer_keys(segments: Sequence[Segment]) -> Tensor:
    """An int64 key per answer [Q], on the CPU: its content's hash, the same on every process."""
    digests = [
        hashlib.blake2b(np.array(segment.answer, dtype=np.int64).tobytes(), digest_size=8).digest()
        for segment in segments
    ]
    return torch.from_numpy(np.frombuffer(b"".join(digests), dtype=np.int64).copy())
