"""Keys and values of many users' prefixes, encoded once and kept in RAM.

The prefix does not depend on scenario or soft prompt, so neither a training step nor another
scenario encodes it again. Kept per user at the true length: padding is added when a batch is put
together and never stored.

Legend: L layers, B users of a batch, U users of the cache, G KV heads, P longest past of a batch,
N text tokens, H head_dim.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from qanchor.towers import AnchorBatch, QAnchorModel
from qanchor.train.batches import Segment, anchor_batch
from qanchor.train.corpus import PrefixCorpus

USERS_PER_BATCH = 32
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class PastBatch:
    """Past keys and values of a batch: `kv_L2BGPH`, zeros behind each user's `past_len_B`."""

    kv_L2BGPH: Tensor
    past_len_B: Tensor


@dataclass(frozen=True, slots=True)
class PrefixCache:
    """Users by row; `kv[row]` is [L, 2, G, prefix_len, H] on the CPU, keys after RoPE."""

    user_ids: tuple[str, ...]
    kv: tuple[Tensor, ...]
    text_kv_UL2GNH: Tensor | None = None
    """The same of a text every user is asked, behind the prefix; see `SuffixPass.after_text`."""

    @property
    def num_bytes(self) -> int:
        """RAM of all prefixes' keys and values."""
        return sum(kv.numel() * kv.element_size() for kv in self.kv)

    @property
    def num_positions(self) -> int:
        """Prefix positions encoded, over all users."""
        return sum(kv.shape[3] for kv in self.kv)

    def past_lens(self, rows: Sequence[int]) -> list[int]:
        """True length of each row's past: prefix, and text where it is kept."""
        text_len = 0 if self.text_kv_UL2GNH is None else self.text_kv_UL2GNH.shape[4]
        return [self.kv[row].shape[3] + text_len for row in rows]

    def batch(self, rows: Sequence[int], like: Tensor) -> PastBatch:
        """The users' keys and values, copied and padded, with device and dtype of `like`."""
        lens = self.past_lens(rows)
        layers, two, heads, _, head_dim = self.kv[rows[0]].shape
        stacked = torch.zeros(
            (layers, two, len(rows), heads, max(lens), head_dim), dtype=self.kv[rows[0]].dtype
        )
        for place, (row, length) in enumerate(zip(rows, lens, strict=True)):
            prefix_len = self.kv[row].shape[3]
            stacked[:, :, place, :, :prefix_len] = self.kv[row]
            if self.text_kv_UL2GNH is not None:
                stacked[:, :, place, :, prefix_len:length] = self.text_kv_UL2GNH[row]
        return PastBatch(
            stacked.to(device=like.device, dtype=like.dtype),
            torch.tensor(lens, device=like.device),
        )


def kv_bytes_per_position(model: QAnchorModel, dtype: torch.dtype) -> int:
    """Bytes of one prefix position's keys and values over all layers."""
    config: Any = model.language_model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(
        2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * dtype.itemsize
    )


@torch.no_grad()
def encode_prefixes(
    model: QAnchorModel, corpus: PrefixCorpus, users: Sequence[int], dtype: torch.dtype
) -> PrefixCache:
    """Encode the prefixes of `users` (rows of the corpus) once; row i of the result is users[i]."""
    device = model.head.up.weight.device
    kept: dict[int, Tensor] = {}
    by_length = sorted(users, key=corpus.prefix_len)
    with tqdm(total=len(users), desc="encoding prefixes", unit="user") as bar:
        for chunk in _chunks(by_length, USERS_PER_BATCH):
            batch = anchor_batch(corpus, chunk, [[Segment(())]] * len(chunk)).to(device)
            for user, kv in zip(chunk, _prefix_kv(model, batch), strict=True):
                kept[user] = kv.to(device="cpu", dtype=dtype, copy=True)
            bar.update(len(chunk))
    names = corpus.rendered.user_ids
    return PrefixCache(
        tuple(names[user] for user in users), tuple(kept[user].contiguous() for user in users)
    )


def _prefix_kv(model: QAnchorModel, batch: AnchorBatch) -> Iterator[Tensor]:
    """[L, 2, G, prefix_len, H] of each user of the batch."""
    prefix_BPD = model.prefix_embeddings(batch)
    position_BP = torch.arange(prefix_BPD.shape[1], device=prefix_BPD.device)[None]
    # No padding mask: padding stands on the right, and causal attention keeps it from the rest.
    past: Any = model.decoder(
        inputs_embeds=prefix_BPD, position_ids=position_BP, use_cache=True
    ).past_key_values
    kv_L2BGPH = torch.stack([torch.stack([layer.keys, layer.values]) for layer in past.layers])
    for user, length in enumerate(batch.prefix_len_B.tolist()):
        yield kv_L2BGPH[:, :, user, :, :length]


def _chunks(rows: Sequence[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(rows), size):
        yield list(rows[start : start + size])
