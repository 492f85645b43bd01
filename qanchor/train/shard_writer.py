"""Preparing a shard directory (qanchor.train.shards) in memory bounded by one shard.

1. Users are drawn into shards at random, so that a batch is as mixed as one of the whole.
2. One pass over profiles and one over triples deal rendered texts out to the shards' raw files.
3. Tokenizers that are learnt see the texts of the first shard.
4. Each shard is tokenised, its event vectors are made if they stay, its raw files are dropped.
"""

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from qanchor import config
from qanchor.checkpoint import Checkpoint
from qanchor.data.dataset import Dataset
from qanchor.data.render import RenderedProfile, render_profile
from qanchor.data.statistics import StatisticSpace
from qanchor.data.useru import SHIFT_COLUMN
from qanchor.data.views import View
from qanchor.data.writer import TableWriter, write_table
from qanchor.errors import DataError
from qanchor.train.corpus import RenderedCorpus, collect_rendered
from qanchor.train.event_vectors import with_event_vectors
from qanchor.train.recipes import Recipe, TrainConfig
from qanchor.train.setup import (
    draw_heldout,
    fit_to_users,
    fresh_checkpoint,
    statistic_space,
    tokenized,
    training_views,
)
from qanchor.train.shards import (
    ANSWERS_FILE,
    HELDOUT,
    INDEX_FILE,
    LAYOUT,
    QUERIES_FILE,
    QUERY_LENS_FILE,
    QUERY_STATES_FILE,
    TEXTS_FILE,
    TRIPLES_FILE,
    USERS_FILE,
    VECTORS_FILE,
    ShardIndex,
    read_shard,
    shard_name,
)
from qanchor.train.triples import TripleQueries

ROWS_HELD = 256
"""Raw rows held back per shard before they are written."""
RAW_USERS_FILE = "raw_users.parquet"
RAW_TRIPLES_FILE = "raw_triples.parquet"
RAW_USERS = pa.schema(
    [
        ("user_id", pa.string()),
        (SHIFT_COLUMN, pa.int16()),
        ("texts", pa.list_(pa.list_(pa.string()))),
        ("measures", pa.list_(pa.list_(pa.list_(pa.float64())))),
        ("statistics", pa.list_(pa.float32())),
    ]
)
RAW_TRIPLES = pa.schema(
    [
        *((name, pa.string()) for name in ("user_id", "topic", "query", "answer")),
        (SHIFT_COLUMN, pa.int16()),
    ]
)


def prepare_shards(
    recipe: Recipe, dataset: Dataset, triples_path: Path, directory: Path
) -> Checkpoint:
    """A step-0 checkpoint and, in `directory`, the shards of the data set's train users.

    Labels are not read. Raises DataError when the triples name a user outside the train split.
    """
    space = statistic_space(recipe, dataset)
    raw = _deal_out(recipe.train, dataset, triples_path, directory, space)
    first = directory / raw[0]
    triples = pq.read_table(first / RAW_TRIPLES_FILE, columns=["query", "answer"])
    queries, answers = (column.to_pylist() for column in triples.columns)
    texts = _rendered(first, dataset).texts
    checkpoint = fresh_checkpoint(recipe, dataset, texts, (queries, answers), space)
    _finish(checkpoint, dataset, directory, raw)
    fit_to_users(checkpoint, read_shard(first, checkpoint.meta).corpus)
    return checkpoint


def shards_again(
    checkpoint: Checkpoint, dataset: Dataset, triples_path: Path, directory: Path
) -> None:
    """The same shards for a run whose tokenizers exist, where their directory was lost."""
    meta = checkpoint.meta
    raw = _deal_out(meta.recipe.train, dataset, triples_path, directory, meta.statistics)
    _finish(checkpoint, dataset, directory, raw)


def _deal_out(
    train: TrainConfig,
    dataset: Dataset,
    triples_path: Path,
    directory: Path,
    space: StatisticSpace | None,
) -> list[str]:
    """Raw files of every shard; returns the shards' names, held-out users last if there are any."""
    shutil.rmtree(directory, ignore_errors=True)
    shifts = _views_with_triples(dataset, triples_path)
    shard_of = _draw_shards(train, list(shifts))
    names = list(dict.fromkeys(sorted(shard_of.values())))
    for name in names:
        (directory / name).mkdir(parents=True)
    views = training_views(dataset, shifts, space)
    bar = tqdm(views, total=sum(map(len, shifts.values())), desc="rendering", unit="view")
    users = (
        _raw_user(view, render_profile(profile, dataset.schema), numbers)
        for view, profile, numbers in bar
    )
    _route(users, shard_of, RAW_USERS, {name: directory / name / RAW_USERS_FILE for name in names})
    triples = tqdm(_triple_rows(triples_path), desc="dealing out triples", unit="triple")
    files = {name: directory / name / RAW_TRIPLES_FILE for name in names}
    _route(triples, shard_of, RAW_TRIPLES, files)
    return names


def _raw_user(
    view: View, rendered: RenderedProfile, statistics: npt.NDArray[np.float16] | None
) -> dict[str, Any]:
    return {
        "user_id": view.user_id,
        SHIFT_COLUMN: view.shift,
        "texts": [list(texts) for texts in rendered.texts],
        "measures": [[list(row) for row in rows] for rows in rendered.measures],
        "statistics": None if statistics is None else statistics.astype(np.float32),
    }


def _views_with_triples(dataset: Dataset, triples_path: Path) -> dict[str, list[int]]:
    """Shifts of the train users that have triples, users in the data set's order.

    Raises DataError for a triple of another user.
    """
    is_train = set(dataset.user_ids("train"))
    found: dict[str, set[int]] = {}
    number = 0
    with pq.ParquetFile(triples_path) as file:
        for batch in _triple_batches(file):
            users, shifts = batch["user_id"].to_pylist(), batch[SHIFT_COLUMN].to_pylist()
            for user_id, shift in zip(users, shifts, strict=True):
                if user_id not in is_train:
                    where = f"{triples_path.name}:{number}:user_id"
                    raise DataError(where, user_id, "is no train user", "make the triples again")
                found.setdefault(user_id, set()).add(shift)
                number += 1
    return {user: sorted(found[user]) for user in dataset.user_ids("train") if user in found}


def _draw_shards(train: TrainConfig, user_ids: list[str]) -> dict[str, str]:
    """Shard of each user. A last shard too small for a batch joins the one before."""
    training, heldout = draw_heldout(len(user_ids), train)
    num_shards = max(-(-len(training) // train.shard_users), 1)
    if num_shards > 1 and len(training) % train.shard_users in range(1, train.users_per_batch):
        num_shards -= 1
    shard_of = {user_ids[user]: HELDOUT for user in heldout}
    for place, user in enumerate(training):
        number = min(place // train.shard_users, num_shards - 1)
        shard_of[user_ids[user]] = shard_name(number)
    return shard_of


def _triple_batches(file: pq.ParquetFile) -> Iterator[pa.RecordBatch]:
    """The columns of RAW_TRIPLES; a file without shifts has shift 0 throughout."""
    present = [name for name in RAW_TRIPLES.names if name in file.schema_arrow.names]
    for batch in file.iter_batches(columns=present):
        if SHIFT_COLUMN not in present:
            zeros = pa.array(np.zeros(batch.num_rows, dtype=np.int16))
            yield (
                batch.append_column(SHIFT_COLUMN, zeros).select(RAW_TRIPLES.names).cast(RAW_TRIPLES)
            )
        else:
            yield batch.select(RAW_TRIPLES.names).cast(RAW_TRIPLES)


def _triple_rows(path: Path) -> Iterator[dict[str, Any]]:
    with pq.ParquetFile(path) as file:
        for batch in _triple_batches(file):
            yield from batch.to_pylist()


def _route(
    rows: Iterable[dict[str, Any]],
    shard_of: Mapping[str, str],
    schema: pa.Schema,
    files: Mapping[str, Path],
) -> None:
    """Write each row to the file of its user's shard, a few rows at a time."""
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(TableWriter(path, schema)) for name, path in files.items()
        }
        held: dict[str, list[dict[str, Any]]] = {name: [] for name in files}
        for row in rows:
            name = shard_of[row["user_id"]]
            held[name].append(row)
            if len(held[name]) == ROWS_HELD:
                writers[name].write(pa.Table.from_pylist(held[name], schema))
                held[name].clear()
        for name, rest in held.items():
            writers[name].write(pa.Table.from_pylist(rest, schema))


def _finish(checkpoint: Checkpoint, dataset: Dataset, directory: Path, names: list[str]) -> None:
    """Tokenise every shard, and say so in the index."""
    asked = TripleQueries(checkpoint)
    topic_of: dict[str, int] = {}
    counts: Counter[int] = Counter()
    num_users = {}
    for name in names:
        shard = directory / name
        corpus = tokenized(checkpoint, _rendered(shard, dataset))
        if not checkpoint.meta.recipe.event_encoder.is_trained:
            corpus = with_event_vectors(corpus, checkpoint.model.event_encoder)
            assert corpus.event_vectors is not None, "This is a bug: they have just been made."
            np.save(shard / VECTORS_FILE, corpus.event_vectors)
        rendered = corpus.rendered
        num_users[name] = len(rendered.user_ids)
        users = {
            "user_id": pa.array(rendered.user_ids, pa.string()),
            "num_events": pa.array(list(rendered.num_events), pa.list_(pa.int32())),
            "rows": pa.array(list(rendered.rows), pa.list_(pa.int32())),
        }
        if rendered.measures:
            flat = [numbers.ravel() for numbers in rendered.measures]
            users["measures"] = pa.array(flat, pa.list_(pa.float32()))
        if checkpoint.meta.statistics is not None:
            raw_users = pq.read_table(shard / RAW_USERS_FILE, columns=["statistics"])
            users["statistics"] = raw_users["statistics"]
        write_table(pa.table(users), shard / USERS_FILE)
        tokens = pa.LargeListArray.from_arrays(corpus.text_offsets, corpus.text_tokens)
        write_table(pa.table({"tokens": tokens}), shard / TEXTS_FILE)
        topics = _finish_triples(checkpoint, asked, shard, rendered.user_ids, topic_of)
        if name != HELDOUT:
            counts.update(topics)
        for file in (RAW_USERS_FILE, RAW_TRIPLES_FILE):
            (shard / file).unlink()
    asked.warn_of_cut()
    index = ShardIndex(
        layout=LAYOUT,
        num_users=tuple(count for name, count in num_users.items() if name != HELDOUT),
        num_heldout=num_users.get(HELDOUT, 0),
        topics=tuple(topic_of),
        topic_counts=tuple(counts[number] for number in topic_of.values()),
    )
    config.save(index, directory / INDEX_FILE)


def _rendered(shard: Path, dataset: Dataset) -> RenderedCorpus:
    """The raw users of a shard with their distinct texts numbered."""
    with pq.ParquetFile(shard / RAW_USERS_FILE) as file:
        users = (
            (View(row["user_id"], row[SHIFT_COLUMN]).name, _rendered_user(row))
            for batch in file.iter_batches()
            for row in batch.to_pylist()
        )
        return collect_rendered(users, dataset.schema)


def _rendered_user(row: dict[str, Any]) -> RenderedProfile:
    return RenderedProfile(
        tuple(tuple(texts) for texts in row["texts"]),
        tuple(tuple(tuple(numbers) for numbers in rows) for rows in row["measures"]),
    )


def _finish_triples(
    checkpoint: Checkpoint,
    asked: TripleQueries,
    shard: Path,
    user_ids: tuple[str, ...],
    topic_of: dict[str, int],
) -> list[int]:
    """Write the shard's triples as numbers; new topics get theirs. Returns each triple's topic."""
    table = pq.read_table(shard / RAW_TRIPLES_FILE)
    owners, topics, queries, answers, shifts = (c.to_pylist() for c in table.columns)
    names = [View(owner, shift).name for owner, shift in zip(owners, shifts, strict=True)]
    row_of = {user_id: row for row, user_id in enumerate(user_ids)}
    query_rows, answer_rows = _numbered(queries), _numbered(answers)
    columns = {
        "user": [row_of[name] for name in names],
        "topic": [topic_of.setdefault(topic, len(topic_of)) for topic in topics],
        "query": [query_rows[query] for query in queries],
        "answer": [answer_rows[answer] for answer in answers],
    }
    by_user = np.argsort(columns["user"], kind="stable")
    numbers = {name: np.array(values, np.int32)[by_user] for name, values in columns.items()}
    write_table(pa.table(numbers), shard / TRIPLES_FILE)
    segments = asked.segments([*query_rows])
    states = [one.query_states_TE for one in segments if one.query_states_TE is not None]
    if states:
        np.save(shard / QUERY_STATES_FILE, np.concatenate(states))
        np.save(shard / QUERY_LENS_FILE, np.array([len(states_TE) for states_TE in states]))
    else:
        _write_tokens([one.query for one in segments], shard / QUERIES_FILE)
    _write_tokens([checkpoint.encode_answer(text) for text in answer_rows], shard / ANSWERS_FILE)
    return columns["topic"]


def _numbered(texts: list[str]) -> dict[str, int]:
    """Distinct texts with a row for each."""
    return {text: row for row, text in enumerate(dict.fromkeys(texts))}


def _write_tokens(token_ids: list[tuple[int, ...]], path: Path) -> None:
    tokens = pa.array([list(ids) for ids in token_ids], pa.list_(pa.int32()))
    write_table(pa.table({"tokens": tokens}), path)
