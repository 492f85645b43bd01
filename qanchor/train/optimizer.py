"""What moves the weights, and its learning rate over a run.

With `train.optimizer=muon` the matrices of projections, adapters and head are moved by Muon (Jordan
et al., 2024: momentum made orthogonal), embeddings and vectors by AdamW; otherwise AdamW moves all.
Not in the paper, which trains adapters of a pre-trained decoder.
"""

import math

import torch
from torch import nn

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
    muon = torch.optim.Muon(
        [{"params": by_muon, PEAK: train.matrix_learning_rate}],
        weight_decay=train.weight_decay,
        # Updates as large as AdamW's, so that rates are of the same order whatever the shape.
        adjust_lr_fn="match_rms_adamw",
    )
    return (adamw, muon)


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
