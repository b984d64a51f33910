"""The matrix multiplication of a block, in one place: what quantization and adapters replace."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


class Linear:
    """`x @ weight.T + bias` for `x [tokens, in]`, `weight [out, in]`, `bias [out]` or None."""

    __slots__ = ("_transposed", "bias", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias
        self._transposed = weight.t()

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """`residual + self(x)`; the multiplication itself adds the residual where there is no bias."""
        if self.bias is None:
            return torch.addmm(residual, x, self._transposed)
        return torch.addmm(self.bias, x, self._transposed).add_(residual)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)
