"""Event dropout: a training step sees users without some of their events, others each time.

A small decoder that meets the same users often learns what came next by heart, user by user.
Probes are then fitted on train users whose embeddings know their future, and fail on others.

Legend: N events of a user, M modalities.
"""

from dataclasses import replace

import numpy as np

from qanchor.train.source import Picked


def thinned(picked: Picked, share: float, rng: np.random.Generator) -> Picked:
    """A batch whose users lack events, each user a share drawn from 0 to twice `share`.

    Answers and behaviour statistics stay those of the whole history. The result's corpus holds the
    batch's users only.
    """
    whole = picked.corpus.rendered
    num_events, rows, measures = [], [], []
    for user in picked.users:
        counts_M = whole.num_events[user]
        kept_N = rng.random(sum(counts_M)) >= rng.uniform(0, 2 * share)
        modality_N = np.repeat(np.arange(len(counts_M)), counts_M)
        left_M = np.bincount(modality_N[kept_N], minlength=len(counts_M))
        num_events.append(tuple(left_M.tolist()))
        rows.append(whole.rows[user][kept_N])
        if whole.measures:
            measures.append(whole.measures[user][kept_N])
    rendered = replace(
        whole,
        user_ids=tuple(whole.user_ids[user] for user in picked.users),
        num_events=tuple(num_events),
        rows=tuple(rows),
        measures=tuple(measures),
        statistics=None if whole.statistics is None else whole.statistics[list(picked.users)],
    )
    corpus = replace(picked.corpus, rendered=rendered)
    return Picked(corpus, range(len(picked.users)), picked.segments)
