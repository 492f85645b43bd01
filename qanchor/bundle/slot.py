"""How the keys and values of one user lie in memory. Must not know ONNX Runtime.

Legend: L layers, 2 key and value, G KV heads, C capacity, K head_dim.
"""

import numpy as np
import numpy.typing as npt

from qanchor.bundle.manifest import KvDType, ModelDims

KvArray = npt.NDArray[np.generic]
"""Numbers of a slot; see `storage_dtype`."""


def storage_dtype(kv_dtype: KvDType) -> npt.DTypeLike:
    """The numpy type with the width of `kv_dtype`; numpy has no bfloat16, uint16 holds its bits."""
    return {
        "float32": np.float32,
        "float16": np.float16,
        "bfloat16": np.uint16,
        "int8": np.int8,
    }[kv_dtype]


def element_type(kv_dtype: KvDType) -> int:
    """The number that ONNX gives to the type (onnx.TensorProto.DataType)."""
    return {"float32": 1, "float16": 10, "bfloat16": 16, "int8": 3}[kv_dtype]


def zero_slot(dims: ModelDims, capacity: int) -> KvArray:
    """Zeros [L, 2, G, C, K]; all bits 0 is the number 0 in every type."""
    shape = (dims.num_layers, 2, dims.num_kv_heads, capacity, dims.head_dim)
    return np.zeros(shape, dtype=storage_dtype(dims.kv_dtype))


def slot_layout(dims: ModelDims) -> str:
    """Element type and dimensions of a slot's numbers: equal text, equal meaning of bytes."""
    return f"{dims.kv_dtype} [{dims.num_layers}, 2, {dims.num_kv_heads}, tokens, {dims.head_dim}]"
