"""An engine of static buckets: every graph reads and writes fixed addresses.

1 A step's tokens go into page-locked host arrays of its bucket's shapes, padded.
2 One upload. 3 The users' keys and values are copied side by side into one staging region, on the
device. 4 The graph runs; a GPU replays it as one CUDA graph. 5 One download of the vectors.

A slot is one contiguous region [layers, 2, kv heads, capacity, head dim] that no graph reads where
it lies: the copy costs microseconds of a GPU's bandwidth and makes the addresses static. A chunk's
keys and values come out dense and are copied into their columns of the slot.

What runs a graph comes as a `GraphRunner` (`cuda.py`, `trt.py`), where it stands as `DeviceMemory`.
Must not know ONNX Runtime, TensorRT or CUDA. Call from the worker thread only.

Legend: N texts, T text length, E event_dim, Q queries, Z embedding_dim; sizes B users, G KV heads,
C prefix_capacity, K head_dim in comments.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from qanchor.bundle.buckets import EventBucket, Ladders, PrefixBucket, SuffixBucket
from qanchor.bundle.manifest import (
    EVENT_ENCODER,
    KV_ITEM_BYTES,
    PREFIX,
    SUFFIX,
    DType,
    Manifest,
    TensorSpec,
    asks_by_query,
)
from qanchor.bundle.packing import PackedSuffix
from qanchor.bundle.padding import fill_chunk, fill_suffix, fill_texts
from qanchor.bundle.slot import slot_layout
from qanchor_server.engine import FloatArray, IntArray, PrefixChunk
from qanchor_server.engine.memory import Bytes, DeviceMemory, aligned
from qanchor_server.failures import Retryable

Bucket = SuffixBucket | PrefixBucket | EventBucket
Addresses = Mapping[str, int]

PAST_PREFIX = "past_key_values."


class GraphRunner(Protocol):
    """Makes one graph ready for one bucket."""

    def ready(
        self, graph: str, dims: Mapping[str, int], addresses: Addresses
    ) -> Callable[[], None]:
        """A call that enqueues the graph on the memory's stream, with these sizes, here.

        May run the graph, to capture it. Raises Retryable when out of memory.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class StaticSlot:
    """One user's keys and values."""

    address: int
    capacity: int


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """One bucket, ready to run."""

    inputs: dict[str, npt.NDArray[Any]]
    """Host arrays of the bucket's shapes, one behind the other in `host`."""
    host: Bytes
    run: Callable[[], None]


@dataclass(frozen=True, slots=True)
class _Columns:
    """Where one user's keys and values stand in memory, in bytes."""

    address: int
    """Of the first column of head 0 of the first tensor."""
    head_bytes: int
    """From head to head."""
    tensor_bytes: int
    """From tensor to tensor: key, value, next layer's key, ..."""

    def head(self, head: int) -> tuple[int, int]:
        """(address, pitch) of one head's first column in all tensors."""
        return self.address + head * self.head_bytes, self.tensor_bytes


class StaticEngine:
    """Event encoder, prefix and suffix graph of one bundle in static buckets."""

    def __init__(
        self, manifest: Manifest, ladders: Ladders, memory: DeviceMemory, runner: GraphRunner
    ) -> None:
        """Set the regions aside that the largest buckets need. Raises Retryable."""
        self._manifest = manifest
        self._by_query = asks_by_query(manifest.precision)
        self._ladders = ladders
        self._memory = memory
        self._runner = runner
        self._column_bytes = manifest.dims.head_dim * KV_ITEM_BYTES[manifest.dims.kv_dtype]
        self._steps: dict[Bucket, _Step] = {}
        sizes = {"input": 0, "past": 0, "output": 0}
        for graph, all_dims in ladders.largest().items():
            for dims in all_dims:
                for region, size in _region_bytes(manifest, graph, dims).items():
                    sizes[region] = max(sizes[region], size)
        self._sizes = sizes
        self._regions = {region: memory.allocate(size) for region, size in sizes.items()}
        self._host_inputs = memory.host_array(sizes["input"])
        self._host_output = memory.host_array(sizes["output"])

    @property
    def num_working_bytes(self) -> int:
        """Device bytes of the regions shared by all steps, slots and graphs not counted."""
        return sum(self._sizes.values())

    def warm_up(self, buckets: Sequence[Bucket]) -> None:
        """Make buckets ready ahead of their first step. Raises Retryable when out of memory."""
        for bucket in buckets:
            self._step(bucket)

    @property
    def side_by_side(self) -> None:
        """No: all users of a step are in one launch."""
        return None

    def encode_events(self, token_ids_NT: IntArray) -> FloatArray:
        """Event vectors [N, E]. Raises Retryable when out of memory."""
        num_texts, text_len = token_ids_NT.shape
        parts = []
        start = 0
        while start < num_texts:
            bucket = self._ladders.event_bucket(num_texts=num_texts - start, text_len=text_len)
            stop = min(num_texts, start + bucket.num_texts)
            step = self._step(bucket)
            fill_texts(
                token_ids_NT[start:stop], self._manifest.event_pad, step.inputs["event_token_ids"]
            )
            self._run(step)
            parts.append(self._take_rows(stop - start, self._manifest.dims.event_dim))
            start = stop
        return np.concatenate(parts)

    def allocate_slot(self, capacity: int) -> StaticSlot:
        """A zeroed slot for `capacity` positions. Raises Retryable when out of memory."""
        return StaticSlot(self._memory.allocate(self._slot_bytes(capacity)), capacity)

    def clear_slot(self, slot: StaticSlot) -> None:
        """Overwrite the slot with zeros."""
        self._memory.clear(slot.address, self._slot_bytes(slot.capacity))
        self._memory.wait()

    def clear_working(self) -> None:
        """Overwrite the shared regions and their host side with zeros."""
        for region, address in self._regions.items():
            self._memory.clear(address, self._sizes[region])
        self._memory.wait()
        self._host_inputs.fill(0)
        self._host_output.fill(0)

    def free_slot(self, slot: StaticSlot) -> None:
        """Give a slot's memory back."""
        self._memory.free(slot.address)

    @property
    def slot_layout(self) -> str:
        """Element type and dimensions of a slot's numbers."""
        return slot_layout(self._manifest.dims)

    def host_arena(self, num_bytes: int) -> Bytes:
        """Page-locked host memory for exports and imports. Raises MemoryError."""
        try:
            return self._memory.host_array(num_bytes)
        except Retryable as error:
            raise MemoryError(str(error)) from error

    def export_slot(self, slot: StaticSlot, num_tokens: int, out: Bytes) -> None:
        """Copy the slot's first positions to the host arena, dense; one strided copy."""
        self._move((_address(out), num_tokens), (slot.address, slot.capacity), num_tokens)

    def import_slot(self, slot: StaticSlot, num_tokens: int, source: Bytes) -> None:
        """Copy an export back into the slot's first positions; one strided copy."""
        self._move((slot.address, slot.capacity), (_address(source), num_tokens), num_tokens)

    def prefill(self, slot: StaticSlot, chunk: PrefixChunk) -> None:
        """Write keys and values of a chunk into the slot. Raises Retryable when out of memory."""
        chunk_len = len(chunk.token_ids_C)
        bucket = self._ladders.prefix_bucket(chunk_len=chunk_len, start=chunk.start)
        step = self._step(bucket)
        arrays: dict[str, npt.NDArray[Any]] = {
            "token_ids": chunk.token_ids_C,
            "adapter": chunk.adapter_C,
            "slot_vectors": chunk.vectors_CE,
        }
        fill_chunk(arrays, chunk.start, step.inputs)
        self._stage(slot, chunk.start, 0, bucket.dims() | {"batch": 1})
        self._run(step)
        present = self._columns("output", {"batch": 1, "prefix_capacity": bucket.chunk_len})
        self._copy(self._slot_columns(slot, chunk.start), present, chunk_len)
        self._memory.wait()

    def runs(self, num_tokens: Sequence[int]) -> list[list[int]]:
        """All users together: one launch, and the weights are read once."""
        return [list(range(len(num_tokens)))]

    def suffix(self, packed: PackedSuffix, slots: Sequence[StaticSlot]) -> FloatArray:
        """L2-normalised embeddings [Q, Z] over the slots. Raises Retryable when out of memory."""
        num_queries = len(packed.emb_index_Q)
        prefix_lens = packed.prefix_len_B.tolist()
        bucket = self._ladders.suffix_bucket(
            num_users=len(slots),
            longest_row=packed.row_index_BR.shape[1],
            packed_len=len(packed.token_ids_S),
            num_queries=num_queries,
            longest_query=packed.query_index_QL.shape[1] if self._by_query else 1,
            prefix_len=max(prefix_lens),
        )
        step = self._step(bucket)
        fill_suffix(packed, step.inputs)
        for user, (slot, prefix_len) in enumerate(zip(slots, prefix_lens, strict=True)):
            self._stage(slot, prefix_len, user, bucket.dims())
        # Soft-prompt rows stand last: what the step does not use is not sent.
        unused = step.inputs["prompt_rows"][len(packed.prompt_rows_KD) :].nbytes
        self._run(step, skip_bytes=unused)
        return self._take_rows(num_queries, self._manifest.dims.embedding_dim)

    def _step(self, bucket: Bucket) -> _Step:
        if bucket not in self._steps:
            self._steps[bucket] = self._make_step(bucket)
        return self._steps[bucket]

    def _make_step(self, bucket: Bucket) -> _Step:
        graph, dims = _GRAPH_OF[type(bucket)], bucket.dims()
        spec = self._manifest.graphs[graph]
        addresses: dict[str, int] = {}
        inputs: dict[str, npt.NDArray[Any]] = {}
        offset = stop = 0
        for tensor in _token_inputs(spec.inputs):
            shape = shape_of(tensor, dims)
            stop = offset + prod(shape) * item_bytes(tensor.dtype)
            view = self._host_inputs[offset:stop].view(tensor.dtype)
            inputs[tensor.name] = view.reshape(shape)
            addresses[tensor.name] = self._regions["input"] + offset
            offset = aligned(stop)
        for region, tensors in (("past", _past(spec.inputs)), ("output", spec.outputs)):
            address = self._regions[region]
            for tensor in tensors:
                addresses[tensor.name] = address
                address += aligned(_num_bytes(tensor, dims))
        # The runner may run the graph to capture it: what other buckets left here would be taken
        # for token ids far outside the table.
        self._memory.clear(self._regions["input"], self._sizes["input"])
        run = self._runner.ready(graph, dims, addresses)
        return _Step(inputs, self._host_inputs[:stop], run)

    def _run(self, step: _Step, *, skip_bytes: int = 0) -> None:
        self._memory.upload(self._regions["input"], step.host[: len(step.host) - skip_bytes])
        step.run()

    def _take_rows(self, num_rows: int, width: int) -> FloatArray:
        """The first rows of a float32 output; waits for the device."""
        host = self._host_output[: num_rows * width * item_bytes("float32")]
        self._memory.download(host, self._regions["output"])
        self._memory.wait()
        return host.view(np.float32).reshape(num_rows, width).copy()

    def _stage(self, slot: StaticSlot, num_columns: int, user: int, dims: dict[str, int]) -> None:
        """Copy a slot's first columns to where the bucket's graph reads user `user`.

        Columns behind them keep old, finite numbers; prefix_len masks them.
        """
        if num_columns:
            self._copy(self._columns("past", dims, user), self._slot_columns(slot, 0), num_columns)

    def _columns(self, region: str, dims: Mapping[str, int], user: int = 0) -> _Columns:
        """A user's keys and values among all users' in a region, tensor by tensor."""
        heads = self._manifest.dims.num_kv_heads
        head_bytes = dims["prefix_capacity"] * self._column_bytes
        return _Columns(
            address=self._regions[region] + user * heads * head_bytes,
            head_bytes=head_bytes,
            tensor_bytes=aligned(dims["batch"] * heads * head_bytes),
        )

    def _slot_columns(self, slot: StaticSlot, start: int) -> _Columns:
        head_bytes = slot.capacity * self._column_bytes
        return _Columns(
            address=slot.address + start * self._column_bytes,
            head_bytes=head_bytes,
            tensor_bytes=self._manifest.dims.num_kv_heads * head_bytes,
        )

    def _copy(self, target: _Columns, source: _Columns, num_columns: int) -> None:
        dims = self._manifest.dims
        for head in range(dims.num_kv_heads):
            self._memory.copy_rows(
                target.head(head),
                source.head(head),
                num_bytes=num_columns * self._column_bytes,
                num_rows=2 * dims.num_layers,
            )

    def _move(self, target: tuple[int, int], source: tuple[int, int], num_columns: int) -> None:
        """Copy the first columns of all heads; each side is (address, its columns per head)."""
        dims, width = self._manifest.dims, self._column_bytes
        self._memory.copy_rows(
            (target[0], target[1] * width),
            (source[0], source[1] * width),
            num_bytes=num_columns * width,
            num_rows=2 * dims.num_layers * dims.num_kv_heads,
        )
        self._memory.wait()

    def _slot_bytes(self, capacity: int) -> int:
        return capacity * self._manifest.dims.kv_bytes_per_token


def shape_of(tensor: TensorSpec, dims: Mapping[str, int]) -> tuple[int, ...]:
    """A tensor's shape where its named dimensions have these sizes."""
    return tuple(dims[dim] if isinstance(dim, str) else dim for dim in tensor.dims)


_GRAPH_OF = {SuffixBucket: SUFFIX, PrefixBucket: PREFIX, EventBucket: EVENT_ENCODER}


def _address(array: Bytes) -> int:
    address: int = array.ctypes.data
    return address


def item_bytes(dtype: DType) -> int:
    """Bytes of one number."""
    return 8 if dtype == "int64" else KV_ITEM_BYTES[dtype]


def _past(tensors: Sequence[TensorSpec]) -> list[TensorSpec]:
    return [tensor for tensor in tensors if tensor.name.startswith(PAST_PREFIX)]


def _token_inputs(tensors: Sequence[TensorSpec]) -> list[TensorSpec]:
    """Inputs that come from the host, soft-prompt rows last."""
    fresh = [tensor for tensor in tensors if not tensor.name.startswith(PAST_PREFIX)]
    return sorted(fresh, key=lambda tensor: tensor.name == "prompt_rows")


def _num_bytes(tensor: TensorSpec, dims: Mapping[str, int]) -> int:
    return prod(shape_of(tensor, dims)) * item_bytes(tensor.dtype)


def _region_bytes(manifest: Manifest, graph: str, dims: Mapping[str, int]) -> dict[str, int]:
    spec = manifest.graphs[graph]
    parts = {
        "input": _token_inputs(spec.inputs),
        "past": _past(spec.inputs),
        "output": list(spec.outputs),
    }
    return {
        region: sum(aligned(_num_bytes(tensor, dims)) for tensor in tensors)
        for region, tensors in parts.items()
    }
