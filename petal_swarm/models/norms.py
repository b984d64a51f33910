"""Layer norms that compute in float32 whatever the dtype of the model."""

from __future__ import annotations

import torch
from torch import Tensor

from petal_swarm.models.differentiable import layer_norm, rms_norm
from petal_swarm.models.kernels.rms import Norm, quick_rms_norm


class LayerNorm:
    """Mean and variance over the last dimension; torch accumulates in float32."""

    __slots__ = ("_shape", "bias", "eps", "weight")

    def __init__(self, weight: Tensor, bias: Tensor, eps: float) -> None:
        self.weight = weight
        self.bias = bias
        self.eps = eps
        self._shape = weight.shape

    def __call__(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            return layer_norm(x, self.weight, self.bias, self.eps)
        return torch.layer_norm(x, self._shape, self.weight, self.bias, self.eps)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + self.bias.nbytes


class RMSNorm:
    """Root mean square norm (arXiv:1910.07467) over the last dimension.

    `weight` is `[size]`, or `[heads, size]` for one weight a head. As in transformers, a bf16 or fp16 input
    is normalized in float32, rounded, then multiplied by the weight.
    """

    __slots__ = ("_quick", "_scaled", "_sum_eps", "eps", "weight")

    def __init__(self, weight: Tensor, eps: float) -> None:
        size = weight.shape[-1]
        self.weight = weight
        self.eps = eps
        # x / sqrt(sum/size + eps) = x * sqrt(size) / sqrt(sum + size*eps): one operation fewer a call
        self._sum_eps = size * eps
        self._scaled = weight.float() * size**0.5
        self._quick: Norm | None = None
        self._quick = quick_rms_norm(weight, eps, self)

    def __call__(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            return rms_norm(x, self.weight, self.eps)
        if self._quick is not None:
            return self._quick(x)
        if x.dtype == torch.float32:
            return (x * self._inverse_length(x)).mul_(self._scaled)
        wide = x.float()
        wide = wide * self._inverse_length(wide)
        return wide.mul_(self.weight.shape[-1] ** 0.5).to(x.dtype).mul_(self.weight)

    def _inverse_length(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse: Tensor = length.square().add_(self._sum_eps).rsqrt_()
        return inverse

    @property
    def nbytes(self) -> int:
        return int(self.weight.nbytes + self._scaled.nbytes)
