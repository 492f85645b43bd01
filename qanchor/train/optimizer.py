"""AdamW and its learning rate over a run."""

import math

import torch

from qanchor.towers import QAnchorModel
from qanchor.train.recipes import TrainConfig


def build_optimizer(model: QAnchorModel, train: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters: matrices decay, vectors (norms, biases) do not."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=train.learning_rate, betas=(0.9, 0.98))


def learning_rate(step: int, train: TrainConfig) -> float:
    """Linear warm-up, then cosine decay to a tenth of the peak at the last step."""
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    progress = (step - train.warmup_steps) / max(train.steps - train.warmup_steps, 1)
    return train.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
