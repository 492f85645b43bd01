"""From a recipe, a data set and triples to the batches of a run: held in memory, or in shards."""

from pathlib import Path

import pyarrow.parquet as pq

from qanchor.checkpoint import Checkpoint
from qanchor.data.dataset import Dataset
from qanchor.errors import DataError
from qanchor.train.recipes import Recipe
from qanchor.train.run_directory import SHARDS_DIR, query_states_dir
from qanchor.train.setup import Material, batch_source, material, prepare, render_views
from qanchor.train.shard_writer import prepare_shards, shards_again
from qanchor.train.shards import HELDOUT, ShardedSource, read_index, read_shard
from qanchor.train.source import Sources
from qanchor.train.triples import read_triple_texts
from qanchor.train.yes_no import YesNo, yes_no_of


def fresh_sources(
    recipe: Recipe, dataset: Dataset, triples_path: Path, run_dir: Path
) -> tuple[Checkpoint, Sources]:
    """An untrained checkpoint and the batches to train it on; shards are written if asked for.

    Raises DataError when there are no triples or they name a user outside the train split.
    """
    if not pq.read_metadata(triples_path).num_rows:
        rule = "holds no triples: there is nothing to learn from"
        raise DataError("triples", str(triples_path), rule, "make some of users of split train")
    if not recipe.train.shard_users:
        kept_in = query_states_dir(recipe, run_dir)
        checkpoint, data = prepare(recipe, dataset, triples_path, kept_in)
        return checkpoint, in_memory(checkpoint, data)
    checkpoint = prepare_shards(recipe, dataset, triples_path, run_dir / SHARDS_DIR)
    return checkpoint, in_shards(checkpoint, run_dir)


def sources_again(
    checkpoint: Checkpoint, dataset: Dataset, triples_path: Path, run_dir: Path
) -> Sources:
    """The same batches for a checkpoint that exists already."""
    recipe = checkpoint.meta.recipe
    if recipe.train.shard_users:
        return in_shards(checkpoint, run_dir)
    texts = read_triple_texts(triples_path)
    rendered = render_views(dataset, texts, checkpoint.meta.statistics)
    kept_in = query_states_dir(recipe, run_dir)
    return in_memory(checkpoint, material(checkpoint, rendered, texts, kept_in))


def mend_shards(
    checkpoint: Checkpoint, dataset: Dataset, triples_path: Path, run_dir: Path
) -> None:
    """Write the shards of a run again if it wants some and they are gone."""
    directory = run_dir / SHARDS_DIR
    if checkpoint.meta.recipe.train.shard_users and read_index(directory) is None:
        shards_again(checkpoint, dataset, triples_path, directory)


def in_memory(checkpoint: Checkpoint, data: Material) -> Sources:
    """Batches of users that are all held in memory."""
    recipe = checkpoint.meta.recipe
    heldout = batch_source(recipe, data.corpus, data.heldout) if data.heldout.users else None
    training = batch_source(recipe, data.corpus, data.training, _yes_no(checkpoint))
    return Sources(training, heldout)


def in_shards(checkpoint: Checkpoint, run_dir: Path) -> Sources:
    """Batches of the run's shards; the users held out are few and in memory.

    Raises DataError when the shards are not there.
    """
    directory = run_dir / SHARDS_DIR
    index = read_index(directory)
    if index is None:
        rule = "holds no finished shards"
        raise DataError("shards", str(directory), rule, "all processes must see the run directory")
    heldout = None
    if index.num_heldout:
        shard = read_shard(directory / HELDOUT, checkpoint.meta)
        heldout = batch_source(checkpoint.meta.recipe, shard.corpus, shard.triples)
    training = ShardedSource(directory, index, checkpoint.meta, _yes_no(checkpoint))
    return Sources(training, heldout)


def _yes_no(checkpoint: Checkpoint) -> YesNo | None:
    """What tells the triples for the yes/no loss alone; those held out have none such."""
    recipe = checkpoint.meta.recipe
    is_wanted = recipe.train.yes_no_per_user and recipe.loss.yes_no_weight
    return yes_no_of(checkpoint) if is_wanted else None
