"""What a run leaves on disk, and how it is found again; written by the first process alone.

recipe.json           the resolved recipe
untrained/            checkpoint at step 0
step-NNNNNN/          the newest checkpoint, with trainer.pt: optimizer and random states
checkpoint            points at it
metrics.jsonl         one line per step
shards/               the prepared corpus, with train.shard_users (qanchor.train.shards)
tensorboard/          the same numbers for TensorBoard, with train.tensorboard
"""

import os
import shutil
from pathlib import Path
from typing import Any

import msgspec
import torch

from qanchor.checkpoint import TRAINER_FILE, Checkpoint, save_checkpoint

UNTRAINED = "untrained"
LATEST = "checkpoint"
METRICS_FILE = "metrics.jsonl"
RECIPE_FILE = "recipe.json"
SHARDS_DIR = "shards"
TENSORBOARD_DIR = "tensorboard"


def holds_run(run_dir: Path) -> bool:
    """Whether there is a run to resume."""
    return (run_dir / LATEST).exists() or (run_dir / UNTRAINED).exists()


def newest(run_dir: Path) -> Path:
    """The checkpoint to go on from."""
    return run_dir / LATEST if (run_dir / LATEST).exists() else run_dir / UNTRAINED


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
