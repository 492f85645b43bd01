"""A variant's pre-training: made once, gone on with after a kill, shared by variants that agree.

Under a study's directory `runs/KEY/` is a run directory of `qanchor pretrain`; KEY follows from all
that decides its result.
"""

import dataclasses
import functools
import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qanchor import config
from qanchor.bundle.reader import file_sha256
from qanchor.checkpoint import META_FILE, read_meta
from qanchor.config import ProfileSchema, override
from qanchor.data.dataset import LABELS_FILE, SCENARIOS_FILE, TRAINING_FILES, Dataset
from qanchor.data.topics import TOPICS_FILE
from qanchor.data.useru import write_triples
from qanchor.data.writer import write_table
from qanchor.study.plan import Variant
from qanchor.train.pretrain import LATEST, pretrain, resume
from qanchor.train.recipes import Recipe
from qanchor.train.run_directory import TRIPLES_FILE, holds_run, triples_sha256

log = logging.getLogger(__name__)

STUDY_FILES = (*TRAINING_FILES, LABELS_FILE, SCENARIOS_FILE, TOPICS_FILE)
"""What of a data set a study's results follow from."""
KEY_CHARS = 12
SUBSET_SEED = 17


@dataclass(frozen=True, slots=True)
class VariantRun:
    """All that a variant's pre-training follows from."""

    recipe: Recipe
    schema: ProfileSchema
    users_share: float
    data_id: str
    """Content id of data set, triples and backbone directories."""

    @property
    def key(self) -> str:
        """Equal for equal runs, whatever the variants are called."""
        parts = (self.recipe, self.schema, self.users_share, self.data_id)
        return digest(*parts)


def variant_run(variant: Variant, recipe: Recipe, dataset: Dataset, data_id: str) -> VariantRun:
    """Resolve a variant. Raises ConfigError for an override that does not fit."""
    resolved = override(recipe, list(variant.set))
    train = resolved.train
    changed = msgspec.structs.replace(
        train,
        steps=max(round(train.steps * variant.steps_share), 1),
        users_per_batch=train.users_per_batch * variant.users_factor,
    )
    paths = (resolved.decoder.path, resolved.event_encoder.path, resolved.query_encoder.path)
    backbones = [directory_id(path) for path in paths if path]
    return VariantRun(
        recipe=msgspec.structs.replace(resolved, train=changed),
        schema=override(dataset.schema, list(variant.schema)),
        users_share=variant.users_share,
        data_id=digest(data_id, *backbones) if backbones else data_id,
    )


def checkpoint_of(run: VariantRun, dataset: Dataset, triples: Path, runs_dir: Path) -> Path:
    """The run's trained checkpoint; trains or goes on training where it is not there yet."""
    run_dir = runs_dir / run.key
    if not _is_finished(run, run_dir):
        seen = training_view(dataset, run)
        own = triples if run.users_share == 1 else run_dir / TRIPLES_FILE
        if run.users_share != 1 and not own.is_file():
            _write_subset(triples, own, set(seen.user_ids("train")))
        if holds_run(run_dir):
            log.info("going on with %s", run_dir)
            resume(seen, own, run_dir)
        else:
            pretrain(run.recipe, seen, own, run_dir)
    return run_dir / LATEST


def base_triples(
    given: Path | None, dataset: Dataset, recipe: Recipe, study_dir: Path
) -> tuple[Path, str]:
    """The triples all variants draw from, given or made once, and the id of data set and triples.

    Reads the data set's files through. Raises ConfigError for given triples that are not there.
    """
    contents = dataset.contents_sha256(STUDY_FILES)
    # Named by what they follow from: triples of other data or options are not taken up.
    path = given or study_dir / f"triples-{digest(contents, recipe.triples)}.parquet"
    if not given and not path.is_file():
        write_triples(dataset, path, recipe.triples)
    return path, digest(contents, triples_sha256(path))


def training_view(dataset: Dataset, run: VariantRun) -> Dataset:
    """The data set as the run's pre-training sees it: its schema, its share of the train users."""
    train = dataset.user_ids("train")
    order = np.random.default_rng(SUBSET_SEED).permutation(len(train))
    kept = {train[place] for place in order[: max(round(len(train) * run.users_share), 1)]}
    split_of = {
        user: split for user, split in dataset.split_of.items() if split != "train" or user in kept
    }
    changed = msgspec.structs.replace(dataset.config, profile=run.schema)
    return dataclasses.replace(dataset, config=changed, split_of=split_of)


def digest(*parts: object) -> str:
    """Short content id of structs and plain values."""
    joined = b"\n".join(config.to_json(part) for part in parts)
    return hashlib.blake2b(joined, digest_size=16).hexdigest()[:KEY_CHARS]


@functools.cache
def directory_id(path: str) -> str:
    """Content id of a backbone's files; read once, as most variants share it."""
    files = sorted(file for file in Path(path).glob("*") if file.is_file())
    return digest([(file.name, file_sha256(file)) for file in files])


def _is_finished(run: VariantRun, run_dir: Path) -> bool:
    meta_path = run_dir / LATEST / META_FILE
    if not meta_path.is_file():
        return False
    return read_meta(run_dir / LATEST).step >= run.recipe.train.steps


def _write_subset(triples: Path, target: Path, users: set[str]) -> None:
    """The triples of `users`."""
    table = pq.read_table(triples)
    chosen = pc.is_in(table["user_id"].cast(pa.string()), pa.array(sorted(users), pa.string()))
    target.parent.mkdir(parents=True, exist_ok=True)
    write_table(table.filter(chosen), target)
