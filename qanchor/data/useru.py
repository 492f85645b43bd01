"""UserU: (user, query, answer) triples for pre-training, from histories and train users' futures.

Every user draws from a random generator of its own, so that triples depend on the seed, the user
and what a sample of train users differs in: not on the order of users. Never reads labels.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from qanchor.config import Config
from qanchor.data.activity import collect
from qanchor.data.dataset import EVENTS_FILE, SCHEMA_FILE, Dataset
from qanchor.data.future_answers import FutureUser
from qanchor.data.futures import FutureQuestions, answer_futures
from qanchor.data.grounded import GroundedUser, answer_topics
from qanchor.data.profile import Event, Profile
from qanchor.data.topics import TopicPool, load_topics
from qanchor.data.views import View, stream_views
from qanchor.data.writer import TableWriter
from qanchor.errors import DataError

TRIPLE_COLUMNS = ("user_id", "kind", "topic", "query", "answer")
SHIFT_COLUMN = "asof_shift"

_CHUNK_TRIPLES = 1 << 15
_SAMPLE_USERS = 100
"""Train users by whose futures questions are weighed."""


@dataclass(frozen=True, slots=True)
class Triple:
    """One pre-training example; the user is given by id, the trainer reads the profile."""

    user_id: str
    kind: Literal["future", "uqa"]
    topic: str
    query: str
    answer: str
    asof_shift: int = 0
    """Days from the user's as-of day at which question and answer hold (qanchor.data.views)."""


class TripleOptions(Config, frozen=True, kw_only=True):
    """How many triples of which kind, and for whom."""

    per_user_future: int = 30
    """Behaviour-prediction triples per train user and view; no other user ever has one."""
    per_user_uqa: int = 6
    """Question-answering triples per user and view."""
    views_per_user: int = 0
    """Further as-of days per train user, each with its own triples. Not in the paper."""
    max_shift_days: int = 30
    """Further as-of days lie at most so far before or after the user's own."""
    seed: int = 0
    with_valid: bool = False
    """Question-answering triples for users of split valid too, to watch training by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Maker:
    """What all users' triples have in common."""

    pool: TopicPool
    known_types: Mapping[str, tuple[str, ...]]
    questions: FutureQuestions
    window_days: int
    future_days: int
    options: TripleOptions

    def triples(
        self, view: View, profile: Profile, after: tuple[Event, ...] | None
    ) -> Iterator[Triple]:
        """Triples of one view; `after` holds a train user's later events, else None."""
        options, user_id, shift = self.options, view.user_id, view.shift
        history = collect(profile.events, profile.as_of_s, -self.window_days, self.window_days)
        if after is not None:
            rng = Random(f"{options.seed}/future/{view.name}")
            # What lies beyond the recorded future is unknown, not nothing.
            num_days = min(self.future_days, self.future_days - shift)
            future = collect(after, profile.as_of_s, 0, num_days)
            for each in answer_futures(
                history, future, self.questions, options.per_user_future, rng
            ):
                yield Triple(user_id, "future", each.topic, each.query, each.answer, shift)
        rng = Random(f"{options.seed}/uqa/{view.name}")
        user = GroundedUser(profile=profile, history=history, known_types=self.known_types)
        for each in answer_topics(user, self.pool, options.per_user_uqa, rng):
            yield Triple(user_id, "uqa", each.topic, each.query, each.answer, shift)


def make_triples(dataset: Dataset, options: TripleOptions | None = None) -> Iterator[Triple]:
    """Yield the triples of a data set, users ascending.

    Raises DataError if futures are asked for and the data set has none.
    """
    options = options or TripleOptions()
    config = dataset.config
    if (options.per_user_future or options.views_per_user) and config.future_days < 1:
        rule = "must be at least 1 to make future triples and further views"
        remedy = "set it, or ask for per_user_future=0 and views_per_user=0"
        raise DataError(f"{SCHEMA_FILE}: future_days", config.future_days, rule, remedy)
    pool = load_topics(dataset.path, dataset.name, dataset.schema, config.attributes)
    types = known_types(dataset)
    train = dataset.user_ids("train") if options.per_user_future else ()
    chosen = train[:: max(len(train) // _SAMPLE_USERS, 1)][:_SAMPLE_USERS]
    sample = [user for _, user in recorded_futures(dataset, chosen)]
    maker = _Maker(
        pool=pool,
        known_types=types,
        questions=FutureQuestions(pool, types, sample),
        window_days=dataset.schema.window_days,
        future_days=config.future_days,
        options=options,
    )
    shifts = {
        user: drawn_shifts(user, config.future_days, options) for user in dataset.user_ids("train")
    }
    if options.with_valid:
        shifts |= dict.fromkeys(dataset.user_ids("valid"), (0,))
    with_future = bool(options.per_user_future or options.views_per_user)
    for view, profile, after in stream_views(dataset, shifts, with_future=with_future):
        is_learnt = options.per_user_future and dataset.split_of[view.user_id] == "train"
        yield from maker.triples(view, profile, after if is_learnt else None)


def recorded_futures(dataset: Dataset, users: Sequence[str]) -> Iterator[tuple[str, FutureUser]]:
    """Train users before and after their as-of moments, in the data set's order."""
    config, window_days = dataset.config, dataset.schema.window_days
    for view, profile, after in stream_views(dataset, dict.fromkeys(users, (0,))):
        history = collect(profile.events, profile.as_of_s, -window_days, window_days)
        future = collect(after, profile.as_of_s, 0, config.future_days)
        yield view.user_id, FutureUser(history=history, future=future)


def drawn_shifts(user_id: str, future_days: int, options: TripleOptions) -> tuple[int, ...]:
    """A train user's views: 0, then further shifts drawn by seed and user alone.

    The last week of the recorded future is left for something to predict.
    """
    latest = min(options.max_shift_days, future_days - 7)
    others = [day for day in range(-options.max_shift_days, latest + 1) if day]
    rng = Random(f"{options.seed}/views/{user_id}")
    drawn = rng.sample(others, min(options.views_per_user, len(others)))
    return (0, *sorted(drawn))


def write_triples(
    dataset: Dataset, path: str | Path, options: TripleOptions | None = None
) -> dict[str, int]:
    """Write the triples as Parquet, with a progress bar on stderr; returns the count by kind.

    Raises DataError as `make_triples` does, and then leaves no file behind.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    schema = pa.schema(
        [*((name, pa.string()) for name in TRIPLE_COLUMNS), (SHIFT_COLUMN, pa.int16())]
    )
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
    columns = read_columns(path)
    return [Triple(*row) for row in zip(*columns.values(), strict=True)]


def read_columns(path: str | Path) -> dict[str, list[Any]]:
    """The columns of a triples file as lists; files without shifts have shift 0 throughout."""
    table = pq.read_table(Path(path))
    columns = {name: table[name].to_pylist() for name in TRIPLE_COLUMNS}
    has_shifts = SHIFT_COLUMN in table.column_names
    columns[SHIFT_COLUMN] = table[SHIFT_COLUMN].to_pylist() if has_shifts else [0] * len(table)
    return columns


def known_types(dataset: Dataset) -> dict[str, tuple[str, ...]]:
    """Event types that occur in the histories, per modality, in alphabetical order."""
    found: dict[str, set[str]] = {}
    names = ["modality", "event_type"]
    with pq.ParquetFile(dataset.path / EVENTS_FILE) as file:
        for batch in file.iter_batches(columns=names):
            pairs = pa.Table.from_batches([batch]).group_by(names).aggregate([])
            for row in pairs.to_pylist():
                found.setdefault(row["modality"], set()).add(row["event_type"])
    return {name: tuple(sorted(found[name])) for name in sorted(found)}


def _table(rows: list[Triple], schema: pa.Schema) -> pa.Table:
    columns = {name: [getattr(row, name) for row in rows] for name in schema.names}
    return pa.table(columns, schema=schema)
