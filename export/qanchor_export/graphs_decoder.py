"""The prefix graph and the suffix graph as functional modules: explicit tensors, no cache objects.

The shapes follow `prefix_spec` and `suffix_spec` of the manifest; `attention.py` has the attention
of both, in one way for CPUs and one for GPUs.

Legend: T new tokens (packed_len or chunk_len), B users, R row_len, C prefix_capacity, D decoder
width, H heads, G KV heads, K head_dim, N queries, A adapters, E slot_vector_dim, X = A E,
Z embedding_dim.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from qanchor_export.attention import (
    Attention,
    GridAttention,
    PackedAttention,
    Rows,
    not_below_zero,
)
from qanchor_export.weights import (
    AdapterWeights,
    DecoderWeights,
    HeadWeights,
    LayerWeights,
)


def rms_norm(states_TD: Tensor, gain_D: Tensor, eps: float) -> Tensor:
    """RMSNorm in float32, written as ONNX Runtime's SimplifiedLayerNormalization fusion expects it.

    Comes back in the type of the gain.
    """
    wide_TD = states_TD.float()
    variance_T1 = wide_TD.pow(2.0).mean(-1, keepdim=True)
    normed_TD = wide_TD / torch.sqrt(variance_T1 + eps)
    return normed_TD.to(gain_D.dtype) * gain_D


def mlp(states_TD: Tensor, layer: LayerWeights, eps: float) -> Tensor:
    """The gated feed-forward block with its norm and residual."""
    normed_TD = rms_norm(states_TD, layer.mlp_norm_D, eps)
    gate_TF = nn.functional.silu(layer.gate(normed_TD))
    return states_TD + layer.down(gate_TF * layer.up(normed_TD))


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
        positions_T = columns_T + past_len_1
        past_BC = (torch.arange(capacity) < past_len_1)[None]
        attention: Attention
        if decoder.dtype == torch.float32:
            attention = PackedAttention(decoder, positions_T, past_BC, own_len=chunk_len)
        else:
            own_BRR = (columns_T[:, None] >= columns_T[None, :])[None]
            attention = GridAttention(decoder, positions_T, past_BC, own_BRR)
        states_TD = self.embed(token_ids_T, adapter_T, slot_vectors_TE)
        present: list[Tensor] = []
        for index, layer in enumerate(decoder.stack):
            normed_TD = rms_norm(states_TD, layer.attention_norm_D, decoder.norm_eps)
            if layer.kv is not None:
                # Nothing of a prefix is read beyond the last layer's keys and values.
                last = attention.keys_values(layer.kv(normed_TD))
                present.extend(layer.store.store(part, one) for part, one in enumerate(last))
                break
            q, k, v = attention.heads(layer.qkv(normed_TD))
            # Attention reads what is stored, so that a prefix in chunks equals one in one piece.
            stored_k, own_k = layer.store.stored_and_read(0, k)
            stored_v, own_v = layer.store.stored_and_read(1, v)
            present += [stored_k, stored_v]
            pair = (past[2 * index], past[2 * index + 1])
            attended_TJ = attention.attend(q, (own_k, own_v), pair, layer.store)
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


class SuffixGraph(nn.Module):
    """Packed suffixes of one or several users over their prefixes to one unit vector per query.

    What both ways of attention share; `suffix_graph` chooses.
    """

    by_query: ClassVar[bool]
    """As `PackedSuffix.inputs` takes it."""
    decoder: DecoderWeights
    head: HeadWeights

    def __init__(self, decoder: DecoderWeights, head: HeadWeights) -> None:
        super().__init__()
        self.decoder = decoder
        self.head = head

    def answer(
        self, states_TD: Tensor, attention: Attention, past: tuple[Tensor, ...], emb_N: Tensor
    ) -> Tensor:
        """Embeddings [N, Z] (float32, L2-normalised) read from rows `emb_N` of the states."""
        decoder = self.decoder
        last = len(decoder.stack) - 1
        for index, layer in enumerate(decoder.stack):
            normed_TD = rms_norm(states_TD, layer.attention_norm_D, decoder.norm_eps)
            q, k, v = attention.heads(layer.qkv(normed_TD))
            pair = (past[2 * index], past[2 * index + 1])
            attended_TJ = attention.attend(q, (k, v), pair, layer.store)
            if index == last:
                # Only the <USER_EMB> rows are read from here on.
                attended_TJ = torch.index_select(attended_TJ, 0, emb_N)
                states_TD = torch.index_select(states_TD, 0, emb_N)
            states_TD = mlp(states_TD + layer.o(attended_TJ), layer, decoder.norm_eps)
        normed_ND = rms_norm(states_TD, decoder.final_norm_D, decoder.norm_eps)
        return self.project(normed_ND)

    def past_visible(self, past: tuple[Tensor, ...], prefix_len_B: Tensor) -> Tensor:
        """[B, C]: the columns that hold a user's prefix."""
        return torch.arange(past[0].shape[2])[None, :] < prefix_len_B[:, None]

    def embed(self, token_ids_T: Tensor, prompt_index_T: Tensor, prompt_rows: Tensor) -> Tensor:
        """Input embeddings [T, D]: soft-prompt row k - 1 where prompt_index is k > 0."""
        tokens_TD = torch.index_select(self.decoder.embed_VD, 0, token_ids_T)
        prompts_TD = torch.index_select(prompt_rows, 0, not_below_zero(prompt_index_T - 1))
        return torch.where((prompt_index_T > 0)[:, None], prompts_TD.to(tokens_TD.dtype), tokens_TD)

    def project(self, states_ND: Tensor) -> Tensor:
        """The head: unit vectors [N, Z]."""
        head = self.head
        inner = torch.relu(states_ND @ head.up_weight + head.up_bias)
        projected_NZ = inner @ head.down_weight + head.down_bias
        norm_N1 = torch.sqrt((projected_NZ * projected_NZ).sum(-1, keepdim=True))
        return projected_NZ / norm_N1.clamp(min=1e-12)


class PackedSuffixGraph(SuffixGraph):
    """Float32 and int8: `PackedAttention`."""

    by_query = True

    def forward(
        self,
        token_ids_T: Tensor,
        positions_T: Tensor,
        prompt_index_T: Tensor,
        prompt_rows: Tensor,
        row_index_BR: Tensor,
        flat_index_T: Tensor,
        query_index_NL: Tensor,
        query_place_T: Tensor,
        emb_index_N: Tensor,
        prefix_len_B: Tensor,
        past: tuple[Tensor, ...],
    ) -> Tensor:
        """As `answer`; inputs as `suffix_spec`."""
        rows = (Rows(row_index_BR, flat_index_T), Rows(query_index_NL, query_place_T))
        past_BC = self.past_visible(past, prefix_len_B)
        attention = PackedAttention(
            self.decoder, positions_T, past_BC, own_len=query_index_NL.shape[1], rows=rows
        )
        states_TD = self.embed(token_ids_T, prompt_index_T, prompt_rows)
        return self.answer(states_TD, attention, past, emb_index_N)


class GridSuffixGraph(SuffixGraph):
    """Half precision: `GridAttention`; from the first layer on the states are the users' grid."""

    by_query = False

    def forward(
        self,
        token_ids_T: Tensor,
        positions_T: Tensor,
        prompt_index_T: Tensor,
        prompt_rows: Tensor,
        row_index_BR: Tensor,
        flat_index_T: Tensor,
        segment_ids_T: Tensor,
        emb_index_N: Tensor,
        prefix_len_B: Tensor,
        past: tuple[Tensor, ...],
    ) -> Tensor:
        """As `answer`; inputs as `suffix_spec`."""
        own_BRR = self.own_visible(segment_ids_T, row_index_BR)
        cells = not_below_zero(row_index_BR).reshape(-1)
        token_ids, positions, prompt_index = (
            torch.index_select(part, 0, cells)
            for part in (token_ids_T, positions_T, prompt_index_T)
        )
        past_BC = self.past_visible(past, prefix_len_B)
        attention = GridAttention(self.decoder, positions, past_BC, own_BRR)
        states = self.embed(token_ids, prompt_index, prompt_rows)
        return self.answer(
            states, attention, past, torch.index_select(flat_index_T, 0, emb_index_N)
        )

    def own_visible(self, segment_ids_T: Tensor, row_index_BR: Tensor) -> Tensor:
        """[B, R, R]: a token sees the earlier tokens of its own segment.

        Padding cells of the grid see each other only; nothing reads what they compute.
        """
        flat = not_below_zero(row_index_BR).reshape(-1)
        segments = torch.index_select(segment_ids_T, 0, flat).reshape(row_index_BR.shape)
        segments_BR = torch.where(row_index_BR >= 0, segments, -1)
        same_BRR = segments_BR[:, :, None] == segments_BR[:, None, :]
        return same_BRR & (row_index_BR[:, None, :] <= row_index_BR[:, :, None])


def suffix_graph(decoder: DecoderWeights, head: HeadWeights) -> SuffixGraph:
    """The suffix graph that suits the decoder's type."""
    if decoder.dtype == torch.float32:
        return PackedSuffixGraph(decoder, head)
    return GridSuffixGraph(decoder, head)
