"""Packs the users of a suffix step into runs as the engine is quickest, and has them run.

Call from one thread only.
"""

from collections.abc import Sequence
from typing import Generic

import numpy as np

from qanchor.bundle.packing import Packer, UserSuffix
from qanchor_server.engine import Engine, FloatArray, SlotT

_MAX_PACKED_BYTES = 64 << 20
"""Packed steps of one user that are kept: one per prefix length and queries, 10 KB for 100 tokens
and the soft prompts' rows on top, so that a few sets of queries are kept for users of any length.
"""


class SuffixRunner(Generic[SlotT]):
    """An engine's suffix graph over users and their queries."""

    def __init__(self, engine: Engine[SlotT], *, user_emb: int, hidden_dim: int) -> None:
        self._engine = engine
        self._packer = Packer(user_emb=user_emb, hidden_dim=hidden_dim, max_bytes=_MAX_PACKED_BYTES)

    def embed(self, users: Sequence[UserSuffix], slots: Sequence[SlotT]) -> FloatArray:
        """L2-normalised embeddings [Q, Z], user by user, query by query. Raises Retryable.

        `slots[b]` holds the prefix of user b.
        """
        runs = self._engine.runs([user.num_tokens for user in users])
        if len(runs) == 1:
            return self._engine.suffix(self._packer.pack(users), slots)
        found = self._engine.suffix_each(
            [
                (self._packer.pack([users[user] for user in run]), [slots[user] for user in run])
                for run in runs
            ]
        )
        by_user: dict[int, FloatArray] = {}
        for run, vectors_QZ in zip(runs, found, strict=True):
            stops = np.cumsum([len(users[user].queries) for user in run])
            by_user.update(zip(run, np.split(vectors_QZ, stops[:-1]), strict=True))
        return np.concatenate([by_user[user] for user in range(len(users))])
