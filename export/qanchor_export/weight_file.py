"""One file for the weights of all graphs of a bundle, equal tensors stored once. Knows no torch."""

import hashlib
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import onnx_ir as ir

ALIGNMENT = 4096
"""Page size: ONNX Runtime maps aligned tensors instead of reading them."""
MIN_BYTES = 1024
"""Smaller initializers stay inside their graph."""


class WeightFile:
    """Appends tensors, page-aligned; knows by content where each lies. A context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_shared_bytes = 0
        """Bytes not written because an equal tensor was there."""
        self._offsets: dict[bytes, int] = {}
        self._stream: BinaryIO = path.open("wb")

    def __enter__(self) -> "WeightFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stream.close()

    def move_out(self, graph: ir.Model) -> None:
        """Replace every initializer of `graph` from MIN_BYTES on by a reference into this file."""
        for value in graph.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.nbytes < MIN_BYTES:
                continue
            data = tensor.tobytes()
            value.const_value = ir.ExternalTensor(
                self.path.name,
                self._place(data),
                len(data),
                tensor.dtype,
                shape=tensor.shape,  # type: ignore[arg-type]
                name=value.name or "",
                base_dir=self.path.parent,
            )

    def _place(self, data: bytes) -> int:
        digest = hashlib.sha256(data).digest()
        if digest in self._offsets:
            self.num_shared_bytes += len(data)
            return self._offsets[digest]
        offset = self._stream.tell()
        if offset % ALIGNMENT:
            offset += self._stream.write(bytes(ALIGNMENT - offset % ALIGNMENT))
        self._stream.write(data)
        self._offsets[digest] = offset
        return offset
