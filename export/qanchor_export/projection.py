"""One big matrix of the decoder: the place where precision is decided.

The graphs call these modules and know no types; calibration hooks into them.

Legend: T rows, I inputs, O outputs.
"""

import torch
from torch import Tensor, nn


def frozen(tensor: Tensor, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """A contiguous parameter without gradient."""
    return nn.Parameter(tensor.detach().to(dtype).contiguous(), requires_grad=False)


class Projection(nn.Module):
    """x W + b in the type of its weight.

    W is [in, out] for MatMul: a two-dimensional nn.Linear would export as Gemm, which TensorRT and
    ONNX Runtime fuse less.
    """

    def __init__(self, weight_IO: Tensor, bias_O: Tensor | None = None) -> None:
        super().__init__()
        self.weight = frozen(weight_IO, weight_IO.dtype)
        self.bias = None if bias_O is None else frozen(bias_O, bias_O.dtype)

    def forward(self, rows_TI: Tensor) -> Tensor:
        """[T, I] to [T, O]."""
        product_TO = rows_TI @ self.weight
        return product_TO if self.bias is None else product_TO + self.bias

    # nn.Module's own __call__ is untyped.
    def __call__(self, rows_TI: Tensor) -> Tensor:
        """Run `forward` with its hooks."""
        product_TO: Tensor = super().__call__(rows_TI)
        return product_TO
