"""Embeddings of many users for many queries, straight from a checkpoint (torch).

Legend: U users, Q queries, A answers, Z embedding_dim.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from qanchor.checkpoint import Checkpoint
from qanchor.config import Scenario
from qanchor.train.batches import Segment, anchor_batch, answer_batch
from qanchor.train.corpus import PrefixCorpus, RenderedCorpus
from qanchor.train.event_vectors import with_event_vectors
from qanchor.train.setup import tokenized

USERS_PER_BATCH = 32
_QUERIES_PER_BATCH = 12
"""Attention over a user's queries side by side grows with their square, and soon costs more than
encoding the prefix once more."""


def encoded_corpus(checkpoint: Checkpoint, rendered: RenderedCorpus) -> PrefixCorpus:
    """Rendered users with a checkpoint's tokens and event vectors; each distinct text once."""
    return with_event_vectors(tokenized(checkpoint, rendered), checkpoint.model.event_encoder)


def embed_users(
    checkpoint: Checkpoint, rendered: RenderedCorpus, queries: Sequence[str | Scenario]
) -> npt.NDArray[np.float32]:
    """`embed_corpus` of users that are only rendered yet."""
    return embed_corpus(checkpoint, encoded_corpus(checkpoint, rendered), queries)


@torch.inference_mode()
def embed_corpus(
    checkpoint: Checkpoint,
    corpus: PrefixCorpus,
    queries: Sequence[str | Scenario],
    users: Sequence[int] | None = None,
) -> npt.NDArray[np.float32]:
    """Anchor embeddings [U, Q, Z] of every user of the corpus for every query.

    `users`: only these of the corpus, in this order. A text is asked as it stands, a scenario with
    its soft prompt. Raises ConfigError for a soft prompt of another width than the decoder's.
    """
    checkpoint.model.eval()
    segments = [segment_of(checkpoint, query) for query in queries]
    chosen = np.arange(len(corpus.rendered.user_ids)) if users is None else np.asarray(users)
    num_users = len(chosen)
    order = np.argsort([corpus.prefix_len(user) for user in chosen.tolist()], kind="stable")
    embedding_dim = checkpoint.meta.recipe.head.embedding_dim
    embeddings_UQZ = np.empty((num_users, len(queries), embedding_dim), dtype=np.float32)
    device = checkpoint.model.head.up.weight.device
    bar = tqdm(total=num_users, desc=f"embedding at step {checkpoint.meta.step}", unit="user")
    for start in range(0, num_users, USERS_PER_BATCH):
        places = order[start : start + USERS_PER_BATCH]
        rows = chosen[places].tolist()
        for first in range(0, len(segments), _QUERIES_PER_BATCH):
            asked = segments[first : first + _QUERIES_PER_BATCH]
            batch = anchor_batch(corpus, rows, [asked] * len(rows)).to(device)
            anchor_QZ, _ = checkpoint.model.anchor(batch)
            anchor_UQZ = anchor_QZ.reshape(len(rows), len(asked), -1).cpu().numpy()
            embeddings_UQZ[places, first : first + len(asked)] = anchor_UQZ
        bar.update(len(places))
    bar.close()
    return embeddings_UQZ


@torch.inference_mode()
def embed_answers(checkpoint: Checkpoint, answers: Sequence[str]) -> npt.NDArray[np.float32]:
    """Semantic embeddings v [A, Z] of answer texts."""
    checkpoint.model.eval()
    device = checkpoint.model.head.up.weight.device
    segments = [Segment((), checkpoint.encode_answer(answer)) for answer in answers]
    ids_QA, len_Q = answer_batch(segments, checkpoint.meta.tokens)
    vectors_QZ = checkpoint.model.semantic(ids_QA.to(device), len_Q.to(device))
    found: npt.NDArray[np.float32] = vectors_QZ.cpu().numpy()
    return found


def segment_of(checkpoint: Checkpoint, query: str | Scenario) -> Segment:
    """A query text, or a scenario with its soft prompt, as a segment without answer."""
    suffix = checkpoint.query(query) if isinstance(query, str) else checkpoint.scenario(query)
    return Segment(suffix.token_ids, prompt_rows_RD=suffix.prompt_rows_KD)
