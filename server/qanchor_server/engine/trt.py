"""The bundle's graphs as TensorRT plan files, one execution context and CUDA graph per bucket.

Not run yet: no GPU was at hand. Calls are those that the Python API of TensorRT 10.15 and 11.4 has
in common. A captured graph holds the addresses of its context, which must not change afterwards:
hence a context per bucket. All contexts share one scratch memory, since one stream runs them one
after the other. Must not know scheduling. Call from the worker thread only.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorrt as trt

from qanchor.bundle.buckets import BucketLimits, Ladders, Range, find_profile, make_ladders
from qanchor.bundle.manifest import Manifest
from qanchor.bundle.plans import GraphPlan, Target, check_ladders, find_plans
from qanchor.bundle.reader import Bundle
from qanchor.errors import BundleError
from qanchor_server.engine.cuda_memory import CudaMemory
from qanchor_server.engine.static import StaticEngine, shape_of


@dataclass(frozen=True, slots=True, kw_only=True)
class TrtOptions:
    """How the plan files are run; see ServerConfig."""

    plans_dir: str
    device_id: int = 0
    cuda_graphs: bool = True


@dataclass(frozen=True, slots=True)
class _Plan:
    runtime: Any
    """Kept: an engine must not outlive the runtime that loaded it."""
    engine: Any
    profiles: tuple[dict[str, Range], ...]


class TrtRunner:
    """GraphRunner of TensorRT."""

    def __init__(
        self, manifest: Manifest, memory: CudaMemory, *, uses_graphs: bool, plans: dict[str, _Plan]
    ) -> None:
        """Set the scratch memory aside. Raises Retryable when out of memory."""
        self._specs = manifest.graphs
        self._memory = memory
        self._uses_graphs = uses_graphs
        self._plans = plans
        self._scratch_bytes = max(
            plan.engine.get_device_memory_size_for_profile_v2(index)
            for plan in plans.values()
            for index in range(plan.engine.num_optimization_profiles)
        )
        self._scratch = memory.allocate(max(1, self._scratch_bytes))
        # A context that is collected takes the memory its captured graph uses with it.
        self._contexts: list[Any] = []

    def ready(
        self, graph: str, dims: Mapping[str, int], addresses: Mapping[str, int]
    ) -> Callable[[], None]:
        """Fix profile, shapes and addresses in a context of its own and capture it."""
        plan, stream = self._plans[graph], self._memory.stream
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = plan.engine.create_execution_context(strategy)
        if context is None:
            raise BundleError(f"{graph}: TensorRT made no execution context; its log says why")
        self._contexts.append(context)
        _check(context.set_optimization_profile_async(find_profile(plan.profiles, dims), stream))
        context.set_device_memory(self._scratch, self._scratch_bytes)
        spec = self._specs[graph]
        for tensor in spec.inputs:
            _check(context.set_input_shape(tensor.name, shape_of(tensor, dims)), tensor.name)
        for tensor in (*spec.inputs, *spec.outputs):
            _check(context.set_tensor_address(tensor.name, addresses[tensor.name]), tensor.name)

        def enqueue() -> None:
            _check(context.execute_async_v3(stream), graph)

        # The first run does what a shape needs once, which must not become part of the graph.
        enqueue()
        self._memory.wait()
        return self._memory.capture(enqueue) if self._uses_graphs else enqueue


def open_trt_engine(
    bundle: Bundle, limits: BucketLimits, options: TrtOptions
) -> tuple[StaticEngine, Ladders]:
    """The engine on plan files that fit this machine, and the ladders they were built for.

    Raises BundleError where none fit, ConfigError where they hold less than `limits` ask for.
    """
    memory = CudaMemory(options.device_id)
    gpu, manifest = memory.gpu(), bundle.manifest
    target = Target(
        gpu=gpu.name,
        compute_capability=gpu.compute_capability,
        tensorrt_version=trt.__version__,
    )
    directory, found = find_plans(Path(options.plans_dir), manifest, target)
    check_ladders(found.ladders, make_ladders(limits, manifest.limits, manifest.profile_schema))
    log = trt.Logger(trt.Logger.WARNING)
    runtime = trt.Runtime(log)
    plans = {name: _load(runtime, directory, plan) for name, plan in found.graphs.items()}
    runner = TrtRunner(manifest, memory, uses_graphs=options.cuda_graphs, plans=plans)
    return StaticEngine(manifest, found.ladders, memory, runner), found.ladders


def _load(runtime: Any, directory: Path, plan: GraphPlan) -> _Plan:
    engine = runtime.deserialize_cuda_engine((directory / plan.file).read_bytes())
    if engine is None:
        raise BundleError(f"{directory / plan.file}: TensorRT cannot load it; build it again")
    return _Plan(runtime, engine, plan.profiles)


def _check(is_done: bool, what: str = "profile") -> None:
    if not is_done:
        raise RuntimeError(f"TensorRT refused {what}; its log says why")
