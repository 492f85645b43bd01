"""Triples in memory and the deterministic order in which training visits them.

The order follows from (seed, epoch) alone: any step's batch can be rebuilt without history, which
is what makes resuming exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from tqdm import tqdm

from qanchor.checkpoint import Checkpoint
from qanchor.errors import DataError
from qanchor.train.batches import Segment

BUCKET_BATCHES = 16


@dataclass(frozen=True, slots=True)
class UserTriples:
    """The (query, answer) pairs of each user; `users[i]` is a row of the prefix corpus."""

    users: tuple[int, ...]
    segments: tuple[tuple[Segment, ...], ...]


def read_triple_texts(path: Path) -> tuple[list[str], list[str], list[str]]:
    """User ids, queries, answers of a triples file, row by row."""
    table = pq.read_table(path, columns=["user_id", "query", "answer"])
    user_ids, queries, answers = (column.to_pylist() for column in table.columns)
    return [str(user_id) for user_id in user_ids], queries, answers


def load_triples(path: Path, checkpoint: Checkpoint, user_ids: Sequence[str]) -> UserTriples:
    """Tokenise the triples of `user_ids` (rows of the corpus).

    Raises DataError for a triple of another user: only train users may be learnt from.
    """
    row_of = {user_id: row for row, user_id in enumerate(user_ids)}
    by_user: dict[int, list[Segment]] = {}
    query_ids: dict[str, tuple[int, ...]] = {}
    rows = zip(*read_triple_texts(path), strict=True)
    for number, (user_id, query, answer) in enumerate(tqdm(rows, desc="tokenising triples")):
        if user_id not in row_of:
            raise DataError(
                f"{path.name}:{number}:user_id",
                user_id,
                "is no train user",
                "make the triples again",
            )
        if query not in query_ids:
            query_ids[query] = checkpoint.encode_query(query)
        segment = Segment(query_ids[query], checkpoint.encode_answer(answer))
        by_user.setdefault(row_of[user_id], []).append(segment)
    users = tuple(sorted(by_user))
    return UserTriples(users, tuple(tuple(by_user[user]) for user in users))


@dataclass(frozen=True, slots=True)
class BatchOrder:
    """Which triples stand in which step: users of like prefix length together."""

    triples: UserTriples
    prefix_lens: np.ndarray
    users_per_batch: int
    queries_per_user: int
    seed: int

    @property
    def batches_per_epoch(self) -> int:
        """Full batches in one pass over the users; a rest smaller than a batch waits."""
        return max(len(self.triples.users) // self.users_per_batch, 1)

    def batch(self, step: int) -> tuple[list[int], list[list[Segment]]]:
        """Users (corpus rows) and their segments at a step, counted from 0."""
        epoch, index = divmod(step, self.batches_per_epoch)
        rng = np.random.default_rng([self.seed, epoch])
        chosen = self._epoch(rng)[index]
        rng = np.random.default_rng([self.seed, epoch, index])
        users, segments = [], []
        for entry in chosen:
            of_user = self.triples.segments[entry]
            count = min(self.queries_per_user, len(of_user))
            picks = rng.choice(len(of_user), size=count, replace=False)
            users.append(self.triples.users[entry])
            segments.append([of_user[pick] for pick in picks])
        return users, segments

    def _epoch(self, rng: np.random.Generator) -> list[np.ndarray]:
        order = rng.permutation(len(self.triples.users))
        size = self.users_per_batch
        batches = []
        for start in range(0, len(order), size * BUCKET_BATCHES):
            bucket = order[start : start + size * BUCKET_BATCHES]
            bucket = bucket[np.argsort(self.prefix_lens[bucket], kind="stable")]
            batches.extend(
                bucket[first : first + size] for first in range(0, len(bucket) - size + 1, size)
            )
        if not batches:
            batches = [order]
        return [batches[index] for index in rng.permutation(len(batches))]
