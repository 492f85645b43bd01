"""Memory that graphs read by address: what a static engine asks of it, and the host's own.

`HostMemory` runs the very same engine on the CPU, where the tests are. `cuda_memory.py` is the
GPU's. All copies and graphs of one memory are ordered; `wait` returns when all are done. Must not
know graphs or slots. Call from the worker thread only.
"""

import ctypes
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from qanchor_server.failures import Retryable

Bytes = npt.NDArray[np.uint8]

ALIGNMENT = 256
"""Bytes; what cudaMalloc gives and TensorRT asks for."""


def aligned(num_bytes: int) -> int:
    """`num_bytes` rounded up to ALIGNMENT."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


class DeviceMemory(Protocol):
    """Allocations by address and ordered copies on one device."""

    device_type: str
    """As ONNX Runtime names it: cpu or cuda."""
    device_id: int

    def allocate(self, num_bytes: int) -> int:
        """Address of zeroed, aligned bytes. Raises Retryable when out of memory."""
        ...

    def free(self, address: int) -> None:
        """Give an allocation back."""
        ...

    def host_array(self, num_bytes: int) -> Bytes:
        """Zeroed host memory that uploads read fastest (page-locked), kept for good."""
        ...

    def upload(self, address: int, source: Bytes) -> None:
        """Begin a copy from host memory; `source` stays as it is until `wait`."""
        ...

    def download(self, target: Bytes, address: int) -> None:
        """Begin a copy to host memory; `target` is complete after `wait`."""
        ...

    def copy_rows(
        self, target: tuple[int, int], source: tuple[int, int], *, num_bytes: int, num_rows: int
    ) -> None:
        """Begin a copy of `num_rows` rows; each side is (address, pitch in bytes).

        Either side is an allocation or lies in a `host_array`.
        """
        ...

    def clear(self, address: int, num_bytes: int) -> None:
        """Begin to overwrite with zeros."""
        ...

    def wait(self) -> None:
        """Return when all that was begun is done."""
        ...


class HostMemory:
    """DeviceMemory of the host; every copy is done when the call returns."""

    def __init__(self) -> None:
        self.device_type = "cpu"
        self.device_id = 0
        self._arrays: dict[int, Bytes] = {}
        self._host: list[Bytes] = []

    def allocate(self, num_bytes: int) -> int:
        """Address of zeroed, aligned bytes. Raises Retryable when out of memory."""
        try:
            array = np.zeros(num_bytes + ALIGNMENT, dtype=np.uint8)
        except MemoryError as error:
            raise Retryable(f"out of memory: {error}") from error
        address = aligned(array.ctypes.data)
        self._arrays[address] = array
        return address

    def free(self, address: int) -> None:
        """Give an allocation back."""
        del self._arrays[address]

    def host_array(self, num_bytes: int) -> Bytes:
        """Zeroed bytes, kept for good."""
        self._host.append(np.zeros(num_bytes, dtype=np.uint8))
        return self._host[-1]

    def upload(self, address: int, source: Bytes) -> None:
        """Copy from `source`."""
        _rows(address, source.size)[0] = source

    def download(self, target: Bytes, address: int) -> None:
        """Copy to `target`."""
        target[:] = _rows(address, target.size)[0]

    def copy_rows(
        self, target: tuple[int, int], source: tuple[int, int], *, num_bytes: int, num_rows: int
    ) -> None:
        """Copy `num_rows` rows; each side is (address, pitch in bytes)."""
        rows = _rows(target[0], num_bytes, num_rows, target[1])
        rows[:] = _rows(source[0], num_bytes, num_rows, source[1])

    def clear(self, address: int, num_bytes: int) -> None:
        """Overwrite with zeros."""
        _rows(address, num_bytes).fill(0)

    def wait(self) -> None:
        """Nothing is pending."""


def bytes_at(address: int, num_bytes: int) -> Bytes:
    """Host memory at an address as an array; whoever holds the memory must outlive it."""
    array: Bytes = np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(address))
    return array


def _rows(address: int, num_bytes: int, num_rows: int = 1, pitch: int = 0) -> Any:
    """Rows of bytes [num_rows, num_bytes] at an address."""
    flat = bytes_at(address, (num_rows - 1) * pitch + num_bytes)
    return np.lib.stride_tricks.as_strided(flat, (num_rows, num_bytes), (pitch, 1))
