"""What torch says: embeddings of a user's queries from the model as it was trained.

Two roads that share no code with the exported graphs: `QAnchorModel.anchor`, and one plain causal
pass of the transformers decoder per query over [prefix | query].

Legend: B users (1 here), P prefix length, S packed suffix length, Q queries, N event texts,
T text length, F measures, D decoder width, Z embedding_dim.
"""

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qanchor.bundle.packing import SuffixQuery, UserSuffix, pack, scenario_suffix
from qanchor.bundle.reader import encode_event
from qanchor.config import Scenario
from qanchor.data.measures import NUM_MEASURES
from qanchor.data.prefix import ADAPTER_FIRST_EVENT, PrefixLayout, build_layout
from qanchor.data.render import RenderedProfile
from qanchor.encoder.query_encoder import read_query
from qanchor.towers import AnchorBatch
from qanchor_export.source import ExportSource

FloatArray = npt.NDArray[np.float32]


def make_query(
    source: ExportSource, text: str, soft_prompt: FloatArray | None = None
) -> SuffixQuery:
    """A question as torch reads it, closed by <USER_EMB>."""
    query_map, token_ids = source.model.query_map, source.encode_query(text)
    query = SuffixQuery(token_ids)
    if source.query_encoder is not None and query_map is not None:
        query = read_query(source.query_encoder, query_map, token_ids)
    return query if soft_prompt is None else query.with_rows(soft_prompt)


def scenario_query(source: ExportSource, scenario: Scenario) -> SuffixQuery:
    """A scenario as it is served. Raises ConfigError for rows of another width."""
    return scenario_suffix(scenario, partial(make_query, source), source.hidden_dim)


@torch.no_grad()
def anchor_embeddings(
    source: ExportSource, rendered: RenderedProfile, queries: list[SuffixQuery]
) -> FloatArray:
    """[Q, Z] from `QAnchorModel.anchor`."""
    layout = build_layout(rendered.num_events, source.tokens)
    user = UserSuffix(len(layout), tuple(queries))
    packed = pack([user], user_emb=source.tokens.user_emb, hidden_dim=source.hidden_dim)
    suffix = torch.from_numpy(packed.token_ids_S)[None]
    texts_NT, event_row_BP = _events(source, rendered, layout)
    batch = AnchorBatch(
        event_token_ids_NT=texts_NT,
        prefix_token_ids_BP=torch.from_numpy(layout.token_ids_P)[None],
        adapter_BP=torch.from_numpy(layout.adapter_P)[None],
        event_row_BP=event_row_BP,
        prefix_len_B=torch.tensor([len(layout)]),
        suffix_token_ids_BS=suffix,
        segment_BS=torch.from_numpy(packed.segment_ids_S)[None],
        position_BS=torch.from_numpy(packed.positions_S)[None],
        labels_BS=torch.full_like(suffix, -100),
        emb_user_Q=torch.zeros(len(queries), dtype=torch.int64),
        emb_column_Q=torch.from_numpy(packed.emb_index_Q),
        prompt_index_BS=torch.from_numpy(packed.prompt_index_S)[None],
        prompt_rows_RD=torch.from_numpy(packed.prompt_rows_KD),
        measures_BPF=_measures(rendered, layout),
    )
    embeddings_QZ, _ = source.model.anchor(batch)
    return _array(embeddings_QZ)


@torch.no_grad()
def full_pass_embeddings(
    source: ExportSource, rendered: RenderedProfile, queries: list[SuffixQuery]
) -> FloatArray:
    """[Q, Z] from one causal transformers pass per query, soft prompts included."""
    layout = build_layout(rendered.num_events, source.tokens)
    model: Any = source.model
    decoder = model.decoder
    texts_NT, event_row_BP = _events(source, rendered, layout)
    vectors_BPE = model.event_encoder(texts_NT)[event_row_BP]
    measures_BPF = _measures(rendered, layout)
    if measures_BPF is not None:
        vectors_BPE = torch.cat([vectors_BPE, measures_BPF], dim=-1)
    prefix_BPD = model.encoder(
        decoder.embed_tokens(torch.from_numpy(layout.token_ids_P))[None],
        torch.from_numpy(layout.adapter_P)[None],
        vectors_BPE,
    )
    found = []
    for query in queries:
        parts = [prefix_BPD[0], _suffix_embeddings(source, query)]
        states = decoder(inputs_embeds=torch.cat(parts)[None], use_cache=False).last_hidden_state
        found.append(model.head(states[0, -1]))
    return _array(torch.stack(found))


def _suffix_embeddings(source: ExportSource, query: SuffixQuery) -> Tensor:
    decoder: Any = source.model.decoder
    text = decoder.embed_tokens(torch.tensor(query.token_ids, dtype=torch.int64))
    last = decoder.embed_tokens(torch.tensor([source.tokens.user_emb]))
    if query.prompt_rows_KD is None:
        return torch.cat([text, last])
    return torch.cat([text, torch.from_numpy(query.prompt_rows_KD), last])


def _events(
    source: ExportSource, rendered: RenderedProfile, layout: PrefixLayout
) -> tuple[Tensor, Tensor]:
    """Padded texts [N, T], shortest first as the anchor tower wants them, and rows [B, P] of them.

    A user without events gives one row of padding that nothing reads.
    """
    pad = source.model.event_encoder.pad_id
    texts = [
        encode_event(source.event_tokenizer, text, spec.max_event_tokens)
        for texts, spec in zip(rendered.texts, source.schema.modalities, strict=True)
        for text in texts
    ] or [[pad]]
    order = np.argsort([len(text) for text in texts], kind="stable")
    row_of_text = np.argsort(order, kind="stable")
    text_len = len(texts[order[-1]])
    padded = [texts[text] + [pad] * (text_len - len(texts[text])) for text in order]
    is_event_P = layout.adapter_P >= ADAPTER_FIRST_EVENT
    rows_P = row_of_text[np.where(is_event_P, layout.source_P, 0)]
    return torch.tensor(padded), torch.from_numpy(rows_P)[None]


def _measures(rendered: RenderedProfile, layout: PrefixLayout) -> Tensor | None:
    """The numbers beside the events, in their places [B, P, F]; None where the schema has none."""
    if not rendered.measures:
        return None
    rows_NF = torch.tensor(rendered.flat_measures()).reshape(-1, NUM_MEASURES)
    measures_PF = torch.zeros(len(layout), NUM_MEASURES)
    is_event_P = torch.from_numpy(layout.adapter_P >= ADAPTER_FIRST_EVENT)
    measures_PF[is_event_P] = rows_NF[torch.from_numpy(layout.source_P)[is_event_P]]
    return measures_PF[None]


def _array(embeddings: Tensor) -> FloatArray:
    found: FloatArray = embeddings.float().numpy()
    return found
