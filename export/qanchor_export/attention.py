"""Attention of one step over past and new tokens, written in two ways: what costs differs.

`PackedAttention`, float32, for CPUs, where work counts: only packed tokens are projected, keys and
values of the past are read where they lie, never joined with the new ones, and a query's tokens
meet each other alone, not those of the other queries. `GridAttention`, half precision, for GPUs,
where kernels count: tokens stand in the users' grid from the first layer on, padding included, and
past and new tokens share one softmax.

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
        """Queries as `attend` takes them, keys and values [B, G, R, K], of a fused projection.

        Queries and keys are rotated. `PackedAttention` lays keys and values in its own rows.
        """
        ...

    def keys_values(self, fused_TJ: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [1, G, T, K], rotated, of a projection without queries; one user."""
        ...

    def attend(
        self,
        q: Tensor,
        own_BGRK: tuple[Tensor, Tensor],
        past_BGCK: tuple[Tensor, Tensor],
        store: KvStore,
    ) -> Tensor:
        """Softmax attention [T, H K]. Queries come scaled, the past as stored."""
        ...


class Rows:
    """Packed tokens laid in rows of equal length and back, KV head by KV head; one copy each way.

    Legend: N rows, L row length, M = L S.
    """

    def __init__(self, index_NL: Tensor, place_T: Tensor) -> None:
        """`index_NL`: packed token of each cell, -1 = padding; `place_T`: cell of each token."""
        self.shape = index_NL.shape
        self._index_NL = not_below_zero(index_NL)
        self._place_T = place_T
        self._cells: dict[tuple[str, int], Tensor] = {}
        """Made once for all layers."""

    def lay(self, parts_THK: Tensor, num_kv: int) -> Tensor:
        """[N, G, M, K]; padding repeats the first token."""
        num_rows, row_len = self.shape
        num_heads, head_dim = parts_THK.shape[1:]
        if ("lay", num_heads) not in self._cells:
            heads_G1S = torch.arange(num_heads).reshape(num_kv, 1, -1)
            cells_NGLS = self._index_NL[:, None, :, None] * num_heads + heads_G1S
            self._cells["lay", num_heads] = cells_NGLS.reshape(-1)
        cells = self._cells["lay", num_heads]
        laid = torch.index_select(parts_THK.reshape(-1, head_dim), 0, cells)
        return laid.reshape(num_rows, num_kv, row_len * (num_heads // num_kv), head_dim)

    def take(self, laid_NGMK: Tensor, num_heads: int) -> Tensor:
        """Back to [T, H, K]."""
        num_kv, last = laid_NGMK.shape[1], laid_NGMK.shape[-1]
        if ("take", num_heads) not in self._cells:
            num_rows, row_len = self.shape
            per_kv = num_heads // num_kv
            # Looked up: a division of whole numbers is traced as one of floats.
            row_of_cell = torch.arange(num_rows)[:, None].expand(-1, row_len).reshape(-1)
            row_T = torch.index_select(row_of_cell, 0, self._place_T)
            # [N, G, L, S] flat: behind what a whole row holds stands the next row.
            first_T = self._place_T * per_kv + row_T * (row_len * per_kv * (num_kv - 1))
            heads_GS = torch.arange(num_kv)[:, None] * (row_len * per_kv) + torch.arange(per_kv)
            cells_TH = first_T[:, None] + heads_GS.reshape(1, -1)
            self._cells["take", num_heads] = cells_TH.reshape(-1)
        cells = self._cells["take", num_heads]
        taken = torch.index_select(laid_NGMK.reshape(-1, last), 0, cells)
        return taken.reshape(-1, num_heads, last)


class OneRow:
    """The rows of a prefix: its tokens as they stand."""

    def lay(self, parts_THK: Tensor, num_kv: int) -> Tensor:
        """[1, G, M, K]."""
        num_heads, head_dim = parts_THK.shape[1:]
        grouped = parts_THK.reshape(-1, num_kv, num_heads // num_kv, head_dim)
        return grouped.transpose(0, 1).reshape(1, num_kv, -1, head_dim)

    def take(self, laid_NGMK: Tensor, num_heads: int) -> Tensor:
        """Back to [T, H, K]."""
        num_kv, last = laid_NGMK.shape[1], laid_NGMK.shape[-1]
        grouped = laid_NGMK.reshape(num_kv, -1, num_heads // num_kv, last)
        return grouped.transpose(0, 1).reshape(-1, num_heads, last)


class PackedAttention:
    """Float32. `users`: the rows that read a user's past; `own`: those whose tokens see each other.

    Each token of an own row sees the row's tokens up to itself; padding stands at the end.
    """

    def __init__(
        self,
        decoder: DecoderWeights,
        positions_T: Tensor,
        past_BC: Tensor,
        own_len: int,
        rows: tuple[Rows, Rows] | None = None,
    ) -> None:
        """`past_BC`: which columns each user's tokens see. `rows`: users' and own; None: one row.

        `own_len`: length of the own rows.
        """
        self._decoder = decoder
        self._users: Rows | OneRow
        self._own: Rows | OneRow
        self._users, self._own = rows or (OneRow(), OneRow())
        self._is_one_row = rows is None
        # A half turns by what the other half is times plus or minus a sine.
        half = decoder.head_dim // 2
        signs_K = torch.cat([torch.full((half,), -1.0), torch.ones(half)])
        angles_T1K = torch.cat([_angles(decoder, positions_T)] * 2, dim=-1) * signs_K
        self._cos_T1K, self._sin_T1K = torch.cos(angles_T1K), torch.sin(angles_T1K)
        self._turns: dict[int, tuple[Tensor, Tensor]] = {}
        """By number of heads, made once for all layers."""
        self._past_B11C = as_bias(past_BC[:, None, None, :])
        columns_L = torch.arange(own_len)
        causal_LSL = (columns_L[:, None] >= columns_L)[:, None, :].expand(
            -1, decoder.heads_per_kv, -1
        )
        self._own_ML = as_bias(causal_LSL.reshape(own_len * decoder.heads_per_kv, own_len))

    def heads(self, fused_TJ: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As the protocol; queries [T, H, K]."""
        decoder = self._decoder
        num_heads, num_kv, head_dim = decoder.num_heads, decoder.num_kv_heads, decoder.head_dim
        qk, v = torch.split(fused_TJ, [(num_heads + num_kv) * head_dim, num_kv * head_dim], dim=-1)
        # Queries and keys turn together: one set of operators instead of two.
        turned = self._rotate(qk.reshape(-1, num_heads + num_kv, head_dim))
        q_THK, k_TGK = torch.split(turned, [num_heads, num_kv], dim=1)
        v_TGK = v.reshape(-1, num_kv, head_dim)
        return q_THK, self._own.lay(k_TGK, num_kv), self._own.lay(v_TGK, num_kv)

    def keys_values(self, fused_TJ: Tensor) -> tuple[Tensor, Tensor]:
        """As the protocol."""
        decoder = self._decoder
        pairs = fused_TJ.reshape(-1, 2 * decoder.num_kv_heads, decoder.head_dim)
        k, v = torch.split(pairs, decoder.num_kv_heads, dim=1)
        return self._rotate(k).transpose(0, 1)[None], v.transpose(0, 1)[None]

    def attend(
        self,
        q: Tensor,
        own_BGRK: tuple[Tensor, Tensor],
        past_BGCK: tuple[Tensor, Tensor],
        store: KvStore,
    ) -> Tensor:
        """As the protocol. Past and new tokens have a softmax each, joined by their sums.

        Joining keys, values or scores would move all of them.
        """
        num_heads, num_kv = self._decoder.num_heads, self._decoder.num_kv_heads
        past_k, past_v = (stored.to(q.dtype) for stored in past_BGCK)
        own_k, own_v = own_BGRK
        to_users = self._users.lay(q, num_kv)
        to_own = to_users if self._is_one_row else self._own.lay(q, num_kv)
        by_past, past_level = _softmax_and_level(
            store.scaled(0, to_users) @ past_k.transpose(-1, -2) + self._past_B11C
        )
        by_own, own_level = _softmax_and_level(to_own @ own_k.transpose(-1, -2) + self._own_ML)
        from_past, from_own = store.scaled(1, by_past @ past_v), by_own @ own_v
        if self._is_one_row:
            mixed = _joined(from_past, past_level, from_own, own_level)
            return self._own.take(mixed, num_heads).flatten(1)
        parts = (
            *(self._users.take(part, num_heads) for part in (from_past, past_level)),
            *(self._own.take(part, num_heads) for part in (from_own, own_level)),
        )
        return _joined(*parts).flatten(1)

    def _rotate(self, states_THK: Tensor) -> Tensor:
        """RoPE over split halves, as Qwen2 pairs dimensions."""
        num_heads, head_dim = states_THK.shape[1:]
        if num_heads not in self._turns:
            # As large as the states: a CPU multiplies them faster than rows it has to broadcast.
            size = (-1, num_heads, -1)
            self._turns[num_heads] = self._cos_T1K.expand(size), self._sin_T1K.expand(size)
        cos_THK, sin_THK = self._turns[num_heads]
        first, second = torch.split(states_THK, head_dim // 2, dim=-1)
        return states_THK * cos_THK + torch.cat([second, first], dim=-1) * sin_THK


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
        q: Tensor,
        own_BGRK: tuple[Tensor, Tensor],
        past_BGCK: tuple[Tensor, Tensor],
        store: KvStore,
    ) -> Tensor:
        """As the protocol; queries [B, G, M, K]."""
        k_BGJK, v_BGJK = (
            torch.cat([store.scaled(part, past.to(own.dtype)), own], dim=2)
            for part, (past, own) in enumerate(zip(past_BGCK, own_BGRK, strict=True))
        )
        scores_BGMJ = q @ k_BGJK.transpose(-1, -2) + self._bias_BGMJ
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


def not_below_zero(index: Tensor) -> Tensor:
    """An int64 index with negative entries made 0. As Max: TensorRT's Clip takes floats only."""
    return torch.maximum(index, torch.zeros((), dtype=torch.int64))


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


def _joined(from_past: Tensor, past_level: Tensor, from_own: Tensor, own_level: Tensor) -> Tensor:
    """Two softmaxes' results as that of one over both."""
    return from_own + torch.sigmoid(past_level - own_level) * (from_past - from_own)
