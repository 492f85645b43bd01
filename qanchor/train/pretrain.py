"""Joint pre-training, Q-Anchor Eq. (3)-(6): the loop, evaluation during it, exact resume.

Runs in one process or, under torchrun, in several that share every batch. What a run leaves on
disk is in qanchor.train.run_directory. A run killed at any moment goes on from its newest
checkpoint with the same losses to the bit (CPU, the same number of processes).
"""

import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from tqdm import tqdm

from qanchor import config
from qanchor.checkpoint import TRAINER_FILE, Checkpoint, at_step, load_checkpoint, save_checkpoint
from qanchor.data.dataset import Dataset
from qanchor.errors import ConfigError
from qanchor.towers import QAnchorModel
from qanchor.train.allocator import keep_freed_memory
from qanchor.train.distributed import Processes, alone
from qanchor.train.gradient_cache import backward, random_state, set_random_state
from qanchor.train.optimizer import build_optimizers, set_learning_rate
from qanchor.train.parallel import Placement, Replicated
from qanchor.train.recipes import Recipe, TrainConfig
from qanchor.train.run_directory import (
    LATEST,
    METRICS_FILE,
    QUERY_STATES_DIR,
    RECIPE_FILE,
    TENSORBOARD_DIR,
    UNTRAINED,
    append_metrics,
    begun_triples,
    check_inputs,
    forget_metrics_after,
    holds_run,
    newest,
    own_triples,
    record_inputs,
    save_newest,
)
from qanchor.train.scalars import Scalars
from qanchor.train.source import BatchSource, Picked, Sources
from qanchor.train.sources import fresh_sources, mend_shards, sources_again
from qanchor.train.step import Step, StepLosses, autocast_dtype
from qanchor.train.thinning import thinned
from qanchor.train.yes_no import yes_no_of

__all__ = ["LATEST", "METRICS_FILE", "UNTRAINED", "Trainer", "pretrain", "resume"]

log = logging.getLogger(__name__)


def pretrain(
    recipe: Recipe,
    dataset: Dataset,
    triples_path: Path | None,
    run_dir: Path,
    processes: Processes | None = None,
) -> Path:
    """Train from scratch into `run_dir`; returns the newest checkpoint's path.

    Without `triples_path` the recipe's triples are made, in `run_dir`. Every process of a run calls
    it; `run_dir` must be one directory for all of them. Raises ConfigError when the directory
    already holds a run (use `resume`) or other triples, and for triples that are not there.
    """
    processes = processes or alone()
    if holds_run(run_dir):
        raise ConfigError(
            "run directory", str(run_dir), "already holds a run", "resume it or choose another"
        )
    # Nobody writes before everybody has looked.
    processes.wait()
    _settle(recipe.train)
    dtype = autocast_dtype(recipe.train.dtype, processes.device)
    train = msgspec.structs.replace(recipe.train, dtype=dtype)
    recipe = msgspec.structs.replace(recipe, train=train)
    if processes.is_first:
        run_dir.mkdir(parents=True, exist_ok=True)
        triples = triples_path or own_triples(run_dir, dataset, recipe.triples)
        record_inputs(run_dir, dataset, triples)
        checkpoint, sources = fresh_sources(recipe, dataset, triples, run_dir)
        config.save(recipe, run_dir / RECIPE_FILE)
        save_checkpoint(checkpoint, run_dir / UNTRAINED)
    processes.wait()
    if not processes.is_first:
        checkpoint = load_checkpoint(run_dir / UNTRAINED)
        triples = triples_path or begun_triples(run_dir)
        sources = sources_again(checkpoint, dataset, triples, run_dir)
        _seed_apart(recipe.train.seed, processes)
    trainer = Trainer(checkpoint, sources, run_dir, processes)
    trainer.save_start()
    return trainer.run()


def resume(
    dataset: Dataset, triples_path: Path | None, run_dir: Path, processes: Processes | None = None
) -> Path:
    """Go on with an interrupted run; returns the newest checkpoint's path.

    Without `triples_path` with those it was begun with, where they lay. Every process of a run
    calls it. Raises ConfigError when there is nothing to resume, and unless triples and data set
    are those the run was begun with.
    """
    processes = processes or alone()
    start = newest(run_dir)
    checkpoint = load_checkpoint(start)
    _settle(checkpoint.meta.recipe.train)
    triples = triples_path or begun_triples(run_dir)
    if processes.is_first:
        check_inputs(run_dir, dataset, triples)
        mend_shards(checkpoint, dataset, triples, run_dir)
    processes.wait()
    sources = sources_again(checkpoint, dataset, triples, run_dir)
    _seed_apart(checkpoint.meta.recipe.train.seed, processes)
    trainer = Trainer(checkpoint, sources, run_dir, processes)
    if (start / TRAINER_FILE).exists():
        trainer.restore(torch.load(start / TRAINER_FILE, map_location="cpu", weights_only=True))
    if processes.is_first:
        forget_metrics_after(run_dir, checkpoint.meta.step)
    return trainer.run()


class Trainer:
    """The optimisation loop of one run; state lives in model, optimizer and step alone."""

    def __init__(
        self, checkpoint: Checkpoint, sources: Sources, run_dir: Path, processes: Processes
    ) -> None:
        self.checkpoint = checkpoint
        self.run_dir = run_dir
        self.processes = processes
        self.recipe = checkpoint.meta.recipe
        self.number = checkpoint.meta.step
        self.training, self.heldout = sources.training, sources.heldout
        train = self.recipe.train
        _check_train(train, self.training, processes)
        if train.gradient_checkpointing:
            checkpoint.model.recompute_layers()
        self.placement = _placement(checkpoint.model, train, processes)
        self.step = Step(
            model=self.placement.model,
            loss=self.recipe.loss,
            dtype=autocast_dtype(train.dtype, processes.device),
            users_per_piece=train.users_per_piece,
            processes=processes,
            yes_no=yes_no_of(checkpoint),
        )
        self.optimizers = build_optimizers(self.placement.model, train)

    def run(self) -> Path:
        """Train to the recipe's last step; returns the path of the newest checkpoint."""
        train, is_first = self.recipe.train, self.processes.is_first
        bar = tqdm(
            total=train.steps,
            initial=self.number,
            desc=f"pretrain {self.recipe.name}",
            unit="step",
            disable=not is_first,
        )
        scalars = None
        if train.tensorboard and is_first:
            scalars = Scalars(self.run_dir / TENSORBOARD_DIR, self.number + 1)
        while self.number < train.steps:
            metrics = self._train_step()
            self.number += 1
            bar.update()
            bar.set_postfix(cl=f"{metrics['contrastive']:.3f}", ntp=f"{metrics['next_token']:.3f}")
            is_last = self.number == train.steps
            if is_last or self.number % train.evaluate_every == 0:
                metrics |= self._evaluate()
                if is_first:
                    log.info("step %d: %s", self.number, metrics)
            if is_first:
                append_metrics(self.run_dir, self.number, metrics)
            if scalars is not None:
                scalars.write(self.number, metrics)
            if is_last or self.number % train.checkpoint_every == 0:
                self._save()
        bar.close()
        if scalars is not None:
            scalars.close()
        # Nobody leaves, and returns a path, before it is written.
        self.processes.wait()
        if is_first:
            shutil.rmtree(self.run_dir / QUERY_STATES_DIR, ignore_errors=True)
        return self.run_dir / LATEST

    def restore(self, state: dict[str, Any]) -> None:
        """Take optimizer and random states over from a checkpoint's trainer file."""
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            self.placement.load_optimizer_state(optimizer, saved)
        random_states = state["random_states"]
        if len(random_states) == self.processes.num_processes:
            set_random_state(self.processes.device, random_states[self.processes.rank])
        elif self.processes.is_first:
            log.warning(
                "the run had %d processes and now has %d: dropout draws anew",
                len(random_states),
                self.processes.num_processes,
            )

    def save_start(self) -> None:
        """Add the random states to the untrained checkpoint, so that a first step repeats too."""
        state = self._state()
        if self.processes.is_first:
            torch.save(state, self.run_dir / UNTRAINED / TRAINER_FILE)

    def _train_step(self) -> dict[str, float]:
        self.step.model.train()
        set_learning_rate(self.optimizers, self.number, self.recipe.train)
        self.step.model.zero_grad(set_to_none=True)
        losses = backward(self.step, self._batch(), is_masked=self._is_masked)
        norm = self.placement.settle_gradients(self.recipe.train.max_grad_norm)
        for optimizer in self.optimizers:
            optimizer.step()
        return {
            "loss": self.step.total(losses).item(),
            **losses.by_name(),
            "grad_norm": norm.item(),
        }

    def _batch(self) -> Picked:
        picked, train = self.training.batch(self.number), self.recipe.train
        if not train.event_dropout:
            return picked
        # By step alone: the same on every process and after every restart.
        return thinned(
            picked, train.event_dropout, np.random.default_rng([train.seed, 9, self.number])
        )

    @property
    def _is_masked(self) -> bool:
        return self.number >= self.recipe.loss.mask_from_step

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        """Mean loss terms and retrieval (right answer among the batch's) over held-out users."""
        if self.heldout is None:
            return {}
        self.step.model.eval()
        rows = []
        for index in range(self.heldout.batches_per_epoch):
            picked = self.heldout.batch(index)
            # Processes get equal shares; the few users too many are left out.
            num_users = len(picked.users) - len(picked.users) % self.processes.num_processes
            if num_users:
                rows.append(self._heldout_metrics(picked.part(range(num_users))))
        if not rows:
            return {}
        return {
            f"heldout_{name}": float(np.mean([of_batch[name] for of_batch in rows]))
            for name in rows[0]
        }

    def _heldout_metrics(self, picked: Picked) -> dict[str, float]:
        losses: StepLosses = self.step.losses(picked, is_masked=self._is_masked)
        best_J = (losses.anchor @ losses.semantic.T).argmax(dim=1)
        is_right_J = best_J == torch.arange(len(best_J), device=best_J.device)
        return losses.by_name() | {"top1": is_right_J.float().mean().item()}

    def _save(self) -> None:
        self.checkpoint = at_step(self.checkpoint, self.number)
        model, state = self.placement.whole_model(), self._state()
        if self.processes.is_first:
            save_newest(replace(self.checkpoint, model=model), state, self.run_dir)

    def _state(self) -> dict[str, Any]:
        """What besides the weights a run goes on from; every process must call."""
        return {
            "optimizers": [
                self.placement.whole_optimizer_state(optimizer) for optimizer in self.optimizers
            ],
            "random_states": self.processes.objects(random_state(self.processes.device)),
        }


def _placement(model: QAnchorModel, train: TrainConfig, processes: Processes) -> Placement:
    if train.parallel == "ddp":
        return Replicated(model, processes)
    if processes.is_alone:
        log.warning("train.parallel=fsdp has no effect on one process; start it with torchrun")
        return Replicated(model, processes)
    from qanchor.train.fsdp import FullySharded

    return FullySharded(model, processes)


def _check_train(train: TrainConfig, training: BatchSource, processes: Processes) -> None:
    """Raises ConfigError unless every process gets an equal share, in a dtype it knows."""
    is_half = train.dtype == "bfloat16" and processes.device.type == "cuda"
    if is_half and not torch.cuda.is_bf16_supported():
        raise ConfigError("train.dtype", train.dtype, "this GPU has no bfloat16", "take float32")
    if train.optimizer == "muon" and train.parallel == "fsdp" and not processes.is_alone:
        rule = "muon needs whole matrices, fsdp slices them"
        raise ConfigError("train.optimizer", train.optimizer, rule, "take adamw, or parallel=ddp")
    if train.users_per_batch % processes.num_processes:
        raise ConfigError(
            "train.users_per_batch",
            train.users_per_batch,
            f"must be a multiple of the {processes.num_processes} processes",
            "it counts the users of all processes together",
        )
    if not processes.is_alone and training.num_users < train.users_per_batch:
        raise ConfigError(
            "train.users_per_batch",
            train.users_per_batch,
            f"must not exceed the {training.num_users} users to train on",
            "lower it, or train in one process",
        )


def _seed_apart(seed: int, processes: Processes) -> None:
    """Let every process but the first draw its own dropout."""
    if not processes.is_first:
        drawn = np.random.SeedSequence([seed, 5, processes.rank]).generate_state(1)
        torch.manual_seed(int(drawn[0]))


def _settle(train: TrainConfig) -> None:
    """Process-wide settings of a run."""
    keep_freed_memory()
    # torchrun tells how many processes share this machine.
    num_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(train.num_threads or max((os.cpu_count() or 1) // num_here, 1))
