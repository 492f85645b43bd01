"""How the model lies on the processes of a run: a whole copy on each (`ddp`), or cut up (`fsdp`).

A copy on each: gradients are summed in large pieces once per step, after the last backward pass;
torch's DistributedDataParallel would exchange them in every pass of a cached step. With LoRA there
is little to exchange. `fsdp` is in qanchor.train.fsdp.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from qanchor.towers import QAnchorModel
from qanchor.train.distributed import Processes


class Placement(Protocol):
    """The model as one process trains it, and what must be brought together."""

    model: QAnchorModel

    def settle_gradients(self, max_norm: float) -> Tensor:
        """Sum gradients over the processes, clip them; returns their norm (scalar).

        Raises RuntimeError for a norm that is not finite.
        """

    def whole_model(self) -> QAnchorModel:
        """The model with its present weights in full, right on the first process."""

    def whole_optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Optimizer state in full, right on the first process; every process must call."""

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Take over what `whole_optimizer_state` of any placement gave."""


class Replicated:
    """A whole copy of the model on each process."""

    def __init__(self, model: QAnchorModel, processes: Processes) -> None:
        self.model = model.to(processes.device)
        self._processes = processes

    def settle_gradients(self, max_norm: float) -> Tensor:
        """Sum gradients over the processes, clip them; returns their norm (scalar).

        Raises RuntimeError for a norm that is not finite.
        """
        self._processes.sum_gradients([p for p in self.model.parameters() if p.requires_grad])
        return torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), max_norm, error_if_nonfinite=True
        )

    def whole_model(self) -> QAnchorModel:
        """The model itself."""
        return self.model

    def whole_optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Optimizer state as it is."""
        return optimizer.state_dict()

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Take over what `whole_optimizer_state` of any placement gave."""
        optimizer.load_state_dict(state)
