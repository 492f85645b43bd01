"""The dual tower over one shared decoder: anchor tower (user + query), semantic tower (answer).

One forward pass of the anchor tower serves several queries of each user: the prefix stands once,
the segments [query, <USER_EMB>, answer, eos] follow side by side and do not see each other. This
is the training twin of the serving split into prefix and suffix.

Legend: B users, P prefix length, S packed suffix length, L = P + S, Q queries, A answer length,
R rows in place of suffix tokens, N event texts, T text length, E event vector width, F measures,
D decoder width, V vocabulary, Z embedding_dim; G rows of packed answers, W their length, K answer
tokens.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qanchor.encoder.event_encoder import EventEncoder
from qanchor.encoder.hierarchical import HierarchicalEncoder
from qanchor.encoder.query_encoder import QueryMap
from qanchor.statistics_head import StatisticsHead

PAD_SEGMENT = -1


@dataclass(slots=True)
class AnchorBatch:
    """Users with packed query segments; int64 tensors on one device.

    `event_token_ids_NT`: unique event texts of the batch, shortest first. `adapter_BP`,
    `prefix_token_ids_BP`: as PrefixLayout. `event_row_BP`: row of the text at event positions,
    else 0. `prefix_len_B`: true lengths. `suffix_token_ids_BS`; `segment_BS`: query number within
    the user, -1 is padding;
    `position_BS`: absolute RoPE positions. `labels_BS`: next answer token where one is to be
    predicted, else -100. `emb_user_Q`, `emb_column_Q`: user and suffix column of each <USER_EMB>.
    `event_vectors_NE` (float32): the texts' event vectors where they are known already; there
    are then no texts (N = 0 in `event_token_ids_NT`). `prompt_index_BS`: numbers of rows, from 1,
    where they stand in place of tokens, else 0. The rows are `prompt_rows_RD` (float32), or what
    the query map makes of `query_states` (float32, [questions, tokens, state_dim], of true lengths
    `query_lens`); one of them, or neither and no index. `measures_BPF` (float32): the numbers
    beside each event, zeros elsewhere, where the schema has measures.
    """

    event_token_ids_NT: Tensor
    prefix_token_ids_BP: Tensor
    adapter_BP: Tensor
    event_row_BP: Tensor
    prefix_len_B: Tensor
    suffix_token_ids_BS: Tensor
    segment_BS: Tensor
    position_BS: Tensor
    labels_BS: Tensor
    emb_user_Q: Tensor
    emb_column_Q: Tensor
    event_vectors_NE: Tensor | None = None
    prompt_index_BS: Tensor | None = None
    prompt_rows_RD: Tensor | None = None
    query_states: Tensor | None = None
    query_lens: Tensor | None = None
    measures_BPF: Tensor | None = None

    def to(self, device: torch.device) -> "AnchorBatch":
        """The same batch on `device`."""
        parts: dict[str, Any] = {name: getattr(self, name) for name in self.__slots__}
        return replace(
            self, **{name: part.to(device) for name, part in parts.items() if part is not None}
        )


class Head(nn.Module):
    """Linear(D, 512) -> ReLU -> Linear(512, Z), L2-normalised."""

    def __init__(self, hidden_dim: int, inner_dim: int, embedding_dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(hidden_dim, inner_dim)
        self.down = nn.Linear(inner_dim, embedding_dim)

    def forward(self, states_D: Tensor) -> Tensor:
        """[..., D] to unit vectors [..., Z] (float32)."""
        with torch.autocast(states_D.device.type, enabled=False):
            projected = self.down(torch.relu(self.up(states_D.float())))
            return nn.functional.normalize(projected, dim=-1)


class QAnchorModel(nn.Module):
    """Event encoder, hierarchical encoder, shared decoder (a Qwen2 causal LM) and head.

    `query_map`: where a query encoder reads the questions, what makes rows of its states.
    Of use in training only: `answer_start`, where answers are predicted from the embedding alone,
    makes the input embedding they begin with; `statistics_head`, where behaviour statistics are.
    """

    def __init__(
        self,
        event_encoder: EventEncoder,
        encoder: HierarchicalEncoder,
        language_model: PreTrainedModel,
        head: Head,
        query_map: QueryMap | None = None,
        answer_start: nn.Linear | None = None,
        statistics_head: StatisticsHead | None = None,
    ) -> None:
        super().__init__()
        self.event_encoder = event_encoder
        self.encoder = encoder
        self.language_model = language_model
        self.head = head
        self.query_map = query_map
        self.answer_start = answer_start
        self.statistics_head = statistics_head

    @property
    def decoder(self) -> PreTrainedModel:
        """The transformers Qwen2Model without the vocabulary projection, adapters included."""
        decoder: PreTrainedModel = self.language_model.get_decoder()
        return decoder

    def recompute_layers(self) -> None:
        """From now on keep only each layer's input of a training pass (gradient checkpointing)."""
        for part in (self.language_model, self.event_encoder.model):
            # transformers 5 renames it on the way; either keeps random states for the second time.
            name = "activation_checkpointing_enable"
            getattr(part, name if hasattr(part, name) else "gradient_checkpointing_enable")()

    def embed_tokens(self, token_ids: Tensor) -> Tensor:
        """Input embeddings [..., D] of token ids [...]."""
        embeddings: Tensor = self.decoder.get_input_embeddings()(token_ids)
        return embeddings

    def prefix_embeddings(self, batch: AnchorBatch) -> Tensor:
        """Input embeddings [B, P, D] of the prefixes, Q-Anchor Eq. (2)."""
        token_embeddings_BPD = self.embed_tokens(batch.prefix_token_ids_BP)
        filled_BPD: Tensor = self.encoder(
            token_embeddings_BPD, batch.adapter_BP, self.event_vectors(batch)
        )
        return filled_BPD

    def suffix_embeddings(self, batch: AnchorBatch) -> Tensor:
        """Input embeddings [B, S, D] of the suffixes, rows in their places."""
        embeddings_BSD = self.embed_tokens(batch.suffix_token_ids_BS)
        rows_RD = batch.prompt_rows_RD
        if batch.query_states is not None:
            assert self.query_map is not None, "This is a bug: the model reads questions itself."
            rows_RD = self.query_map(batch.query_states, batch.query_lens).flatten(end_dim=1)
        if batch.prompt_index_BS is None or rows_RD is None:
            return embeddings_BSD
        rows_BSD = rows_RD.to(embeddings_BSD.dtype)[(batch.prompt_index_BS - 1).clamp(min=0)]
        return torch.where((batch.prompt_index_BS > 0)[..., None], rows_BSD, embeddings_BSD)

    def event_vectors(self, batch: AnchorBatch) -> Tensor:
        """h_{m,t} at event positions of the prefixes, any vector elsewhere, [B, P, E (+ F)]."""
        vectors_NE = batch.event_vectors_NE
        if vectors_NE is None:
            vectors_NE = self.event_encoder.in_pieces(batch.event_token_ids_NT)
        vectors_BPE = vectors_NE[batch.event_row_BP]
        if batch.measures_BPF is None:
            return vectors_BPE
        return torch.cat([vectors_BPE, batch.measures_BPF.to(vectors_BPE.dtype)], dim=-1)

    def anchor(self, batch: AnchorBatch) -> tuple[Tensor, Tensor]:
        """Anchor embeddings u_{i,q} [Q, Z] and suffix hidden states [B, S, D]."""
        prefix_BPD = self.prefix_embeddings(batch)
        suffix_BSD = self.suffix_embeddings(batch)
        prefix_len = prefix_BPD.shape[1]
        position_BP = torch.arange(prefix_len, device=prefix_BPD.device).expand(len(prefix_BPD), -1)
        states_BLD = self.decoder(
            inputs_embeds=torch.cat([prefix_BPD, suffix_BSD], dim=1),
            attention_mask=packed_mask(batch, prefix_BPD.dtype),
            position_ids=torch.cat([position_BP, batch.position_BS], dim=1),
            use_cache=False,
        ).last_hidden_state
        suffix_states_BSD = states_BLD[:, prefix_len:]
        return self.head(suffix_states_BSD[batch.emb_user_Q, batch.emb_column_Q]), suffix_states_BSD

    def answer_logits(self, suffix_states_BSD: Tensor, labels_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [K, V] and labels [K] at the K suffix positions that predict an answer token."""
        wanted_BS = labels_BS >= 0
        logits_KV = self.language_model.get_output_embeddings()(suffix_states_BSD[wanted_BS])
        return logits_KV.float(), labels_BS[wanted_BS]

    def logits_from_embedding(
        self, anchor_QZ: Tensor, answer_token_ids_QA: Tensor, answer_len_Q: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Logits [K, V] and labels [K] of answers predicted from u alone; answers as `semantic`'s.

        Answers come in their order. Only for a model with `answer_start`.
        """
        assert self.answer_start is not None, "This is a bug: the recipe has no answer_start."
        packed = PackedAnswers.of(answer_token_ids_QA, answer_len_Q)
        # Components of a unit vector are of the order of 1 / sqrt(Z).
        start_QD = self.answer_start(anchor_QZ * anchor_QZ.shape[1] ** 0.5)
        # Every answer moves one place on, to make room for its start.
        tokens_GWD = self.embed_tokens(packed.token_ids_GW.roll(1, dims=1))
        inputs_GWD = tokens_GWD.index_put(
            (packed.row_Q, packed.first_Q), start_QD.to(tokens_GWD.dtype)
        )
        states_KD = self._answer_states(packed, inputs_GWD)[packed.row_K, packed.column_K]
        logits_KV = self.language_model.get_output_embeddings()(states_KD)
        return logits_KV.float(), packed.token_ids_GW[packed.row_K, packed.column_K]

    def semantic(self, answer_token_ids_QA: Tensor, answer_len_Q: Tensor) -> Tensor:
        """Semantic embeddings v_a [Q, Z]: the same decoder and head at the last answer token.

        `answer_token_ids_QA`: right-padded, closed by eos; `answer_len_Q` counts eos.
        """
        packed = PackedAnswers.of(answer_token_ids_QA, answer_len_Q)
        states_GWD = self._answer_states(packed, self.embed_tokens(packed.token_ids_GW))
        last_Q = packed.first_Q + answer_len_Q - 1
        semantic_QZ: Tensor = self.head(states_GWD[packed.row_Q, last_Q])
        return semantic_QZ

    def _answer_states(self, packed: "PackedAnswers", inputs_GWD: Tensor) -> Tensor:
        states_GWD: Tensor = self.decoder(
            inputs_embeds=inputs_GWD,
            attention_mask=packed.mask(inputs_GWD.dtype),
            position_ids=packed.position_GW,
            use_cache=False,
        ).last_hidden_state
        return states_GWD


@dataclass(frozen=True, slots=True)
class PackedAnswers:
    """Answers side by side in rows as long as the longest: most are a few words, some are many.

    `token_ids_GW`, `position_GW` (within the answer), `segment_GW`: the answer's number, -1 is
    padding. `row_Q`, `first_Q`: where each answer begins. `row_K`, `column_K`: of every answer
    token, answer by answer. All int64 on one device.
    """

    token_ids_GW: Tensor
    position_GW: Tensor
    segment_GW: Tensor
    row_Q: Tensor
    first_Q: Tensor
    row_K: Tensor
    column_K: Tensor

    @classmethod
    def of(cls, token_ids_QA: Tensor, len_Q: Tensor) -> "PackedAnswers":
        """Pack right-padded answers [Q, A] of `len_Q` tokens each."""
        device, width = len_Q.device, token_ids_QA.shape[1]
        places = _first_fit(len_Q.tolist(), width)
        row_Q, first_Q = torch.tensor(places, device=device).T
        answer_K, offset_K = _real_columns(token_ids_QA, len_Q).nonzero(as_tuple=True)
        row_K, column_K = row_Q[answer_K], first_Q[answer_K] + offset_K
        shape = (int(row_Q.max()) + 1, width)

        def spread(values_K: Tensor, fill: int) -> Tensor:
            return len_Q.new_full(shape, fill).index_put((row_K, column_K), values_K)

        return cls(
            token_ids_GW=spread(token_ids_QA[answer_K, offset_K], 0),
            position_GW=spread(offset_K, 0),
            segment_GW=spread(answer_K, PAD_SEGMENT),
            row_Q=row_Q,
            first_Q=first_Q,
            row_K=row_K,
            column_K=column_K,
        )

    def mask(self, dtype: torch.dtype) -> Tensor:
        """Additive attention mask [G, 1, W, W]: causal, answers blind to each other."""
        same_GWW = self.segment_GW[:, :, None] == self.segment_GW[:, None, :]
        return _additive(same_GWW.tril(), dtype)


def _first_fit(lengths: list[int], width: int) -> list[tuple[int, int]]:
    """(row, first column) of each length, the longest placed first, each in the first row it fits.

    >>> _first_fit([2, 5, 3], 5)
    [(1, 3), (0, 0), (1, 0)]
    """
    used: list[int] = []
    places = [(0, 0)] * len(lengths)
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        fits = (row for row, taken in enumerate(used) if taken + lengths[index] <= width)
        row = next(fits, len(used))
        if row == len(used):
            used.append(0)
        places[index] = (row, used[row])
        used[row] += lengths[index]
    return places


def _real_columns(token_ids_QA: Tensor, len_Q: Tensor) -> Tensor:
    """True [Q, A] where right-padded rows hold a token."""
    return torch.arange(token_ids_QA.shape[1], device=token_ids_QA.device) < len_Q[:, None]


def packed_mask(batch: AnchorBatch, dtype: torch.dtype) -> Tensor:
    """Additive attention mask [B, 1, L, L]: causal, padding out, segments blind to each other."""
    prefix_len = batch.prefix_token_ids_BP.shape[1]
    columns_P = torch.arange(prefix_len, device=batch.prefix_len_B.device)
    in_prefix_BP = columns_P < batch.prefix_len_B[:, None]
    segment_BP = torch.where(in_prefix_BP, 0, PAD_SEGMENT)
    segment_BS = torch.where(batch.segment_BS >= 0, batch.segment_BS + 1, PAD_SEGMENT)
    segment_BL = torch.cat([segment_BP, segment_BS], dim=1)
    same = segment_BL[:, :, None] == segment_BL[:, None, :]
    to_prefix = segment_BL[:, None, :] == 0
    real_key = segment_BL[:, None, :] != PAD_SEGMENT
    causal = torch.ones(same.shape[1:], dtype=torch.bool, device=same.device).tril()
    # A padding row attends to itself, so that its softmax is defined; nothing reads the result.
    itself = torch.eye(same.shape[1], dtype=torch.bool, device=same.device)
    allowed_BLL = ((same | to_prefix) & real_key & causal) | itself
    return _additive(allowed_BLL, dtype)


def _additive(allowed_BLL: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where allowed, else the least number [B, 1, L, L]; every row must allow something."""
    mask_BLL = torch.zeros(allowed_BLL.shape, dtype=dtype, device=allowed_BLL.device)
    return mask_BLL.masked_fill_(~allowed_BLL, torch.finfo(dtype).min)[:, None]
