"""A small ONNX Runtime runner of a bundle, for proofs and measurements. Torch-free, no server.

It shows the plainest correct use of the graphs: encode events, prefill in chunks into one
contiguous keys/values array per user, pack queries, run the suffix step. One thread calls it.

Legend: L layers, G KV heads, C prefix_capacity, K head_dim, E event_dim, D decoder width,
T packed_len, B users, R row_len, N queries, Z embedding_dim.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from qanchor.bundle.exact_int8 import exact_int8_entry
from qanchor.bundle.manifest import (
    EVENT_ENCODER,
    PREFIX,
    QUERY_ENCODER,
    SUFFIX,
    asks_by_query,
    past_names,
    present_names,
)
from qanchor.bundle.packing import PackedSuffix, SuffixQuery, UserSuffix, pack, scenario_suffix
from qanchor.bundle.reader import Bundle
from qanchor.bundle.slot import KvArray, element_type, zero_slot
from qanchor.config import Scenario
from qanchor.data.prefix import PrefixLayout, build_layout, slot_vectors, with_measures
from qanchor.data.render import RenderedProfile

FloatArray = npt.NDArray[np.float32]

_TEXTS_PER_RUN = 64


@dataclass(frozen=True, slots=True)
class EncodedPrefix:
    """A user's keys and values: `kv_L2GCK`, contiguous; columns from `length` on are unused."""

    kv_L2GCK: KvArray
    length: int


@dataclass(slots=True)
class BundleRunner:
    """Runs the graphs on the CPU; a session is opened when its graph is first used.

    `num_threads` 0 takes all cores. Raises BundleError when a graph is of another export.
    """

    bundle: Bundle
    num_threads: int = 0
    _sessions: dict[str, Any] = field(default_factory=dict)

    def session(self, name: str) -> Any:
        """The ONNX Runtime session of a graph."""
        if name not in self._sessions:
            options = ort.SessionOptions()
            options.intra_op_num_threads = self.num_threads
            options.log_severity_level = 3
            options.add_session_config_entry(*exact_int8_entry())
            spec = self.bundle.manifest.graphs[name]
            opened = ort.InferenceSession(
                str(self.bundle.path / spec.file), options, providers=["CPUExecutionProvider"]
            )
            self.bundle.check_export_id(name, opened.get_modelmeta().custom_metadata_map)
            self._sessions[name] = opened
        return self._sessions[name]

    def close(self, name: str) -> None:
        """Free the memory of a graph's session."""
        self._sessions.pop(name, None)

    def event_vectors(self, rendered: RenderedProfile) -> FloatArray:
        """Pre-adapter vectors [num events, E] of a user's texts in prefix order."""
        manifest = self.bundle.manifest
        limits = [spec.max_event_tokens for spec in manifest.profile_schema.modalities]
        token_lists = [
            self.bundle.encode_event(text, limit)
            for texts, limit in zip(rendered.texts, limits, strict=True)
            for text in texts
        ]
        vectors = np.zeros((len(token_lists), manifest.dims.event_dim), dtype=np.float32)
        # Texts of like length share a run, so that little padding is computed.
        by_length = sorted(range(len(token_lists)), key=lambda index: len(token_lists[index]))
        for start in range(0, len(by_length), _TEXTS_PER_RUN):
            rows = by_length[start : start + _TEXTS_PER_RUN]
            text_len = max(len(token_lists[row]) for row in rows)
            padded = np.full((len(rows), text_len), manifest.event_pad, dtype=np.int64)
            for line, row in enumerate(rows):
                padded[line, : len(token_lists[row])] = token_lists[row]
            (found,) = self.session(EVENT_ENCODER).run(None, {"event_token_ids": padded})
            vectors[rows] = found
        return vectors

    def encode_prefix(
        self, rendered: RenderedProfile, chunk_len: int = 0, spare: int = 0
    ) -> EncodedPrefix:
        """Encode a user's prefix; see `prefill` for `chunk_len` and `spare`."""
        layout = build_layout(rendered.num_events, self.bundle.manifest.tokens)
        vectors_NE = with_measures(self.event_vectors(rendered), rendered)
        vectors_PE = slot_vectors(layout, rendered.num_events, vectors_NE)
        return self.prefill(layout, vectors_PE, chunk_len, spare)

    def prefill(
        self, layout: PrefixLayout, vectors_PE: FloatArray, chunk_len: int = 0, spare: int = 0
    ) -> EncodedPrefix:
        """Run the prefix graph in chunks of `chunk_len` positions (0: in one piece).

        `spare` columns stand unused behind the prefix, filled with noise: nothing may depend on
        what they hold.
        """
        dims, length = self.bundle.manifest.dims, len(layout)
        step = chunk_len or length
        kv = _noise_like(zero_slot(dims, length + spare))
        for start in range(0, length, step):
            stop = min(start + step, length)
            binding = self.session(PREFIX).io_binding()
            feeds = {
                "token_ids": layout.token_ids_P[start:stop],
                "adapter": layout.adapter_P[start:stop],
                "slot_vectors": vectors_PE[start:stop],
                "past_len": np.array([start], dtype=np.int64),
            }
            for name, value in feeds.items():
                binding.bind_cpu_input(name, value)
            present = zero_slot(dims, stop - start)
            past = self._values(past_names(dims.num_layers), kv[:, :, None])
            for name, value in past.items():
                binding.bind_ortvalue_input(name, value)
            outputs = self._values(present_names(dims.num_layers), present[:, :, None])
            for name, value in outputs.items():
                binding.bind_ortvalue_output(name, value)
            self.session(PREFIX).run_with_iobinding(binding)
            kv[:, :, :, start:stop] = present
        return EncodedPrefix(kv, length)

    def suffix(self, users: list[tuple[EncodedPrefix, list[SuffixQuery]]]) -> FloatArray:
        """Embeddings [N, Z] of all queries of all users, in order, from one suffix step."""
        manifest = self.bundle.manifest
        packed = pack(
            [UserSuffix(prefix.length, tuple(queries)) for prefix, queries in users],
            user_emb=manifest.tokens.user_emb,
            hidden_dim=manifest.dims.hidden_dim,
        )
        return self.run_suffix(packed, [prefix.kv_L2GCK for prefix, _ in users])

    def run_suffix(self, packed: PackedSuffix, kvs: list[KvArray]) -> FloatArray:
        """Run an already packed suffix step.

        One user's keys and values are bound where they lie; those of several are stacked first.
        """
        binding = self.session(SUFFIX).io_binding()
        stacked = kvs[0][:, :, None] if len(kvs) == 1 else _stack(kvs)
        by_query = asks_by_query(self.bundle.manifest.precision)
        for name, value in packed.inputs(by_query=by_query).items():
            binding.bind_cpu_input(name, value)
        names = past_names(self.bundle.manifest.dims.num_layers)
        for name, value in self._values(names, stacked).items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("embeddings", "cpu")
        self.session(SUFFIX).run_with_iobinding(binding)
        embeddings: FloatArray = binding.copy_outputs_to_cpu()[0]
        return embeddings

    def query(self, text: str, soft_prompt: FloatArray | None = None) -> SuffixQuery:
        """A question as the bundle reads it, closed by <USER_EMB>."""
        token_ids = self.bundle.encode_query(text)
        query = SuffixQuery(tuple(token_ids))
        if self.bundle.manifest.query_encoder is not None:
            feeds = {"query_token_ids": np.array(token_ids, dtype=np.int64)}
            query = SuffixQuery((), self.session(QUERY_ENCODER).run(None, feeds)[0])
        return query if soft_prompt is None else query.with_rows(soft_prompt)

    def scenario(self, scenario: Scenario) -> SuffixQuery:
        """A scenario as it is served. Raises ConfigError for rows of another width."""
        return scenario_suffix(scenario, self.query, self.bundle.manifest.dims.hidden_dim)

    def _values(self, names: list[str], kv_L2BGCK: KvArray) -> dict[str, Any]:
        """Key and value of each layer by tensor name, as OrtValues over the array's memory."""
        onnx_type = element_type(self.bundle.manifest.dims.kv_dtype)
        return {
            name: ort.OrtValue.ortvalue_from_numpy_with_onnx_type(
                kv_L2BGCK[index // 2, index % 2], onnx_type
            )
            for index, name in enumerate(names)
        }


def _noise_like(kv_L2GCK: KvArray) -> KvArray:
    """Noise of the array's shape and type; of bfloat16, whose bits lie in uint16, small numbers."""
    draw = np.random.default_rng(0)
    if kv_L2GCK.dtype.kind == "f":
        return draw.standard_normal(kv_L2GCK.shape, dtype=np.float32).astype(kv_L2GCK.dtype)
    low, high = (-127, 128) if kv_L2GCK.dtype == np.int8 else (0x3F00, 0x4000)
    return draw.integers(low, high, kv_L2GCK.shape, dtype=kv_L2GCK.dtype)


def _stack(kvs: list[KvArray]) -> KvArray:
    """[L, 2, B, G, C, K] of users of different capacity; missing columns are zeros."""
    layers, two, heads, _, width = kvs[0].shape
    capacity = max(kv.shape[3] for kv in kvs)
    stacked = np.zeros((layers, two, len(kvs), heads, capacity, width), dtype=kvs[0].dtype)
    for user, kv in enumerate(kvs):
        stacked[:, :, user, :, : kv.shape[3]] = kv
    return stacked
