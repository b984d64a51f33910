"""Quantized weights as blocks see them: matrices whose rows can be reordered and stacked like plain ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, cast

import torch
from torch import Tensor

from petal_swarm.errors import CheckpointError
from petal_swarm.models.int8 import Int8Rows, ViewedInt8Rows, make_int8_linear, quantize_int8
from petal_swarm.models.kernels.linears import quick_linear
from petal_swarm.models.linear import Linear, Projection
from petal_swarm.models.nf4 import Nf4Rows, bitsandbytes, block_size_for, make_nf4_linear, quantize_nf4

Quant = Literal["none", "int8", "nf4"]
QUANTS: tuple[Quant, ...] = ("none", "int8", "nf4")
#: A matrix `[out, in]`. The parts of a quantized one all have `out` rows.
Weight = Tensor | Int8Rows | Nf4Rows

# Of what the rows of each kind consist, as files name it: part -> dtype.
PARTS: Mapping[Quant, Mapping[str, torch.dtype]] = {
    "none": {},
    "int8": {"values": torch.int8, "scales": torch.float32},
    "nf4": {"codes": torch.uint8, "scales": torch.float32},
}


def part_shapes(quant: Quant, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Shapes of the parts of a matrix of `shape`.

    Raises:
        ConfigError: its rows cannot be quantized so.
    """
    rows, columns = shape
    if quant == "int8":
        return {"values": (rows, columns), "scales": (rows,)}
    size = block_size_for(columns)
    return {"codes": (rows, columns // 2), "scales": (rows, columns // size)}


def matrix_bytes(quant: Quant, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Memory of a matrix of `shape`; `dtype` is that of plain weights.

    Raises:
        ConfigError: its rows cannot be quantized so.
    """
    if quant == "none":
        return torch.Size(shape).numel() * dtype.itemsize
    parts = part_shapes(quant, shape)
    return sum(torch.Size(parts[name]).numel() * kind.itemsize for name, kind in PARTS[quant].items())


def check_quant(quant: Quant, shapes: Iterable[tuple[int, ...]]) -> None:
    """Says before anything is read whether tensors of these shapes can be quantized so, here.

    Raises:
        ConfigError: rows do not fit, or a library is not installed.
    """
    if quant == "nf4":
        bitsandbytes()
    for shape in shapes:
        if len(shape) > 1 and quant != "none":
            part_shapes(quant, shape)


def quantize(name: str, weight: Tensor, quant: Quant) -> Weight:
    """Quantizes the matrix `weight`, which the checkpoint calls `name`.

    Raises:
        CheckpointError: it is not finite.
        ConfigError: its rows cannot be quantized so.
    """
    rows = quantize_int8(weight) if quant == "int8" else quantize_nf4(weight)
    if not bool(rows.scales.isfinite().all()):
        raise CheckpointError(f"tensor {name} holds infinite or undefined numbers: it cannot be quantized")
    return rows


def from_parts(quant: Quant, parts: Sequence[Tensor]) -> Weight:
    return Int8Rows(*parts) if quant == "int8" else Nf4Rows(*parts)


def map_parts(weight: Weight, function: Callable[[Tensor], Tensor]) -> Weight:
    """Applies `function`, which must treat rows alike whatever they hold, to a matrix or all parts of one."""
    if isinstance(weight, Tensor):
        return function(weight)
    return type(weight)(*map(function, weight))


def stack_rows(weights: Sequence[Weight]) -> Weight:
    """Concatenates the rows of projections of the same input into one, so that one multiplication serves."""
    first = weights[0]
    if isinstance(first, Tensor):
        plain = cast(Sequence[Tensor], weights)
        return first.contiguous() if len(plain) == 1 else torch.cat(list(plain))
    quantized = cast(Sequence[Int8Rows | Nf4Rows], weights)
    return type(first)(*(torch.cat(parts) for parts in zip(*quantized, strict=True)))


def viewed(weight: Weight) -> Weight:
    """The same numbers, for a projection whose tensors can be views of memory that others fill."""
    return ViewedInt8Rows(*weight) if isinstance(weight, Int8Rows) else weight


def make_linear(weight: Weight, bias: Tensor | None = None) -> Projection:
    """The product with `weight` in the way that is fastest on its device."""
    if isinstance(weight, Tensor):
        return Linear(weight, bias)
    quick = quick_linear(weight, bias)
    if quick is not None:
        return quick
    return make_int8_linear(weight, bias) if isinstance(weight, Int8Rows) else make_nf4_linear(weight, bias)


def vector(tensors: Mapping[str, Weight], name: str) -> Tensor:
    """A tensor that is never quantized: of a norm, or a bias."""
    tensor = tensors[name]
    assert isinstance(tensor, Tensor), f"{name} is not a matrix"
    return tensor
