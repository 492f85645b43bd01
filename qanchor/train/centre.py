"""Data-dependent initialisation of the adapters, so that users differ from the first step on.

Vectors of different event texts share most of their direction, means over events even more: what
tells users apart is a few percent of what an adapter reads. Training from there first grows the
shared part (all events pull it the same way) and loses the rest. The LayerNorm of each adapter is
therefore set so that what leaves it has mean 0 and spread 1 per feature over train users. It
stays the paper's LayerNorm, with another start; labels are not read.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import layer_norm
from tqdm import tqdm

from qanchor.encoder.hierarchical import LAYER_NORM_EPS
from qanchor.towers import QAnchorModel
from qanchor.train.batches import Segment, anchor_batch
from qanchor.train.corpus import PrefixCorpus

USERS_PER_PIECE = 32
MIN_VECTORS = 32
"""An adapter that meets fewer keeps its usual start: no mean to speak of."""
MIN_SPREAD = 0.05
"""Features that vary less (of a LayerNorm's 1) are not blown up further."""


@torch.no_grad()
def centre_adapters(model: QAnchorModel, corpus: PrefixCorpus, num_users: int, seed: int) -> None:
    """Set every adapter's LayerNorm from `num_users` users of `corpus` drawn by `seed`."""
    everyone = len(corpus.rendered.user_ids)
    users = np.random.default_rng([seed, 2]).permutation(everyone)[:num_users]
    for adapter, pieces in zip(
        model.encoder.adapters, _adapter_inputs(model, corpus, users.tolist()), strict=True
    ):
        normed_NE = layer_norm(torch.cat(pieces), adapter.norm.normalized_shape, eps=LAYER_NORM_EPS)
        if len(normed_NE) >= MIN_VECTORS:
            spread_E = normed_NE.std(dim=0).clamp(min=MIN_SPREAD)
            adapter.norm.weight.copy_(1 / spread_E)
            adapter.norm.bias.copy_(-normed_NE.mean(dim=0) / spread_E)


def _adapter_inputs(
    model: QAnchorModel, corpus: PrefixCorpus, users: list[int]
) -> list[list[Tensor]]:
    """For each adapter the vectors [N, E] the users' prefixes bring it, in pieces."""
    found: list[list[Tensor]] = [[] for _ in model.encoder.adapters]
    nothing_asked = [Segment(query=())]
    for start in tqdm(range(0, len(users), USERS_PER_PIECE), desc="centring adapters"):
        piece = users[start : start + USERS_PER_PIECE]
        batch = anchor_batch(corpus, piece, [nothing_asked] * len(piece))
        vectors_BPE = model.encoder.pool(batch.adapter_BP, model.event_vectors(batch))
        for index, vectors in enumerate(found):
            vectors.append(vectors_BPE[batch.adapter_BP == index + 1])
    return found
