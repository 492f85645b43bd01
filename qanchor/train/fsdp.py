"""Fully sharded training: every process keeps a slice of each weight, gradient and moment.

Layers are gathered as a forward or backward pass reaches them (FSDP2, `fully_shard`); what belongs
to no layer (embeddings, adapters, head) forms the root and stays gathered between forward and
backward. Checkpoints are written whole and are the same as those of whole copies.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from qanchor.errors import ConfigError
from qanchor.towers import QAnchorModel
from qanchor.train.distributed import Processes

FORWARD_METHODS = ("anchor", "semantic", "answer_logits", "logits_from_embedding")
LAYER_LISTS = ("layers", "layer")
"""What Qwen2 and BERT call their stacks of layers."""


class FullySharded:
    """The model cut up over the processes; a plain copy on the first one's CPU for checkpoints."""

    def __init__(self, model: QAnchorModel, processes: Processes) -> None:
        """Raises ConfigError when torch cannot reduce gradients that some processes lack."""
        if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
            raise ConfigError(
                "train.parallel",
                "fsdp",
                f"torch {torch.__version__} cannot reduce gradients that some processes lack",
                "take torch 2.13 or newer, or parallel=ddp",
            )
        self._is_first = processes.is_first
        self._plain = copy.deepcopy(model).cpu() if processes.is_first else model
        self.model = model.to(processes.device)
        mesh = init_device_mesh(processes.device.type, (processes.num_processes,))
        # An encoder that is not trained has encoded everything already.
        idle = {p for p in self.model.event_encoder.parameters() if not p.requires_grad}
        is_idle = len(idle) == sum(1 for _ in self.model.event_encoder.parameters())
        for layer in _layers(self.model, with_encoder=not is_idle):
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh, ignored_params=idle if is_idle else None)
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                # Summed, not averaged: see qanchor.train.distributed.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        assert isinstance(self.model, FSDPModule), "This is a bug: fully_shard changes the class."
        # A process whose users have no event of a modality has no gradient for its adapter.
        self.model.set_reduce_scatter_unused_params(True)
        for name in FORWARD_METHODS:
            register_fsdp_forward_method(self.model, name)

    def settle_gradients(self, max_norm: float) -> Tensor:
        """Clip the gradients, which the backward pass has summed; returns their norm (scalar).

        Raises RuntimeError for a norm that is not finite.
        """
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if not norm.isfinite():
            raise RuntimeError(f"gradient norm is {norm.item()}: must be finite")
        torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), max_norm, norm)
        return norm

    @torch.no_grad()
    def whole_model(self) -> QAnchorModel:
        """The plain copy with the present weights, right on the first process."""
        assert isinstance(self.model, FSDPModule)
        self.model.reshard()
        plain = dict(self._plain.named_parameters()) if self._is_first else {}
        for name, parameter in self.model.named_parameters():
            whole = _whole(parameter)
            if self._is_first:
                plain[name].copy_(whole)
        return self._plain

    def whole_optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Optimizer state in full, right on the first process; every process must call."""
        state = optimizer.state_dict()
        whole: dict[int, dict[str, Any]] = {}
        for index, moments in state["state"].items():
            gathered = {name: _whole(value) for name, value in moments.items()}
            if self._is_first:
                whole[index] = {name: value.cpu() for name, value in gathered.items()}
        return {"state": whole, "param_groups": state["param_groups"]}

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Take over what `whole_optimizer_state` of any placement gave."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        cut = {
            index: {name: _like(value, parameters[index]) for name, value in moments.items()}
            for index, moments in state["state"].items()
        }
        optimizer.load_state_dict({**state, "state": cut})


def _layers(model: QAnchorModel, *, with_encoder: bool) -> list[nn.Module]:
    """Every layer of the decoder, and of the text encoder."""
    parts: list[nn.Module] = [model.language_model]
    if with_encoder:
        parts.append(model.event_encoder)
    return [
        layer
        for part in parts
        for name, module in part.named_modules()
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] in LAYER_LISTS
        for layer in module
    ]


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole moment cut as its parameter is; the step counter stays as it is."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )
