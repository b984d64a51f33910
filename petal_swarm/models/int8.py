"""int8 weights: an absmax scale for each output row, and products that dispatch to what the device does best.

On x86 with VNNI the weight is packed for oneDNN, and activations become integers with an absmax scale for
each token, as in LLM.int8() (arXiv:2208.07339). What it does with *columns* that hold outliers is done with
*tokens* here: a token with an outlier travels as two rows of integers, 16 bits in all. Elsewhere activations
stay in floating point, where outliers need nothing special. docs/decisions/0011-int8-on-cpu.md has reasons
and figures.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_LEVELS = 127
# A row whose largest number is below this one is all zeros for float32 arithmetic.
_TINY = 1e-30
# Numbers converted at a time, so that temporaries stay small.
_PIECE_ELEMENTS = 1 << 21
_DEVICE_PIECE_ELEMENTS = 1 << 26

#: Activations above this are outliers (the threshold of LLM.int8()),
OUTLIER = 6.0
#: and so are those so many times above the mean magnitude of their token: 8 bits leave the rest too few.
OUTLIER_TO_MEAN = 10.0
# Steps of a token in 16 bits: 127 coarse ones of 256 fine ones.
_FINE = 256
_STEPS = float(_LEVELS * _FINE)
_ZERO_POINT = 128
# With two rows for each token at worst; oneDNN is no faster with more than about a thousand rows at a time.
_CHUNK_TOKENS = 512
# `torch._weight_int8pack_mm` beats dequantizing up to so many rows (1024 x 4096, ms for 1, 8, 32 rows:
# 0.25, 0.51, 1.7 against 0.71, 0.75, 1.2) [measured].
_FEW_ROWS = 8
# For smaller weights the work around a packed product takes longer than dequantizing: 33 us for one row,
# against 11 us with 64 x 64 and 20 us with 256 x 256 [measured]. They are not fused: a token's result should
# not depend on how many others there are.
_SMALL_WEIGHT = 1 << 16


class Int8Rows(NamedTuple):
    """A matrix `[out, in]`: `values` int8 of that shape, times `scales` float32 `[out]`."""

    values: Tensor
    scales: Tensor

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return (self.values * self.scales.unsqueeze(1)).to(dtype)


class ViewedInt8Rows(Int8Rows):
    """Rows that a product must leave where they are: in memory that others fill by turns."""

    __slots__ = ()


def quantize_int8(weight: Tensor) -> Int8Rows:
    """Rounds `weight [out, in]` to 255 levels for each row; a row that is not finite gets such a scale."""
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(weight.shape[0], device=weight.device)
    step = max(1, _PIECE_ELEMENTS // weight.shape[1])
    for first in range(0, weight.shape[0], step):
        rows = slice(first, first + step)
        piece = weight[rows].float()
        largest = piece.abs().amax(1).clamp_min_(_TINY)
        scales[rows] = largest / _LEVELS
        values[rows] = (piece * (_LEVELS / largest).unsqueeze(1)).round_().to(torch.int8)
    return Int8Rows(values, scales)


class PackedInt8Linear:
    """A weight packed for oneDNN's product of unsigned and signed bytes (x86 with VNNI).

    What comes out for a token does not depend on which other tokens it is computed with, beyond the
    rounding of float32.
    """

    __slots__ = ("_bias", "_nbytes", "_packed", "_scales", "_shape", "_zeros")

    def __init__(self, weight: Int8Rows, bias: Tensor | None = None) -> None:
        self._shape = weight.values.shape
        self._packed = torch.ops.onednn.qlinear_prepack(weight.values, None)
        self._scales = weight.scales
        self._zeros = _zeros(self._shape[0])
        self._bias = None if bias is None else bias.float()
        self._nbytes = weight.values.nbytes + weight.scales.nbytes
        self._nbytes += 0 if self._bias is None else self._bias.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        return self._apply(x, None)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """`residual + self(x)`."""
        return self._apply(x, residual)

    def back(self, grad: Tensor) -> Tensor:
        """`grad @ weight`, in floating point: rounding an activation counts as if it changed nothing."""
        values = self._packed.to_dense()  # [in, out]
        step = max(1, _PIECE_ELEMENTS // values.shape[1])
        pieces = [F.linear(grad, (piece * self._scales).to(grad.dtype)) for piece in values.split(step)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)

    def _apply(self, x: Tensor, residual: Tensor | None) -> Tensor:
        wide = x if x.dtype is torch.float32 else x.float()
        out = self._one(wide) if x.shape[0] == 1 else self._many(wide)
        if residual is not None:
            out.add_(residual)
        return out if x.dtype is torch.float32 else out.to(x.dtype)

    def _one(self, x: Tensor) -> Tensor:
        """For `x [1, in]`: the scale is a number, so oneDNN applies it, and adds the bias."""
        sizes = x.abs()
        largest = sizes.amax().item()
        if not largest < torch.inf:
            return x.new_full((1, self._shape[0]), torch.nan)
        largest = max(largest, _TINY)
        # Adding this wraps around: the upper byte then has its zero at 128, as the lower one.
        fine = torch.mul(x, _STEPS / largest).round_().to(torch.int16).add_(_ZERO_POINT - 32768)
        rows = fine.view(torch.uint8).view(-1, 2).t()
        if largest <= OUTLIER and largest <= OUTLIER_TO_MEAN * sizes.mean().item():
            return self._product(rows[1:].contiguous(), largest / _LEVELS, self._bias)
        both = self._product(rows.contiguous(), largest / _STEPS, None)
        if self._bias is None:
            return torch.mm(_places(), both)
        return torch.addmm(self._bias, _places(), both)

    def _many(self, x: Tensor) -> Tensor:
        if x.shape[0] <= _CHUNK_TOKENS:
            return self._chunk(x)
        out = x.new_empty(x.shape[0], self._shape[0])
        for first in range(0, x.shape[0], _CHUNK_TOKENS):
            chunk = slice(first, first + _CHUNK_TOKENS)
            out[chunk] = self._chunk(x[chunk])
        return out

    def _chunk(self, x: Tensor) -> Tensor:
        tokens = x.shape[0]
        sizes = x.abs()
        largest = sizes.amax(1, keepdim=True)
        # Written so that undefined numbers count as outliers; only their own row can come out undefined.
        normal = (largest <= OUTLIER) & (largest <= OUTLIER_TO_MEAN * sizes.mean(1, keepdim=True))
        wide = (~normal).squeeze(1).nonzero().squeeze(1)
        largest.clamp_min_(_TINY)
        fine = (x * torch.div(_steps(), largest)).round_().to(torch.int16).add_(_ZERO_POINT)
        steps = largest.div_(_LEVELS)
        rows = torch.empty(tokens + len(wide), x.shape[1], dtype=torch.uint8)
        every = len(wide) == tokens
        rows[tokens:].copy_(fine if every else fine[wide])
        rows[:tokens].copy_(fine.bitwise_right_shift_(8).add_(_ZERO_POINT))
        both = self._product(rows, 1.0, None)
        out = both[:tokens]
        if every:
            out.add_(both[tokens:], alpha=1 / _FINE).mul_(steps)
        else:
            out.mul_(steps).index_add_(0, wide, both[tokens:].mul_(steps[wide].div_(_FINE)))
        return out if self._bias is None else out.add_(self._bias)

    def _product(self, rows: Tensor, scale: float, bias: Tensor | None) -> Tensor:
        # Unsigned bytes with their zero at 128: with signed ones oneDNN is 400 times slower [measured].
        out: Tensor = torch.ops.onednn.qlinear_pointwise.default(
            rows,
            scale,
            _ZERO_POINT,
            self._packed,
            self._scales,
            self._zeros,
            bias,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        return out

    @property
    def nbytes(self) -> int:
        return self._nbytes


@cache
def _places() -> Tensor:
    """What the lower and the upper byte of a number count."""
    return torch.tensor([[1.0, float(_FINE)]])


@cache
def _steps() -> Tensor:
    """A number divided by a tensor is not rounded as their quotient is: it is multiplied by the inverse."""
    return torch.tensor(_STEPS)


@cache
def _zeros(rows: int) -> Tensor:
    """Zero points of weights, shared by all matrices: eight bytes a row would be wasted on each."""
    return torch.zeros(rows, dtype=torch.int64)


@cache
def packing_works() -> bool:
    """Whether this machine multiplies packed bytes fast, and right: without VNNI 16-bit sums overflow."""
    vnni = getattr(torch.cpu, "_is_vnni_supported", None)
    onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not onednn or vnni is None or not vnni():
        return False
    with torch.inference_mode():
        signs = torch.tensor([1, -1], dtype=torch.int8).repeat(4).unsqueeze(1)
        values = (127 * signs).expand(8, 64).contiguous()
        try:
            linear = PackedInt8Linear(Int8Rows(values, torch.ones(8)))
            rows = torch.tensor([[255], [0]], dtype=torch.uint8).expand(2, 64).contiguous()
            found = linear._product(rows, 1.0, None)
        except (AttributeError, RuntimeError, NotImplementedError):
            return False
        return torch.equal(found, (rows.float() - _ZERO_POINT) @ values.float().t())


class Int8Linear:
    """A plain int8 weight, on any device: activations stay in floating point, outliers with them.

    The host never waits for the device. `fused` says whether few rows may use torch's product of bfloat16
    activations and int8 weights; by default where the device has one.
    """

    __slots__ = ("_bias", "_ones", "_piece_rows", "_scales", "_values")

    def __init__(self, weight: Int8Rows, bias: Tensor | None = None, *, fused: bool | None = None) -> None:
        self._values, self._scales = weight
        self._bias = bias
        on_cpu = self._values.device.type == "cpu"
        elements = _PIECE_ELEMENTS if on_cpu else _DEVICE_PIECE_ELEMENTS
        self._piece_rows = max(1, elements // self._values.shape[1])
        fused = on_cpu and _fused_works(self._values) if fused is None else fused
        self._ones = _ones(self._values.shape[0]) if fused else None

    def __call__(self, x: Tensor) -> Tensor:
        if self._ones is not None and x.shape[0] <= _FEW_ROWS:
            sums = torch._weight_int8pack_mm(x.bfloat16(), self._values, self._ones)
            out = sums.float().mul_(self._scales)
            return (out if self._bias is None else out.add_(self._bias)).to(x.dtype)
        parts = (torch.split(part, self._piece_rows) for part in (self._values, self._scales))
        outs = [F.linear(x, Int8Rows(*piece).dequantized(x.dtype)) for piece in zip(*parts, strict=True)]
        out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)
        return out if self._bias is None else out.add_(self._bias)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """`residual + self(x)`."""
        return self(x).add_(residual)

    def back(self, grad: Tensor) -> Tensor:
        """`grad @ weight`."""
        step = max(1, self._piece_rows * self._values.shape[1] // self._values.shape[0])
        columns = torch.split(self._values, step, dim=1)
        pieces = [grad @ Int8Rows(piece, self._scales).dequantized(grad.dtype) for piece in columns]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)

    @property
    def nbytes(self) -> int:
        return self._values.nbytes + self._scales.nbytes + (0 if self._bias is None else self._bias.nbytes)


@cache
def _ones(rows: int) -> Tensor:
    return torch.ones(rows, dtype=torch.bfloat16)


def _fused_works(values: Tensor) -> bool:
    probe = torch.ones(1, values.shape[1], dtype=torch.bfloat16)
    try:
        found = torch._weight_int8pack_mm(probe, values[:1], _ones(1))
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return bool(torch.isfinite(found).all())


def make_int8_linear(weight: Int8Rows, bias: Tensor | None) -> PackedInt8Linear | Int8Linear:
    """The fastest kind for the device that the weight is on; oneDNN's packed numbers are nobody's to view."""
    if weight.values.device.type != "cpu" or not packing_works():
        return Int8Linear(weight, bias)
    if weight.values.numel() < _SMALL_WEIGHT:
        return Int8Linear(weight, bias, fused=False)
    viewed = isinstance(weight, ViewedInt8Rows)
    return Int8Linear(weight, bias) if viewed else PackedInt8Linear(weight, bias)
