"""UserU: (user, query, answer) triples for pre-training, from histories and train users' futures.

Every user draws from a random generator of its own, so that triples depend on the seed and the
user alone: not on the order of users, nor on who else is there. Never reads labels.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from qanchor.data.activity import collect
from qanchor.data.dataset import EVENTS_FILE, SCHEMA_FILE, Dataset
from qanchor.data.futures import answer_futures
from qanchor.data.grounded import GroundedUser, answer_topics
from qanchor.data.profile import Event, Profile
from qanchor.data.topics import TopicPool, load_topics
from qanchor.data.writer import TableWriter
from qanchor.errors import DataError

TRIPLE_COLUMNS = ("user_id", "kind", "topic", "query", "answer")

_CHUNK_TRIPLES = 1 << 15


@dataclass(frozen=True, slots=True)
class Triple:
    """One pre-training example; the user is given by id, the trainer reads the profile."""

    user_id: str
    kind: Literal["future", "uqa"]
    topic: str
    query: str
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TripleOptions:
    """How many triples of which kind, and for whom."""

    per_user_future: int = 30
    """Behaviour-prediction triples per train user; no other user ever has one."""
    per_user_uqa: int = 6
    """Question-answering triples per user."""
    seed: int = 0
    with_valid: bool = False
    """Question-answering triples for users of split valid too, to watch training by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Maker:
    """What all users' triples have in common."""

    pool: TopicPool
    known_types: Mapping[str, tuple[str, ...]]
    window_days: int
    future_days: int
    options: TripleOptions

    def triples(self, profile: Profile, after: tuple[Event, ...] | None) -> Iterator[Triple]:
        """Triples of one user; `after` holds a train user's later events, else None."""
        options, user_id = self.options, profile.user_id
        history = collect(profile.events, profile.as_of_s, -self.window_days, self.window_days)
        if after is not None:
            rng = Random(f"{options.seed}/future/{user_id}")
            future = collect(after, profile.as_of_s, 0, self.future_days)
            for each in answer_futures(history, future, self.pool, options.per_user_future, rng):
                yield Triple(user_id, "future", each.topic, each.query, each.answer)
        rng = Random(f"{options.seed}/uqa/{user_id}")
        user = GroundedUser(profile=profile, history=history, known_types=self.known_types)
        for each in answer_topics(user, self.pool, options.per_user_uqa, rng):
            yield Triple(user_id, "uqa", each.topic, each.query, each.answer)


def make_triples(dataset: Dataset, options: TripleOptions | None = None) -> Iterator[Triple]:
    """Yield the triples of a data set, users ascending.

    Raises DataError if futures are asked for and the data set has none.
    """
    options = options or TripleOptions()
    config = dataset.config
    if options.per_user_future and config.future_days < 1:
        rule = "must be at least 1 to make future triples"
        remedy = "set it, or ask for per_user_future=0"
        raise DataError(f"{SCHEMA_FILE}: future_days", config.future_days, rule, remedy)
    maker = _Maker(
        pool=load_topics(dataset.path, dataset.name, dataset.schema, config.attributes),
        known_types=known_types(dataset),
        window_days=dataset.schema.window_days,
        future_days=config.future_days,
        options=options,
    )
    train = dataset.user_ids("train")
    users = [*train, *(dataset.user_ids("valid") if options.with_valid else ())]
    futures = dataset.future(train if options.per_user_future else ())
    for profile in dataset.profiles(users):
        after: tuple[Event, ...] | None = None
        if options.per_user_future and dataset.split_of[profile.user_id] == "train":
            user_id, after = next(futures)
            assert user_id == profile.user_id, "This is a bug: both streams ascend by user_id."
        yield from maker.triples(profile, after)


def write_triples(
    dataset: Dataset, path: str | Path, options: TripleOptions | None = None
) -> dict[str, int]:
    """Write the triples as Parquet, with a progress bar on stderr; returns the count by kind.

    Raises DataError as `make_triples` does, and then leaves no file behind.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    schema = pa.schema([(name, pa.string()) for name in TRIPLE_COLUMNS])
    counts = {"future": 0, "uqa": 0}
    rows: list[Triple] = []
    with TableWriter(target, schema) as writer, tqdm(unit=" triples", desc="triples") as bar:
        for triple in make_triples(dataset, options):
            counts[triple.kind] += 1
            rows.append(triple)
            if len(rows) == _CHUNK_TRIPLES:
                writer.write(_table(rows, schema))
                bar.update(len(rows))
                rows.clear()
        writer.write(_table(rows, schema))
        bar.update(len(rows))
    return counts


def read_triples(path: str | Path) -> list[Triple]:
    """Read what `write_triples` wrote."""
    columns = pq.read_table(Path(path), columns=list(TRIPLE_COLUMNS)).to_pydict()
    return [Triple(*row) for row in zip(*columns.values(), strict=True)]


def known_types(dataset: Dataset) -> dict[str, tuple[str, ...]]:
    """Event types that occur in the histories, per modality, in alphabetical order."""
    events = pq.read_table(dataset.path / EVENTS_FILE, columns=["modality", "event_type"])
    pairs = events.group_by(["modality", "event_type"]).aggregate([])
    found: dict[str, list[str]] = {}
    for row in pairs.to_pylist():
        found.setdefault(row["modality"], []).append(row["event_type"])
    return {name: tuple(sorted(found[name])) for name in sorted(found)}


def _table(rows: list[Triple], schema: pa.Schema) -> pa.Table:
    columns = [[getattr(row, name) for row in rows] for name in TRIPLE_COLUMNS]
    return pa.table(dict(zip(TRIPLE_COLUMNS, columns, strict=True)), schema=schema)
