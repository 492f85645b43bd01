"""The graphs that read texts: event encoder and query encoder, BERTs as functions of their weights.

Legend: N texts, T text_len, L tokens that are read on (T, or 1 in the last layer of the event
encoder), S distances of two tokens, E width, H heads, K head_dim, R rows of a query, D decoder
width, J = R D. In the query map E is twice the width and H and K are its own.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from qanchor.backbone_maths import QUERY_ENCODERS, check_text_encoder, num_text_positions
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
        query, key, value, out, norm = _attention_parts(layer.attention)
        scale = 1.0 / math.sqrt(head_dim)
        self.q_weight = frozen(transposed(query) * scale)
        self.q_bias = frozen(bias_of(query) * scale)
        self.kv_weight = frozen(torch.cat([transposed(key), transposed(value)], dim=1))
        self.kv_bias = frozen(torch.cat([bias_of(key), bias_of(value)]))
        self.o_weight = frozen(transposed(out))
        self.o_bias = frozen(bias_of(out))
        self.attention_gain = frozen(norm.weight)
        self.attention_shift = frozen(norm.bias)
        self.up_weight = frozen(transposed(layer.intermediate.dense))
        self.up_bias = frozen(bias_of(layer.intermediate.dense))
        self.down_weight = frozen(transposed(layer.output.dense))
        self.down_bias = frozen(bias_of(layer.output.dense))
        self.output_gain = frozen(layer.output.LayerNorm.weight)
        self.output_shift = frozen(layer.output.LayerNorm.bias)


def _attention_parts(attention: Any) -> tuple[Any, Any, Any, Any, Any]:
    """Query, key, value, output and LayerNorm, by the names BERT and MPNet have for them."""
    if hasattr(attention, "attn"):
        inner = attention.attn
        return inner.q, inner.k, inner.v, inner.o, attention.LayerNorm
    inner, out = attention.self, attention.output
    return inner.query, inner.key, inner.value, out.dense, out.LayerNorm


class BertGraph(nn.Module):
    """The layers of a BERT or an MPNet; `field` names it in errors.

    MPNet: positions begin behind that of padding, texts have no type, and a term of the distance
    between two tokens stands beside their scores.
    """

    def __init__(self, bert: Any, field: str, kinds: tuple[str, ...] = ("bert",)) -> None:
        super().__init__()
        check_text_encoder(bert.config, field, kinds)
        embeddings = bert.embeddings
        num_positions = num_text_positions(bert.config)
        self.num_heads = int(bert.config.num_attention_heads)
        self.width = int(bert.config.hidden_size)
        self.norm_eps = float(bert.config.layer_norm_eps)
        self.token_VE = frozen(embeddings.word_embeddings.weight)
        position_PE = embeddings.position_embeddings.weight[-num_positions:]
        self.distance_SH: Tensor | None = None
        if bert.config.model_type == "mpnet":
            distances_S = torch.arange(1 - num_positions, num_positions)
            buckets_S = bert.encoder.relative_position_bucket(distances_S)
            self.distance_SH = frozen(bert.encoder.relative_attention_bias.weight[buckets_S])
        else:
            # Every text is of type 0: its vector is part of the position's.
            position_PE = position_PE + embeddings.token_type_embeddings.weight[0]
        self.position_PE = frozen(position_PE)
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

    def distances(self, text_len: int) -> Tensor | None:
        """What the distance of two tokens adds to their scores, [1, H, T, T]; None for BERT."""
        if self.distance_SH is None:
            return None
        places_T = torch.arange(text_len)
        places_TT = places_T[None] - places_T[:, None] + (len(self.position_PE) - 1)
        added = torch.index_select(self.distance_SH, 0, places_TT.reshape(-1))
        return added.reshape(1, text_len, text_len, self.num_heads).permute(0, 3, 1, 2)

    def norm(self, states: Tensor, gain_E: Tensor, shift_E: Tensor) -> Tensor:
        """LayerNorm over E."""
        return nn.functional.layer_norm(
            states, (self.width,), weight=gain_E, bias=shift_E, eps=self.norm_eps
        )

    def layer(
        self,
        rows_NLE: Tensor,
        states_NTE: Tensor,
        sees_N11T: Tensor,
        layer: Any,
        added_1HTT: Tensor | None = None,
    ) -> Tensor:
        """Rows [N, L, E] after attention to [N, T, E] and the feed-forward block."""
        attended_NLE = self.attend(rows_NLE, states_NTE, sees_N11T, layer, added_1HTT)
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

    def attend(
        self,
        rows_NLE: Tensor,
        states_NTE: Tensor,
        sees_N11T: Tensor,
        layer: Any,
        added_1HTT: Tensor | None,
    ) -> Tensor:
        """Full attention of rows over the text's real tokens, heads joined again [N, L, E]."""
        num_texts, heads, head_dim = rows_NLE.shape[0], self.num_heads, -1
        q = rows_NLE @ layer.q_weight + layer.q_bias
        k, v = torch.split(states_NTE @ layer.kv_weight + layer.kv_bias, self.width, dim=-1)
        q_NHLK, k_NHTK, v_NHTK = (
            part.reshape(num_texts, part.shape[1], heads, head_dim).transpose(1, 2)
            for part in (q, k, v)
        )
        scores_NHLT = q_NHLK @ k_NHTK.transpose(-1, -2)
        if added_1HTT is not None:
            scores_NHLT = scores_NHLT + added_1HTT
        scores = torch.where(sees_N11T, scores_NHLT, MASKED)
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
        self.bert = BertGraph(encoder.model, "query_encoder", QUERY_ENCODERS)
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
        added_1HTT = self.bert.distances(query_token_ids_T.shape[0])
        found = [states_NTE]
        for layer in self.bert.layers:
            found.append(self.bert.layer(found[-1], found[-1], sees_N11T, layer, added_1HTT))
        states_TE = torch.cat([found[number] for number in self.read_layers], dim=-1)[0]
        pooled_HE = torch.softmax(states_TE @ self.look_EH, dim=0).transpose(0, 1) @ states_TE
        numbers_H1K = (pooled_HE - self.mean_E)[:, None] @ self.keep_HEK
        rows_1J = numbers_H1K.reshape(1, -1) @ self.row_weight + self.row_bias_J
        return rows_1J.reshape(self.num_rows, -1)
