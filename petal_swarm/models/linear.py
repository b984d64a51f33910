"""The matrix multiplication of a block: what blocks ask of it, and the plain one."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

# float32 on CPU, 1024 x 4096, 2 threads, microseconds for 1, 2, 4, 8 rows [measured, MKL on an AMD EPYC]:
# x @ w.T 880, 1880, 1670, 1410; (w @ x.T).T 860, 480, 590, 1610. So few rows are multiplied from the left.
_FEW_ROWS = range(2, 5)
_LARGE_WEIGHT = 1 << 18


class Projection(Protocol):
    """What blocks know of a product with a weight `[out, in]`; made by `quantization.make_linear`.

    `x [tokens, in]` has the dtype of the computation, and so has the result.
    """

    def __call__(self, x: Tensor) -> Tensor:
        """`[tokens, out]`, contiguous."""
        ...

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """`residual + self(x)`; `residual` stays as it is."""
        ...

    def back(self, grad: Tensor) -> Tensor:
        """The gradient of `x` for `grad [tokens, out]`, the one of the result: `grad @ weight`."""
        ...

    @property
    def nbytes(self) -> int: ...


class Linear:
    """`x @ weight.T + bias` for `x [tokens, in]`, `weight [out, in]`, `bias [out]` or None."""

    __slots__ = ("_from_left", "_transposed", "bias", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias
        self._transposed = weight.t()
        self._from_left = (
            weight.dtype == torch.float32 and weight.device.type == "cpu" and weight.numel() >= _LARGE_WEIGHT
        )

    def __call__(self, x: Tensor) -> Tensor:
        if self._from_left and x.shape[0] in _FEW_ROWS:
            if self.bias is None:
                return torch.mm(self.weight, x.t()).t().contiguous()
            return torch.addmm(self.bias.unsqueeze(1), self.weight, x.t()).t().contiguous()
        return F.linear(x, self.weight, self.bias)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """`residual + self(x)`; the multiplication itself adds the residual where there is no bias."""
        if self._from_left and x.shape[0] in _FEW_ROWS:
            return self(x).add_(residual)
        if self.bias is None:
            return torch.addmm(residual, x, self._transposed)
        return torch.addmm(self.bias, x, self._transposed).add_(residual)

    def back(self, grad: Tensor) -> Tensor:
        """`grad @ weight`."""
        return torch.mm(grad, self.weight)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)
