"""The processes of one data-parallel run: who they are, what they exchange, whose share is whose.

Every process computes the same joined loss from the gathered rows of all of them, and takes its
gradient with respect to its own rows alone. Parameter gradients are therefore *summed* over the
processes, never averaged, and equal those of one process on the whole batch.

Started by `torchrun`, which sets RANK, WORLD_SIZE and LOCAL_RANK; without it there is one process
and every exchange is the identity, to the bit.

Legend: Q rows of this process, J joined rows of all processes.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from qanchor.errors import ConfigError

T = TypeVar("T")

WAIT = timedelta(hours=6)
"""One process renders and tokenises while the others wait for it."""
BUCKET_NUMBERS = 1 << 24
"""Gradients reduced at once: 64 MiB of float32."""


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among those of its run."""

    rank: int = 0
    num_processes: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_first(self) -> bool:
        """Whether this is the one process that writes checkpoints, metrics and bars."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        """Whether there is nobody to exchange anything with."""
        return self.num_processes == 1

    def wait(self) -> None:
        """Return once every process has come here."""
        if not self.is_alone:
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def share(self, items: Sequence[T]) -> list[T]:
        """Every num_processes-th of `items`, so that long and short prefixes spread evenly."""
        return list(items[self.rank :: self.num_processes])

    def gather(self, rows_Q: Tensor) -> Tensor:
        """Rows [J, ...] of all processes, by rank; the gradient flows to this process's own.

        `rows_Q`: [Q, ...] on `device`; Q may differ between processes, the rest must not.
        """
        if self.is_alone:
            return rows_Q
        joined_J: Tensor = _GatherRows.apply(rows_Q, self.rank, self.num_processes)  # type: ignore[no-untyped-call]
        return joined_J

    def total(self, part: Tensor) -> Tensor:
        """Sum of a tensor over all processes; the gradient flows to this process's part."""
        if self.is_alone:
            return part
        summed: Tensor = _Total.apply(part)  # type: ignore[no-untyped-call]
        return summed

    def objects(self, value: T) -> list[T]:
        """`value` of every process, by rank (pickled; small things only)."""
        if self.is_alone:
            return [value]
        found: list[Any] = [None] * self.num_processes
        dist.all_gather_object(found, value)
        return found

    @torch.no_grad()
    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Sum `grad` over the processes, in place; None where no process has one stays None."""
        if self.is_alone:
            return
        has_grad = torch.tensor([p.grad is not None for p in parameters], device=self.device)
        counts = has_grad.int()
        dist.all_reduce(counts)
        wanted = [p for p, count in zip(parameters, counts.tolist(), strict=True) if count]
        for parameter in wanted:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets(wanted):
            flat = torch.cat([_grad(parameter).reshape(-1) for parameter in bucket])
            dist.all_reduce(flat)
            sizes = [parameter.numel() for parameter in bucket]
            for parameter, part in zip(bucket, flat.split(sizes), strict=True):
                _grad(parameter).copy_(part.view_as(parameter))


def alone() -> Processes:
    """The only process of a run, on the GPU if there is one."""
    return Processes(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))


@contextmanager
def joined_processes() -> Iterator[Processes]:
    """This process's place under torchrun, or alone; the group is left when the block ends.

    Exchanges run over nccl where there is a GPU per process, else over gloo. Raises ConfigError
    when this machine has fewer GPUs than processes.
    """
    has_gpu = torch.cuda.is_available()
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if num_processes == 1:
        yield alone()
        return
    device = torch.device("cpu")
    if has_gpu:
        local_rank = int(os.environ["LOCAL_RANK"])
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                "--nproc-per-node",
                local_rank + 1,
                f"this machine has {torch.cuda.device_count()} GPUs",
                "start one process per GPU",
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if has_gpu else "gloo", timeout=WAIT)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


class _GatherRows(torch.autograd.Function):
    """Forward: rows of all. Backward: of the joined gradient, the slice of one's own rows."""

    @staticmethod
    def forward(ctx: Any, rows_Q: Tensor, rank: int, num_processes: int) -> Tensor:
        num_rows = [
            torch.zeros(1, dtype=torch.long, device=rows_Q.device) for _ in range(num_processes)
        ]
        dist.all_gather(num_rows, torch.tensor([len(rows_Q)], device=rows_Q.device))
        counts = [int(count) for count in num_rows]
        # Processes hold different numbers of pairs; the exchange wants equal ones.
        padded = rows_Q.new_zeros((max(counts), *rows_Q.shape[1:]))
        padded[: len(rows_Q)] = rows_Q
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        ctx.own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0][ctx.own], None, None


class _Total(torch.autograd.Function):
    """Forward: sum over all. Backward: the gradient as it is."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        summed = part.clone()
        dist.all_reduce(summed)
        return summed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def _grad(parameter: torch.nn.Parameter) -> Tensor:
    assert parameter.grad is not None, "This is a bug: only parameters with a gradient come here."
    return parameter.grad


def _buckets(parameters: list[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    """Runs of parameters of one dtype, each up to BUCKET_NUMBERS long (a larger one alone)."""
    bucket: list[torch.nn.Parameter] = []
    size = 0
    for parameter in parameters:
        is_other = bool(bucket) and _grad(parameter).dtype != _grad(bucket[0]).dtype
        if bucket and (is_other or size + parameter.numel() > BUCKET_NUMBERS):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.numel()
    if bucket:
        yield bucket
