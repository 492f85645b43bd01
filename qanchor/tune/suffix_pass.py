"""Embeddings from cached prefixes: the decoder runs over suffix positions alone.

Nothing of the model and nothing of the cache changes in a pass; gradients reach whatever built the
suffix's input embeddings, i.e. a soft prompt.

Legend: B users, S suffix length, P longest past, R soft-prompt rows, D decoder width, N text
tokens, L layers, G KV heads, H head_dim, Z embedding_dim.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

from qanchor.bundle.packing import SuffixQuery
from qanchor.towers import QAnchorModel
from qanchor.tune.prefix_cache import PastBatch, PrefixCache

USERS_PER_PASS = 256


@dataclass(slots=True)
class PositionCount:
    """Token positions the decoder computed in forward passes, and what the cache saved."""

    num_prefix: int
    """Prefix positions encoded, once per user."""
    num_suffix: int = 0
    num_reused: int = 0
    """Positions of prefix and text that passes without a cache would have computed again."""

    @property
    def times_fewer(self) -> float:
        """Positions without reuse over positions computed."""
        return (self.num_reused + self.num_suffix) / max(self.num_prefix + self.num_suffix, 1)


class FixedPast(DynamicCache):
    """Past keys and values that a pass reads and cannot change; its own are kept apart."""

    def __init__(self, past: PastBatch) -> None:
        super().__init__()
        self._kv_L2BGPH = past.kv_L2BGPH
        self._new: list[tuple[Tensor, Tensor]] = []

    def new_kv(self) -> Tensor:
        """Keys and values of the pass's own positions, [B, L, 2, G, S, H]."""
        return torch.stack([torch.stack(layer, dim=1) for layer in self._new], dim=1)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """[past, new] keys and values of a layer, [B, G, P + S, H]."""
        self._new.append((key_states, value_states))
        keys, values = self._kv_L2BGPH[layer_idx]
        return torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Past columns, padding included."""
        return self._kv_L2BGPH.shape[4]


@dataclass(slots=True)
class SuffixPass:
    """The anchor tower behind cached prefixes; one suffix for all users of a call."""

    model: QAnchorModel
    cache: PrefixCache
    user_emb: int
    """Id of <USER_EMB>."""
    positions: PositionCount = field(init=False)
    """Shared with the passes `after_text` makes."""

    def __post_init__(self) -> None:
        self.model.eval()
        self.positions = PositionCount(self.cache.num_positions)

    @torch.no_grad()
    def after_text(self, text_ND: Tensor) -> "SuffixPass":
        """The same users, the text's keys and values kept behind their prefixes.

        The text stands before the soft prompt, so it changes as little during tuning as the
        prefix: what follows it costs its own positions alone.
        """
        cache = self.cache
        found: Tensor | None = None
        for rows in _by_length(cache, range(len(cache.kv))):
            past = FixedPast(batch := cache.batch(rows, text_ND))
            self._states(rows, text_ND, batch, past)
            new_kv = past.new_kv().to(device="cpu", dtype=cache.kv[0].dtype)
            if found is None:
                found = torch.empty((len(cache.kv), *new_kv.shape[1:]), dtype=new_kv.dtype)
            found[rows] = new_kv
        behind = SuffixPass(self.model, replace(cache, text_kv_UL2GNH=found), self.user_emb)
        behind.positions = self.positions
        return behind

    def embeddings(self, rows: Sequence[int], suffix_SD: Tensor) -> Tensor:
        """u_{i,q} [B, Z] of the users in cache rows `rows`; `suffix_SD` closes with <USER_EMB>."""
        batch = self.cache.batch(rows, suffix_SD)
        states_BSD = self._states(rows, suffix_SD, batch, FixedPast(batch))
        anchor_BZ: Tensor = self.model.head(states_BSD[:, -1])
        return anchor_BZ

    @torch.no_grad()
    def all_embeddings(self, rows: Sequence[int], suffix_SD: Tensor) -> Tensor:
        """The same for any number of users, without gradient, on the CPU."""
        found = torch.empty(len(rows), self.model.head.down.out_features)
        for places in _by_length(self.cache, rows):
            found[places] = self.embeddings([rows[place] for place in places], suffix_SD).cpu()
        return found

    def text_embeddings(self, token_ids: Sequence[int]) -> Tensor:
        """Input embeddings [N, D] of text tokens, without gradient."""
        device = self.model.head.up.weight.device
        ids = torch.tensor(token_ids, dtype=torch.int64, device=device)
        return self.model.embed_tokens(ids).detach()

    def suffix(self, text_ND: Tensor, prompt_RD: Tensor) -> Tensor:
        """[text, soft prompt, <USER_EMB>]; either of the first two may have no rows."""
        return torch.cat([text_ND, prompt_RD, self.text_embeddings([self.user_emb])])

    def suffix_of(self, query: SuffixQuery) -> Tensor:
        """The input embeddings of a query as it is served."""
        text_ND = self.text_embeddings(query.token_ids)
        if query.prompt_rows_KD is None:
            return self.suffix(text_ND, text_ND[:0])
        return self.suffix(text_ND, torch.from_numpy(query.prompt_rows_KD).to(text_ND))

    def _states(
        self, rows: Sequence[int], suffix_SD: Tensor, batch: PastBatch, past: FixedPast
    ) -> Tensor:
        """Hidden states [B, S, D] of the same suffix behind each user's past."""
        suffix_len = len(suffix_SD)
        place_S = torch.arange(suffix_len, device=suffix_SD.device)
        states_BSD: Tensor = self.model.decoder(
            inputs_embeds=suffix_SD.expand(len(rows), -1, -1),
            attention_mask=suffix_mask(batch, suffix_len),
            # From the true length of the past, however far the batch is padded.
            position_ids=batch.past_len_B[:, None] + place_S,
            past_key_values=past,
            use_cache=False,
        ).last_hidden_state
        self.positions.num_suffix += len(rows) * suffix_len
        self.positions.num_reused += sum(self.cache.past_lens(rows))
        return states_BSD


def _by_length(cache: PrefixCache, rows: Sequence[int]) -> Iterator[list[int]]:
    """Places in `rows`, a pass's worth at a time; users of like length together: less padding."""
    lens = cache.past_lens(rows)
    order = sorted(range(len(rows)), key=lens.__getitem__)
    for start in range(0, len(order), USERS_PER_PASS):
        yield order[start : start + USERS_PER_PASS]


def suffix_mask(past: PastBatch, suffix_len: int) -> Tensor:
    """Additive mask [B, 1, S, P + S]: the user's own past and earlier suffix positions."""
    device, dtype = past.kv_L2BGPH.device, past.kv_L2BGPH.dtype
    columns_P = torch.arange(past.kv_L2BGPH.shape[4], device=device)
    in_past_BP = columns_P < past.past_len_B[:, None]
    causal_SS = torch.ones(suffix_len, suffix_len, dtype=torch.bool, device=device).tril()
    num_users = len(past.past_len_B)
    allowed = torch.cat(
        [
            in_past_BP[:, None].expand(-1, suffix_len, -1),
            causal_SS.expand(num_users, -1, -1),
        ],
        dim=2,
    )
    mask = torch.zeros(allowed.shape, dtype=dtype, device=device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]


def pooled_rows(embeddings_ND: Tensor, num_rows: int) -> Tensor:
    """N input embeddings to `num_rows` [R, D]: means of neighbours, or repeats where N is less."""
    return functional.adaptive_avg_pool1d(embeddings_ND.T[None], num_rows)[0].T.contiguous()


@contextmanager
def frozen(model: QAnchorModel) -> Iterator[None]:
    """No parameter of the model takes gradients inside; afterwards each is as it was."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
