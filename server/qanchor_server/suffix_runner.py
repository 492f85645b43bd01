"""Packs what is asked of the users of a suffix step into runs as the engine is quickest.

Call from one thread only.
"""

import queue
from collections.abc import Sequence
from typing import Generic

import numpy as np

from qanchor.bundle.packing import Packer, UserSuffix
from qanchor_server.engine import Engine, FloatArray, RunsDone, SlotT, SuffixRun

_MAX_PACKED_BYTES = 64 << 20
"""Packed steps of one user that are kept: one per prefix length and queries, 10 KB for 100 tokens
and the soft prompts' rows on top, so that a few sets of queries are kept for users of any length.
"""
_ROW_TOKENS = 64
"""Where runs go side by side, what else is asked of a user goes into another run from so many
tokens on: products are near their full rate then, and within a run all tokens are scored against
all (docs/log.md)."""


class SuffixRunner(Generic[SlotT]):
    """An engine's suffix graph over users and their queries.

    `asked` and `slots` below: one entry per request, a user's requests one after the other;
    `slots[r]` holds the prefix of the user of request r. Embeddings are L2-normalised, [Q, Z],
    request by request, query by query.
    """

    def __init__(self, engine: Engine[SlotT], *, user_emb: int, hidden_dim: int) -> None:
        self._engine = engine
        self._packer = Packer(user_emb=user_emb, hidden_dim=hidden_dim, max_bytes=_MAX_PACKED_BYTES)

    def embed(self, asked: Sequence[UserSuffix], slots: Sequence[SlotT]) -> FloatArray:
        """The embeddings. Raises Retryable."""
        if self._engine.side_by_side is not None:
            return np.concatenate(run_each(self._engine, self._runs(asked, slots)))
        return self._together(*_rows(asked, slots, room=None))

    def begin(
        self,
        asked: Sequence[UserSuffix],
        slots: Sequence[SlotT],
        done: RunsDone,
        *,
        is_idle: bool,
    ) -> FloatArray | None:
        """The embeddings, or None where they are made while the caller goes on. Raises Retryable.

        After None `done` gets them in pieces, one below the other. `is_idle`: nothing else is being
        made.
        """
        beside = self._engine.side_by_side
        if beside is None:
            return self.embed(asked, slots)
        runs = self._runs(asked, slots)
        # Nothing to go beside: one run is quickest with all threads on each operator.
        if is_idle and len(runs) == 1:
            return self._engine.suffix(*runs[0])
        beside.begin(runs, done)
        return None

    def _runs(self, asked: Sequence[UserSuffix], slots: Sequence[SlotT]) -> list[SuffixRun[SlotT]]:
        """Runs that go side by side."""
        rows, slots_of_rows = _rows(asked, slots, room=_ROW_TOKENS)
        return [
            (self._packer.pack([row]), [slot])
            for row, slot in zip(rows, slots_of_rows, strict=True)
        ]

    def _together(self, users: Sequence[UserSuffix], slots: Sequence[SlotT]) -> FloatArray:
        runs = self._engine.runs([user.num_tokens for user in users])
        if len(runs) == 1:
            return self._engine.suffix(self._packer.pack(users), slots)
        by_user: dict[int, FloatArray] = {}
        for run in runs:
            packed = self._packer.pack([users[user] for user in run])
            vectors_QZ = self._engine.suffix(packed, [slots[user] for user in run])
            stops = np.cumsum([len(users[user].queries) for user in run])
            by_user.update(zip(run, np.split(vectors_QZ, stops[:-1]), strict=True))
        return np.concatenate([by_user[user] for user in range(len(users))])


def run_each(engine: Engine[SlotT], runs: Sequence[SuffixRun[SlotT]]) -> list[FloatArray]:
    """Embeddings of each run, side by side where the engine can. Raises Retryable."""
    beside = engine.side_by_side
    if beside is None or len(runs) == 1:
        return [engine.suffix(*run) for run in runs]
    ended: queue.SimpleQueue[list[FloatArray] | Exception] = queue.SimpleQueue()
    beside.begin(runs, ended.put)
    found = ended.get()
    if isinstance(found, Exception):
        raise found
    return found


def _rows(
    asked: Sequence[UserSuffix], slots: Sequence[SlotT], *, room: int | None
) -> tuple[list[UserSuffix], list[SlotT]]:
    """Join a user's requests, each into the one before while that has less than `room` tokens."""
    rows: list[UserSuffix] = []
    slots_of_rows: list[SlotT] = []
    for suffix, slot in zip(asked, slots, strict=True):
        if slots_of_rows and slots_of_rows[-1] is slot:
            last = rows[-1]
            if room is None or last.num_tokens < room:
                rows[-1] = UserSuffix(last.prefix_len, last.queries + suffix.queries)
                continue
        rows.append(suffix)
        slots_of_rows.append(slot)
    return rows, slots_of_rows
