"""The least that a step must compute and read, and the seconds this machine needs for that.

Counted are matrix products, each decoder weight and each cached key and value read once. Must not
know how the engine does it.
"""

from dataclasses import dataclass

from qanchor.bundle.manifest import ModelDims, Precision
from qanchor_bench.machine import Rates

_WEIGHT_BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "int8": 1.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSize:
    """A suffix step: users, queries of each, tokens of each query, positions of each prefix."""

    prefix_len: int
    num_queries: int
    query_len: int
    """<USER_EMB> included."""
    num_users: int = 1


@dataclass(frozen=True, slots=True)
class Floor:
    """Operations with weights, operations between activations, bytes, and the time for them."""

    dense_flops: float
    attention_flops: float
    num_bytes: float
    seconds: float

    @property
    def flops(self) -> float:
        """All operations."""
        return self.dense_flops + self.attention_flops


def suffix_floor(
    dims: ModelDims, size: StepSize, rates: Rates, precision: Precision = "float32"
) -> Floor:
    """The larger of computing and reading.

    In the last layer what follows attention is counted for one row per query. Attention is
    computed in float32 whatever the weights' precision.
    """
    num_queries = size.num_users * size.num_queries
    tokens = num_queries * size.query_len
    qkv, after = _layer_products(dims)
    dense = tokens * (dims.num_layers * qkv + (dims.num_layers - 1) * after) + num_queries * after
    seen = size.prefix_len + (size.query_len + 1) / 2
    attention = tokens * dims.num_layers * 2 * dims.num_heads * dims.head_dim * seen
    num_bytes = _WEIGHT_BYTES[precision] * dims.num_layers * (qkv + after)
    num_bytes += float(size.num_users * size.prefix_len * dims.kv_bytes_per_token)
    return _floor(2.0 * dense, 2.0 * attention, num_bytes, rates, precision)


def prefill_floor(
    dims: ModelDims, prefix_len: int, rates: Rates, precision: Precision = "float32"
) -> Floor:
    """The same for encoding a prefix of text tokens; the last layer needs keys and values alone."""
    qkv, after = _layer_products(dims)
    keys_values = 2 * dims.hidden_dim * dims.num_kv_heads * dims.head_dim
    layers = dims.num_layers - 1
    dense = prefix_len * (layers * (qkv + after) + keys_values)
    pairs = prefix_len * (prefix_len + 1) / 2
    attention = pairs * layers * 2 * dims.num_heads * dims.head_dim
    num_bytes = _WEIGHT_BYTES[precision] * (layers * (qkv + after) + keys_values)
    num_bytes += float(prefix_len * dims.kv_bytes_per_token)
    return _floor(2.0 * dense, 2.0 * attention, num_bytes, rates, precision)


def _layer_products(dims: ModelDims) -> tuple[float, float]:
    """Weights of one layer: query, key, value; and what follows attention."""
    inner = dims.num_heads * dims.head_dim
    qkv = dims.hidden_dim * (inner + 2 * dims.num_kv_heads * dims.head_dim)
    after = dims.hidden_dim * (inner + 3 * dims.intermediate_dim)
    return float(qkv), float(after)


def _floor(
    dense: float, attention: float, num_bytes: float, rates: Rates, precision: Precision
) -> Floor:
    compute = dense / rates.dense_flops(precision) + attention / rates.gemm_flops
    return Floor(dense, attention, num_bytes, max(compute, num_bytes / rates.read_bytes))
