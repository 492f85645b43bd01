"""The bundle's graphs on ONNX Runtime's CPU provider, with every slot's tensors bound once.

A slot is one contiguous array of keys and values. Its per-layer views are bound when the slot is
made; a step binds only its token inputs. One user: the graph reads the slot where it lies, all
threads on each operator. Several users of a small model: side by side, a thread for each, from a
second session. Of a large one: those with many tokens one after the other, all threads on each;
the slots of the others are copied into a padded working array first.

Must not know scheduling or profiles. Call from the worker thread only; what was begun side by side
goes on meanwhile, with tensors of its own.

Legend: L layers, 2 key and value, B users, G KV heads, C prefix_capacity, K head_dim,
T chunk length, Q queries, Z embedding_dim.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from qanchor.bundle.manifest import (
    EVENT_ENCODER,
    PREFIX,
    SUFFIX,
    asks_by_query,
    past_names,
    present_names,
)
from qanchor.bundle.packing import PackedSuffix
from qanchor.bundle.reader import Bundle
from qanchor.bundle.slot import KvArray, element_type, slot_layout, storage_dtype, zero_slot
from qanchor_server.engine import (
    ByteArray,
    FloatArray,
    IntArray,
    PrefixChunk,
    RunsDone,
    SuffixRun,
)
from qanchor_server.engine.lanes import Lanes
from qanchor_server.engine.ort_session import memory_is_retryable, open_session

_TOKENS_ALONE = 64
"""From so many suffix tokens a user is run alone: products are near their full rate then, and a
joint step's packing, copies and padding cost more than they save (docs/log.md)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OrtOptions:
    """How sessions are made; see ServerConfig for the trade-offs."""

    intra_op_threads: int = 0
    allow_spinning: bool = True
    lanes: int = 1
    """Runs of a step that go side by side, a thread each; 1: none."""


@dataclass(slots=True, eq=False)
class _SuffixBinding:
    """A slot as one session of the suffix graph reads it."""

    session: Any
    values: Any
    """The session's IOBinding, past bound."""
    bound: PackedSuffix | None = None
    """The step it is bound to, its output included."""


@dataclass(slots=True, eq=False)
class OrtSlot:
    """One user's keys and values and the bindings that read them."""

    kv_L2GCK: KvArray
    prefix: Any
    """IOBinding of the prefix graph, past bound."""
    suffix: tuple[_SuffixBinding, ...]
    """The engine's own and one per lane: two lanes may read a slot at once."""


_Run = Callable[[_SuffixBinding, PackedSuffix], FloatArray]


class OrtSideBySide:
    """A session of the suffix graph with one thread per run, run by several threads at once."""

    def __init__(self, session: Any, num_lanes: int, run: _Run) -> None:
        """`run`: what makes embeddings of a binding and a packed step."""
        self.session = session
        self.num_lanes = num_lanes
        self._lanes = Lanes(num_lanes)
        self._run = run

    def begin(self, runs: Sequence[SuffixRun[OrtSlot]], done: RunsDone) -> None:
        """Have runs of one user each computed. `done` may get Retryable: out of memory."""
        self._lanes.begin(
            [partial(self._run_in, slot, packed) for packed, (slot,) in runs],
            done,
        )

    def _run_in(self, slot: OrtSlot, packed: PackedSuffix, lane: int) -> FloatArray:
        with memory_is_retryable():
            return self._run(slot.suffix[1 + lane], packed)


class OrtEngine:
    """Event encoder, prefix and suffix graph of one bundle."""

    def __init__(self, bundle: Bundle, options: OrtOptions) -> None:
        """Open the three graphs.

        Raises BundleError when a graph is of another export or takes other tensors than the
        manifest says.
        """
        self._bundle = bundle
        self._dims = bundle.manifest.dims
        self._by_query = asks_by_query(bundle.manifest.precision)
        self._past_names = past_names(self._dims.num_layers)
        self._present_names = present_names(self._dims.num_layers)
        self._event_encoder = self._open(EVENT_ENCODER, options)
        self._prefix = self._open(PREFIX, options)
        self._suffix = self._open(SUFFIX, options)
        self._side_by_side: OrtSideBySide | None = None
        if options.lanes > 1:
            session = self._open(SUFFIX, replace(options, intra_op_threads=1))
            self._side_by_side = OrtSideBySide(session, options.lanes, self._run)
        self._empty_past = self._prefix.io_binding()
        self._bind_past(self._empty_past, zero_slot(self._dims, 1)[:, :, None])
        self._present = zero_slot(self._dims, 0)
        self._present_values: list[Any] = []
        self._staging = np.zeros(0, dtype=storage_dtype(self._dims.kv_dtype))

    @property
    def side_by_side(self) -> OrtSideBySide | None:
        """Runs of one user each, a thread for each, where the options have lanes."""
        return self._side_by_side

    def encode_events(self, token_ids_NT: IntArray) -> FloatArray:
        """Event vectors [N, event_dim]. Raises Retryable when out of memory."""
        with memory_is_retryable():
            (vectors_NE,) = self._event_encoder.run(None, {"event_token_ids": token_ids_NT})
        found: FloatArray = vectors_NE
        return found

    def allocate_slot(self, capacity: int) -> OrtSlot:
        """A zeroed slot for `capacity` positions. Raises Retryable when out of memory."""
        with memory_is_retryable():
            # Zeros, not whatever lies there: a masked NaN is still a NaN after the product with 0.
            kv_L2GCK = zero_slot(self._dims, capacity)
            kv_L2BGCK = kv_L2GCK[:, :, None]
            prefix = self._prefix.io_binding()
            self._bind_past(prefix, kv_L2BGCK)
            suffix = [self._past_binding(self._suffix, kv_L2BGCK)]
            if (beside := self._side_by_side) is not None:
                lanes = range(beside.num_lanes)
                suffix += [self._past_binding(beside.session, kv_L2BGCK) for _ in lanes]
        return OrtSlot(kv_L2GCK, prefix, tuple(suffix))

    def clear_slot(self, slot: OrtSlot) -> None:
        """Overwrite the slot with zeros; let go of the embeddings of its last step."""
        slot.kv_L2GCK.fill(0)
        for binding in slot.suffix:
            binding.values.clear_binding_outputs()
            binding.bound = None

    def clear_working(self) -> None:
        """Overwrite the engine's working copies with zeros."""
        self._staging.fill(0)
        self._present.fill(0)

    def free_slot(self, slot: OrtSlot) -> None:
        """Let go of the slot's bindings; its memory goes with the last reference."""
        slot.prefix.clear_binding_inputs()
        for binding in slot.suffix:
            binding.values.clear_binding_inputs()
            binding.bound = None

    @property
    def slot_layout(self) -> str:
        """Element type and dimensions of a slot's numbers."""
        return slot_layout(self._dims)

    def host_arena(self, num_bytes: int) -> ByteArray:
        """Uninitialised memory [num_bytes]; the system gives pages as they are written."""
        return np.empty(num_bytes, dtype=np.uint8)

    def export_slot(self, slot: OrtSlot, num_tokens: int, out: ByteArray) -> None:
        """Copy the slot's first positions into `out`, dense; one strided copy."""
        kept = slot.kv_L2GCK[:, :, :, :num_tokens]
        np.copyto(out.view(kept.dtype).reshape(kept.shape), kept)

    def import_slot(self, slot: OrtSlot, num_tokens: int, source: ByteArray) -> None:
        """Copy an export back into the slot's first positions; one strided copy."""
        kept = slot.kv_L2GCK[:, :, :, :num_tokens]
        np.copyto(kept, source.view(kept.dtype).reshape(kept.shape))

    def prefill(self, slot: OrtSlot, chunk: PrefixChunk) -> None:
        """Write keys and values of a chunk into the slot. Raises Retryable when out of memory."""
        chunk_len = len(chunk.token_ids_C)
        # Nothing precedes the first chunk: one masked column costs less than the whole slot's.
        binding = self._empty_past if chunk.start == 0 else slot.prefix
        inputs: dict[str, npt.NDArray[Any]] = {
            "token_ids": chunk.token_ids_C,
            "adapter": chunk.adapter_C,
            "slot_vectors": chunk.vectors_CE,
            "past_len": np.array([chunk.start], dtype=np.int64),
        }
        with memory_is_retryable():
            self._fit_present(chunk_len)
            for name, value in zip(self._present_names, self._present_values, strict=True):
                binding.bind_ortvalue_output(name, value)
            for name, array in inputs.items():
                binding.bind_cpu_input(name, array)
            self._prefix.run_with_iobinding(binding)
        stop = chunk.start + chunk_len
        slot.kv_L2GCK[:, :, :, chunk.start : stop] = self._present

    def runs(self, num_tokens: Sequence[int]) -> list[list[int]]:
        """Those with many tokens each by itself."""
        alone = [[user] for user, count in enumerate(num_tokens) if count >= _TOKENS_ALONE]
        together = [user for user, count in enumerate(num_tokens) if count < _TOKENS_ALONE]
        return [*alone, together] if together else alone

    def suffix(self, packed: PackedSuffix, slots: Sequence[OrtSlot]) -> FloatArray:
        """L2-normalised embeddings [Q, Z] over the slots. Raises Retryable when out of memory."""
        with memory_is_retryable():
            if len(slots) == 1:
                return self._run(slots[0].suffix[0], packed)
            return self._run(self._stage(slots), packed)

    def _run(self, binding: _SuffixBinding, packed: PackedSuffix) -> FloatArray:
        # Asked the same again, a slot's binding still holds every input, and an output that fits.
        if binding.bound is not packed:
            binding.bound = None
            for name, array in packed.inputs(by_query=self._by_query).items():
                binding.values.bind_cpu_input(name, array)
            binding.values.bind_output("embeddings", "cpu")
            binding.bound = packed
        binding.session.run_with_iobinding(binding.values)
        embeddings_QZ: FloatArray = binding.values.copy_outputs_to_cpu()[0]
        return embeddings_QZ

    def _open(self, graph: str, options: OrtOptions) -> Any:
        session_options = ort.SessionOptions()
        session_options.intra_op_num_threads = options.intra_op_threads
        session_options.inter_op_num_threads = 1
        if affinities := _affinities(options.intra_op_threads):
            session_options.add_session_config_entry(
                "session.intra_op_thread_affinities", affinities
            )
        spinning = "1" if options.allow_spinning else "0"
        session_options.add_session_config_entry("session.intra_op.allow_spinning", spinning)
        # Between steps the cores belong to whoever receives and sends.
        session_options.add_session_config_entry("session.force_spinning_stop", spinning)
        return open_session(self._bundle, graph, session_options)

    def _past_binding(self, session: Any, kv_L2BGCK: KvArray) -> _SuffixBinding:
        binding = session.io_binding()
        self._bind_past(binding, kv_L2BGCK)
        return _SuffixBinding(session, binding)

    def _bind_past(self, binding: Any, kv_L2BGCK: KvArray) -> None:
        for name, value in zip(self._past_names, self._layer_values(kv_L2BGCK), strict=True):
            binding.bind_ortvalue_input(name, value)

    def _fit_present(self, chunk_len: int) -> None:
        if self._present.shape[3] != chunk_len:
            self._present = zero_slot(self._dims, chunk_len)
            self._present_values = self._layer_values(self._present[:, :, None])

    def _layer_values(self, kv_L2BGCK: KvArray) -> list[Any]:
        """Key and value of each layer as OrtValues that share the array's memory."""
        onnx_type = element_type(self._dims.kv_dtype)
        return [
            ort.OrtValue.ortvalue_from_numpy_with_onnx_type(kv_L2BGCK[layer, part], onnx_type)
            for layer in range(kv_L2BGCK.shape[0])
            for part in range(2)
        ]

    def _stage(self, slots: Sequence[OrtSlot]) -> _SuffixBinding:
        """Copy several slots side by side and bind them; columns beyond a slot are zero.

        prefix_len masks those, but a number of another user that is not finite would still spoil
        the sum that a zero weight takes it into.
        """
        capacity = max(slot.kv_L2GCK.shape[3] for slot in slots)
        dims = self._dims
        shape = (dims.num_layers, 2, len(slots), dims.num_kv_heads, capacity, dims.head_dim)
        size = int(np.prod(shape))
        if self._staging.size < size:
            self._staging = np.zeros(size, dtype=self._staging.dtype)
        kv_L2BGCK = self._staging[:size].reshape(shape)
        for user, slot in enumerate(slots):
            held = slot.kv_L2GCK.shape[3]
            kv_L2BGCK[:, :, user, :, :held] = slot.kv_L2GCK
            kv_L2BGCK[:, :, user, :, held:] = 0
        return self._past_binding(self._suffix, kv_L2BGCK)


def _affinities(num_threads: int) -> str:
    """A processor for each thread of ONNX Runtime's pool, where all processors are used; else "".

    After some milliseconds of rest the system wakes the pool on the processor that the caller
    computes and spins on, and moves nobody before the next tick: steps then take several times as
    long (docs/log.md). ONNX Runtime does the same itself when it chooses the number of threads.
    """
    processors = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if num_threads < 2 or num_threads != len(processors):
        return ""
    # The caller is a thread of the step too, and stays free. Numbers count from 1 there.
    return ";".join(str(processor + 1) for processor in processors[1:])
