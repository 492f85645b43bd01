"""Where <USER_EMB> looks: its attention by modality, from the checkpoint with eager attention.

Legend: B users of a batch, S packed suffix length, L = prefix + suffix columns, Q queries,
H heads, G groups of positions.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from qanchor.checkpoint import Checkpoint
from qanchor.config import Scenario
from qanchor.data.prefix import (
    ADAPTER_FIRST_EVENT,
    ADAPTER_MODALITY,
    ADAPTER_TOKEN,
    ADAPTER_USER,
    PrefixLayout,
)
from qanchor.eval.embed import segment_of
from qanchor.eval.results import Attention, AttentionShares
from qanchor.towers import AnchorBatch, QAnchorModel, packed_mask
from qanchor.train.batches import Segment, anchor_batch
from qanchor.train.corpus import PrefixCorpus

USERS_PER_BATCH = 8
HEADER, DELIMITERS, USER, MODALITY = range(4)
FIRST_MODALITY = 4
SUFFIX_GROUPS = ("query", "soft prompt", "<USER_EMB> itself")


@dataclass(slots=True)
class _Watch:
    """What a pass leaves behind: attention [Q, H, L] at every <USER_EMB>, layer by layer."""

    batch: AnchorBatch | None = None
    """Set before the pass."""
    layers: list[Tensor] = field(default_factory=list)

    def keep(self, _module: Any, _inputs: Any, outputs: Any) -> None:
        """Hook of an attention module: whole weights of a layer are not held any longer."""
        assert self.batch is not None, "This is a bug: no batch is being watched."
        rows_Q = self.batch.prefix_token_ids_BP.shape[1] + self.batch.emb_column_Q
        self.layers.append(outputs[1][self.batch.emb_user_Q, :, rows_Q].double())


def group_names(modalities: Sequence[str]) -> tuple[str, ...]:
    """What the columns of a share stand for."""
    coarse = ("header", "delimiters", "user token", "modality tokens")
    return (*coarse, *modalities, *SUFFIX_GROUPS)


def attention_shares(
    checkpoint: Checkpoint,
    corpus: PrefixCorpus,
    users: Sequence[int],
    base: Sequence[Scenario],
    tuned: Sequence[Scenario],
) -> Attention:
    """Shares of every scenario over `users` (rows of the corpus), before and after tuning.

    All scenarios ride in one pass. The model's own attention implementation is put back
    afterwards.
    """
    names = group_names([spec.name for spec in checkpoint.meta.profile_schema.modalities])
    asked = [*((False, one) for one in base), *((True, one) for one in tuned)]
    segments = [segment_of(checkpoint, scenario) for _, scenario in asked]
    suffix_groups: list[int] = []
    for segment, (_, scenario) in zip(segments, asked, strict=True):
        suffix_groups += _suffix_groups(segment, len(scenario.soft_prompt), len(names))
    model = checkpoint.model.eval()
    batches = []
    with _watched(model) as watch, torch.inference_mode():
        bar = tqdm(range(0, len(users), USERS_PER_BATCH), desc="attention", unit="batch")
        for start in bar:
            chosen = users[start : start + USERS_PER_BATCH]
            shares_BQLG = _shares(model, corpus, chosen, segments, suffix_groups, len(names), watch)
            batches.append(shares_BQLG.sum(axis=0))
    mean_QLG = sum(batches) / len(users)
    return Attention(
        groups=names,
        num_users=len(users),
        shares=tuple(
            AttentionShares(
                scenario=scenario.name,
                is_tuned=is_tuned,
                total=tuple(of_query_LG.mean(axis=0).tolist()),
                by_layer=tuple(tuple(layer) for layer in of_query_LG.tolist()),
            )
            for (is_tuned, scenario), of_query_LG in zip(asked, mean_QLG, strict=True)
        ),
    )


def prefix_groups(layout: PrefixLayout, header_len: int) -> npt.NDArray[np.int64]:
    """Group of every prefix position."""
    groups_P = np.where(
        layout.adapter_P >= ADAPTER_FIRST_EVENT,
        layout.adapter_P - ADAPTER_FIRST_EVENT + FIRST_MODALITY,
        DELIMITERS,
    )
    groups_P[layout.adapter_P == ADAPTER_USER] = USER
    groups_P[layout.adapter_P == ADAPTER_MODALITY] = MODALITY
    groups_P[:header_len] = HEADER
    assert (layout.adapter_P[:header_len] == ADAPTER_TOKEN).all()
    return groups_P


def _suffix_groups(segment: Segment, prompt_len: int, num_groups: int) -> list[int]:
    """Group of every suffix position; rows that a query encoder made are the query's."""
    query, prompt, itself = range(num_groups - len(SUFFIX_GROUPS), num_groups)
    query_len = len(segment.query) + segment.num_rows - prompt_len
    return [query] * query_len + [prompt] * prompt_len + [itself]


def _shares(
    model: QAnchorModel,
    corpus: PrefixCorpus,
    users: Sequence[int],
    segments: Sequence[Segment],
    suffix_groups: Sequence[int],
    num_groups: int,
    watch: _Watch,
) -> npt.NDArray[np.float64]:
    """[B, Q, layers, G], mean over heads."""
    device = model.head.up.weight.device
    batch = anchor_batch(corpus, users, [list(segments)] * len(users)).to(device)
    group_BLG = _one_hot_groups(corpus, users, suffix_groups, batch, num_groups)
    watch.batch = batch
    watch.layers.clear()
    _run(model, batch)
    found = [
        torch.einsum("qhl,qlg->qg", layer_QHL, group_BLG[batch.emb_user_Q]) / layer_QHL.shape[1]
        for layer_QHL in watch.layers
    ]
    shares_QLG = torch.stack(found, dim=1)
    return shares_QLG.reshape(len(users), len(segments), len(found), num_groups).cpu().numpy()


def _one_hot_groups(
    corpus: PrefixCorpus,
    users: Sequence[int],
    suffix_groups: Sequence[int],
    batch: AnchorBatch,
    num_groups: int,
) -> Tensor:
    """[B, L, G]; padding belongs to no group, and gets no attention."""
    prefix_width, suffix_width = batch.prefix_token_ids_BP.shape[1], batch.segment_BS.shape[1]
    groups_BL = np.full((len(users), prefix_width + suffix_width), -1, dtype=np.int64)
    header_len = len(corpus.tokens.header)
    for row, user in enumerate(users):
        layout = corpus.layout(user)
        groups_BL[row, : len(layout)] = prefix_groups(layout, header_len)
        groups_BL[row, prefix_width : prefix_width + len(suffix_groups)] = suffix_groups
    one_hot = groups_BL[:, :, None] == np.arange(num_groups)
    return torch.from_numpy(one_hot).double().to(batch.segment_BS.device)


def _run(model: QAnchorModel, batch: AnchorBatch) -> None:
    """The decoder pass of `QAnchorModel.anchor`, without its head."""
    prefix_BPD, suffix_BSD = model.prefix_embeddings(batch), model.suffix_embeddings(batch)
    position_BP = torch.arange(prefix_BPD.shape[1], device=prefix_BPD.device)
    position_BP = position_BP.expand(len(prefix_BPD), -1)
    model.decoder(
        inputs_embeds=torch.cat([prefix_BPD, suffix_BSD], dim=1),
        attention_mask=packed_mask(batch, prefix_BPD.dtype),
        position_ids=torch.cat([position_BP, batch.position_BS], dim=1),
        use_cache=False,
    )


@contextmanager
def _watched(model: QAnchorModel) -> Iterator[_Watch]:
    """Inside, every pass leaves its attention in the watch that is given."""
    decoder: Any = model.decoder
    watch = _Watch()
    usual = decoder.config._attn_implementation
    decoder.set_attn_implementation("eager")
    hooks = [layer.self_attn.register_forward_hook(watch.keep) for layer in decoder.layers]
    try:
        yield watch
    finally:
        for hook in hooks:
            hook.remove()
        decoder.set_attn_implementation(usual)
