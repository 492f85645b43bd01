"""Joint pre-training, Q-Anchor Eq. (3)-(6): the loop, evaluation during it, exact resume.

A run directory holds `untrained/` (step 0), `step-NNNNNN/` with `checkpoint` pointing at the
newest, and `metrics.jsonl`. A run killed at any moment goes on from `checkpoint` with the same
losses to the bit (CPU).
"""

import logging
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from torch import Tensor
from tqdm import tqdm

from qanchor import config
from qanchor.checkpoint import (
    TRAINER_FILE,
    Checkpoint,
    at_step,
    load_checkpoint,
    save_checkpoint,
)
from qanchor.data.dataset import Dataset
from qanchor.errors import ConfigError
from qanchor.losses import LossConfig, contrastive_loss, next_token_loss
from qanchor.towers import QAnchorModel
from qanchor.train.allocator import keep_freed_memory
from qanchor.train.batches import Segment, anchor_batch, answer_batch
from qanchor.train.recipes import Recipe, TrainConfig
from qanchor.train.setup import Material, batch_order, material, prepare, render_views
from qanchor.train.triples import read_triple_texts

log = logging.getLogger(__name__)

UNTRAINED = "untrained"
LATEST = "checkpoint"
METRICS_FILE = "metrics.jsonl"
RECIPE_FILE = "recipe.json"


@dataclass(frozen=True, slots=True)
class StepLosses:
    """Loss terms of one batch (scalar tensors), with u and v [Q, embedding_dim] beside them."""

    contrastive: Tensor
    next_token: Tensor
    anchor: Tensor
    semantic: Tensor


def pretrain(recipe: Recipe, dataset: Dataset, triples_path: Path, run_dir: Path) -> Path:
    """Train from scratch into `run_dir`; returns the newest checkpoint's path.

    Raises ConfigError when the directory already holds a run (use `resume`).
    """
    if (run_dir / LATEST).exists() or (run_dir / UNTRAINED).exists():
        raise ConfigError(
            "run directory", str(run_dir), "already holds a run", "resume it or choose another"
        )
    _settle(recipe.train)
    checkpoint, data = prepare(recipe, dataset, triples_path)
    run_dir.mkdir(parents=True, exist_ok=True)
    config.save(recipe, run_dir / RECIPE_FILE)
    save_checkpoint(checkpoint, run_dir / UNTRAINED)
    return Trainer(checkpoint, data, run_dir).run()


def resume(dataset: Dataset, triples_path: Path, run_dir: Path) -> Path:
    """Go on with an interrupted run; returns the newest checkpoint's path.

    Raises ConfigError when there is nothing to resume.
    """
    latest = run_dir / LATEST
    start = latest if latest.exists() else run_dir / UNTRAINED
    checkpoint = load_checkpoint(start)
    _settle(checkpoint.meta.recipe.train)
    texts = read_triple_texts(triples_path)
    data = material(checkpoint, render_views(dataset, texts), texts)
    trainer = Trainer(checkpoint, data, run_dir)
    if latest.exists():
        trainer.restore(torch.load(latest / TRAINER_FILE, weights_only=True))
    _forget_metrics_after(run_dir / METRICS_FILE, checkpoint.meta.step)
    return trainer.run()


def compute_losses(
    model: QAnchorModel,
    data: Material,
    picked: tuple[list[int], list[list[Segment]]],
    loss: LossConfig,
    *,
    is_masked: bool,
) -> StepLosses:
    """Both towers on `picked` users and segments, and the two terms of Eq. (3)-(6)."""
    users, segments = picked
    device = model.head.up.weight.device
    batch = anchor_batch(data.corpus, users, segments).to(device)
    flat = [segment for of_user in segments for segment in of_user]
    answers_QA, answer_len_Q = (part.to(device) for part in answer_batch(flat, data.corpus.tokens))
    answers_see_all = loss.next_token_context == "all"
    anchor_QZ, states_BSD = model.anchor(batch, answers_see_all=answers_see_all)
    semantic_QZ = model.semantic(answers_QA, answer_len_Q)
    contrastive = next_token = anchor_QZ.new_zeros(())
    if loss.next_token_weight:
        next_token = next_token_loss(*model.answer_logits(states_BSD, batch.labels_BS))
    if loss.contrastive_weight:
        equal_QQ = (answers_QA[:, None] == answers_QA).all(dim=-1)
        # A bfloat16 similarity would be off by as much as a tenth of its own over tau.
        with torch.autocast(device.type, enabled=False):
            contrastive = contrastive_loss(
                anchor_QZ, semantic_QZ, loss, is_masked=is_masked, equal_QQ=equal_QQ
            )
    return StepLosses(contrastive, next_token, anchor_QZ, semantic_QZ)


class Trainer:
    """The optimisation loop of one run; state lives in model, optimizer and step alone."""

    def __init__(self, checkpoint: Checkpoint, data: Material, run_dir: Path) -> None:
        self.checkpoint = checkpoint
        self.data = data
        self.run_dir = run_dir
        self.recipe = checkpoint.meta.recipe
        self.step = checkpoint.meta.step
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = checkpoint.model.to(self.device)
        self.order = batch_order(self.recipe, data.corpus, data.training)
        self.optimizer = torch.optim.AdamW(
            _parameter_groups(self.model, self.recipe.train.weight_decay),
            lr=self.recipe.train.learning_rate,
            betas=(0.9, 0.98),
        )

    def run(self) -> Path:
        """Train to the recipe's last step; returns the path of the newest checkpoint."""
        train = self.recipe.train
        bar = tqdm(
            total=train.steps, initial=self.step, desc=f"pretrain {self.recipe.name}", unit="step"
        )
        while self.step < train.steps:
            metrics = self._train_step()
            self.step += 1
            bar.update()
            bar.set_postfix(cl=f"{metrics['contrastive']:.3f}", ntp=f"{metrics['next_token']:.3f}")
            is_last = self.step == train.steps
            if is_last or self.step % train.evaluate_every == 0:
                metrics |= self._evaluate()
                log.info("step %d: %s", self.step, metrics)
            with (self.run_dir / METRICS_FILE).open("ab") as stream:
                stream.write(msgspec.json.encode({"step": self.step, **metrics}) + b"\n")
            if is_last or self.step % train.checkpoint_every == 0:
                self._save()
        bar.close()
        return self.run_dir / LATEST

    def restore(self, state: dict[str, object]) -> None:
        """Take optimizer and random state over from a checkpoint's trainer file."""
        self.optimizer.load_state_dict(state["optimizer"])  # type: ignore[arg-type]
        torch.set_rng_state(state["rng"])  # type: ignore[arg-type]

    def _train_step(self) -> dict[str, float]:
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.recipe.train)
        self.optimizer.zero_grad(set_to_none=True)
        losses = self._losses(self.order.batch(self.step))
        weights = self.recipe.loss
        total = (
            weights.contrastive_weight * losses.contrastive
            + weights.next_token_weight * losses.next_token
        )
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), self.recipe.train.max_grad_norm, error_if_nonfinite=True
        )
        self.optimizer.step()
        return {
            "loss": total.item(),
            "contrastive": losses.contrastive.item(),
            "next_token": losses.next_token.item(),
            "grad_norm": norm.item(),
        }

    def _losses(self, picked: tuple[list[int], list[list[Segment]]]) -> StepLosses:
        is_half = self.recipe.train.dtype == "bfloat16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=is_half):
            return compute_losses(
                self.model,
                self.data,
                picked,
                self.recipe.loss,
                is_masked=self.step >= self.recipe.loss.mask_from_step,
            )

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        """Mean loss terms and retrieval (right answer among the batch's) over held-out users."""
        if not self.data.heldout.users:
            return {}
        heldout = batch_order(self.recipe, self.data.corpus, self.data.heldout)
        self.model.eval()
        rows = []
        for index in range(heldout.batches_per_epoch):
            losses = self._losses(heldout.batch(index))
            best_Q = (losses.anchor @ losses.semantic.T).argmax(dim=1)
            is_right_Q = best_Q == torch.arange(len(best_Q), device=self.device)
            rows.append(
                [
                    losses.contrastive.item(),
                    losses.next_token.item(),
                    is_right_Q.float().mean().item(),
                ]
            )
        means = torch.tensor(rows).mean(dim=0).tolist()
        return dict(
            zip(("heldout_contrastive", "heldout_next_token", "heldout_top1"), means, strict=True)
        )

    def _save(self) -> None:
        directory = self.run_dir / f"step-{self.step:06d}"
        self.checkpoint = at_step(self.checkpoint, self.step)
        save_checkpoint(self.checkpoint, directory)
        state = {"optimizer": self.optimizer.state_dict(), "rng": torch.get_rng_state()}
        torch.save(state, directory / TRAINER_FILE)
        link = self.run_dir / (LATEST + ".new")
        link.unlink(missing_ok=True)
        link.symlink_to(directory.name)
        os.replace(link, self.run_dir / LATEST)
        for old in self.run_dir.glob("step-*"):
            if old != directory:
                shutil.rmtree(old)


def learning_rate(step: int, train: TrainConfig) -> float:
    """Linear warm-up, then cosine decay to a tenth of the peak at the last step."""
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    progress = (step - train.warmup_steps) / max(train.steps - train.warmup_steps, 1)
    return train.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def _parameter_groups(model: QAnchorModel, weight_decay: float) -> list[dict[str, object]]:
    """Matrices decay; vectors (norms, biases) do not; frozen parameters are left out."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]


def _forget_metrics_after(path: Path, step: int) -> None:
    """Drop the lines of steps that will be taken again."""
    if path.is_file():
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:step]))


def _settle(train: TrainConfig) -> None:
    """Process-wide settings of a run."""
    keep_freed_memory()
    torch.set_num_threads(train.num_threads or os.cpu_count() or 1)
