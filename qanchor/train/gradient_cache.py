"""The gradient of a step, also of batches larger than memory: activations of one piece at a time.

The contrastive loss needs all u and v at once, but its gradient with respect to them needs no
tower. So: a pass without graph for u and v, piece by piece; the loss and its gradient by row; then
a pass with graph, piece by piece, that carries these gradients on into the parameters. Costs one
more forward pass. Technique: Gao et al., "Scaling Deep Contrastive Learning Batch Size under
Memory Limited Setup" (arXiv 2101.06983); here with the other terms in the second pass.

Legend: Q pairs of this process, Z embedding_dim, T row terms.
"""

import torch
from torch import Tensor

from qanchor.train.source import Picked
from qanchor.train.step import Step, StepLosses


def backward(step: Step, picked: Picked, *, is_masked: bool) -> StepLosses:
    """Losses of a global batch; adds this process's part of their gradient to the parameters.

    Summed over the processes (Processes.sum_gradients) the parts are the gradient of `step.total`.
    """
    pieces = step.pieces(picked)
    if len(pieces) > 1:
        return _in_pieces(step, pieces, is_masked=is_masked)
    losses = step.joined([step.rows(pieces[0])], is_masked)
    step.total(losses).backward()
    return losses


def _in_pieces(step: Step, pieces: list[Picked], *, is_masked: bool) -> StepLosses:
    """The same for several pieces, by two passes.

    Dropout draws the same in both, so that the gradients belong to the vectors compared.
    """
    device = step.processes.device
    states, first = [], []
    for piece in pieces:
        states.append(random_state(device))
        with torch.no_grad():
            first.append(step.rows(piece, with_row_losses=False))
    anchor_QZ = torch.cat([rows.anchor_QZ for rows in first]).requires_grad_()
    semantic_QZ = torch.cat([rows.semantic_QZ for rows in first]).requires_grad_()
    keys_Q = torch.cat([rows.answer_key_Q for rows in first])
    contrastive, anchor_JZ, semantic_JZ = step.contrastive(
        anchor_QZ, semantic_QZ, keys_Q, is_masked=is_masked
    )
    grads = _row_gradients(step.loss.contrastive_weight * contrastive, anchor_QZ, semantic_QZ)
    pairs = torch.arange(len(keys_Q)).split([len(rows.answer_key_Q) for rows in first])
    row_losses_T = torch.zeros_like(first[0].row_losses_T)
    work = zip(pieces, states, pairs, step.shares(first), strict=True)
    for piece, state, pair, share_T in work:
        set_random_state(device, state)
        rows = step.rows(piece)
        told_T = rows.row_losses_T * share_T
        carried = step.weighted(told_T)
        if grads is not None:
            for rows_QZ, grad_QZ in zip((rows.anchor_QZ, rows.semantic_QZ), grads, strict=True):
                carried = carried + (rows_QZ * grad_QZ[pair]).sum()
        carried.backward()
        row_losses_T = row_losses_T + told_T.detach()
    return StepLosses(
        contrastive.detach(),
        step.processes.total(row_losses_T),
        anchor_JZ.detach(),
        semantic_JZ.detach(),
    )


def random_state(device: torch.device) -> list[Tensor]:
    """State of every generator a forward pass on `device` draws from (uint8, CPU)."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def set_random_state(device: torch.device, states: list[Tensor]) -> None:
    """Go back to a `random_state`; one taken on a CPU leaves a GPU's generator as it is."""
    torch.set_rng_state(states[0])
    if device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


def _row_gradients(
    loss: Tensor, anchor_QZ: Tensor, semantic_QZ: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Gradients by row; None where the contrastive term is off."""
    if not loss.requires_grad:
        return None
    anchor_grad_QZ, semantic_grad_QZ = torch.autograd.grad(loss, (anchor_QZ, semantic_QZ))
    return anchor_grad_QZ, semantic_grad_QZ
