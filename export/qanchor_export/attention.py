"""Attention of one step over past and new tokens, written in two ways: what costs differs.

`PackedAttention`, float32, for CPUs, where work counts: only packed tokens are projected, and keys
and values of the past are read where they lie, never joined with the new ones. `GridAttention`,
half precision, for GPUs, where kernels count: tokens stand in the users' grid from the first layer
on, padding included, and past and new tokens share one softmax.

The query heads that share a KV head are folded into rows, so keys and values are never repeated.

Legend: T new tokens, B users, R row_len, C prefix_capacity, J = C + R, D decoder width, H heads,
G KV heads, S heads per KV head, M = R S attention rows, K head_dim.
"""

from typing import Protocol

import torch
from torch import Tensor

from qanchor_export.kv_store import KvStore
from qanchor_export.weights import DecoderWeights

MASKED, HALF_MASKED = -1e30, -3e4
"""Score of what may not be seen: finite, so that a row with nothing to see stays finite."""


class Attention(Protocol):
    """What all layers of one step share: masks and rotation, made once."""

    def heads(self, fused_TJ: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, G, M, K], keys and values [B, G, R, K], rotated, of a fused projection."""
        ...

    def keys_values(self, fused_TJ: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [1, G, T, K], rotated, of a projection without queries; one user."""
        ...

    def attend(
        self,
        q_BGMK: Tensor,
        own_BGRK: tuple[Tensor, Tensor],
        past_BGCK: tuple[Tensor, Tensor],
        store: KvStore,
    ) -> Tensor:
        """Softmax attention; flat cells [B R, H K]. Queries come scaled, the past as stored."""
        ...


class PackedAttention:
    """Float32. `rows`: packed token of each flat grid cell; None where tokens are the grid."""

    def __init__(
        self,
        decoder: DecoderWeights,
        positions_T: Tensor,
        past_BC: Tensor,
        own_BRR: Tensor,
        rows: Tensor | None = None,
    ) -> None:
        """`past_BC`, `own_BRR`: what the tokens of each user may see."""
        self._decoder = decoder
        self._grid = own_BRR.shape[:2]
        self._rows = rows
        angles = _angles(decoder, positions_T)
        self._cos, self._sin = torch.cos(angles), torch.sin(angles)
        self._past_B11C = as_bias(past_BC[:, None, None, :])
        batch, row_len = self._grid
        wide = own_BRR[:, :, None, :].expand(batch, row_len, decoder.heads_per_kv, row_len)
        self._own_B1MR = as_bias(wide.reshape(batch, 1, row_len * decoder.heads_per_kv, row_len))

    def heads(self, fused_TJ: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As the protocol."""
        decoder, (batch, row_len) = self._decoder, self._grid
        num_heads, num_kv, head_dim = decoder.num_heads, decoder.num_kv_heads, decoder.head_dim
        qk, v = torch.split(fused_TJ, [(num_heads + num_kv) * head_dim, num_kv * head_dim], dim=-1)
        # Queries and keys turn together: one set of operators instead of two.
        turned = self._rotate(qk.reshape(-1, num_heads + num_kv, head_dim))
        q, k = torch.split(turned, [num_heads, num_kv], dim=1)
        parts: list[Tensor] = [q, k, v.reshape(-1, num_kv, head_dim)]
        if self._rows is not None:
            parts = [torch.index_select(part, 0, self._rows) for part in parts]
        q_BRHK, k_BRGK, v_BRGK = (part.reshape(batch, row_len, -1, head_dim) for part in parts)
        grouped = q_BRHK.reshape(batch, row_len, num_kv, decoder.heads_per_kv, head_dim)
        q_BGMK = grouped.transpose(1, 2).reshape(batch, num_kv, -1, head_dim)
        return q_BGMK, k_BRGK.transpose(1, 2), v_BRGK.transpose(1, 2)

    def keys_values(self, fused_TJ: Tensor) -> tuple[Tensor, Tensor]:
        """As the protocol."""
        decoder = self._decoder
        pairs = fused_TJ.reshape(-1, 2 * decoder.num_kv_heads, decoder.head_dim)
        k, v = torch.split(pairs, decoder.num_kv_heads, dim=1)
        return self._rotate(k).transpose(0, 1)[None], v.transpose(0, 1)[None]

    def attend(
        self,
        q_BGMK: Tensor,
        own_BGRK: tuple[Tensor, Tensor],
        past_BGCK: tuple[Tensor, Tensor],
        store: KvStore,
    ) -> Tensor:
        """As the protocol. Past and new tokens have a softmax each, joined by their sums.

        Joining keys, values or scores would move all of them.
        """
        past_k, past_v = (stored.to(q_BGMK.dtype) for stored in past_BGCK)
        own_k, own_v = own_BGRK
        to_past = store.scaled(0, q_BGMK) @ past_k.transpose(-1, -2) + self._past_B11C
        to_own = q_BGMK @ own_k.transpose(-1, -2) + self._own_B1MR
        by_past, past_weight = _softmax_and_level(to_past)
        by_own, own_weight = _softmax_and_level(to_own)
        from_past = store.scaled(1, by_past @ past_v)
        from_own = by_own @ own_v
        share_BGM1 = torch.sigmoid(past_weight - own_weight)
        mixed_BGMK = from_own + share_BGM1 * (from_past - from_own)
        batch, row_len = self._grid
        decoder = self._decoder
        grouped = mixed_BGMK.reshape(
            batch, decoder.num_kv_heads, row_len, decoder.heads_per_kv, decoder.head_dim
        )
        return grouped.transpose(1, 2).reshape(
            batch * row_len, decoder.num_heads * decoder.head_dim
        )

    def _rotate(self, states_THK: Tensor) -> Tensor:
        """RoPE over split halves, as Qwen2 pairs dimensions."""
        cos, sin = self._cos, self._sin
        first, second = torch.split(states_THK, states_THK.shape[-1] // 2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class GridAttention:
    """Half precision. The tokens are the grid: T = B R."""

    def __init__(
        self, decoder: DecoderWeights, positions_T: Tensor, past_BC: Tensor, own_BRR: Tensor
    ) -> None:
        """`past_BC`, `own_BRR`: what the tokens of each user may see."""
        self._decoder = decoder
        self._batch, self._row_len = own_BRR.shape[:2]
        batch, row_len, num_kv = self._batch, self._row_len, decoder.num_kv_heads
        dtype, num_heads = decoder.dtype, decoder.num_heads
        # All heads turn together; values by nothing, which costs less than to part them.
        turning = torch.cat([torch.ones(num_heads + num_kv), torch.zeros(num_kv)])[:, None]
        angles_TAK = torch.cat([_angles(decoder, positions_T)] * 2, dim=-1) * turning
        self._cos, self._sin = torch.cos(angles_TAK).to(dtype), torch.sin(angles_TAK).to(dtype)
        # As large as the scores: a broadcast sum takes a GPU three times as long.
        past_BRC = past_BC[:, None, :].expand(-1, row_len, -1)
        bias_BRJ = as_bias(torch.cat([past_BRC, own_BRR], dim=-1), HALF_MASKED).to(dtype)
        wide = bias_BRJ[:, None].expand(-1, num_heads, -1, -1)
        self._bias_BGMJ = wide.reshape(batch, num_kv, row_len * decoder.heads_per_kv, -1)

    def heads(self, fused_TJ: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As the protocol."""
        decoder, batch, row_len = self._decoder, self._batch, self._row_len
        num_heads, num_kv, head_dim = decoder.num_heads, decoder.num_kv_heads, decoder.head_dim
        states = fused_TJ.reshape(-1, num_heads + 2 * num_kv, head_dim)
        turned = self._rotate(states, self._cos, self._sin)
        by_head = turned.reshape(batch, row_len, -1, head_dim).transpose(1, 2)
        q_BGMK = by_head[:, :num_heads].reshape(batch, num_kv, -1, head_dim)
        return q_BGMK, by_head[:, num_heads : num_heads + num_kv], by_head[:, num_heads + num_kv :]

    def keys_values(self, fused_TJ: Tensor) -> tuple[Tensor, Tensor]:
        """As the protocol."""
        num_heads, num_kv = self._decoder.num_heads, self._decoder.num_kv_heads
        states = fused_TJ.reshape(-1, 2 * num_kv, self._decoder.head_dim)
        turned = self._rotate(states, self._cos[:, num_heads:], self._sin[:, num_heads:])
        by_head = turned.transpose(0, 1)[None]
        return by_head[:, :num_kv], by_head[:, num_kv:]

    def attend(
        self,
        q_BGMK: Tensor,
        own_BGRK: tuple[Tensor, Tensor],
        past_BGCK: tuple[Tensor, Tensor],
        store: KvStore,
    ) -> Tensor:
        """As the protocol."""
        k_BGJK, v_BGJK = (
            torch.cat([store.scaled(part, past.to(own.dtype)), own], dim=2)
            for part, (past, own) in enumerate(zip(past_BGCK, own_BGRK, strict=True))
        )
        scores_BGMJ = q_BGMK @ k_BGJK.transpose(-1, -2) + self._bias_BGMJ
        mixed_BGMK = torch.softmax(scores_BGMJ, dim=-1) @ v_BGJK
        head_dim = self._decoder.head_dim
        by_head = mixed_BGMK.reshape(self._batch, -1, self._row_len, head_dim)
        return by_head.transpose(1, 2).reshape(
            self._batch * self._row_len, self._decoder.num_heads * head_dim
        )

    def _rotate(self, states_TAK: Tensor, cos_TAK: Tensor, sin_TAK: Tensor) -> Tensor:
        """RoPE as one product and three sums of all heads: parting and joining halves is slow."""
        swap_KK = self._decoder.swap_KK
        assert swap_KK is not None, "This is a bug: float32 weights have no swap matrix."
        return states_TAK * cos_TAK + (states_TAK @ swap_KK) * sin_TAK


def as_bias(allowed: Tensor, masked: float = MASKED) -> Tensor:
    """0 where allowed, else `masked`."""
    return torch.where(allowed, 0.0, masked)


def _angles(decoder: DecoderWeights, positions_T: Tensor) -> Tensor:
    """Angles [T, 1, K / 2] of RoPE at absolute positions."""
    return positions_T.to(torch.float32)[:, None, None] * decoder.inv_freq


def _softmax_and_level(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the last dimension, and the logarithm of its sum of exponentials.

    The largest weight is exp(largest score - that logarithm): two maxima, no second exponential.
    """
    weights = torch.softmax(scores, dim=-1)
    highest = scores.amax(-1, keepdim=True)
    return weights, highest - torch.log(weights.amax(-1, keepdim=True))
