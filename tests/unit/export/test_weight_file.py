"""The shared weight file: content decides, not names."""

from pathlib import Path

import numpy as np
import onnx_ir as ir

from qanchor_export.weight_file import ALIGNMENT, WeightFile


def graph_with(**tensors: np.ndarray) -> ir.Model:
    """A model of initializers only."""
    values = []
    for name, array in tensors.items():
        values.append(ir.Value(name=name, const_value=ir.tensor(array, name=name)))
    graph = ir.Graph([], [], nodes=[], initializers=values, opset_imports={"": 20})
    return ir.Model(graph, ir_version=10)


def test_equal_tensors_lie_once_and_small_ones_stay(tmp_path: Path) -> None:
    big = np.arange(300, dtype=np.float32)
    one = graph_with(a=big, small=np.zeros(3, dtype=np.float32))
    two = graph_with(b=big.copy(), c=big + 1)
    path = tmp_path / "weights.bin"
    with WeightFile(path) as weights:
        weights.move_out(one)
        weights.move_out(two)
        assert weights.num_shared_bytes == big.nbytes
    a, b, c = (
        one.graph.initializers["a"].const_value,
        two.graph.initializers["b"].const_value,
        two.graph.initializers["c"].const_value,
    )
    assert isinstance(a, ir.ExternalTensor)
    assert isinstance(b, ir.ExternalTensor)
    assert isinstance(c, ir.ExternalTensor)
    assert not isinstance(one.graph.initializers["small"].const_value, ir.ExternalTensor)
    assert (a.offset, a.length) == (b.offset, b.length) == (0, big.nbytes)
    assert c.offset == ALIGNMENT
    assert path.stat().st_size == ALIGNMENT + big.nbytes
    assert np.array_equal(c.numpy(), big + 1)


def test_equal_bytes_of_another_type_share_their_place(tmp_path: Path) -> None:
    ones = np.ones(256, dtype=np.float32)
    model = graph_with(a=ones, b=ones.view(np.int32))
    with WeightFile(tmp_path / "weights.bin") as weights:
        weights.move_out(model)
    assert model.graph.initializers["b"].const_value.dtype == ir.DataType.INT32
    assert (tmp_path / "weights.bin").stat().st_size == ones.nbytes
