"""The joint loss of Q-Anchor Eq. (3)-(6): contrastive with margin mask, plus next token.

Two further terms, off by default, are in qanchor.statistics_head and qanchor.train.yes_no.

Legend: Q pairs on this device, Z embedding_dim, K predicted answer tokens, V vocabulary.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from qanchor.config import Config
from qanchor.errors import ConfigError

Term = Literal["anchor_semantic", "anchor_anchor", "semantic_semantic", "semantic_anchor"]


class LossConfig(Config, frozen=True, kw_only=True):
    """Which parts of the joint loss are on."""

    contrastive_weight: float = 1.0
    """Weight of L_cl; 0 switches it off."""
    next_token_weight: float = 1.0
    """Weight of L_ntp; 0 switches it off."""
    next_token_context: Literal["all", "embedding"] = "all"
    """What answers are predicted from: `all` is Eq. (6), prefix and query included; `embedding` is
    the anchor embedding u alone, so that it has to carry whatever the answer says of the user. Not
    in the paper, whose decoder comes pre-trained."""
    statistics_weight: float = 0.0
    """Weight of the statistics loss (qanchor.statistics_head): counts, active days and recency of
    the user's behaviour are to be told by a linear map of u, so that u keeps what no answer asks
    for. 0, the paper's, switches it off."""
    statistics_future_share: float = 0.2
    """Share of the statistics loss that is about train users' futures; the rest is about the
    history and the attributes."""
    statistics_whitening: float = 0.0
    """Power of a principal component's variance by which its weight in the statistics loss falls. 0
    weighs columns alike, so that what many of them repeat counts many times; 1 weighs components
    alike, down to those that hold little but noise."""
    yes_no_weight: float = 0.0
    """Weight of the yes/no loss (qanchor.train.yes_no): answers that begin with yes or no say which
    way u is to point, so that a scenario given as a question alone can be scored. 0, the paper's,
    switches it off."""
    temperature: float = 0.07
    """tau of Eq. (3), and of the yes/no loss."""
    margin: float | None = 0.1
    """c_margin of the false-negative mask, Eq. (5); null switches the mask off."""
    mask_from_step: int = 0
    """First training step with the mask. A fresh model maps all users to nearly one direction, so
    s(u_i,u_j) exceeds s(u_i,v_i) + margin for every j: masked from the start, L_cl would be 0 and
    stay there. Recipes that start from scratch wait until the directions have spread."""
    drop_equal_answers: bool = False
    """Drop j where a_j is a_i word for word: such a pair is a false negative that the margin never
    finds, s(u_i,v_j) being s(u_i,v_i). Not in the paper, whose answers hardly repeat."""
    terms: tuple[Term, ...] = ("anchor_semantic", "anchor_anchor", "semantic_semantic")
    """Negatives in Z_i: s(u_i,v_j), s(u_i,u_j), s(v_i,v_j) of the paper; s(v_i,u_j) as the
    authors' code adds."""
    mask: Literal["joint", "per_term"] = "joint"
    """`joint`: m_ij of Eq. (5) drops j from every term; `per_term` (authors' code): each term
    drops its own similarities above s(u_i,v_i) + margin."""

    def __post_init__(self) -> None:
        for name in ("statistics_future_share", "statistics_whitening"):
            if not 0 <= (share := getattr(self, name)) <= 1:
                raise ConfigError(f"loss.{name}", share, "must be from 0 to 1", "e.g. 0.5")


def contrastive_loss(
    anchor_QZ: Tensor,
    semantic_QZ: Tensor,
    config: LossConfig,
    *,
    is_masked: bool = True,
    equal_QQ: Tensor | None = None,
) -> Tensor:
    """L_cl of Eq. (3)-(5): scalar mean over the Q pairs; row i of both inputs is one pair.

    Inputs are L2-normalised float32 on one device. `is_masked=False` leaves Eq. (5) out, whatever
    the config's margin. `equal_QQ` (bool): answers i and j are the same words; read only with
    `drop_equal_answers`.
    """
    similarity = {
        "anchor_semantic": anchor_QZ @ semantic_QZ.T,
        "anchor_anchor": anchor_QZ @ anchor_QZ.T,
        "semantic_semantic": semantic_QZ @ semantic_QZ.T,
    }
    similarity["semantic_anchor"] = similarity["anchor_semantic"].T
    positive_Q = similarity["anchor_semantic"].diagonal()
    keep_QQ = ~torch.eye(len(positive_Q), dtype=torch.bool, device=positive_Q.device)
    if config.drop_equal_answers and equal_QQ is not None:
        keep_QQ = keep_QQ & ~equal_QQ
    threshold_Q1 = None
    if is_masked and config.margin is not None:
        threshold_Q1 = positive_Q.detach()[:, None] + config.margin
    if threshold_Q1 is not None and config.mask == "joint":
        keep_QQ = keep_QQ & (similarity["anchor_semantic"] <= threshold_Q1)
        keep_QQ = keep_QQ & (similarity["anchor_anchor"] <= threshold_Q1)
    scores = [positive_Q[:, None] / config.temperature]
    for term in config.terms:
        kept_QQ = keep_QQ
        if threshold_Q1 is not None and config.mask == "per_term":
            kept_QQ = keep_QQ & (similarity[term] <= threshold_Q1)
        scores.append((similarity[term] / config.temperature).masked_fill(~kept_QQ, -torch.inf))
    log_z_Q = torch.logsumexp(torch.cat(scores, dim=1), dim=1)
    return (log_z_Q - positive_Q / config.temperature).mean()


def next_token_loss(logits_KV: Tensor, labels_K: Tensor) -> Tensor:
    """L_ntp of Eq. (6): mean cross-entropy over the K answer tokens (0 when there are none)."""
    if not len(labels_K):
        return logits_KV.sum()
    return functional.cross_entropy(logits_KV, labels_K)
