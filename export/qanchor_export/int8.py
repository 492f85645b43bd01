"""int8 matrices: weights with one scale per output column, activations with one scale per row.

A row's scale is its own largest absolute value, found at run time: what a token gives does not
depend on the tokens packed beside it, and no calibrated range can be exceeded. In torch the module
computes what the exported operators compute; exported, it is ONNX Runtime's CPU road:
QuantizeLinear by row, then MatMulIntegerToFloat (uint8 x int8, VNNI). int8 x int8 runs forty times
slower there, hence the offset of 128.

Legend: T rows, I inputs, O outputs.
"""

import torch
from torch import Tensor, nn

from qanchor_export.projection import Projection, frozen

PEAK = 127
ZERO_POINT = 128
_LEAST_PEAK = 1e-20
"""A row of zeros has a scale too."""


class Int8Projection(Projection):
    """A projection with an int8 weight; takes and gives float32."""

    column_scale_O: Tensor
    zero_point: Tensor
    row_unit: Tensor

    def __init__(self, origin: Projection) -> None:
        """Quantise a float32 projection."""
        nn.Module.__init__(self)
        weight_IO = origin.weight
        scale_O = weight_IO.abs().amax(0).clamp(min=_LEAST_PEAK) / PEAK
        levels_IO = torch.round(weight_IO / scale_O).clamp(-PEAK, PEAK)
        self.weight = frozen(levels_IO, torch.int8)
        self.bias = origin.bias
        self.register_buffer("column_scale_O", scale_O.detach().clone())
        self.register_buffer("zero_point", torch.tensor(ZERO_POINT, dtype=torch.uint8))
        self.register_buffer("row_unit", torch.tensor(1.0))

    def forward(self, rows_TI: Tensor) -> Tensor:
        """[T, I] to [T, O]."""
        peak_T1 = rows_TI.abs().amax(-1, keepdim=True).clamp(min=_LEAST_PEAK)
        row_scale_T1 = peak_T1 * (1.0 / PEAK)
        if torch.onnx.is_in_onnx_export():
            product_TO = self._exported(rows_TI, row_scale_T1)
        else:
            levels_TI = torch.round(rows_TI / row_scale_T1)
            product_TO = (levels_TI @ self.weight.float()) * self.column_scale_O
        product_TO = product_TO * row_scale_T1
        return product_TO if self.bias is None else product_TO + self.bias

    def _exported(self, rows_TI: Tensor, row_scale_T1: Tensor) -> Tensor:
        """The same product in ONNX Runtime's operators."""
        num_rows = rows_TI.shape[0]
        zero_points_T = torch.full((num_rows,), ZERO_POINT, dtype=torch.uint8)
        levels_TI = torch.onnx.ops.symbolic(
            "QuantizeLinear",
            (rows_TI, row_scale_T1.reshape(-1), zero_points_T),
            {"axis": 0},
            dtype=torch.uint8,
            shape=rows_TI.shape,
        )
        return torch.onnx.ops.symbolic(
            "com.microsoft::MatMulIntegerToFloat",
            (levels_TI, self.weight, self.row_unit, self.column_scale_O, self.zero_point),
            dtype=torch.float32,
            shape=(num_rows, self.weight.shape[1]),
            version=1,
        )
