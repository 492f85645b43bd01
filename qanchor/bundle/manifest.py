"""The bundle's manifest: every tensor, dimension, file hash, token id, limit and scenario.

Written by the exporter, read by verifier, engines and server. Must not know torch, ONNX or gRPC.
"""

from typing import Literal

from qanchor.config import Config, ProfileSchema
from qanchor.data.prefix import PrefixTokens
from qanchor.data.render import RenderedProfile

FORMAT_VERSION = 2
MANIFEST_FILE = "manifest.json"
SCENARIOS_FILE = "scenarios.json"
PARITY_FILE = "parity.json"
EVENT_TOKENIZER_FILE = "event_tokenizer.json"
TOKENIZER_FILE = "tokenizer.json"
QUERY_TOKENIZER_FILE = "query_tokenizer.json"
WEIGHTS_FILE = "weights.bin"
QUERY_WEIGHTS_FILE = "query_encoder.bin"
"""Of the query encoder alone: it runs on the CPU whatever the engine, once per text."""
INT8_REPORT_FILE = "int8_report.json"
"""What was decided in quantising, for people; in int8 bundles only."""
EXPORT_ID_KEY = "qanchor.export_id"
EVENT_ENCODER = "event_encoder"
QUERY_ENCODER = "query_encoder"
PREFIX = "prefix"
SUFFIX = "suffix"
DEVICE_GRAPHS = (EVENT_ENCODER, PREFIX, SUFFIX)
"""What an engine runs. The query encoder is none of its work."""

DType = Literal["int64", "float32", "float16", "bfloat16", "int8"]
Precision = Literal["float32", "float16", "bfloat16", "int8"]
"""Of the decoder. float16, bfloat16: weights and activations in that type; RMS norms, softmax,
adapters and head compute in float32. int8: weights of the big matrices, float32 elsewhere."""
KvDType = Literal["float32", "float16", "bfloat16", "int8"]
KV_ITEM_BYTES: dict[KvDType, int] = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}


class TensorSpec(Config, frozen=True, kw_only=True):
    """One graph input or output; a string dimension is dynamic and names the ONNX dimension."""

    name: str
    dtype: DType
    dims: tuple[int | str, ...]


class GraphSpec(Config, frozen=True, kw_only=True):
    """One ONNX graph of the bundle."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class FileSpec(Config, frozen=True, kw_only=True):
    """Integrity of one bundle file."""

    sha256: str
    num_bytes: int


class ModelDims(Config, frozen=True, kw_only=True):
    """Sizes of the exported network."""

    num_layers: int
    hidden_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_dim: int
    event_dim: int
    """Width of the event encoder's vectors."""
    num_measures: int = 0
    """Numbers that stand behind each event vector in `slot_vectors`."""
    embedding_dim: int
    """Width of the L2-normalised answer."""
    kv_dtype: KvDType = "float32"
    """Type of the past inputs and of what the prefix graph gives. int8 carries no scales: they are
    constants of the graphs, so a slot holds nothing but numbers of this type."""

    @property
    def slot_vector_dim(self) -> int:
        """Width of the prefix graph's `slot_vectors`: event vector, then measures."""
        return self.event_dim + self.num_measures

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values of one prefix position over all layers."""
        numbers = self.num_layers * 2 * self.num_kv_heads * self.head_dim
        return numbers * KV_ITEM_BYTES[self.kv_dtype]


class Limits(Config, frozen=True, kw_only=True):
    """What the server accepts; beyond them a request is rejected, never cut silently."""

    max_prefix_len: int
    """Prefix positions; follows from the schema."""
    max_query_len: int
    """Tokens of one suffix: query text or the rows in its place, soft prompt and <USER_EMB>."""


class QueryEncoderSpec(Config, frozen=True, kw_only=True):
    """How questions are read where the decoder does not read their text itself."""

    num_rows: int
    """Suffix positions of a question."""
    max_text_len: int
    """Tokens of a question, the tokenizer's own included."""


class Manifest(Config, frozen=True, kw_only=True):
    """All a reader needs to run the bundle's graphs."""

    format_version: int
    export_id: str
    """Stamped into every graph's metadata; graphs of different exports refuse to load together."""
    model_id: str
    """Digest over graphs, weights, tokenizers, schema and tokens: equal ids, equal embeddings."""
    checkpoint_id: str = ""
    """Content id of the checkpoint exported, by which a scenario file says what it was tuned for;
    empty for a bundle that came from no checkpoint."""
    recipe: str
    precision: Precision = "float32"
    """What the decoder computes in; inputs and outputs but keys and values are the same in all."""
    dims: ModelDims
    profile_schema: ProfileSchema
    tokens: PrefixTokens
    event_pad: int
    """Padding id of the event tokenizer."""
    limits: Limits
    query_encoder: QueryEncoderSpec | None = None
    """None: a question is its tokens, in the schema's template."""
    graphs: dict[str, GraphSpec]
    files: dict[str, FileSpec]


class ParityCase(Config, frozen=True, kw_only=True):
    """One user with queries and the embeddings torch gave for them at export."""

    texts: tuple[tuple[str, ...], ...]
    """Rendered event texts per modality, in schema order."""
    measures: tuple[tuple[tuple[float, ...], ...], ...] = ()
    """The numbers beside each text; empty where the schema has none."""
    queries: tuple[str, ...]
    embeddings: tuple[tuple[float, ...], ...]

    @property
    def rendered(self) -> RenderedProfile:
        """The user as `render_profile` gave it."""
        return RenderedProfile(self.texts, self.measures)


def past_names(num_layers: int) -> list[str]:
    """Names of the explicit past inputs, key then value per layer.

    Each is [batch, num_kv_heads, prefix_capacity, head_dim]; keys are stored after RoPE.
    """
    return [
        f"past_key_values.{layer}.{part}"
        for layer in range(num_layers)
        for part in ("key", "value")
    ]


def present_names(num_layers: int) -> list[str]:
    """Names of the prefix graph's outputs, key then value per layer.

    Each is [1, num_kv_heads, chunk_len, head_dim].
    """
    return [f"present.{layer}.{part}" for layer in range(num_layers) for part in ("key", "value")]


def event_encoder_spec(dims: ModelDims) -> GraphSpec:
    """`event_encoder.onnx`: event text tokens to pre-adapter vectors (mask = id is not pad)."""
    return GraphSpec(
        file="event_encoder.onnx",
        inputs=(TensorSpec(name="event_token_ids", dtype="int64", dims=("num_texts", "text_len")),),
        outputs=(
            TensorSpec(name="event_vectors", dtype="float32", dims=("num_texts", dims.event_dim)),
        ),
    )


def query_encoder_spec(dims: ModelDims, num_rows: int) -> GraphSpec:
    """`query_encoder.onnx`: a question's tokens to the rows that stand for it in a suffix.

    There is none where the decoder reads questions itself.
    """
    rows = (num_rows, dims.hidden_dim)
    return GraphSpec(
        file="query_encoder.onnx",
        inputs=(TensorSpec(name="query_token_ids", dtype="int64", dims=("query_text_len",)),),
        outputs=(TensorSpec(name="query_rows", dtype="float32", dims=rows),),
    )


def _past_specs(dims: ModelDims, batch: int | str) -> tuple[TensorSpec, ...]:
    shape = (batch, dims.num_kv_heads, "prefix_capacity", dims.head_dim)
    return tuple(
        TensorSpec(name=n, dtype=dims.kv_dtype, dims=shape) for n in past_names(dims.num_layers)
    )


def prefix_spec(dims: ModelDims) -> GraphSpec:
    """`prefix.onnx`: one chunk of one user's prefix, after `past_len` tokens already encoded."""
    chunk = (1, dims.num_kv_heads, "chunk_len", dims.head_dim)
    return GraphSpec(
        file="prefix.onnx",
        inputs=(
            TensorSpec(name="token_ids", dtype="int64", dims=("chunk_len",)),
            TensorSpec(name="adapter", dtype="int64", dims=("chunk_len",)),
            TensorSpec(
                name="slot_vectors", dtype="float32", dims=("chunk_len", dims.slot_vector_dim)
            ),
            TensorSpec(name="past_len", dtype="int64", dims=(1,)),
            *_past_specs(dims, 1),
        ),
        outputs=tuple(
            TensorSpec(name=n, dtype=dims.kv_dtype, dims=chunk)
            for n in present_names(dims.num_layers)
        ),
    )


def asks_by_query(precision: Precision) -> bool:
    """Whether the suffix graph lays each query's tokens in a row of their own (CPUs)."""
    return precision in ("float32", "int8")


def suffix_spec(dims: ModelDims, precision: Precision) -> GraphSpec:
    """`suffix.onnx`: packed suffixes of one or several users over their cached prefixes.

    All suffix tokens of the step stand in one row of length packed_len, a query's tokens side by
    side; a token attends to its user's prefix and to earlier tokens of its own query. `row_index`
    [batch, row_len] lists each user's packed positions, -1 = padding; `flat_index` is its inverse:
    packed position -> user * row_len + column. Which query a token is of, say `query_index`
    [num_queries, query_len] and `query_place`, the same two of the queries, or in half precision
    `segment_ids`, a number per query, unique over the step. `positions` are absolute (prefix length
    + offset in the query). `prompt_index` 0 takes the token's embedding, k > 0 takes row k - 1 of
    `prompt_rows`. `emb_index` is the packed place of each <USER_EMB>.
    """
    packed = ("packed_len",)
    of_query: tuple[TensorSpec, ...]
    of_query = (TensorSpec(name="segment_ids", dtype="int64", dims=packed),)
    if asks_by_query(precision):
        of_query = (
            TensorSpec(name="query_index", dtype="int64", dims=("num_queries", "query_len")),
            TensorSpec(name="query_place", dtype="int64", dims=packed),
        )
    return GraphSpec(
        file="suffix.onnx",
        inputs=(
            TensorSpec(name="token_ids", dtype="int64", dims=packed),
            TensorSpec(name="positions", dtype="int64", dims=packed),
            TensorSpec(name="prompt_index", dtype="int64", dims=packed),
            TensorSpec(
                name="prompt_rows", dtype="float32", dims=("num_prompt_rows", dims.hidden_dim)
            ),
            TensorSpec(name="row_index", dtype="int64", dims=("batch", "row_len")),
            TensorSpec(name="flat_index", dtype="int64", dims=packed),
            *of_query,
            TensorSpec(name="emb_index", dtype="int64", dims=("num_queries",)),
            TensorSpec(name="prefix_len", dtype="int64", dims=("batch",)),
            *_past_specs(dims, "batch"),
        ),
        outputs=(
            TensorSpec(
                name="embeddings", dtype="float32", dims=("num_queries", dims.embedding_dim)
            ),
        ),
    )
