"""The prefix graph and the suffix graph as functional modules: explicit tensors, no cache objects.

The shapes follow `prefix_spec` and `suffix_spec` of the manifest. Keys and values of the past are
read where they lie: scores against the past and among the new tokens are computed apart and joined
afterwards, and the query heads that share a KV head are folded into rows, so that keys and values
are never joined, repeated or copied.

Legend: T new tokens (packed_len or chunk_len), B users, R row_len, C prefix_capacity, D decoder
width, H heads, G KV heads, S heads per KV head, M = R S attention rows, K head_dim, N queries,
A adapters, E slot_vector_dim, X = A E, Z embedding_dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qanchor_export.kv_store import KvStore
from qanchor_export.weights import (
    AdapterWeights,
    DecoderWeights,
    HeadWeights,
    LayerWeights,
)

MASKED = -1e30
"""Score of what may not be seen: finite, so that a row with nothing to see stays finite."""


@dataclass(frozen=True, slots=True)
class Visibility:
    """Added to scores: 0 for what a row may see, else MASKED; once per step for all layers."""

    past_B11C: Tensor
    own_B1MR: Tensor


def rms_norm(states_TD: Tensor, gain_D: Tensor, eps: float) -> Tensor:
    """RMSNorm in float32, written as ONNX Runtime's SimplifiedLayerNormalization fusion expects it.

    Comes back in the type of the gain.
    """
    wide_TD = states_TD.float()
    variance_T1 = wide_TD.pow(2.0).mean(-1, keepdim=True)
    normed_TD = wide_TD / torch.sqrt(variance_T1 + eps)
    return normed_TD.to(gain_D.dtype) * gain_D


def rotation(positions_T: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine [T, 1, K / 2] of RoPE at absolute positions."""
    angles = positions_T.to(torch.float32)[:, None, None] * inv_freq
    return torch.cos(angles), torch.sin(angles)


def rotate(states_THK: Tensor, rotation_T1K: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE over split halves, as Qwen2 pairs dimensions."""
    cos, sin = (part.to(states_THK.dtype) for part in rotation_T1K)
    first, second = torch.split(states_THK, states_THK.shape[-1] // 2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def project_qkv(
    normed_TD: Tensor, layer: LayerWeights, decoder: DecoderWeights, turn: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries [T, H, K], rotated keys [T, G, K] and values [T, G, K]."""
    num_heads, num_kv = decoder.num_heads, decoder.num_kv_heads
    fused_TJ = layer.qkv(normed_TD)
    qk_width, v_width = (num_heads + num_kv) * decoder.head_dim, num_kv * decoder.head_dim
    qk, v = torch.split(fused_TJ, [qk_width, v_width], dim=-1)
    # Queries and keys turn together: one set of operators instead of two.
    turned = rotate(qk.reshape(-1, num_heads + num_kv, decoder.head_dim), turn)
    q_THK, k_TGK = torch.split(turned, [num_heads, num_kv], dim=1)
    return q_THK, k_TGK, v.reshape(-1, num_kv, decoder.head_dim)


def attend(
    q_BGMK: Tensor,
    own_BGRK: tuple[Tensor, Tensor],
    past_BGCK: tuple[Tensor, Tensor],
    sees: Visibility,
    store: KvStore,
) -> Tensor:
    """Softmax attention over the past and the new tokens, [B, G, M, K]; queries come scaled.

    The past comes as stored. Scores are float32 from the masks to the softmax. In float32 (CPUs)
    past and new tokens have a softmax each, joined by their sums: joining the scores moves all of
    them twice. In half precision (GPUs) scores are joined: fewer kernels count more there.
    """
    own_k, own_v = own_BGRK
    past_k, past_v = (stored.to(q_BGMK.dtype) for stored in past_BGCK)
    to_past = (store.scaled(0, q_BGMK) @ past_k.transpose(-1, -2)).float() + sees.past_B11C
    to_own = (q_BGMK @ own_k.transpose(-1, -2)).float() + sees.own_B1MR
    if q_BGMK.dtype == torch.float32:
        by_past, past_weight = softmax_and_level(to_past)
        by_own, own_weight = softmax_and_level(to_own)
        from_past = store.scaled(1, by_past @ past_v)
        from_own = by_own @ own_v
        share_BGM1 = torch.sigmoid(past_weight - own_weight)
        return from_own + share_BGM1 * (from_past - from_own)
    weights = torch.softmax(torch.cat([to_past, to_own], dim=-1), dim=-1).to(q_BGMK.dtype)
    on_past, on_own = torch.split(weights, [past_k.shape[2], own_k.shape[2]], dim=-1)
    return store.scaled(1, on_past @ past_v) + on_own @ own_v


def softmax_and_level(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the last dimension, and the logarithm of its sum of exponentials.

    The largest weight is exp(largest score - that logarithm): two maxima, no second exponential.
    """
    weights = torch.softmax(scores, dim=-1)
    highest = scores.amax(-1, keepdim=True)
    return weights, highest - torch.log(weights.amax(-1, keepdim=True))


def mlp(states_TD: Tensor, layer: LayerWeights, eps: float) -> Tensor:
    """The gated feed-forward block with its norm and residual."""
    normed_TD = rms_norm(states_TD, layer.mlp_norm_D, eps)
    gate_TF = nn.functional.silu(layer.gate(normed_TD))
    return states_TD + layer.down(gate_TF * layer.up(normed_TD))


def fold_rows(q_BRHK: Tensor, num_kv_heads: int) -> Tensor:
    """[B, R, H, K] to [B, G, R S, K]: the heads of one KV head become rows."""
    batch, row_len, num_heads, head_dim = q_BRHK.shape
    per_kv = num_heads // num_kv_heads
    grouped = q_BRHK.reshape(batch, row_len, num_kv_heads, per_kv, head_dim)
    return grouped.transpose(1, 2).reshape(batch, num_kv_heads, row_len * per_kv, head_dim)


def unfold_rows(attended_BGMK: Tensor, row_len: int, width: int) -> Tensor:
    """[B, G, R S, K] back to flat rows [B R, H K]."""
    batch, num_kv, _, head_dim = attended_BGMK.shape
    grouped = attended_BGMK.reshape(batch, num_kv, row_len, width // (num_kv * head_dim), head_dim)
    return grouped.transpose(1, 2).reshape(batch * row_len, width)


def not_below_zero(index: Tensor) -> Tensor:
    """An int64 index with negative entries made 0. As Max: TensorRT's Clip takes floats only."""
    return torch.maximum(index, torch.zeros((), dtype=torch.int64))


def mask_rows(allowed_BRR: Tensor, heads_per_kv: int) -> Tensor:
    """[B, R, R] to [B, 1, R S, R], one row per folded query head."""
    batch, row_len, _ = allowed_BRR.shape
    wide = allowed_BRR[:, :, None, :].expand(batch, row_len, heads_per_kv, row_len)
    return wide.reshape(batch, 1, row_len * heads_per_kv, row_len)


def as_bias(allowed: Tensor) -> Tensor:
    """0 where allowed, else MASKED."""
    return torch.where(allowed, 0.0, MASKED)


class PrefixGraph(nn.Module):
    """One chunk of a user's prefix to its keys (after RoPE) and values, layer by layer."""

    decoder: DecoderWeights
    adapters: AdapterWeights

    def __init__(self, decoder: DecoderWeights, adapters: AdapterWeights) -> None:
        super().__init__()
        self.decoder = decoder
        self.adapters = adapters

    def forward(
        self,
        token_ids_T: Tensor,
        adapter_T: Tensor,
        slot_vectors_TE: Tensor,
        past_len_1: Tensor,
        past: tuple[Tensor, ...],
    ) -> tuple[Tensor, ...]:
        """Present keys and values, each [1, G, T, K], in the order of `present_names`."""
        decoder = self.decoder
        chunk_len, capacity = token_ids_T.shape[0], past[0].shape[2]
        columns_T = torch.arange(chunk_len)
        turn = rotation(columns_T + past_len_1, decoder.inv_freq)
        causal_1TT = (columns_T[:, None] >= columns_T[None, :])[None]
        sees = Visibility(
            past_B11C=as_bias((torch.arange(capacity) < past_len_1)[None, None, None]),
            own_B1MR=as_bias(mask_rows(causal_1TT, decoder.heads_per_kv)),
        )
        states_TD = self.embed(token_ids_T, adapter_T, slot_vectors_TE)
        present: list[Tensor] = []
        for index, layer in enumerate(decoder.stack):
            normed_TD = rms_norm(states_TD, layer.attention_norm_D, decoder.norm_eps)
            if layer.kv is not None:
                last = self.last_keys_values(layer.kv(normed_TD), turn)
                present.extend(layer.store.store(part, one[None]) for part, one in enumerate(last))
                break
            q_THK, k_TGK, v_TGK = project_qkv(normed_TD, layer, decoder, turn)
            # Attention reads what is stored, so that a prefix in chunks equals one in one piece.
            stored_k, own_k = layer.store.stored_and_read(0, k_TGK.transpose(0, 1))
            stored_v, own_v = layer.store.stored_and_read(1, v_TGK.transpose(0, 1))
            present += [stored_k[None], stored_v[None]]
            own = (own_k[None], own_v[None])
            q_BGMK = fold_rows(q_THK[None], decoder.num_kv_heads)
            pair = (past[2 * index], past[2 * index + 1])
            width = decoder.num_heads * decoder.head_dim
            attended = attend(q_BGMK, own, pair, sees, layer.store)
            attended_TJ = unfold_rows(attended, chunk_len, width)
            states_TD = mlp(states_TD + layer.o(attended_TJ), layer, decoder.norm_eps)
        return tuple(present)

    def embed(self, token_ids_T: Tensor, adapter_T: Tensor, slot_vectors_TE: Tensor) -> Tensor:
        """Input embeddings [T, D]: token embedding where adapter is 0, else that adapter's MLP.

        All adapters run as one MLP over [T, A E]; a one-hot gate keeps the position's own block.
        """
        weights = self.adapters
        tokens_TD = torch.index_select(self.decoder.embed_VD, 0, token_ids_T)
        normed_TE = nn.functional.layer_norm(
            slot_vectors_TE, (weights.vector_dim,), eps=weights.norm_eps
        )
        inner_TX = nn.functional.gelu(normed_TE @ weights.up_weight_EX + weights.up_bias_X)
        ids_A = torch.arange(weights.num_adapters) + 1
        gate_TA = (adapter_T[:, None] == ids_A[None, :]).to(torch.float32)
        blocks_TAE = inner_TX.reshape(-1, weights.num_adapters, weights.vector_dim)
        gated_TX = (blocks_TAE * gate_TA[:, :, None]).reshape(
            -1, weights.num_adapters * weights.vector_dim
        )
        adapted_TD = gated_TX @ weights.down_weight_XD + gate_TA @ weights.down_bias_AD
        return torch.where((adapter_T == 0)[:, None], tokens_TD, adapted_TD.to(tokens_TD.dtype))

    def last_keys_values(
        self, fused_TJ: Tensor, turn: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Keys and values [G, T, K] of the last layer: nothing of a prefix is read beyond them."""
        decoder = self.decoder
        pairs = fused_TJ.reshape(-1, 2 * decoder.num_kv_heads, decoder.head_dim)
        k, v = torch.split(pairs, decoder.num_kv_heads, dim=1)
        return rotate(k, turn).transpose(0, 1), v.transpose(0, 1)


class SuffixGraph(nn.Module):
    """Packed suffixes of one or several users over their prefixes to one unit vector per query."""

    decoder: DecoderWeights
    head: HeadWeights

    def __init__(self, decoder: DecoderWeights, head: HeadWeights) -> None:
        super().__init__()
        self.decoder = decoder
        self.head = head

    def forward(
        self,
        token_ids_T: Tensor,
        positions_T: Tensor,
        segment_ids_T: Tensor,
        prompt_index_T: Tensor,
        prompt_rows: Tensor,
        row_index_BR: Tensor,
        flat_index_T: Tensor,
        emb_index_N: Tensor,
        prefix_len_B: Tensor,
        past: tuple[Tensor, ...],
    ) -> Tensor:
        """Embeddings [N, Z] (float32, L2-normalised)."""
        decoder = self.decoder
        turn = rotation(positions_T, decoder.inv_freq)
        sees = self.visibility(segment_ids_T, row_index_BR, prefix_len_B, past[0].shape[2])
        rows_BR = not_below_zero(row_index_BR)
        states_TD = self.embed(token_ids_T, prompt_index_T, prompt_rows)
        last = len(decoder.stack) - 1
        for index, layer in enumerate(decoder.stack):
            normed_TD = rms_norm(states_TD, layer.attention_norm_D, decoder.norm_eps)
            qkv = project_qkv(normed_TD, layer, decoder, turn)
            pair = (past[2 * index], past[2 * index + 1])
            attended = self.attend_on_grid(qkv, rows_BR, pair, sees, layer.store)
            places_T = flat_index_T
            if index == last:
                # Only the <USER_EMB> rows are read from here on.
                places_T = torch.index_select(flat_index_T, 0, emb_index_N)
                states_TD = torch.index_select(states_TD, 0, emb_index_N)
            attended_TJ = torch.index_select(attended, 0, places_T)
            states_TD = mlp(states_TD + layer.o(attended_TJ), layer, decoder.norm_eps)
        normed_ND = rms_norm(states_TD, decoder.final_norm_D, decoder.norm_eps)
        return self.project(normed_ND)

    def embed(self, token_ids_T: Tensor, prompt_index_T: Tensor, prompt_rows: Tensor) -> Tensor:
        """Input embeddings [T, D]: soft-prompt row k - 1 where prompt_index is k > 0."""
        tokens_TD = torch.index_select(self.decoder.embed_VD, 0, token_ids_T)
        prompts_TD = torch.index_select(prompt_rows, 0, not_below_zero(prompt_index_T - 1))
        return torch.where((prompt_index_T > 0)[:, None], prompts_TD.to(tokens_TD.dtype), tokens_TD)

    def visibility(
        self, segment_ids_T: Tensor, row_index_BR: Tensor, prefix_len_B: Tensor, capacity: int
    ) -> Visibility:
        """A token sees its user's prefix and the earlier tokens of its own segment.

        Padding cells of the grid see each other only; nothing reads what they compute.
        """
        batch, row_len = row_index_BR.shape
        flat = not_below_zero(row_index_BR).reshape(-1)
        segments = torch.index_select(segment_ids_T, 0, flat).reshape(batch, row_len)
        segments_BR = torch.where(row_index_BR >= 0, segments, -1)
        same_BRR = segments_BR[:, :, None] == segments_BR[:, None, :]
        earlier_BRR = row_index_BR[:, None, :] <= row_index_BR[:, :, None]
        past_BC = torch.arange(capacity)[None, :] < prefix_len_B[:, None]
        return Visibility(
            past_B11C=as_bias(past_BC[:, None, None, :]),
            own_B1MR=as_bias(mask_rows(same_BRR & earlier_BRR, self.decoder.heads_per_kv)),
        )

    def attend_on_grid(
        self,
        qkv: tuple[Tensor, Tensor, Tensor],
        rows_BR: Tensor,
        past_BGCK: tuple[Tensor, Tensor],
        sees: Visibility,
        store: KvStore,
    ) -> Tensor:
        """Attention of packed tokens, each user's in its row of the grid; flat cells [B R, H K]."""
        batch, row_len = rows_BR.shape
        head_dim, flat = self.decoder.head_dim, rows_BR.reshape(-1)
        q_BRHK, k_BRGK, v_BRGK = (
            torch.index_select(part, 0, flat).reshape(batch, row_len, -1, head_dim) for part in qkv
        )
        attended_BGMK = attend(
            fold_rows(q_BRHK, self.decoder.num_kv_heads),
            (k_BRGK.transpose(1, 2), v_BRGK.transpose(1, 2)),
            past_BGCK,
            sees,
            store,
        )
        return unfold_rows(attended_BGMK, row_len, self.decoder.num_heads * head_dim)

    def project(self, states_ND: Tensor) -> Tensor:
        """The head: unit vectors [N, Z]."""
        head = self.head
        inner = torch.relu(states_ND @ head.up_weight + head.up_bias)
        projected_NZ = inner @ head.down_weight + head.down_bias
        norm_N1 = torch.sqrt((projected_NZ * projected_NZ).sum(-1, keepdim=True))
        return projected_NZ / norm_N1.clamp(min=1e-12)
