"""Training users in shards on disk, for data sets that do not fit in memory.

A shard directory holds some thousand users, drawn at random, tokenised once:

    index.json                 ShardIndex; written last: without it the directory is unfinished
    00000/users.parquet        user_id (name of the view), num_events, rows (into texts), measures,
                               statistics
    00000/texts.parquet        token ids of each distinct event text of the shard
    00000/queries.parquet      token ids of each distinct query of the shard
    00000/query_states.npy     in their place states, one query's below the other's, where a query
    00000/query_lens.npy       encoder reads the queries, and of how many tokens each is
    00000/answers.parquet      token ids of each distinct answer of the shard
    00000/triples.parquet      user, topic, query, answer (all rows); by user
    00000/vectors.npy          event vectors, where the event encoder does not change
    heldout/...                the same of the users held out

An epoch visits the shards one after the other in an order drawn from (seed, epoch); every batch
lies within one shard. The place in it follows from the step alone, so a resumed run reads on where
it was. At most two shards are in memory: the one in use, and the next, which a thread reads ahead.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from qanchor import config
from qanchor.checkpoint import CheckpointMeta
from qanchor.config import Config
from qanchor.data.measures import NUM_MEASURES
from qanchor.train.batches import Segment
from qanchor.train.corpus import PrefixCorpus, RenderedCorpus
from qanchor.train.source import Picked
from qanchor.train.triples import BatchOrder, UserTriples
from qanchor.train.yes_no import YesNo

INDEX_FILE = "index.json"
HELDOUT = "heldout"
USERS_FILE = "users.parquet"
TEXTS_FILE = "texts.parquet"
QUERIES_FILE = "queries.parquet"
QUERY_STATES_FILE = "query_states.npy"
QUERY_LENS_FILE = "query_lens.npy"
ANSWERS_FILE = "answers.parquet"
TRIPLES_FILE = "triples.parquet"
VECTORS_FILE = "vectors.npy"
MAX_HELD = 2
LAYOUT = 3


class ShardIndex(Config, frozen=True, kw_only=True):
    """What is said of all shards together."""

    layout: int = 1
    """Of the files; shards of another are made again."""
    num_users: tuple[int, ...]
    """Training users per shard."""
    num_heldout: int
    topics: tuple[str, ...]
    """Topic names; triples give their number."""
    topic_counts: tuple[int, ...]
    """Training triples per topic."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard in memory: users are rows of its own corpus."""

    corpus: PrefixCorpus
    triples: UserTriples
    prefix_lens: npt.NDArray[np.int64]


def shard_name(number: int) -> str:
    """Directory of a training shard."""
    return f"{number:05d}"


def read_index(directory: Path) -> ShardIndex | None:
    """The index of finished shards of this layout, else None."""
    path = directory / INDEX_FILE
    index = config.load(ShardIndex, path) if path.is_file() else None
    return index if index is not None and index.layout == LAYOUT else None


def read_shard(directory: Path, meta: CheckpointMeta) -> Shard:
    """Read one shard; event vectors stay on disk and are read row by row."""
    users = pq.read_table(directory / USERS_FILE)
    num_events, rows = _lists(users["num_events"]), _lists(users["rows"])
    text_offsets, text_tokens = _flat_lists(pq.read_table(directory / TEXTS_FILE)["tokens"])
    vectors = directory / VECTORS_FILE
    corpus = PrefixCorpus(
        rendered=RenderedCorpus(
            user_ids=tuple(users["user_id"].to_pylist()),
            num_events=tuple(tuple(counts.tolist()) for counts in num_events),
            rows=tuple(rows),
            texts=(),
            text_limits=np.zeros(0, dtype=np.int32),
            measures=_measures(users),
            statistics=_statistics(users),
        ),
        tokens=meta.tokens,
        event_pad=meta.event_pad,
        text_tokens=text_tokens,
        text_offsets=text_offsets,
        event_vectors=np.load(vectors, mmap_mode="r") if vectors.is_file() else None,
    )
    triples = _read_triples(directory, len(users), meta)
    return Shard(corpus, triples, np.array([corpus.prefix_len(user) for user in triples.users]))


class ShardedSource:
    """The batches of a run, shard by shard."""

    def __init__(
        self,
        directory: Path,
        index: ShardIndex,
        meta: CheckpointMeta,
        yes_no: YesNo | None = None,
    ) -> None:
        """Without `yes_no` without triples for the yes/no loss alone."""
        self._index = index
        self._yes_no = yes_no
        self._train = meta.recipe.train
        counts = np.array(index.topic_counts, dtype=np.float64)
        self._topic_share = counts / counts.sum()
        size = self._train.users_per_batch
        self._num_batches = np.array([max(count // size, 1) for count in index.num_users])
        self._reader = ShardReader(lambda number: read_shard(directory / shard_name(number), meta))
        self._opened: tuple[int, int] | None = None
        self._order: BatchOrder | None = None
        self._corpus: PrefixCorpus | None = None

    @property
    def num_users(self) -> int:
        """Users with triples, of all shards."""
        return sum(self._index.num_users)

    @property
    def batches_per_epoch(self) -> int:
        """Full batches in one pass over all shards."""
        return int(self._num_batches.sum())

    def batch(self, step: int) -> Picked:
        """What is trained on in a step, counted from 0."""
        epoch, index = divmod(step, self.batches_per_epoch)
        visits = self._visits(epoch)
        ends = np.cumsum(self._num_batches[visits])
        place = int(np.searchsorted(ends, index, side="right"))
        shard = int(visits[place])
        if self._opened != (epoch, shard):
            is_last = place + 1 == len(visits)
            following = int(self._visits(epoch + 1)[0] if is_last else visits[place + 1])
            self._open(epoch, shard, following)
        assert self._order is not None, "This is a bug: a shard is open."
        assert self._corpus is not None, "This is a bug: a shard is open."
        within = index - int(ends[place]) + int(self._num_batches[shard])
        step_of_shard = epoch * self._order.batches_per_epoch + within
        return Picked(self._corpus, *self._order.batch(step_of_shard))

    def _visits(self, epoch: int) -> npt.NDArray[np.int64]:
        """Order of the shards in an epoch."""
        rng = np.random.default_rng([self._train.seed, 6, epoch])
        return rng.permutation(len(self._num_batches))

    def _open(self, epoch: int, number: int, following: int) -> None:
        self._order = self._corpus = None
        shard = self._reader.get(number, following)
        size = self._train.users_per_batch
        triples, prefix_lens = shard.triples, shard.prefix_lens
        num_waiting = len(triples.users) % size if len(triples.users) > size else 0
        if num_waiting:
            # Too few for a batch: others wait in each epoch, whatever their prefix lengths.
            rng = np.random.default_rng([self._train.seed, 7, epoch, number])
            kept = np.sort(rng.permutation(len(triples.users))[num_waiting:])
            triples, prefix_lens = triples.part(kept.tolist()), prefix_lens[kept]
        seed = np.random.SeedSequence([self._train.seed, 8, number]).generate_state(1)[0]
        self._order = BatchOrder(
            triples=triples,
            topic_share=self._topic_share,
            prefix_lens=prefix_lens,
            users_per_batch=size,
            queries_per_user=self._train.queries_per_user,
            seed=int(seed),
            yes_no_per_user=self._train.yes_no_per_user,
            yes_no=self._yes_no,
        )
        self._corpus, self._opened = shard.corpus, (epoch, number)


class ShardReader:
    """Reads shards in a thread of its own, one ahead; call from one thread only."""

    def __init__(self, read: Callable[[int], Shard]) -> None:
        self._read = read
        self._thread = ThreadPoolExecutor(1, "shards")
        self._held: dict[int, Future[Shard]] = {}

    @property
    def num_held(self) -> int:
        """Shards in memory or being read, never more than MAX_HELD."""
        return len(self._held)

    def get(self, wanted: int, following: int) -> Shard:
        """Shard `wanted`, waiting for it if need be; begins to read `following`, drops others."""
        needed = list(dict.fromkeys((wanted, following)))
        self._held = {number: self._held[number] for number in needed if number in self._held}
        for number in needed:
            if number not in self._held:
                self._held[number] = self._thread.submit(self._read, number)
        assert self.num_held <= MAX_HELD, "This is a bug: only two were asked for."
        return self._held[wanted].result()


@dataclass(frozen=True, slots=True)
class _Segments(Sequence[Sequence[Segment]]):
    """The segments of each user, made from the token table when they are asked for."""

    offsets: npt.NDArray[np.int64]
    """Start of each user's triples, and the end of the last."""
    query: npt.NDArray[np.int32]
    answer: npt.NDArray[np.int32]
    queries: Sequence[Segment]
    """The shard's distinct queries."""
    answer_offsets: npt.NDArray[np.int64]
    answer_tokens: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, entry: int) -> Sequence[Segment]: ...
    @overload
    def __getitem__(self, entry: slice) -> Sequence[Sequence[Segment]]: ...
    def __getitem__(self, entry: int | slice) -> Any:
        if isinstance(entry, slice):
            return [self[each] for each in range(*entry.indices(len(self)))]
        rows = range(self.offsets[entry], self.offsets[entry + 1])
        return [replace(self.queries[self.query[r]], answer=self._answer(r)) for r in rows]

    def _answer(self, row: int) -> tuple[int, ...]:
        start, end = self.answer_offsets[self.answer[row] :][:2]
        return tuple(self.answer_tokens[start:end].tolist())


def _measures(users: pa.Table) -> tuple[npt.NDArray[np.float32], ...]:
    """The numbers beside each user's texts [N, F]; none where the schema has none."""
    if "measures" not in users.column_names:
        return ()
    lists = users["measures"].cast(pa.large_list(pa.float32())).combine_chunks()
    flat = np.split(lists.values.to_numpy(), lists.offsets.to_numpy()[1:-1])
    return tuple(numbers.reshape(-1, NUM_MEASURES) for numbers in flat)


def _statistics(users: pa.Table) -> npt.NDArray[np.float16] | None:
    """Behaviour statistics [U, S]; None where the recipe does without."""
    if "statistics" not in users.column_names:
        return None
    flat = users["statistics"].combine_chunks().flatten().to_numpy()
    rows_US: npt.NDArray[np.float16] = flat.reshape(len(users), -1).astype(np.float16)
    return rows_US


def _read_triples(directory: Path, num_users: int, meta: CheckpointMeta) -> UserTriples:
    table = pq.read_table(directory / TRIPLES_FILE)
    user, topic, query, answer = (
        table[name].to_numpy() for name in ("user", "topic", "query", "answer")
    )
    answers = _flat_lists(pq.read_table(directory / ANSWERS_FILE)["tokens"])
    offsets = np.searchsorted(user, np.arange(num_users + 1))
    return UserTriples(
        users=tuple(range(num_users)),
        segments=_Segments(offsets, query, answer, _read_queries(directory, meta), *answers),
        topics=[of_user.tolist() for of_user in np.split(topic, offsets[1:-1])],
    )


def _read_queries(directory: Path, meta: CheckpointMeta) -> list[Segment]:
    """A segment without answer for each distinct query."""
    if not meta.recipe.query_encoder.path:
        ids = _lists(pq.read_table(directory / QUERIES_FILE)["tokens"])
        return [Segment(tuple(of_query.tolist())) for of_query in ids]
    num_rows = meta.recipe.query_encoder.num_rows
    ends = np.cumsum(np.load(directory / QUERY_LENS_FILE))
    # Most of a shard's queries wait for their step: they stay in the file until then. Nobody writes
    # to them; torch only takes what could be written to.
    states_TE = np.asarray(np.load(directory / QUERY_STATES_FILE, mmap_mode="c"))
    return [
        Segment((), query_states_TE=of_query, num_query_rows=num_rows)
        for of_query in np.split(states_TE, ends[:-1])
    ]


def _flat_lists(
    column: pa.ChunkedArray,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """Offsets and values of a column of int32 lists."""
    lists = column.cast(pa.large_list(pa.int32())).combine_chunks()
    offsets: npt.NDArray[np.int64] = lists.offsets.to_numpy()
    return offsets, lists.values.to_numpy()


def _lists(column: pa.ChunkedArray) -> list[npt.NDArray[np.int32]]:
    offsets, values = _flat_lists(column)
    return np.split(values, offsets[1:-1])
