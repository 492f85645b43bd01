"""GPU memory through NVIDIA's own Python bindings of the CUDA runtime, all on one stream.

Every call is checked; the names and signatures are those of cuda-bindings 12.9 to 13.5.
Must not know graphs or slots. Call from the worker thread only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cuda.bindings import runtime

from qanchor.errors import ConfigError
from qanchor_server.engine.memory import Bytes, bytes_at
from qanchor_server.failures import Retryable


@dataclass(frozen=True, slots=True)
class Gpu:
    """The device a plan file is built for."""

    name: str
    compute_capability: str
    """As in "9.0"."""


class CudaMemory:
    """DeviceMemory of one GPU and the stream its graphs run on."""

    def __init__(self, device_id: int = 0) -> None:
        """Take the device. Raises ConfigError where there is none of that number."""
        self.device_type = "cuda"
        self.device_id = device_id
        status, count = runtime.cudaGetDeviceCount()
        if status != runtime.cudaError_t.cudaSuccess or device_id >= count:
            raise ConfigError(
                "device_id",
                device_id,
                f"{count or 0} GPUs found ({_text(status)})",
                "check the driver with nvidia-smi, or serve with engine=cpu",
            )
        _call(runtime.cudaSetDevice, device_id)
        stream = _call(runtime.cudaStreamCreateWithFlags, runtime.cudaStreamNonBlocking)
        self.stream = int(stream)
        """cudaStream_t as a number."""

    def gpu(self) -> Gpu:
        """Name and compute capability of the device."""
        found = _call(runtime.cudaGetDeviceProperties, self.device_id)
        return Gpu(found.name.decode(), f"{found.major}.{found.minor}")

    def allocate(self, num_bytes: int) -> int:
        """Address of zeroed, aligned bytes. Raises Retryable when out of memory."""
        address = int(_call(runtime.cudaMalloc, num_bytes))
        self.clear(address, num_bytes)
        return address

    def free(self, address: int) -> None:
        """Give an allocation back; waits for the device."""
        _call(runtime.cudaFree, address)

    def host_array(self, num_bytes: int) -> Bytes:
        """Zeroed page-locked bytes, kept until the process ends."""
        address = int(_call(runtime.cudaHostAlloc, num_bytes, runtime.cudaHostAllocDefault))
        array = bytes_at(address, num_bytes)
        array.fill(0)
        return array

    def upload(self, address: int, source: Bytes) -> None:
        """Begin a copy from host memory."""
        self._copy(address, source.ctypes.data, source.size, "cudaMemcpyHostToDevice")

    def download(self, target: Bytes, address: int) -> None:
        """Begin a copy to host memory."""
        self._copy(target.ctypes.data, address, target.size, "cudaMemcpyDeviceToHost")

    def copy_rows(
        self, target: tuple[int, int], source: tuple[int, int], *, num_bytes: int, num_rows: int
    ) -> None:
        """Begin a copy of `num_rows` rows; each side is (address, pitch in bytes)."""
        # The addresses tell the direction; a host side must come from `host_array`.
        kind = runtime.cudaMemcpyKind.cudaMemcpyDefault
        _call(runtime.cudaMemcpy2DAsync, *target, *source, num_bytes, num_rows, kind, self.stream)

    def clear(self, address: int, num_bytes: int) -> None:
        """Begin to overwrite with zeros."""
        _call(runtime.cudaMemsetAsync, address, 0, num_bytes, self.stream)

    def wait(self) -> None:
        """Return when the stream is empty. Raises what a graph or copy failed with."""
        _call(runtime.cudaStreamSynchronize, self.stream)

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """Record what `enqueue` puts on the stream as a CUDA graph; the result launches it."""
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        _call(runtime.cudaStreamBeginCapture, self.stream, mode)
        try:
            enqueue()
        finally:
            # Also after a failure: the stream must leave capture mode.
            graph = _call(runtime.cudaStreamEndCapture, self.stream)
        executable = _call(runtime.cudaGraphInstantiate, graph, 0)
        _call(runtime.cudaGraphDestroy, graph)

        def launch() -> None:
            _call(runtime.cudaGraphLaunch, executable, self.stream)

        return launch

    def _copy(self, target: int, source: int, num_bytes: int, kind: str) -> None:
        direction = getattr(runtime.cudaMemcpyKind, kind)
        _call(runtime.cudaMemcpyAsync, target, source, num_bytes, direction, self.stream)


def _call(function: Callable[..., Any], *arguments: object) -> Any:
    """The result of a CUDA call. Raises Retryable when out of memory, else RuntimeError."""
    status, *results = function(*arguments)
    if status == runtime.cudaError_t.cudaErrorMemoryAllocation:
        raise Retryable(f"{function.__name__}{arguments}: GPU out of memory")
    if status != runtime.cudaError_t.cudaSuccess:
        raise RuntimeError(f"{function.__name__}{arguments}: {_text(status)}")
    return results[0] if results else None


def _text(status: Any) -> str:
    _, message = runtime.cudaGetErrorString(status)
    return f"{status.name}: {message.decode()}"
