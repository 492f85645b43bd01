"""Run by torchrun from test_distributed.py: one process of several, on a directory made there.

gradients DIR        losses and whole gradients of one batch, by variant, into DIR/found.pt
pretrain DIR RUN     train, or go on; DIE_IN_STEP kills every process in that step
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from qanchor import config
from qanchor.checkpoint import load_checkpoint
from qanchor.config import override
from qanchor.data.dataset import open_dataset
from qanchor.decoder import LoraConfig
from qanchor.train import pretrain as training
from qanchor.train.distributed import Processes, joined_processes
from qanchor.train.fsdp import FullySharded
from qanchor.train.gradient_cache import backward
from qanchor.train.parallel import Placement, Replicated
from qanchor.train.recipes import Recipe
from qanchor.train.run_directory import METRICS_FILE
from qanchor.train.setup import batch_source, material, render_views
from qanchor.train.source import Picked
from qanchor.train.step import Step
from qanchor.train.triples import read_triple_texts
from qanchor.train.yes_no import yes_no_of

PLACEMENTS = {"ddp": Replicated, "fsdp": FullySharded}
VARIANTS = {
    "ddp": ("ddp", 0),
    "ddp in pieces": ("ddp", 2),
    "fsdp": ("fsdp", 0),
    "fsdp in pieces": ("fsdp", 2),
}
"""Placement and users per piece."""


def with_lora(recipe: Recipe, _: Path) -> Recipe:
    """Adapters with much dropout, layers computed twice."""
    recipe = override(recipe, ["train.parallel=fsdp", "train.gradient_checkpointing=true"])
    return msgspec.structs.replace(recipe, lora=LoraConfig(rank=4, dropout=0.5))


def with_query_encoder(recipe: Recipe, directory: Path) -> Recipe:
    """DIR/encoder reads the questions; without dropout, which each process draws for itself."""
    changes = ["query_encoder.dropout=0", "loss.yes_no_weight=0.5", "train.yes_no_per_user=2"]
    return override(recipe, [f"query_encoder.path={directory / 'encoder'}", *changes])


RUNS: dict[str, tuple[Callable[[Recipe, Path], Recipe], int]] = {
    "ddp": (lambda recipe, _: override(recipe, ["train.users_per_piece=2"]), 4),
    "fsdp": (lambda recipe, _: override(recipe, ["train.parallel=fsdp"]), 4),
    "lora": (with_lora, 2),
    "muon": (lambda recipe, _: override(recipe, ["train.optimizer=muon"]), 4),
    "shards": (lambda recipe, _: override(recipe, ["train.shard_users=12"]), 4),
    "reading": (with_query_encoder, 4),
    "reading, fsdp": (
        lambda recipe, directory: override(
            with_query_encoder(recipe, directory), ["train.parallel=fsdp"]
        ),
        4,
    ),
}
"""What differs from DIR/recipe.json, and the step to stop in; 2 is before the first checkpoint."""


def uneven_batch(directory: Path) -> Picked:
    """The first batch, but its first user is asked one question less: shares then differ."""
    checkpoint = load_checkpoint(directory / "start")
    dataset = open_dataset(directory / "data")
    texts = read_triple_texts(directory / "triples.parquet")
    data = material(checkpoint, render_views(dataset, texts, checkpoint.meta.statistics), texts)
    picked = batch_source(checkpoint.meta.recipe, data.corpus, data.training).batch(0)
    return Picked(picked.corpus, picked.users, [picked.segments[0][1:], *picked.segments[1:]])


def measure(directory: Path, picked: Picked, variant: str, processes: Processes) -> dict[str, Any]:
    """Losses and clipped gradients of a batch; every process gets the same."""
    checkpoint = load_checkpoint(directory / "start")
    placement_name, users_per_piece = VARIANTS[variant]
    placement: Placement = PLACEMENTS[placement_name](checkpoint.model, processes)
    step = Step(
        model=placement.model.train(),
        loss=checkpoint.meta.recipe.loss,
        users_per_piece=users_per_piece,
        processes=processes,
        yes_no=yes_no_of(checkpoint),
    )
    losses = backward(step, picked, is_masked=True)
    norm = placement.settle_gradients(1.0)
    return {
        "contrastive": losses.contrastive.detach(),
        "row_losses": losses.row_losses_T.detach(),
        "num_pairs": len(losses.anchor),
        "norm": norm,
        "gradients": {
            name: whole(parameter.grad)
            for name, parameter in placement.model.named_parameters()
            if parameter.grad is not None
        },
    }


def whole(gradient: Tensor) -> Tensor:
    """A gradient in full; every process must call."""
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def write_gradients(directory: Path, processes: Processes) -> None:
    """All variants, one after the other."""
    picked = uneven_batch(directory)
    found = {variant: measure(directory, picked, variant, processes) for variant in VARIANTS}
    if processes.is_first:
        torch.save(found, directory / "found.pt")


class Stopped(Exception):
    """A run that ends here."""


def train(directory: Path, name: str, processes: Processes) -> None:
    """One run of RUNS whole, and stopped in the step given there and resumed."""
    change, stop_in = RUNS[name]
    dataset, triples = open_dataset(directory / "data"), directory / "triples.parquet"
    recipe = change(config.load(Recipe, directory / "recipe.json"), directory)
    training.pretrain(recipe, dataset, triples, directory / f"{name}-whole", processes)
    stopped = directory / f"{name}-stopped"
    original = training.Trainer._train_step

    def stopping(self: training.Trainer) -> dict[str, float]:
        if self.number == stop_in:
            raise Stopped
        return original(self)

    training.Trainer._train_step = stopping  # type: ignore[method-assign]
    try:
        training.pretrain(recipe, dataset, triples, stopped, processes)
    except Stopped:
        torch.manual_seed(99)
    finally:
        training.Trainer._train_step = original  # type: ignore[method-assign]
    if processes.is_first:
        (stopped / "lines_before").write_bytes((stopped / METRICS_FILE).read_bytes())
    training.resume(dataset, triples, stopped, processes)


def main(directory: Path) -> None:
    """See above."""
    torch.set_num_threads(1)
    with joined_processes() as processes:
        write_gradients(directory, processes)
        for name in RUNS:
            train(directory, name, processes)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
