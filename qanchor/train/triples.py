"""Triples in memory and the deterministic order in which training visits them.

The order follows from (seed, epoch) alone: any step's batch can be rebuilt without history, which
is what makes resuming exact. A step draws a few topics and asks them of all its users, so that
most negatives answer the same question about another user: only behaviour tells them apart.
"""

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from qanchor.bundle.packing import FloatArray
from qanchor.checkpoint import Checkpoint
from qanchor.data.useru import SHIFT_COLUMN, read_columns
from qanchor.data.views import View
from qanchor.errors import DataError
from qanchor.train.batches import Segment
from qanchor.train.query_states import kept_states
from qanchor.train.yes_no import YesNo

log = logging.getLogger(__name__)

BUCKET_BATCHES = 16
MAX_KNOWN_QUERIES = 1 << 14
"""Questions whose states are kept for the next shard: 500 MB at 20 words, 384 wide."""


@dataclass(frozen=True, slots=True)
class UserTriples:
    """The (query, answer) pairs of each user; `users[i]` is a row of the prefix corpus."""

    users: tuple[int, ...]
    segments: Sequence[Sequence[Segment]]
    topics: Sequence[Sequence[int]]
    """Topic number of each segment."""

    def part(self, entries: Sequence[int]) -> "UserTriples":
        """The users at the given places."""
        return UserTriples(
            tuple(self.users[entry] for entry in entries),
            tuple(self.segments[entry] for entry in entries),
            tuple(self.topics[entry] for entry in entries),
        )

    @property
    def topic_counts(self) -> npt.NDArray[np.int64]:
        """Triples per topic number."""
        return np.bincount([topic for of_user in self.topics for topic in of_user])


@dataclass(frozen=True, slots=True)
class TripleTexts:
    """A triples file, row by row."""

    views: list[View]
    topics: list[str]
    queries: list[str]
    answers: list[str]

    def shifts(self) -> dict[str, list[int]]:
        """The views that have triples: shifts by user, ascending."""
        found: dict[str, set[int]] = {}
        for view in self.views:
            found.setdefault(view.user_id, set()).add(view.shift)
        return {user: sorted(shifts) for user, shifts in found.items()}


def read_triple_texts(path: Path) -> TripleTexts:
    """Read a triples file."""
    columns = read_columns(path)
    views = [
        View(str(user), shift)
        for user, shift in zip(columns["user_id"], columns[SHIFT_COLUMN], strict=True)
    ]
    return TripleTexts(views, columns["topic"], columns["query"], columns["answer"])


class TripleQueries:
    """Queries of triples as training reads them, cut to the recipe's limit.

    Remembers which it cut, and, within bounds, what a query encoder read where no directory keeps
    it: shards ask much alike.
    """

    def __init__(self, checkpoint: Checkpoint, kept_in: Path | None = None) -> None:
        self._checkpoint = checkpoint
        self._kept_in = kept_in
        self._max_query_len = checkpoint.meta.recipe.train.max_query_len
        self._cut: set[str] = set()
        self._known: dict[str, FloatArray] = {}

    def segments(self, queries: Sequence[str]) -> list[Segment]:
        """A segment without answer for each of different queries."""
        encoder = self._checkpoint.query_encoder
        if encoder is None:
            return [Segment(self._token_ids(query)) for query in queries]
        num_rows = self._checkpoint.meta.recipe.query_encoder.num_rows
        if self._kept_in is None:
            states = self.states(queries)
        else:
            token_ids = [self._token_ids(query) for query in queries]
            states = kept_states(encoder, token_ids, self._kept_in)
        return [
            Segment((), query_states_TE=states_TE, num_query_rows=num_rows) for states_TE in states
        ]

    def states(self, queries: Sequence[str]) -> list[FloatArray]:
        """What the query encoder reads of each query, [T, E] each, float16: there are many."""
        encoder = self._checkpoint.query_encoder
        assert encoder is not None, "This is a bug: the decoder reads the questions."
        new = [query for query in dict.fromkeys(queries) if query not in self._known]
        token_ids = [self._token_ids(query) for query in new]
        shape = (sum(map(len, token_ids)), encoder.state_dim)
        read = dict(zip(new, encoder.states(token_ids, np.empty(shape, np.float16)), strict=True))
        room = MAX_KNOWN_QUERIES - len(self._known)
        # Copies, or the few would hold all that were read with them.
        self._known.update((query, read[query].copy()) for query in new[: max(room, 0)])
        known = self._known | read
        return [known[query] for query in queries]

    def warn_of_cut(self) -> None:
        """Say how many queries were cut, if any."""
        if self._cut:
            log.warning(
                "%d queries are cut to train.max_query_len=%d tokens, so those that differ only "
                "further on are trained as one; shorten them or raise it",
                len(self._cut),
                self._max_query_len,
            )

    def _token_ids(self, query: str) -> tuple[int, ...]:
        ids = self._checkpoint.encode_query(query)
        if len(ids) > self._max_query_len:
            self._cut.add(query)
        return ids[: self._max_query_len]


def load_triples(
    triples: TripleTexts,
    checkpoint: Checkpoint,
    view_names: Sequence[str],
    where: str,
    kept_in: Path | None = None,
) -> UserTriples:
    """Tokenise the triples of `view_names` (rows of the corpus); `where` names them in errors.

    What a query encoder reads of them is kept in `kept_in`, if given, else in memory.

    Raises DataError for a triple of another user: only train users may be learnt from.
    """
    row_of = {name: row for row, name in enumerate(view_names)}
    by_user: dict[int, list[tuple[Segment, int]]] = {}
    queries = TripleQueries(checkpoint, kept_in)
    distinct = list(dict.fromkeys(triples.queries))
    asked = dict(zip(distinct, queries.segments(distinct), strict=True))
    queries.warn_of_cut()
    answer_ids: dict[str, tuple[int, ...]] = {}
    topic_of: dict[str, int] = {}
    rows = zip(triples.views, triples.topics, triples.queries, triples.answers, strict=True)
    bar = tqdm(rows, desc="tokenising triples", unit="triple", total=len(triples.views))
    for number, (view, topic, query, answer) in enumerate(bar):
        if view.name not in row_of:
            raise DataError(
                f"{where}:{number}:user_id",
                view.name,
                "is no train user",
                "make the triples again",
            )
        if answer not in answer_ids:
            answer_ids[answer] = checkpoint.encode_answer(answer)
        segment = replace(asked[query], answer=answer_ids[answer])
        topic_number = topic_of.setdefault(topic, len(topic_of))
        by_user.setdefault(row_of[view.name], []).append((segment, topic_number))
    users = tuple(sorted(by_user))
    return UserTriples(
        users,
        tuple(tuple(segment for segment, _ in by_user[user]) for user in users),
        tuple(tuple(topic for _, topic in by_user[user]) for user in users),
    )


@dataclass(frozen=True, slots=True)
class BatchOrder:
    """Which triples stand in which step: users of like prefix length together."""

    triples: UserTriples
    topic_share: npt.NDArray[np.float64]
    """Probability of drawing each topic."""
    prefix_lens: npt.NDArray[np.int64]
    users_per_batch: int
    queries_per_user: int
    seed: int
    yes_no_per_user: int = 0
    yes_no: YesNo | None = None
    """Tells which answers say yes or no, where there are to be such."""

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
        count = min(self.queries_per_user, int((self.topic_share > 0).sum()))
        drawn = rng.choice(len(self.topic_share), size=count, replace=False, p=self.topic_share)
        users, segments = [], []
        for entry in chosen:
            users.append(self.triples.users[entry])
            segments.append(self._pick(entry, set(drawn.tolist()), rng))
        return users, segments

    def _pick(self, entry: int, drawn: set[int], rng: np.random.Generator) -> list[Segment]:
        """The user's triples of the drawn topics, filled up with others where it has none.

        Behind them those for the yes/no loss alone: of any topic, as it compares no users.
        """
        of_user, topics = self.triples.segments[entry], self.triples.topics[entry]
        order = rng.permutation(len(of_user)).tolist()
        order.sort(key=lambda pick: topics[pick] not in drawn)
        picked = [of_user[pick] for pick in order[: self.queries_per_user]]
        if self.yes_no is None:
            return picked
        others = (of_user[pick] for pick in order[self.queries_per_user :])
        known = (each for each in others if self.yes_no.sign(each) is not None)
        more = itertools.islice(known, self.yes_no_per_user)
        return [*picked, *(replace(each, is_yes_no_only=True) for each in more)]

    def _epoch(self, rng: np.random.Generator) -> list[npt.NDArray[np.int64]]:
        order = rng.permutation(len(self.triples.users))
        size = self.users_per_batch
        batches: list[npt.NDArray[np.int64]] = []
        for start in range(0, len(order), size * BUCKET_BATCHES):
            bucket = order[start : start + size * BUCKET_BATCHES]
            # Who waits for the next epoch is drawn before sorting: else it is who has most events.
            bucket = bucket[: len(bucket) // size * size]
            bucket = bucket[np.argsort(self.prefix_lens[bucket], kind="stable")]
            batches.extend(bucket[first : first + size] for first in range(0, len(bucket), size))
        if not batches:
            batches = [order]
        return [batches[index] for index in rng.permutation(len(batches))]
