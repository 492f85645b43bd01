"""transformers as one would use it: with the prefix's cache reused, and with full passes.

Each road answers the same queries of the same user and returns unit vectors [N, Z] on the host, so
that a GPU has finished.

Legend: P prefix length, N queries, S query length with <USER_EMB>, Z embedding_dim.
"""

import copy
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from qanchor_bench.bench import Road
from qanchor_bench.workload import FloatArray, IntArray
from qanchor_export.source import ExportSource


def transformers_roads(
    source: ExportSource,
    prefix_P: IntArray,
    queries_NS: IntArray,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Road]:
    """Reused cache (one query, all in sequence, all as a batch) and full passes (one, all).

    The model of `source` is moved to `device`, its decoder computes in `dtype` from then on; the
    head stays float32, as in our graphs.
    """
    model: Any = source.model.to(device)
    decoder, head = _in_type(model.decoder, dtype), model.head
    prefix, queries = _on(model, prefix_P)[None], _on(model, queries_NS)
    queries[:, -1] = source.tokens.user_emb
    with torch.inference_mode():
        cache = DynamicCache(config=decoder.config)
        decoder(input_ids=prefix, past_key_values=cache, use_cache=True)
        # The copies are made before the clock starts: the peer gets them for nothing.
        wide_cache = copy.deepcopy(cache)
        wide_cache.batch_repeat_interleave(len(queries))

    @torch.inference_mode()
    def reuse(rows: Any, past: Any) -> FloatArray:
        states = decoder(input_ids=rows, past_key_values=past, use_cache=True).last_hidden_state
        past.crop(-rows.shape[1])
        return _vectors(head, states[:, -1])

    return {
        "reuse_one": lambda: reuse(queries[:1], cache),
        "reuse_one_by_one": lambda: np.concatenate([reuse(row[None], cache) for row in queries]),
        "reuse_batch": lambda: reuse(queries, wide_cache),
        "full_pass_one": lambda: full_passes(source, prefix_P, queries_NS[:1]),
        "full_pass_all": lambda: full_passes(source, prefix_P, queries_NS),
    }


@torch.inference_mode()
def full_passes(source: ExportSource, prefix_P: IntArray, queries_NS: IntArray) -> FloatArray:
    """The authors' way: one pass over prefix and query per query, nothing kept in between.

    The last token of each query is read as <USER_EMB>.
    """
    model: Any = source.model
    prefix, queries = _on(model, prefix_P)[None], _on(model, queries_NS)
    queries[:, -1] = source.tokens.user_emb
    states = [
        model.decoder(
            input_ids=torch.cat([prefix, row[None]], dim=1), use_cache=False
        ).last_hidden_state[:, -1]
        for row in queries
    ]
    return _vectors(model.head, torch.cat(states))


def _in_type(decoder: Any, dtype: torch.dtype) -> Any:
    """`decoder` computing in `dtype`; its rotary frequencies stay float32.

    In half precision they would be wrong by a tenth of a radian at position 700, which is no fault
    of one who loads a model in that type.
    """
    frequencies = decoder.rotary_emb.inv_freq
    decoder.to(dtype)
    decoder.rotary_emb.inv_freq = frequencies
    return decoder


def _on(model: Any, tokens: IntArray) -> torch.Tensor:
    """A copy where the model is."""
    return torch.tensor(tokens, device=next(model.parameters()).device)


def _vectors(head: Any, states_ND: torch.Tensor) -> FloatArray:
    found: FloatArray = head(states_ND).float().cpu().numpy()
    return found
