"""Quantized projections that multiply by Triton kernels where those are right and faster than torch."""

from __future__ import annotations

import logging
from typing import TypeAlias

import torch
from torch import Tensor

from petal_swarm.models.int8 import Int8Linear, Int8Rows
from petal_swarm.models.kernels import on, ready
from petal_swarm.models.kernels.trials import ROWS, Product, Way, device_clock, fastest
from petal_swarm.models.linear import Projection
from petal_swarm.models.nf4 import Nf4Linear, Nf4Rows, bitsandbytes

logger = logging.getLogger(__name__)

# What a way costs in exactness it must bring in time: rounding activations to int8 is about 1 % off.
_ROUNDING = 0.03
_ROUNDED_SHARE = 0.8

_Shape: TypeAlias = tuple[type, int, int, torch.dtype, torch.device]
# The ways for weights of a shape, by name; the plain way has none. As fast for one weight as for another.
_chosen: dict[_Shape, list[str | None]] = {}


class _Quick:
    """Multiplies in the way that was fastest for as many rows; the first call for a shape tries them all."""

    __slots__ = ("_plain", "_shape", "_ways")

    def __init__(self, plain: Product, ways: list[Way], shape: tuple[type, int, int]) -> None:
        self._plain = plain
        self._ways = ways
        self._shape = shape

    def __call__(self, x: Tensor, residual: Tensor | None) -> Tensor:
        key = (*self._shape, x.dtype, x.device)
        names = _chosen.get(key)
        if names is None:
            names = _chosen[key] = self._try(x)
        name = names[min((x.shape[0] - 1).bit_length(), len(ROWS) - 1)]
        for way in self._ways:
            if way.name == name:
                with on(x.device):
                    return way.product(x.contiguous(), residual)
        return self._plain(x, residual)

    def _try(self, x: Tensor) -> list[str | None]:
        kind, outer, inner = self._shape
        with on(x.device):
            found = fastest(self._plain, self._ways, inner, x.dtype, x.device, device_clock(x.device))
        names = [None if way is None else way.name for way in found]
        told = ", ".join(f"{rows}: {name or 'as before'}" for rows, name in zip(ROWS, names, strict=True))
        logger.info("%s, %d x %d, %s, by rows: %s", kind.__name__, outer, inner, x.dtype, told)
        return names


class QuickInt8Linear(Int8Linear):
    """An int8 weight on a CUDA device, or in Triton's interpreter."""

    __slots__ = ("_quick",)

    def __init__(self, weight: Int8Rows, bias: Tensor | None = None) -> None:
        from petal_swarm.models.kernels import products

        super().__init__(weight, bias)
        ways = [
            Way(
                "int8 by sums",
                lambda x, r: products.int8_by_sums(x, weight, bias, r),
                1,
                products.SUMMED_ROWS,
            ),
            Way("int8 by tiles", lambda x, r: products.int8_by_tiles(x, weight, bias, r), 1, ROWS[-1]),
        ]
        if all(size % 8 == 0 for size in weight.values.shape):  # cuBLAS wants that
            ways.append(
                Way(
                    "int8 by tensor cores",
                    lambda x, r: products.int8_by_tensor_cores(x, weight, bias, r),
                    products.TENSOR_CORE_ROWS,
                    ROWS[-1],
                    _ROUNDING,
                    _ROUNDED_SHARE,
                )
            )
        self._quick = _Quick(self._plainly, ways, (QuickInt8Linear, *weight.values.shape))

    def __call__(self, x: Tensor) -> Tensor:
        return self._quick(x, None)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """`residual + self(x)`."""
        return self._quick(x, residual)

    def _plainly(self, x: Tensor, residual: Tensor | None) -> Tensor:
        out = Int8Linear.__call__(self, x)
        return out if residual is None else out.add_(residual)


class QuickNf4Linear(Nf4Linear):
    """A 4-bit weight on a CUDA device, or in Triton's interpreter; bitsandbytes multiplies many rows."""

    __slots__ = ("_quick",)

    def __init__(self, weight: Nf4Rows, bias: Tensor | None = None) -> None:
        from petal_swarm.models.kernels import products

        super().__init__(weight, bias)
        levels: Tensor = bitsandbytes().get_4bit_type("nf4", device=weight.codes.device).float()
        way = Way(
            "nf4 by sums",
            lambda x, r: products.nf4_by_sums(x, weight, levels, bias, r),
            1,
            products.SUMMED_ROWS,
        )
        outer, halves = weight.codes.shape
        self._quick = _Quick(self._plainly, [way], (QuickNf4Linear, outer, 2 * halves))

    def __call__(self, x: Tensor) -> Tensor:
        return self._quick(x, None)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """`residual + self(x)`."""
        return self._quick(x, residual)

    def _plainly(self, x: Tensor, residual: Tensor | None) -> Tensor:
        out = Nf4Linear.__call__(self, x)
        return out if residual is None else out.add_(residual)


def quick_linear(weight: Int8Rows | Nf4Rows, bias: Tensor | None) -> Projection | None:
    """A projection by kernels, or None where there are none for the weight's device."""
    if isinstance(weight, Int8Rows):
        return QuickInt8Linear(weight, bias) if ready(weight.values.device) else None
    return QuickNf4Linear(weight, bias) if ready(weight.codes.device) else None
