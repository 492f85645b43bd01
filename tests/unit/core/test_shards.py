"""Shards on disk give the same order every time, visit everybody once, and hold two at a time."""

import gc
import itertools
import shutil
import threading
import weakref
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qanchor.checkpoint import Checkpoint, load_checkpoint
from qanchor.config import override
from qanchor.data.dataset import Dataset, open_dataset
from qanchor.data.prefix import ADAPTER_FIRST_EVENT
from qanchor.data.useru import TripleOptions, write_triples
from qanchor.data.wallet import generate_wallet
from qanchor.errors import ConfigError, DataError
from qanchor.train import pretrain as training
from qanchor.train.batches import anchor_batch
from qanchor.train.pretrain import METRICS_FILE, pretrain, resume
from qanchor.train.recipes import Recipe, TrainConfig
from qanchor.train.run_directory import SHARDS_DIR
from qanchor.train.setup import material, render_views
from qanchor.train.shard_writer import RAW_USERS_FILE
from qanchor.train.shards import Shard, ShardedSource, ShardReader, read_index
from qanchor.train.source import InMemory, Picked
from qanchor.train.sources import fresh_sources, in_shards
from qanchor.train.step import StepLosses
from qanchor.train.triples import read_triple_texts

NUM_USERS = 60
NUM_TRAINED = 32
NUM_VIEWS = 2 * NUM_TRAINED
USERS_PER_BATCH = 4


@pytest.fixture(scope="module")
def wallet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Simulated users with the triples of 35 train users, each on two days."""
    directory = tmp_path_factory.mktemp("wallet")
    generate_wallet(directory / "data", NUM_USERS, seed=3)
    options = TripleOptions(views_per_user=1)
    write_triples(open_dataset(directory / "data"), directory / "all.parquet", options)
    table = pq.read_table(directory / "all.parquet")
    some = list(dict.fromkeys(table["user_id"].to_pylist()))[: NUM_TRAINED + 3]
    kept = pa.compute.is_in(table["user_id"], pa.array(some))
    pq.write_table(table.filter(kept), directory / "triples.parquet")
    return directory


@pytest.fixture(scope="module")
def recipe(tiny_recipe: Recipe) -> Recipe:
    """Four shards of eight users; three are held out."""
    return override(
        tiny_recipe,
        [
            "train.shard_users=8", f"train.users_per_batch={USERS_PER_BATCH}",
            "train.queries_per_user=2", "train.heldout_users=3", "train.steps=10",
            "train.warmup_steps=2", "train.evaluate_every=5", "train.checkpoint_every=4",
            "train.num_threads=1",
        ],
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(wallet: Path, recipe: Recipe) -> tuple[Checkpoint, Path]:
    """A checkpoint and a run directory that holds its shards."""
    dataset = open_dataset(wallet / "data")
    checkpoint, _ = fresh_sources(recipe, dataset, wallet / "triples.parquet", wallet / "made")
    return checkpoint, wallet / "made"


def source_of(made: tuple[Checkpoint, Path]) -> ShardedSource:
    source = in_shards(*made).training
    assert isinstance(source, ShardedSource)
    return source


def seen(picked: Picked) -> list[tuple[str, tuple[Any, ...]]]:
    """View names and segments of a batch, in order."""
    ids = picked.corpus.rendered.user_ids
    return [
        (ids[user], tuple(segments))
        for user, segments in zip(picked.users, picked.segments, strict=True)
    ]


def test_every_user_is_visited_once_per_epoch(made: tuple[Checkpoint, Path]) -> None:
    source = source_of(made)
    assert source.num_users == NUM_VIEWS
    assert source.batches_per_epoch == NUM_VIEWS // USERS_PER_BATCH
    epochs = []
    for epoch in range(2):
        steps = range(epoch * source.batches_per_epoch, (epoch + 1) * source.batches_per_epoch)
        epochs.append([user for step in steps for user, _ in seen(source.batch(step))])
        assert len(set(epochs[-1])) == len(epochs[-1]) == NUM_VIEWS
    assert set(epochs[0]) == set(epochs[1])
    assert epochs[0] != epochs[1]
    heldout = in_shards(*made).heldout
    assert heldout is not None
    held = {user.split("@")[0] for user, _ in seen(heldout.batch(0))}
    assert not held & {user.split("@")[0] for user in epochs[0]}


def test_the_order_is_the_same_again_and_from_the_middle_on(made: tuple[Checkpoint, Path]) -> None:
    whole = [seen(source_of(made).batch(step)) for step in range(24)]
    one_reader = source_of(made)
    assert [seen(one_reader.batch(step)) for step in range(24)] == whole
    resumed = source_of(made)
    assert [seen(resumed.batch(step)) for step in range(13, 24)] == whole[13:]


def test_a_batch_of_a_shard_is_that_of_memory(made: tuple[Checkpoint, Path], wallet: Path) -> None:
    """Same users, same segments: the same tensors, whichever corpus they come from."""
    checkpoint, _ = made
    dataset = open_dataset(wallet / "data")
    texts = read_triple_texts(wallet / "triples.parquet")
    rendered = render_views(dataset, texts, checkpoint.meta.statistics)
    data = material(checkpoint, rendered, texts)
    row_of = {user_id: row for row, user_id in enumerate(rendered.user_ids)}
    known = {
        user: set(segments)
        for part in (data.training, data.heldout)
        for user, segments in zip(part.users, part.segments, strict=True)
    }
    source = source_of(made)
    for step in range(source.batches_per_epoch):
        picked = source.batch(step)
        users = [row_of[user_id] for user_id, _ in seen(picked)]
        for user, segments in zip(users, picked.segments, strict=True):
            assert set(segments) <= known[user]
        mine = anchor_batch(picked.corpus, picked.users, picked.segments)
        theirs = anchor_batch(data.corpus, users, picked.segments)
        for name in (
            "prefix_token_ids_BP", "adapter_BP", "measures_BPF", "suffix_token_ids_BS", "labels_BS",
        ):  # fmt: skip
            assert getattr(mine, name).equal(getattr(theirs, name)), name
        of_shard, of_memory = picked.corpus.rendered.statistics, rendered.statistics
        assert of_shard is not None
        assert of_memory is not None
        np.testing.assert_array_equal(of_shard[picked.users], of_memory[users])
        is_event_BP = mine.adapter_BP >= ADAPTER_FIRST_EVENT
        # Padding shifts a float32 sum by its last bit: shards encode texts in other company.
        assert mine.event_vectors_NE is not None
        assert theirs.event_vectors_NE is not None
        np.testing.assert_allclose(
            mine.event_vectors_NE[mine.event_row_BP][is_event_BP].numpy(),
            theirs.event_vectors_NE[theirs.event_row_BP][is_event_BP].numpy(),
            atol=1e-5,
        )


def test_topics_are_counted_over_the_training_users(
    made: tuple[Checkpoint, Path], wallet: Path
) -> None:
    _, run_dir = made
    index = read_index(run_dir / SHARDS_DIR)
    assert index is not None
    assert index.num_users == (16, 16, 16, 16)
    assert index.num_heldout == 6
    heldout = in_shards(*made).heldout
    assert isinstance(heldout, InMemory)
    table = pq.read_table(wallet / "triples.parquet").to_pylist()
    names = heldout.corpus.rendered.user_ids
    held = {names[user].split("@")[0] for user in heldout.order.triples.users}
    assert len(held) == 3
    counts = [
        sum(row["topic"] == topic and row["user_id"] not in held for row in table)
        for topic in index.topics
    ]
    assert list(index.topic_counts) == counts
    assert not list((run_dir / SHARDS_DIR).rglob(RAW_USERS_FILE))


def test_two_shards_are_in_memory_and_the_next_is_read_ahead() -> None:
    alive: weakref.WeakSet[Shard] = weakref.WeakSet()
    most, read = 0, []
    next_is_read = threading.Event()

    class Remembered(Shard):
        __slots__ = ("__weakref__",)

    def load(number: int) -> Shard:
        nonlocal most
        shard: Any = Remembered(number, None, None)  # type: ignore[arg-type]
        alive.add(shard)
        gc.collect()
        most = max(most, len(alive))
        read.append(number)
        if number == 1:
            next_is_read.set()
        return shard

    reader = ShardReader(load)
    assert reader.get(0, 1).corpus == 0  # type: ignore[comparison-overlap]
    assert next_is_read.wait(10)
    for number in range(1, 6):
        reader.get(number, number + 1)
        assert reader.num_held == 2
    assert reader.get(6, 6).corpus == 6  # type: ignore[comparison-overlap]
    assert read == [0, 1, 2, 3, 4, 5, 6]
    assert reader.num_held == 1
    assert most <= 2


def losses(run_dir: Path) -> list[float]:
    lines = (run_dir / METRICS_FILE).read_bytes().splitlines()
    return [msgspec.json.decode(line)["loss"] for line in lines]


def test_a_run_over_shards_is_resumed_to_the_bit_even_if_they_are_lost(
    recipe: Recipe, wallet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, triples = open_dataset(wallet / "data"), wallet / "triples.parquet"
    latest = pretrain(recipe, dataset, triples, tmp_path / "whole")
    assert load_checkpoint(latest).meta.step == recipe.train.steps
    original, calls = training.backward, itertools.count(1)

    def killed_in_step_six(*args: Any, **kwargs: Any) -> StepLosses:
        if next(calls) == 6:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(training, "backward", killed_in_step_six)
        with pytest.raises(KeyboardInterrupt):
            pretrain(recipe, dataset, triples, tmp_path / "killed")
    shutil.copytree(tmp_path / "killed", tmp_path / "lost", symlinks=True)
    shutil.rmtree(tmp_path / "lost" / SHARDS_DIR)
    for name in ("killed", "lost"):
        resume(dataset, triples, tmp_path / name)
        assert losses(tmp_path / name) == losses(tmp_path / "whole")


def test_users_too_few_for_a_batch_of_their_own_join_the_shard_before(
    recipe: Recipe, wallet: Path, tmp_path: Path
) -> None:
    uneven = override(recipe, ["train.shard_users=15", "train.heldout_users=0"])
    dataset: Dataset = open_dataset(wallet / "data")
    made = fresh_sources(uneven, dataset, wallet / "triples.parquet", tmp_path)[0], tmp_path
    index = read_index(tmp_path / SHARDS_DIR)
    assert index is not None
    assert index.num_users == (30, 30, 10)
    source = source_of(made)
    assert source.batches_per_epoch == 7 + 7 + 2
    for epoch in range(3):
        steps = range(epoch * 16, epoch * 16 + 16)
        users = [user for step in steps for user, _ in seen(source.batch(step))]
        assert len(users) == len(set(users)) == 64
    joined = override(uneven, ["train.shard_users=16"])
    fresh_sources(joined, dataset, wallet / "triples.parquet", tmp_path)
    index = read_index(tmp_path / SHARDS_DIR)
    assert index is not None
    assert index.num_users == (32, 38)


def test_texts_longer_than_the_model_takes_are_told_once_for_all_shards(
    recipe: Recipe, wallet: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    short = override(recipe, ["train.max_query_len=6"])
    dataset = open_dataset(wallet / "data")
    fresh_sources(short, dataset, wallet / "triples.parquet", tmp_path)
    said = [record.getMessage() for record in caplog.records]
    texts = read_triple_texts(wallet / "triples.parquet")
    (cut,) = [message for message in said if "are cut" in message]
    # Every query is in many shards, and counts once.
    assert 0 < int(cut.split()[0]) <= len(set(texts.queries))
    # What will be asked of the finished model is no error of training, but told before it.
    (asked,) = [message for message in said if "is read as" in message]
    assert asked.startswith(f"{dataset.scenarios[0].name}.question=")


def test_a_triple_of_a_test_user_is_refused(recipe: Recipe, wallet: Path, tmp_path: Path) -> None:
    dataset = open_dataset(wallet / "data")
    table = pq.read_table(wallet / "triples.parquet").to_pylist()
    table[3]["user_id"] = dataset.user_ids("test")[0]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "triples.parquet")
    with pytest.raises(DataError, match=r"triples.parquet:3:user_id"):
        fresh_sources(recipe, dataset, tmp_path / "triples.parquet", tmp_path)


@pytest.mark.parametrize("shard_users", [0, 64])
def test_a_triples_file_without_triples_is_refused(
    recipe: Recipe, wallet: Path, tmp_path: Path, shard_users: int
) -> None:
    nothing = pq.read_table(wallet / "triples.parquet").slice(0, 0)
    pq.write_table(nothing, tmp_path / "triples.parquet")
    changed = override(recipe, [f"train.shard_users={shard_users}"])
    with pytest.raises(DataError, match=r"triples.parquet': holds no triples"):
        fresh_sources(
            changed, open_dataset(wallet / "data"), tmp_path / "triples.parquet", tmp_path
        )


def test_a_shard_smaller_than_a_batch_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train.shard_users=16: must be 0 or at least"):
        TrainConfig(shard_users=16, users_per_batch=32)
