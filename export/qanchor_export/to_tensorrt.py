"""A finished bundle to TensorRT plan files, on the machine whose GPU will run them.

Not run yet: TensorRT's builder was not at hand. Calls are those that the Python API of TensorRT
10.15 and 11.4 has in common. Networks are strongly typed, the only way from TensorRT 11 on: a plan
computes in the types of the bundle's graphs, so the precision is chosen by `export --precision`.

1 Check that the graphs have only standard operators. 2 Parse each graph where its weights lie.
3 Give it the optimization profiles of the ladders. 4 Build with the shared timing cache. 5 Write
plan and key into a directory that appears whole or not at all.
"""

import hashlib
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import onnx

from qanchor import config
from qanchor.bundle.buckets import BucketLimits, Range, make_ladders
from qanchor.bundle.manifest import DEVICE_GRAPHS, GraphSpec
from qanchor.bundle.plans import (
    PLANS_FILE,
    GraphPlan,
    PlanSet,
    Target,
    graphs_hash,
    machine_name,
    set_name,
)
from qanchor.bundle.reader import Bundle
from qanchor.errors import BundleError, ConfigError

logger = logging.getLogger(__name__)

_WORKSPACE_BYTES = 4 << 30
STANDARD_DOMAINS = ("", "ai.onnx")


def export_plans(bundle: Bundle, plans_dir: Path, limits: BucketLimits) -> tuple[Path, PlanSet]:
    """Build the plan set of this machine under `plans_dir`; one that is there is built anew.

    Raises ConfigError where TensorRT or a GPU is missing, BundleError for a graph it cannot take.
    """
    check_operators(bundle)
    trt = _tensorrt()
    target = this_machine(trt)
    manifest = bundle.manifest
    ladders = make_ladders(limits, manifest.limits, manifest.profile_schema)
    destination = plans_dir / set_name(target, manifest, ladders)
    plans_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=plans_dir, prefix=".building-") as scratch:
        staging = Path(scratch) / "plans"
        staging.mkdir()
        builder = _PlanBuilder(trt, bundle, plans_dir / f"{machine_name(target)}.timing")
        graphs = {
            graph: builder.build(graph, profiles, staging)
            for graph, profiles in ladders.profiles().items()
        }
        plans = PlanSet(
            gpu=target.gpu,
            compute_capability=target.compute_capability,
            tensorrt_version=target.tensorrt_version,
            export_id=manifest.export_id,
            graphs_hash=graphs_hash(manifest),
            ladders=ladders,
            graphs=graphs,
        )
        config.save(plans, staging / PLANS_FILE)
        if destination.exists():
            shutil.rmtree(destination)
        staging.rename(destination)
    return destination, plans


def check_operators(bundle: Bundle) -> None:
    """Raise BundleError for what TensorRT cannot take: int8 slots, ONNX Runtime's own operators."""
    if bundle.manifest.dims.kv_dtype == "int8":
        raise BundleError(
            f"{bundle.path}: keys and values are int8, which TensorRT takes from quantisation "
            "nodes only; export the checkpoint with --kv-dtype float16 or bfloat16 for it"
        )
    for graph in DEVICE_GRAPHS:
        file = bundle.path / bundle.manifest.graphs[graph].file
        model = onnx.load(str(file), load_external_data=False)
        nodes = [node for node in model.graph.node if node.domain not in STANDARD_DOMAINS]
        foreign = sorted({f"{node.domain}::{node.op_type}" for node in nodes})
        if foreign:
            raise BundleError(
                f"{graph}: TensorRT has no {', '.join(foreign)}; export the checkpoint with "
                "--precision float16 or bfloat16 for it"
            )


def profile_shapes(
    graph: GraphSpec, ranges: dict[str, Range]
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """Least, usual and greatest shape of each input that has a dynamic dimension.

    Raises KeyError for a dimension without a range.
    """
    shapes = {}
    for tensor in graph.inputs:
        if any(isinstance(dim, str) for dim in tensor.dims):
            least, usual, greatest = (
                tuple(ranges[dim][i] if isinstance(dim, str) else dim for dim in tensor.dims)
                for i in range(3)
            )
            shapes[tensor.name] = (least, usual, greatest)
    return shapes


def this_machine(trt: Any) -> Target:
    """What plan files built here are for. Raises ConfigError without a GPU."""
    from cuda.bindings import runtime

    status, found = runtime.cudaGetDeviceProperties(0)
    if status != runtime.cudaError_t.cudaSuccess:
        raise ConfigError(
            "--target", "tensorrt", f"no GPU here ({status.name})", "build where it will run"
        )
    return Target(
        gpu=found.name.decode(),
        compute_capability=f"{found.major}.{found.minor}",
        tensorrt_version=trt.__version__,
    )


class _PlanBuilder:
    """TensorRT's builder with a timing cache that lives beside the plan sets."""

    def __init__(self, trt: Any, bundle: Bundle, timing_cache: Path) -> None:
        self._trt = trt
        self._bundle = bundle
        self._timing_cache = timing_cache
        self._log = trt.Logger(trt.Logger.WARNING)

    def build(self, graph: str, profiles: tuple[dict[str, Range], ...], into: Path) -> GraphPlan:
        """Build one graph's plan file; minutes. Raises BundleError."""
        trt, spec = self._trt, self._bundle.manifest.graphs[graph]
        builder = trt.Builder(self._log)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, self._log)
        # By path: the parser then finds the external weights beside the graph.
        if not parser.parse_from_file(str(self._bundle.path / spec.file)):
            errors = [str(parser.get_error(i)) for i in range(parser.num_errors)]
            raise BundleError(f"{spec.file}: TensorRT cannot take it: {'; '.join(errors)}")
        settings = builder.create_builder_config()
        settings.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, _WORKSPACE_BYTES)
        # float32 means float32; bfloat16 is there for speed.
        settings.clear_flag(trt.BuilderFlag.TF32)
        cache = self._timing_cache.read_bytes() if self._timing_cache.exists() else b""
        settings.set_timing_cache(settings.create_timing_cache(cache), False)
        for ranges in profiles:
            profile = builder.create_optimization_profile()
            for name, shapes in profile_shapes(spec, ranges).items():
                profile.set_shape(name, *shapes)
            settings.add_optimization_profile(profile)
        logger.info("building %s with %d profiles", spec.file, len(profiles))
        plan = builder.build_serialized_network(network, settings)
        if plan is None:
            raise BundleError(f"{spec.file}: TensorRT built no plan; its log says why")
        self._timing_cache.write_bytes(bytes(settings.get_timing_cache().serialize()))
        data = bytes(plan)
        file = f"{graph}.plan"
        (into / file).write_bytes(data)
        return GraphPlan(file=file, sha256=hashlib.sha256(data).hexdigest(), profiles=profiles)


def _tensorrt() -> Any:
    try:
        import tensorrt
    except ImportError as error:
        raise ConfigError(
            "--target",
            "tensorrt",
            f"TensorRT does not load here ({error})",
            "install qanchor[tensorrt] on the machine with the GPU",
        ) from None
    return tensorrt
