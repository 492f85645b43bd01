"""Mean-pooled event vectors: what a checkpoint's event encoder says of a user without a decoder.

Legend: U users, M modalities, N events of a user, E width of event vectors, measures included.
"""

import numpy as np

from qanchor.eval.probe import Features
from qanchor.train.corpus import PrefixCorpus


def pooled_events(corpus: PrefixCorpus) -> Features:
    """Mean event vector of each modality [U, M, E], float32; zeros for an empty modality.

    The same means a user's modality tokens are made of, before any adapter. The corpus must carry
    event vectors.
    """
    rendered, num_modalities = corpus.rendered, len(corpus.tokens.modality_start)
    users = range(len(rendered.user_ids))
    first_NE = _event_vectors(corpus, 0)
    means_UME = np.zeros((len(users), num_modalities, first_NE.shape[1]), np.float32)
    for user in users:
        vectors_NE, counts = _event_vectors(corpus, user), rendered.num_events[user]
        for modality, (count, end) in enumerate(zip(counts, np.cumsum(counts), strict=True)):
            if count:
                means_UME[user, modality] = vectors_NE[end - count : end].mean(axis=0)
    return means_UME


def _event_vectors(corpus: PrefixCorpus, user: int) -> Features:
    """A user's event vectors [N, E] with the measures behind them, where the schema has some."""
    assert corpus.event_vectors is not None, "This is a bug: the corpus has no event vectors."
    vectors_NE: Features = corpus.event_vectors[corpus.rendered.rows[user]]
    if not corpus.rendered.measures:
        return vectors_NE
    return np.concatenate([vectors_NE, corpus.rendered.measures[user]], axis=1)
