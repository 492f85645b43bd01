"""Int8 products are exact whatever the CPU: the entry is right, and ONNX Runtime obeys it here."""

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from qanchor.bundle import exact_int8
from qanchor.bundle.exact_int8 import PRECISE, exact_int8_entry


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        ({"avx2"}, "1"),
        ({"avx2", "avx512f"}, "1"),
        ({"avx2", "avx_vnni"}, "0"),
        ({"avx2", "avx512f", "avx512_vnni"}, "0"),
        (set(), "1"),
    ],
)
def test_only_a_cpu_with_vnni_keeps_the_fast_kernels(
    monkeypatch: pytest.MonkeyPatch, flags: set[str], value: str
) -> None:
    monkeypatch.setattr(exact_int8, "cpu_flags", lambda: frozenset(flags))
    assert exact_int8_entry() == (PRECISE, value)


def test_the_largest_products_do_not_saturate() -> None:
    """Each pair of products is 2 x 255 x 127, twice what 16 bits hold."""
    left = np.full((8, 64), 255, dtype=np.uint8)
    weight = np.full((64, 32), 127, dtype=np.int8)
    node = helper.make_node("MatMulInteger", ["left", "weight"], ["product"])
    graph = helper.make_graph(
        [node],
        "products",
        [helper.make_tensor_value_info("left", TensorProto.UINT8, left.shape)],
        [helper.make_tensor_value_info("product", TensorProto.INT32, (8, 32))],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = ort.SessionOptions()
    options.add_session_config_entry(*exact_int8_entry())
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (product,) = session.run(None, {"left": left})
    assert (product == 64 * 255 * 127).all()
