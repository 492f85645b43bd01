"""Embeddings of many users for many queries, straight from a checkpoint (torch).

Legend: U users, Q queries, Z embedding_dim.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from qanchor.bundle.packing import scenario_suffix
from qanchor.checkpoint import Checkpoint
from qanchor.config import Scenario
from qanchor.train.batches import Segment, anchor_batch
from qanchor.train.corpus import RenderedCorpus
from qanchor.train.event_vectors import with_event_vectors
from qanchor.train.setup import tokenized

USERS_PER_BATCH = 32


@torch.inference_mode()
def embed_users(
    checkpoint: Checkpoint, rendered: RenderedCorpus, queries: Sequence[str | Scenario]
) -> npt.NDArray[np.float32]:
    """Anchor embeddings [U, Q, Z] of every rendered user for every query.

    A text is asked as it stands, a scenario with its soft prompt. Raises ConfigError for a soft
    prompt of another width than the decoder's.
    """
    checkpoint.model.eval()
    corpus = with_event_vectors(tokenized(checkpoint, rendered), checkpoint.model.event_encoder)
    segments = [segment_of(checkpoint, query) for query in queries]
    num_users = len(rendered.user_ids)
    order = np.argsort([corpus.prefix_len(user) for user in range(num_users)], kind="stable")
    embedding_dim = checkpoint.meta.recipe.head.embedding_dim
    embeddings_UQZ = np.empty((num_users, len(queries), embedding_dim), dtype=np.float32)
    device = checkpoint.model.head.up.weight.device
    bar = tqdm(total=num_users, desc=f"embedding at step {checkpoint.meta.step}", unit="user")
    for start in range(0, num_users, USERS_PER_BATCH):
        users = order[start : start + USERS_PER_BATCH].tolist()
        batch = anchor_batch(corpus, users, [segments] * len(users)).to(device)
        anchor_QZ, _ = checkpoint.model.anchor(batch)
        embeddings_UQZ[users] = anchor_QZ.reshape(len(users), len(queries), -1).cpu().numpy()
        bar.update(len(users))
    bar.close()
    return embeddings_UQZ


def segment_of(checkpoint: Checkpoint, query: str | Scenario) -> Segment:
    """A query text, or a scenario with its soft prompt, as a segment without answer."""
    if isinstance(query, str):
        return Segment(checkpoint.encode_query(query))
    hidden_dim = checkpoint.hidden_dim
    suffix = scenario_suffix(query, checkpoint.encode_query, hidden_dim)
    return Segment(suffix.token_ids, prompt_rows_RD=suffix.prompt_rows_KD)
