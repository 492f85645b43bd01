"""The machine a measurement ran on: what it is called, and how fast it computes and reads."""

import os
import re
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import torch
from onnx import helper, numpy_helper

from qanchor.bundle.exact_int8 import exact_int8_entry
from qanchor.bundle.manifest import Precision
from qanchor.environment import cpu_flags, cpu_model
from qanchor.errors import ConfigError
from qanchor_export.kv_store import TORCH_DTYPES

_READ_BYTES = 1 << 29
_RATE_SECONDS = 0.4
_RATE_REPEATS = 8
_RUNS_PER_GRAPH = 100
_DECISIVE_FLAGS = (
    "avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile",
    "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "sve", "bf16",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rates:
    """Best measured rates of this run; the floor is stated with them. 0: not measured here."""

    gemm_flops: float
    """FLOP/s, the better of `ort` and `torch`; float32, on a GPU the type of the bundle."""
    ort_gemm_flops: float
    torch_gemm_flops: float
    int8_gemm_flops: float
    """Operations/s of ONNX Runtime's uint8 x int8 product, its left side quantised beforehand."""
    read_bytes: float
    """Bytes/s of reading memory with all threads, or the GPU's memory."""

    def dense_flops(self, precision: Precision) -> float:
        """Rate of products with the model's weights in that precision."""
        return self.int8_gemm_flops if precision == "int8" else self.gemm_flops


def measure_rates(num_rows: int, inner: int, columns: int, num_threads: int) -> Rates:
    """Rates of GEMMs [num_rows, inner] x [inner, columns] and of a long sum."""
    flops = 2.0 * num_rows * inner * columns
    ort_flops = flops / _best(_ort_gemm(num_rows, inner, columns, num_threads))
    int8_flops = flops / _best(_ort_int8_gemm(num_rows, inner, columns, num_threads))
    left, right = torch.randn(num_rows, inner), torch.randn(inner, columns)
    torch_flops = flops / _best(lambda: left @ right)
    long = torch.ones(_READ_BYTES // 4)
    read_bytes = _READ_BYTES / _best(lambda: long.sum())
    return Rates(max(ort_flops, torch_flops), ort_flops, torch_flops, int8_flops, read_bytes)


def measure_gpu_rates(num_rows: int, inner: int, columns: int, precision: Precision) -> Rates:
    """The same of the GPU, by torch in the type of `precision`.

    Raises ConfigError where torch has no GPU.
    """
    if not torch.cuda.is_available():
        raise ConfigError(
            "engine", "on a GPU", f"torch {torch.__version__} sees none", "install torch for CUDA"
        )
    dtype = TORCH_DTYPES[precision]
    left = torch.randn(num_rows, inner, device="cuda", dtype=dtype)
    right = torch.randn(inner, columns, device="cuda", dtype=dtype)
    long = torch.ones(_READ_BYTES // 4, device="cuda")

    flops = 2.0 * num_rows * inner * columns / _best_on_gpu(lambda: left @ right)
    read_bytes = _READ_BYTES / _best_on_gpu(lambda: long.sum())
    return Rates(flops, 0.0, flops, 0.0, read_bytes)


@dataclass(frozen=True, slots=True)
class Busy:
    """A reading of the clocks that tell how much of the machine others used in between."""

    wall_seconds: float
    all_seconds: float
    own_seconds: float

    @classmethod
    def now(cls) -> "Busy":
        """Read the clocks; all processes count as idle where /proc/stat does not exist."""
        own = os.times()
        # Children count once they have been waited for.
        own_seconds = own.user + own.system + own.children_user + own.children_system
        try:
            fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
        except OSError:
            return cls(time.monotonic(), 0.0, own_seconds)
        ticks = [int(field) for field in fields]
        # Fields 4 and 5 are idle and waiting for the disk, 9 and 10 repeat user time of guests.
        busy = (sum(ticks[:3]) + sum(ticks[5:8])) / os.sysconf("SC_CLK_TCK")
        return cls(time.monotonic(), busy, own_seconds)

    def others_since(self, earlier: "Busy") -> float:
        """Share of the machine, 0 to 1, that other processes used since `earlier`."""
        others = self.all_seconds - earlier.all_seconds - (self.own_seconds - earlier.own_seconds)
        possible = (self.wall_seconds - earlier.wall_seconds) * (os.cpu_count() or 1)
        return max(0.0, others / possible)


def decisive_flags() -> tuple[str, ...]:
    """Instruction sets present that decide how fast matrix products can be."""
    present = cpu_flags()
    return tuple(flag for flag in _DECISIVE_FLAGS if flag in present)


def governor() -> str:
    """The first core's frequency governor, or `unknown`."""
    return _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip() or "unknown"


def memory_gib() -> float:
    """Memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)


def gpu_state() -> str:
    """Name, driver and memory of the first GPU, and what would run on it; empty without one."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    found = [done.stdout.splitlines()[0]]
    for package in ("onnxruntime-gpu", "tensorrt", "cuda-bindings"):
        with suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    return ", ".join(found)


def hardware_slug(gpu: str = "") -> str:
    """Short name of the machine for file names, such as `amd-epyc-2c`; the GPU's where one ran."""
    name, suffix = (gpu.split(",")[0], "") if gpu else (cpu_model(), f"-{os.cpu_count()}c")
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + suffix


def _ort_gemm(num_rows: int, inner: int, columns: int, num_threads: int) -> Callable[[], object]:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((inner, columns), dtype=np.float32)
    left = rng.standard_normal((num_rows, inner), dtype=np.float32)
    node = helper.make_node("MatMul", ["left", "weight"], ["product"])
    return _ort_product(node, left, {"weight": weight}, num_threads)


def _ort_int8_gemm(
    num_rows: int, inner: int, columns: int, num_threads: int
) -> Callable[[], object]:
    rng = np.random.default_rng(0)
    left = rng.integers(0, 256, (num_rows, inner), dtype=np.uint8)
    constants: dict[str, npt.NDArray[Any]] = {
        "weight": rng.integers(-127, 128, (inner, columns), dtype=np.int8),
        "left_scale": np.array(1.0, dtype=np.float32),
        "column_scales": np.ones(columns, dtype=np.float32),
        "left_zero": np.array(128, dtype=np.uint8),
    }
    inputs = ["left", "weight", "left_scale", "column_scales", "left_zero"]
    node = helper.make_node("MatMulIntegerToFloat", inputs, ["product"], domain="com.microsoft")
    return _ort_product(node, left, constants, num_threads)


def _ort_product(
    node: onnx.NodeProto,
    left: npt.NDArray[Any],
    constants: dict[str, npt.NDArray[Any]],
    num_threads: int,
) -> Callable[[], object]:
    """A run of one node over `left` and constants."""
    left_type = helper.np_dtype_to_tensor_dtype(left.dtype)
    graph = helper.make_graph(
        [node],
        "gemm",
        [helper.make_tensor_value_info("left", left_type, left.shape)],
        [helper.make_tensor_value_info("product", onnx.TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.add_session_config_entry(*exact_int8_entry())
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda: session.run(None, {"left": left})


def _best(run: Callable[[], object]) -> float:
    """Seconds of the quickest of some runs: a rate is what the machine can do undisturbed."""
    run()
    seconds: list[float] = []
    end = time.perf_counter() + _RATE_SECONDS
    while len(seconds) < _RATE_REPEATS or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _best_on_gpu(start: Callable[[], object]) -> float:
    """Seconds of one of many runs back to back in a CUDA graph: launches cost nothing."""
    start()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_RUNS_PER_GRAPH):
            start()

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return _best(replay) / _RUNS_PER_GRAPH


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
