"""The graphs that read texts: event encoder and query encoder, BERTs as functions of their weights.

Legend: N texts, T text_len, L tokens that are read on (T, or 1 in the last layer of the event
encoder), E width, H heads, K head_dim, R rows of a query, D decoder width, J = R D. In the query
map E is twice the width and H and K are its own.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from qanchor.backbone_maths import check_text_encoder
from qanchor.encoder.event_encoder import EventEncoder
from qanchor.encoder.query_encoder import QueryEncoder, QueryMap, read_layers
from qanchor_export.attention import MASKED
from qanchor_export.projection import frozen
from qanchor_export.source import merged
from qanchor_export.weights import bias_of, transposed


class BertLayerWeights(nn.Module):
    """One encoder layer; query weights already scaled by 1/sqrt(K)."""

    def __init__(self, layer: Any, head_dim: int) -> None:
        super().__init__()
        attention, scale = layer.attention.self, 1.0 / math.sqrt(head_dim)
        self.q_weight = frozen(transposed(attention.query) * scale)
        self.q_bias = frozen(bias_of(attention.query) * scale)
        self.kv_weight = frozen(
            torch.cat([transposed(attention.key), transposed(attention.value)], dim=1)
        )
        self.kv_bias = frozen(torch.cat([bias_of(attention.key), bias_of(attention.value)]))
        self.o_weight = frozen(transposed(layer.attention.output.dense))
        self.o_bias = frozen(bias_of(layer.attention.output.dense))
        self.attention_gain = frozen(layer.attention.output.LayerNorm.weight)
        self.attention_shift = frozen(layer.attention.output.LayerNorm.bias)
        self.up_weight = frozen(transposed(layer.intermediate.dense))
        self.up_bias = frozen(bias_of(layer.intermediate.dense))
        self.down_weight = frozen(transposed(layer.output.dense))
        self.down_bias = frozen(bias_of(layer.output.dense))
        self.output_gain = frozen(layer.output.LayerNorm.weight)
        self.output_shift = frozen(layer.output.LayerNorm.bias)


class BertGraph(nn.Module):
    """The layers of a BERT; `field` names it in errors."""

    def __init__(self, bert: Any, field: str) -> None:
        super().__init__()
        check_text_encoder(bert.config, field)
        embeddings = bert.embeddings
        self.num_heads = int(bert.config.num_attention_heads)
        self.width = int(bert.config.hidden_size)
        self.norm_eps = float(bert.config.layer_norm_eps)
        self.token_VE = frozen(embeddings.word_embeddings.weight)
        # Every text is of type 0: its vector is part of the position's.
        self.position_PE = frozen(
            embeddings.position_embeddings.weight + embeddings.token_type_embeddings.weight[0]
        )
        self.gain_E = frozen(embeddings.LayerNorm.weight)
        self.shift_E = frozen(embeddings.LayerNorm.bias)
        head_dim = self.width // self.num_heads
        self.layers = nn.ModuleList(BertLayerWeights(x, head_dim) for x in bert.encoder.layer)

    def embed(self, token_ids_NT: Tensor) -> Tensor:
        """What the first layer reads, [N, T, E]."""
        num_texts, text_len = token_ids_NT.shape
        tokens = torch.index_select(self.token_VE, 0, token_ids_NT.reshape(-1))
        positions_TE = torch.index_select(self.position_PE, 0, torch.arange(text_len))
        states_NTE = tokens.reshape(num_texts, text_len, self.width) + positions_TE
        return self.norm(states_NTE, self.gain_E, self.shift_E)

    def norm(self, states: Tensor, gain_E: Tensor, shift_E: Tensor) -> Tensor:
        """LayerNorm over E."""
        return nn.functional.layer_norm(
            states, (self.width,), weight=gain_E, bias=shift_E, eps=self.norm_eps
        )

    def layer(self, rows_NLE: Tensor, states_NTE: Tensor, sees_N11T: Tensor, layer: Any) -> Tensor:
        """Rows [N, L, E] after attention to [N, T, E] and the feed-forward block."""
        attended_NLE = self.attend(rows_NLE, states_NTE, sees_N11T, layer)
        rows_NLE = self.norm(
            rows_NLE + (attended_NLE @ layer.o_weight + layer.o_bias),
            layer.attention_gain,
            layer.attention_shift,
        )
        inner = nn.functional.gelu(rows_NLE @ layer.up_weight + layer.up_bias)
        return self.norm(
            rows_NLE + (inner @ layer.down_weight + layer.down_bias),
            layer.output_gain,
            layer.output_shift,
        )

    def attend(self, rows_NLE: Tensor, states_NTE: Tensor, sees_N11T: Tensor, layer: Any) -> Tensor:
        """Full attention of rows over the text's real tokens, heads joined again [N, L, E]."""
        num_texts, heads, head_dim = rows_NLE.shape[0], self.num_heads, -1
        q = rows_NLE @ layer.q_weight + layer.q_bias
        k, v = torch.split(states_NTE @ layer.kv_weight + layer.kv_bias, self.width, dim=-1)
        q_NHLK, k_NHTK, v_NHTK = (
            part.reshape(num_texts, part.shape[1], heads, head_dim).transpose(1, 2)
            for part in (q, k, v)
        )
        scores = torch.where(sees_N11T, q_NHLK @ k_NHTK.transpose(-1, -2), MASKED)
        attended_NLHK = (torch.softmax(scores, dim=-1) @ v_NHTK).transpose(1, 2)
        return attended_NLHK.reshape(num_texts, rows_NLE.shape[1], self.width)


class EventEncoderGraph(nn.Module):
    """Padded event texts to pre-adapter event vectors, shapes as `event_encoder_spec`.

    In the last layer only the [CLS] row is needed after keys and values, so only that is computed.
    """

    def __init__(self, encoder: EventEncoder) -> None:
        super().__init__()
        self.bert = BertGraph(merged(encoder.model), "event_encoder")
        self.pad_id = encoder.pad_id

    def forward(self, event_token_ids_NT: Tensor) -> Tensor:
        """Event vectors [N, E] (float32) of texts [N, T] (int64, padded with `pad_id`)."""
        states_NTE = self.bert.embed(event_token_ids_NT)
        sees_N11T = (event_token_ids_NT != self.pad_id)[:, None, None, :]
        last = len(self.bert.layers) - 1
        for index, layer in enumerate(self.bert.layers):
            rows_NLE = states_NTE[:, :1] if index == last else states_NTE
            states_NTE = self.bert.layer(rows_NLE, states_NTE, sees_N11T, layer)
        return states_NTE.reshape(event_token_ids_NT.shape[0], self.bert.width)


class QueryEncoderGraph(nn.Module):
    """One question to the rows that stand for it, shapes as `query_encoder_spec`."""

    def __init__(self, encoder: QueryEncoder, query_map: QueryMap) -> None:
        super().__init__()
        self.bert = BertGraph(encoder.model, "query_encoder")
        rows: Any = query_map.rows
        self.mean_E = frozen(query_map.mean_E)
        self.look_EH = frozen(query_map.look_EH / query_map.spread_E[:, None])
        self.keep_HEK = frozen(query_map.keep_HEK / query_map.spread_E[:, None])
        self.row_weight = frozen(torch.cat([transposed(row) for row in rows], 1))
        self.row_bias_J = frozen(torch.cat([bias_of(row) for row in rows]))
        self.num_rows = len(rows)
        self.read_layers = read_layers(encoder.model)

    def forward(self, query_token_ids_T: Tensor) -> Tensor:
        """Rows [R, D] (float32) of a text [T] (int64), the tokenizer's own tokens included."""
        states_NTE = self.bert.embed(query_token_ids_T[None])
        sees_N11T = torch.ones_like(query_token_ids_T, dtype=torch.bool)[None, None, None]
        found = [states_NTE]
        for layer in self.bert.layers:
            found.append(self.bert.layer(found[-1], found[-1], sees_N11T, layer))
        states_TE = torch.cat([found[number] for number in self.read_layers], dim=-1)[0]
        pooled_HE = torch.softmax(states_TE @ self.look_EH, dim=0).transpose(0, 1) @ states_TE
        numbers_H1K = (pooled_HE - self.mean_E)[:, None] @ self.keep_HEK
        rows_1J = numbers_H1K.reshape(1, -1) @ self.row_weight + self.row_bias_J
        return rows_1J.reshape(self.num_rows, -1)
