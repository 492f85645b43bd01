"""Moving outliers from activations into weights, exactly (SmoothQuant, arXiv 2211.10438, Eq. 4).

A channel of a projection's input is divided by s_j = max|x_j|^alpha / max|w_j|^(1 - alpha) where it
is made, and its row of the weight is multiplied: the float model computes the same. The divisor
goes into the gain of the norm before (qkv, kv, gate, up), into the columns of `up` (down), and into
the value columns of qkv (o; one divisor per KV head and channel, since its query heads share it).

Legend: D decoder width, F inner width, G KV heads, K head_dim, S heads per KV head, I inputs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qanchor_export.projection import Projection, frozen
from qanchor_export.weights import DecoderWeights, LayerWeights

_LEAST = 1e-6
_WIDEST = 16.0
"""A channel is divided or multiplied by this at most: a channel nearly still in the calibration
users must not be blown up for others."""


@dataclass(frozen=True, slots=True)
class LayerScales:
    """Divisors of one layer's activations."""

    attention_D: Tensor
    mlp_D: Tensor
    inner_F: Tensor
    values_GK: Tensor


def layer_scales(
    layer: LayerWeights, peaks: dict[str, Tensor], heads: tuple[int, int, int], alpha: float
) -> LayerScales:
    """Divisors from the peaks [I] of each projection's input, by projection name.

    `heads`: KV heads, query heads per KV head, head_dim.
    """
    num_kv, per_kv, head_dim = heads
    grouped = (num_kv, per_kv, head_dim)
    o_peaks_GK = peaks["o"].reshape(grouped).amax(1)
    o_weights_GK = _row_peaks(layer.o.weight).reshape(grouped).amax(1)
    gate_up_D = torch.maximum(_row_peaks(layer.gate.weight), _row_peaks(layer.up.weight))
    return LayerScales(
        attention_D=_divisor(peaks["qkv"], _row_peaks(layer.qkv.weight), alpha),
        mlp_D=_divisor(peaks["gate"], gate_up_D, alpha),
        inner_F=_divisor(peaks["down"], _row_peaks(layer.down.weight), alpha),
        values_GK=_divisor(o_peaks_GK, o_weights_GK, alpha),
    )


@torch.no_grad()
def fold(decoder: DecoderWeights, scales: list[LayerScales], *, is_undone: bool = False) -> None:
    """Give a float32 decoder the smoothed weights, or take the divisors out again.

    Every changed tensor is a new one: a decoder shares memory with the model it was made of.
    """
    for layer, one in zip(decoder.stack, scales, strict=True):
        if is_undone:
            parts = (one.attention_D, one.mlp_D, one.inner_F, one.values_GK)
            one = LayerScales(*(1.0 / part for part in parts))
        _fold_layer(decoder, layer, one)


def _fold_layer(decoder: DecoderWeights, layer: LayerWeights, one: LayerScales) -> None:
    layer.attention_norm_D = frozen(layer.attention_norm_D / one.attention_D)
    layer.mlp_norm_D = frozen(layer.mlp_norm_D / one.mlp_D)
    values = one.values_GK.reshape(-1)
    for projection in (layer.qkv, layer.kv):
        if projection is not None:
            num_outputs = projection.weight.shape[1]
            divisor_O = torch.cat([torch.ones(num_outputs - len(values)), values])
            _scale(projection, one.attention_D, divisor_O)
    wide = one.values_GK[:, None].expand(-1, decoder.heads_per_kv, -1).reshape(-1)
    _scale(layer.o, wide)
    _scale(layer.gate, one.mlp_D)
    _scale(layer.up, one.mlp_D, one.inner_F)
    _scale(layer.down, one.inner_F)


def _scale(projection: Projection, rows_I: Tensor, divisor_O: Tensor | None = None) -> None:
    """Multiply a weight's rows, divide its columns and their bias."""
    weight_IO = projection.weight * rows_I[:, None]
    if divisor_O is not None:
        weight_IO = weight_IO / divisor_O
        if projection.bias is not None:
            projection.bias = frozen(projection.bias / divisor_O)
    projection.weight = frozen(weight_IO)


def _row_peaks(weight_IO: Tensor) -> Tensor:
    return weight_IO.abs().amax(1)


def _divisor(peaks: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """s_j; 1 for a channel that never carries anything."""
    raw = peaks.clamp(min=_LEAST) ** alpha / weights.clamp(min=_LEAST) ** (1.0 - alpha)
    # Rows and columns have scales of their own: only the differences between channels matter.
    mean = torch.exp(torch.log(raw).mean())
    bounded = (raw / mean).clamp(1.0 / _WIDEST, _WIDEST)
    return torch.where(peaks > _LEAST, bounded, torch.ones_like(raw))
