"""Mean-pooled event vectors: what a checkpoint's event encoder says of a user without a decoder.

Legend: U users, M modalities, E event_dim.
"""

import numpy as np

from qanchor.eval.probe import Features
from qanchor.train.corpus import PrefixCorpus


def pooled_events(corpus: PrefixCorpus) -> Features:
    """Mean event vector of each modality [U, M, E], float32; zeros for an empty modality.

    The same means a user's modality tokens are made of, before any adapter. The corpus must carry
    event vectors.
    """
    rendered, vectors = corpus.rendered, corpus.event_vectors
    assert vectors is not None, "This is a bug: the corpus has no event vectors."
    num_modalities = len(corpus.tokens.modality_start)
    means_UME = np.zeros((len(rendered.user_ids), num_modalities, vectors.shape[1]), np.float32)
    for user, (counts, rows) in enumerate(zip(rendered.num_events, rendered.rows, strict=True)):
        for modality, (count, end) in enumerate(zip(counts, np.cumsum(counts), strict=True)):
            if count:
                means_UME[user, modality] = vectors[rows[end - count : end]].mean(axis=0)
    return means_UME
