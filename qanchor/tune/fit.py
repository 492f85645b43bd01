"""The loop of tuning and compiling: AdamW, early stopping on valid, the best state kept."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from qanchor.train.corpus import IntArray
from qanchor.tune.config import SuffixTraining


@dataclass(frozen=True, slots=True)
class Fitted:
    """How a fit went; scores are the judge's, higher is better."""

    steps: int
    """Steps taken, those after the best one included."""
    best_step: int
    """0: no step made it better."""
    start_score: float
    best_score: float
    last_loss: float


def fit(
    parameters: list[Tensor],
    loss_of: Callable[[IntArray], Tensor],
    judge: Callable[[], float],
    num_users: int,
    config: SuffixTraining,
    title: str,
) -> Fitted:
    """Minimise `loss_of` over batches of user numbers below `num_users`.

    `judge` scores the present parameters on valid. Afterwards `parameters` hold the best state
    seen, the starting one included. The order of users follows from the seed.
    """
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
    batches = _Batches(num_users, config)
    start = best_score = judge()
    best_step, step, loss_value = 0, 0, math.nan
    best = [parameter.detach().clone() for parameter in parameters]
    bar = tqdm(total=config.steps, desc=title, unit="step")
    while step < config.steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(batches.next())
        loss.backward()
        optimizer.step()
        loss_value = loss.item()
        step += 1
        bar.update()
        if step % config.evaluate_every and step != config.steps:
            continue
        score = judge()
        bar.set_postfix(loss=f"{loss_value:.4f}", valid=f"{score:.4f}")
        if score > best_score:
            best_score, best_step = score, step
            best = [parameter.detach().clone() for parameter in parameters]
        elif config.patience and step - best_step >= config.patience * config.evaluate_every:
            break
    bar.close()
    with torch.no_grad():
        for parameter, kept in zip(parameters, best, strict=True):
            parameter.copy_(kept)
    return Fitted(step, best_step, start, best_score, loss_value)


def learning_rate(step: int, config: SuffixTraining) -> float:
    """The schedule's learning rate at a step."""
    if config.schedule == "constant":
        return config.learning_rate
    return config.learning_rate * (0.55 + 0.45 * math.cos(math.pi * step / config.steps))


class _Batches:
    """Users in a new random order each epoch; the last, smaller batch of an epoch is taken too."""

    def __init__(self, num_users: int, config: SuffixTraining) -> None:
        self._rng = np.random.default_rng([config.seed, 3])
        self._num_users = num_users
        self._size = config.batch_users
        self._left = np.empty(0, dtype=np.int64)

    def next(self) -> IntArray:
        if not len(self._left):
            self._left = self._rng.permutation(self._num_users)
        batch, self._left = self._left[: self._size], self._left[self._size :]
        return batch
