"""The bundle's graphs on ONNX Runtime's CUDA execution provider, one CUDA graph per bucket.

Everything is bound by address, once per bucket, on the stream that also carries the copies. The
same runner on host memory and the CPU provider is what the tests run where there is no GPU.

ONNX Runtime runs a `gpu_graph_id` once, captures it right after and replays from then on. While a
stream is captured its arena cannot grow, so a bucket first runs without capture until a run of the
same sizes finds all its memory there. Bound host arrays would not be read again on replay, hence
addresses (onnxruntime issue 29782). Own stream, bound addresses and no wait in `run` together leave
the host free until the engine's one wait; replay respects that since pull request 28686.
Must not know scheduling. Call from the worker thread only.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import onnxruntime as ort

from qanchor.bundle.buckets import Ladders
from qanchor.bundle.manifest import EVENT_ENCODER, PREFIX, SUFFIX, TensorSpec
from qanchor.bundle.reader import Bundle
from qanchor.bundle.slot import element_type
from qanchor_server.engine.memory import DeviceMemory
from qanchor_server.engine.ort_session import CPU, CUDA, memory_is_retryable, open_session
from qanchor_server.engine.static import StaticEngine, shape_of

_INT64 = 7  # onnx.TensorProto.INT64
_NO_CAPTURE = "-1"
_SETTLING_RUNS = 2
"""The first traces what a run of these sizes allocates, the second allocates it in one piece."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaOptions:
    """How the CUDA sessions are made; see ServerConfig for the trade-offs."""

    device_id: int = 0
    arena_bytes: int = 0
    """Most bytes of ONNX Runtime's arena per graph; 0: no bound."""
    cuda_graphs: bool = True


class OrtRunner:
    """GraphRunner of ONNX Runtime on the device its memory lies on."""

    def __init__(
        self, bundle: Bundle, memory: DeviceMemory, provider_options: Mapping[str, str]
    ) -> None:
        """Open the three graphs. Raises BundleError, ConfigError as `open_session`."""
        self._specs = bundle.manifest.graphs
        self._memory = memory
        self._has_graphs = provider_options.get("enable_cuda_graph") == "1"
        self._num_ready = 0
        provider = CUDA if memory.device_type == "cuda" else CPU
        self._sessions = {}
        for graph in (EVENT_ENCODER, PREFIX, SUFFIX):
            options = ort.SessionOptions()
            options.intra_op_num_threads = 1
            self._sessions[graph] = open_session(bundle, graph, options, provider, provider_options)

    def ready(
        self, graph: str, dims: Mapping[str, int], addresses: Mapping[str, int]
    ) -> Callable[[], None]:
        """Bind every tensor and, with CUDA graphs, capture. Raises Retryable."""
        session, spec = self._sessions[graph], self._specs[graph]
        binding = session.io_binding()
        for tensor in spec.inputs:
            binding.bind_input(tensor.name, *self._place(tensor, dims, addresses))
        for tensor in spec.outputs:
            binding.bind_output(tensor.name, *self._place(tensor, dims, addresses))

        def call(options: Any) -> None:
            with memory_is_retryable():
                session.run_with_iobinding(binding, options)

        if not self._has_graphs:
            return partial(call, ort.RunOptions())
        for _ in range(_SETTLING_RUNS):
            call(_graph_options(_NO_CAPTURE))
        self._num_ready += 1
        run = partial(call, _graph_options(str(self._num_ready)))
        run()
        self._memory.wait()
        return run

    def _place(
        self, tensor: TensorSpec, dims: Mapping[str, int], addresses: Mapping[str, int]
    ) -> tuple[str, int, int, tuple[int, ...], int]:
        memory, shape = self._memory, shape_of(tensor, dims)
        # By number, as in ONNX: numpy has no bfloat16.
        kind = _INT64 if tensor.dtype == "int64" else element_type(tensor.dtype)
        return memory.device_type, memory.device_id, kind, shape, addresses[tensor.name]


def _graph_options(graph_id: str) -> Any:
    """Of one bucket's CUDA graph; the engine waits for the stream, not the session."""
    options = ort.RunOptions()
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    options.add_run_config_entry("gpu_graph_id", graph_id)
    return options


def open_cuda_engine(bundle: Bundle, ladders: Ladders, options: CudaOptions) -> StaticEngine:
    """The engine on a GPU. Raises BundleError, ConfigError, and Retryable when out of memory."""
    # Only here: the runner on host memory needs no CUDA bindings.
    from qanchor_server.engine.cuda_memory import CudaMemory

    # Finds CUDA and cuDNN where pip put them; what it does not find, the system's loader may.
    ort.preload_dlls()
    memory = CudaMemory(options.device_id)
    provider_options = {
        "device_id": str(options.device_id),
        # One stream for copies and graphs: they are ordered without a wait of the host.
        "user_compute_stream": str(memory.stream),
        "enable_cuda_graph": "1" if options.cuda_graphs else "0",
        # Grows by what is asked for: doubling would take the memory that users' slots need.
        "arena_extend_strategy": "kSameAsRequested",
        # float32 means float32; bfloat16 is there for speed.
        "use_tf32": "0",
    }
    if options.arena_bytes:
        provider_options["gpu_mem_limit"] = str(options.arena_bytes)
    runner = OrtRunner(bundle, memory, provider_options)
    return StaticEngine(bundle.manifest, ladders, memory, runner)
