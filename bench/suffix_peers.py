"""The roads measured side by side: our packed suffix step, and transformers as one would use it.

Each road answers the same queries of the same user and returns unit vectors [N, Z].

Legend: P prefix length, N queries, S query length with <USER_EMB>, Z embedding_dim.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import DynamicCache

from qanchor.bundle.packing import SuffixQuery
from qanchor.bundle.slot import zero_slot
from qanchor.data.prefix import ADAPTER_TOKEN, PrefixLayout
from qanchor_export.runner import BundleRunner, EncodedPrefix
from qanchor_export.source import ExportSource

FloatArray = npt.NDArray[np.float32]
Road = Callable[[], FloatArray]


@dataclass(frozen=True, slots=True)
class Task:
    """One user and the queries asked of him: token ids, [P] and [N, S], the last is <USER_EMB>."""

    prefix_P: npt.NDArray[np.int64]
    queries_NS: npt.NDArray[np.int64]


def make_task(
    source: ExportSource, prefix_len: int, num_queries: int, query_len: int, seed: int = 0
) -> Task:
    """Random tokens; the cost of a step does not depend on which."""
    rng = np.random.default_rng(seed)
    highest = source.tokenizer.get_vocab_size()
    queries_NS = rng.integers(0, highest, (num_queries, query_len))
    queries_NS[:, -1] = source.tokens.user_emb
    return Task(rng.integers(0, highest, prefix_len), queries_NS)


def our_prefix(runner: BundleRunner, task: Task) -> EncodedPrefix:
    """The prefix, all of it text tokens, through our prefix graph."""
    length = len(task.prefix_P)
    adapter_P = np.full(length, ADAPTER_TOKEN)
    layout = PrefixLayout(task.prefix_P, adapter_P, np.zeros_like(adapter_P))
    width = runner.bundle.manifest.dims.slot_vector_dim
    return runner.prefill(layout, np.zeros((length, width), dtype=np.float32))


def noise_prefix(runner: BundleRunner, length: int) -> EncodedPrefix:
    """A prefix of random keys and values: what a step costs does not depend on them."""
    kv_L2GCK = zero_slot(runner.bundle.manifest.dims, length)
    noise = np.random.default_rng(0).standard_normal(kv_L2GCK.shape, dtype=np.float32)
    kv_L2GCK[...] = noise.astype(kv_L2GCK.dtype)
    return EncodedPrefix(kv_L2GCK, length)


def packed_step(runner: BundleRunner, prefix: EncodedPrefix, queries_NS: Any) -> Road:
    """Our suffix step, packing and binding included."""

    def run() -> FloatArray:
        queries = [SuffixQuery(tuple(row[:-1])) for row in queries_NS.tolist()]
        return runner.suffix([(prefix, queries)])

    return run


def transformers_roads(source: ExportSource, task: Task) -> dict[str, Road]:
    """Reused cache query by query, reused cache as a batch, and full passes (one, and all)."""
    model: Any = source.model
    decoder, head = model.decoder, model.head
    prefix = torch.from_numpy(task.prefix_P)[None]
    queries = torch.from_numpy(task.queries_NS)
    num_queries = len(queries)
    with torch.inference_mode():
        cache = DynamicCache(config=decoder.config)
        decoder(input_ids=prefix, past_key_values=cache, use_cache=True)
        # The copies are made before the clock starts: the peer gets them for nothing.
        wide_cache = copy.deepcopy(cache)
        wide_cache.batch_repeat_interleave(num_queries)

    def reuse(rows: Any, past: Any) -> Any:
        states = decoder(input_ids=rows, past_key_values=past, use_cache=True).last_hidden_state
        past.crop(-rows.shape[1])
        return head(states[:, -1])

    @torch.inference_mode()
    def one_by_one() -> FloatArray:
        found: FloatArray = torch.cat([reuse(row[None], cache) for row in queries]).numpy()
        return found

    @torch.inference_mode()
    def as_batch() -> FloatArray:
        found: FloatArray = reuse(queries, wide_cache).numpy()
        return found

    @torch.inference_mode()
    def full(rows: Any) -> FloatArray:
        states = [
            decoder(
                input_ids=torch.cat([prefix, row[None]], dim=1), use_cache=False
            ).last_hidden_state[:, -1]
            for row in rows
        ]
        found: FloatArray = head(torch.cat(states)).numpy()
        return found

    return {
        "reuse_one_by_one": one_by_one,
        "reuse_batch": as_batch,
        "full_pass_one": lambda: full(queries[:1]),
        "full_pass_all": lambda: full(queries),
    }
