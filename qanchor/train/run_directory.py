"""What a run leaves on disk, and how it is found again; written by the first process alone.

recipe.json           the resolved recipe
inputs.json           which triples and data set it was begun with
triples.parquet       the run's own triples, unless others were given
untrained/            checkpoint at step 0
step-NNNNNN/          the newest checkpoint, with trainer.pt: optimizer and random states
checkpoint            points at it
metrics.jsonl         one line per step
shards/               the prepared corpus, with train.shard_users (qanchor.train.shards)
query_states/         what a query encoder has read, until the run ends (qanchor.train.query_states)
tensorboard/          the same numbers for TensorBoard, with train.tensorboard
"""

import os
import shutil
from pathlib import Path
from typing import Any

import msgspec
import torch

from qanchor import config
from qanchor.bundle.reader import file_sha256
from qanchor.checkpoint import TRAINER_FILE, Checkpoint, save_checkpoint
from qanchor.config import Config
from qanchor.data.dataset import TRAINING_FILES, Dataset
from qanchor.data.useru import TripleOptions, write_triples
from qanchor.errors import ConfigError
from qanchor.train.recipes import Recipe

UNTRAINED = "untrained"
LATEST = "checkpoint"
METRICS_FILE = "metrics.jsonl"
RECIPE_FILE = "recipe.json"
INPUTS_FILE = "inputs.json"
TRIPLES_FILE = "triples.parquet"
SHARDS_DIR = "shards"
QUERY_STATES_DIR = "query_states"
TENSORBOARD_DIR = "tensorboard"


class RunInputs(Config, frozen=True, kw_only=True):
    """Content of `inputs.json`: a resumed run takes the same."""

    triples: str
    """Path, from the run directory where the file lies in it."""
    triples_sha256: str
    dataset_sha256: str
    """Of the files that training reads."""


def holds_run(run_dir: Path) -> bool:
    """Whether there is a run to resume."""
    return (run_dir / LATEST).exists() or (run_dir / UNTRAINED).exists()


def newest(run_dir: Path) -> Path:
    """The checkpoint to go on from."""
    return run_dir / LATEST if (run_dir / LATEST).exists() else run_dir / UNTRAINED


def triples_sha256(path: Path) -> str:
    """Hash of a triples file. Raises ConfigError where there is none."""
    if not path.is_file():
        remedy = "`qanchor data triples DATASET FILE` makes one; if it was moved, say where it is"
        raise ConfigError("--triples", str(path), "no such file", remedy)
    return file_sha256(path)


def own_triples(run_dir: Path, dataset: Dataset, options: TripleOptions) -> Path:
    """Make the run's own triples. Raises ConfigError where others lie in their place."""
    path = run_dir / TRIPLES_FILE
    made = path.with_suffix(".new")
    write_triples(dataset, made, options)
    if path.is_file() and file_sha256(path) != file_sha256(made):
        made.unlink()
        rule = "is there, but is not what this recipe makes of this data set"
        remedy = "give it with --triples to train on it, or remove it"
        raise ConfigError(TRIPLES_FILE, str(path), rule, remedy)
    made.replace(path)
    return path


def record_inputs(run_dir: Path, dataset: Dataset, triples: Path) -> None:
    """Remember what the run is begun with. Raises ConfigError for triples that are not there."""
    sha256, path = triples_sha256(triples), triples.resolve()
    if path.is_relative_to(run_dir.resolve()):
        path = path.relative_to(run_dir.resolve())
    inputs = RunInputs(
        triples=str(path),
        triples_sha256=sha256,
        dataset_sha256=dataset.contents_sha256(TRAINING_FILES),
    )
    config.save(inputs, run_dir / INPUTS_FILE)


def begun_triples(run_dir: Path) -> Path:
    """Where the triples lay that the run was begun with."""
    inputs = _inputs(run_dir)
    return run_dir / (inputs.triples if inputs else TRIPLES_FILE)


def check_inputs(run_dir: Path, dataset: Dataset, triples: Path) -> None:
    """Raise ConfigError unless the run was begun with these triples and this data set.

    Of a run without a record, made by an earlier version, only that there are triples is known.
    """
    sha256, inputs = triples_sha256(triples), _inputs(run_dir)
    if inputs is None:
        return
    remedy = "give it as it was, or begin another run"
    if sha256 != inputs.triples_sha256:
        rule = f"its content is not that of {inputs.triples} when the run was begun"
        raise ConfigError("--triples", str(triples), rule, remedy)
    if dataset.contents_sha256(TRAINING_FILES) != inputs.dataset_sha256:
        rule = f"its {', '.join(TRAINING_FILES)} are not those the run was begun with"
        raise ConfigError("dataset", str(dataset.path), rule, remedy)


def query_states_dir(recipe: Recipe, run_dir: Path) -> Path:
    """Where what a query encoder reads is kept: in the run's directory, or for other runs too."""
    return Path(recipe.query_encoder.cache or run_dir / QUERY_STATES_DIR)


def append_metrics(run_dir: Path, step: int, metrics: dict[str, float]) -> None:
    """Add a step's line."""
    with (run_dir / METRICS_FILE).open("ab") as stream:
        stream.write(msgspec.json.encode({"step": step, **metrics}) + b"\n")


def forget_metrics_after(run_dir: Path, step: int) -> None:
    """Drop the lines of steps that will be taken again."""
    path = run_dir / METRICS_FILE
    if path.is_file():
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:step]))


def save_newest(checkpoint: Checkpoint, trainer_state: dict[str, Any], run_dir: Path) -> None:
    """Write the checkpoint, point at it, then drop older ones; a kill leaves one that is whole."""
    directory = run_dir / f"step-{checkpoint.meta.step:06d}"
    save_checkpoint(checkpoint, directory)
    torch.save(trainer_state, directory / TRAINER_FILE)
    link = run_dir / (LATEST + ".new")
    link.unlink(missing_ok=True)
    link.symlink_to(directory.name)
    os.replace(link, run_dir / LATEST)
    for old in run_dir.glob("step-*"):
        if old != directory:
            shutil.rmtree(old)


def _inputs(run_dir: Path) -> RunInputs | None:
    path = run_dir / INPUTS_FILE
    return config.load(RunInputs, path) if path.is_file() else None
