"""What moves the weights, and its learning rate over a run.

With `train.optimizer=muon` the matrices of projections, adapters and head are moved by Muon (Jordan
et al., 2024: momentum made orthogonal), embeddings and vectors by AdamW; otherwise AdamW moves all.
Not in the paper, which trains adapters of a pre-trained decoder.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from qanchor.towers import QAnchorModel
from qanchor.train.recipes import TrainConfig

PEAK = "peak_learning_rate"
"""Key of a parameter group: what its learning rate is a share of."""

Optimizers = tuple[torch.optim.Optimizer, ...]


def build_optimizers(model: QAnchorModel, train: TrainConfig) -> Optimizers:
    """The optimizers of a run; together they hold every trainable parameter once.

    Matrices decay, vectors (norms, biases) do not.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    by_muon = [
        p for p in trainable if train.optimizer == "muon" and p.ndim == 2 and id(p) not in tables
    ]
    taken = {id(parameter) for parameter in by_muon}
    others = [parameter for parameter in trainable if id(parameter) not in taken]
    groups = [
        {"params": [p for p in others if p.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(
        [{**group, PEAK: train.learning_rate} for group in groups], betas=(0.9, 0.98)
    )
    if not by_muon:
        return (adamw,)
    muon = Muon(
        [{"params": by_muon, PEAK: train.matrix_learning_rate}],
        weight_decay=train.weight_decay,
    )
    return (adamw, muon)


class Muon(torch.optim.Muon):
    """torch's Muon, orthogonalising in float32.

    torch's own does it in bfloat16 on every device, which CPUs without instructions for it emulate:
    there it took 60 % of a step of `mini`, now 3 %.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every matrix that has a gradient."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is not None:
                    self._move(matrix, group)

    def _move(self, matrix: nn.Parameter, group: dict[str, Any]) -> None:
        gradient, momentum = matrix.grad, group["momentum"]
        assert gradient is not None
        state = self.state[matrix]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        average = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        update = orthogonalized(
            gradient.lerp(average, momentum), group["ns_coefficients"], group["ns_steps"]
        )
        matrix.mul_(1 - group["lr"] * group["weight_decay"])
        # An entry's root mean square as AdamW's, so that rates are of the same order for any shape.
        matrix.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(matrix.shape)))


def orthogonalized(
    matrix: Tensor, coefficients: tuple[float, float, float], num_iterations: int
) -> Tensor:
    """The matrix with singular values of about 1, by quintic Newton-Schulz iterations in float32.

    The coefficients are Jordan's: steep at 0, so values end between 0.5 and 1.5.
    """
    a, b, c = coefficients
    is_tall = matrix.shape[0] > matrix.shape[1]
    turned = (matrix.T if is_tall else matrix).float()
    turned = turned / turned.norm().clamp(min=1e-7)
    for _ in range(num_iterations):
        gram = turned @ turned.T
        turned = torch.addmm(turned, torch.addmm(gram, gram, gram, beta=b, alpha=c), turned, beta=a)
    return (turned.T if is_tall else turned).to(matrix.dtype)


def set_learning_rate(optimizers: Optimizers, step: int, train: TrainConfig) -> None:
    """Give every parameter group its rate at `step`."""
    share = learning_rate_share(step, train)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group[PEAK] * share


def learning_rate_share(step: int, train: TrainConfig) -> float:
    """Share of the peak: linear warm-up, then cosine decay to a tenth at the last step."""
    if step < train.warmup_steps:
        return (step + 1) / train.warmup_steps
    progress = (step - train.warmup_steps) / max(train.steps - train.warmup_steps, 1)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))
