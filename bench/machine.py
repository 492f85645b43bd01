"""The machine a measurement ran on: what it is called, and how fast it computes and reads."""

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import torch
from onnx import helper, numpy_helper

from qanchor.environment import cpu_model

_READ_BYTES = 1 << 30
_RATE_REPEATS = 20


@dataclass(frozen=True, slots=True)
class Rates:
    """Best measured rates of this run; the floor is stated with them."""

    gemm_flops: float
    """float32 FLOP/s, the better of `ort` and `torch`."""
    ort_gemm_flops: float
    torch_gemm_flops: float
    read_bytes: float
    """Bytes/s of reading memory with all threads."""
    int8_gemm_flops: float = 0.0
    """ONNX Runtime's uint8 x int8 GEMM to float32, its left side quantised beforehand."""


def measure_rates(num_rows: int, inner: int, columns: int, num_threads: int) -> Rates:
    """Rates of a float32 GEMM [num_rows, inner] x [inner, columns] and of a long sum."""
    flops = 2.0 * num_rows * inner * columns
    ort_flops = flops / _best(_ort_gemm(num_rows, inner, columns, num_threads))
    int8_flops = flops / _best(_ort_int8_gemm(num_rows, inner, columns, num_threads))
    left, right = torch.randn(num_rows, inner), torch.randn(inner, columns)
    torch_flops = flops / _best(lambda: left @ right)
    long = torch.ones(_READ_BYTES // 4)
    read_bytes = _READ_BYTES / _best(lambda: long.sum())
    best = max(ort_flops, torch_flops)
    return Rates(best, ort_flops, torch_flops, read_bytes, int8_flops)


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
        try:
            fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
        except OSError:
            return cls(time.monotonic(), 0.0, own.user + own.system)
        ticks = [int(field) for field in fields]
        # Fields 4 and 5 are idle and waiting for the disk, 9 and 10 repeat user time of guests.
        busy = (sum(ticks[:3]) + sum(ticks[5:8])) / os.sysconf("SC_CLK_TCK")
        return cls(time.monotonic(), busy, own.user + own.system)

    def others_since(self, earlier: "Busy") -> float:
        """Share of the machine, 0 to 1, that other processes used since `earlier`."""
        others = self.all_seconds - earlier.all_seconds - (self.own_seconds - earlier.own_seconds)
        possible = (self.wall_seconds - earlier.wall_seconds) * (os.cpu_count() or 1)
        return max(0.0, others / possible)


def hardware_slug() -> str:
    """Short name of the machine for file names, such as `amd-epyc-2c`."""
    return re.sub(r"[^a-z0-9]+", "-", cpu_model().lower()).strip("-") + f"-{os.cpu_count()}c"


def _ort_gemm(num_rows: int, inner: int, columns: int, num_threads: int) -> Callable[[], object]:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((inner, columns), dtype=np.float32)
    left = rng.standard_normal((num_rows, inner), dtype=np.float32)
    node = helper.make_node("MatMul", ["left", "weight"], ["product"])
    return _ort_node(node, left, {"weight": weight}, num_threads)


def _ort_int8_gemm(
    num_rows: int, inner: int, columns: int, num_threads: int
) -> Callable[[], object]:
    rng = np.random.default_rng(0)
    left = rng.integers(0, 256, (num_rows, inner), dtype=np.uint8)
    constants = {
        "weight": rng.integers(-127, 128, (inner, columns), dtype=np.int8),
        "left_scale": np.array(1.0, dtype=np.float32),
        "column_scales": np.ones(columns, dtype=np.float32),
        "left_zero": np.array(128, dtype=np.uint8),
    }
    inputs = ["left", "weight", "left_scale", "column_scales", "left_zero"]
    node = helper.make_node("MatMulIntegerToFloat", inputs, ["product"], domain="com.microsoft")
    return _ort_node(node, left, constants, num_threads)


def _ort_node(
    node: Any, left: npt.NDArray[Any], constants: dict[str, npt.NDArray[Any]], num_threads: int
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
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda: session.run(None, {"left": left})


def _best(run: Callable[[], object]) -> float:
    run()
    seconds = []
    for _ in range(_RATE_REPEATS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
