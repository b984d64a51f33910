"""4-bit NormalFloat weights (QLoRA, arXiv:2305.14314) by bitsandbytes, which is imported only when asked for.

bitsandbytes has three ways to multiply, and none is best everywhere: on a CPU with AVX512-BF16 a kernel for
its own packed layout, fast for few rows; on CUDA fused kernels; elsewhere the weight is dequantized, here in
pieces so that working memory stays small. Activations stay in floating point.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from petal_swarm.errors import ConfigError

logger = logging.getLogger(__name__)

#: Numbers that share a scale: the first of these that divides the rows.
BLOCK_SIZES = (64, 32)
_PIECE_ELEMENTS = 1 << 21
# The packed kernel wants groups of so many rows. With 1024 x 4096 and 1, 8, 32, 128, 512 tokens it takes
# (ms) 0.09, 0.23, 0.85, 3.4, 13; dequantizing to bfloat16 first 0.85, 0.95, 1.4, 3.2, 9.8, and to float32
# 1.0, 2.0, 4.0, 12, 41 [measured]. One layout must do for all of them.
_PACKED_ROWS = 32


class Nf4Rows(NamedTuple):
    """A matrix `[out, in]`: `codes` uint8 `[out, in / 2]`, `scales` float32 `[out, in / block size]`."""

    codes: Tensor
    scales: Tensor

    @property
    def block_size(self) -> int:
        return 2 * self.codes.shape[1] // self.scales.shape[1]

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        shape = (self.codes.shape[0], 2 * self.codes.shape[1])
        found: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
            self.codes.view(-1, 1), self.scales.view(-1), self.block_size, "nf4", shape, dtype
        )
        return found


def block_size_for(columns: int) -> int:
    """How many neighbours share a scale in rows of `columns` numbers.

    Raises:
        ConfigError: no size of bitsandbytes divides them.
    """
    for size in BLOCK_SIZES:
        if columns % size == 0:
            return size
    raise ConfigError(
        f"--quant nf4 needs rows that are a multiple of {BLOCK_SIZES[-1]} long, and this model has some of"
        f" {columns}; use --quant int8"
    )


@cache
def bitsandbytes() -> Any:
    """The module `bitsandbytes.functional`.

    Raises:
        ConfigError: it is not installed, or does not load.
    """
    noisy = logging.getLogger("bitsandbytes.backends.cpu.ops")
    noisy.addFilter(_is_news)
    try:
        import bitsandbytes.functional as functional
    except (ImportError, OSError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"--quant nf4 needs bitsandbytes ({reason}): pip install bitsandbytes, or use --quant int8"
        ) from error
    finally:
        noisy.removeFilter(_is_news)
    return functional


def _is_news(record: logging.LogRecord) -> bool:
    """bitsandbytes warns on import that an optional package is not there, which nobody here asked for."""
    message = record.getMessage()
    if not message.startswith("Failed to load CPU gemm_4bit_forward"):
        return True
    logger.debug("bitsandbytes: %s", message)
    return False


def quantize_nf4(weight: Tensor) -> Nf4Rows:
    """Rounds `weight [out, in]` to 16 levels for each block of neighbours in a row.

    A block that is not finite gets such a scale.

    Raises:
        ConfigError: rows cannot be cut into blocks.
    """
    rows, columns = weight.shape
    size = block_size_for(columns)
    codes = torch.empty(rows, columns // 2, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(rows, columns // size, device=weight.device)
    step = max(1, _PIECE_ELEMENTS // columns)
    for first in range(0, rows, step):
        piece = weight[first : first + step].float().contiguous()
        found, state = bitsandbytes().quantize_4bit(piece, blocksize=size, quant_type="nf4")
        codes[first : first + step] = found.view(piece.shape[0], -1)
        scales[first : first + step] = state.absmax.view(piece.shape[0], -1)
    return Nf4Rows(codes, scales)


def _state(weight: Nf4Rows, dtype: torch.dtype) -> Any:
    functional = bitsandbytes()
    return functional.QuantState(
        absmax=weight.scales.reshape(-1),
        shape=torch.Size((weight.codes.shape[0], 2 * weight.codes.shape[1])),
        code=functional.get_4bit_type("nf4", device=weight.codes.device),
        blocksize=weight.block_size,
        quant_type="nf4",
        dtype=dtype,
    )


class Nf4Linear:
    """A 4-bit weight in the canonical layout, on any device."""

    __slots__ = ("_bias", "_fused", "_piece_rows", "_state", "_weight")

    def __init__(self, weight: Nf4Rows, bias: Tensor | None = None) -> None:
        self._weight = weight
        self._bias = bias
        self._fused = weight.codes.device.type == "cuda"
        self._state = _state(weight, torch.float32 if bias is None else bias.dtype)
        self._piece_rows = max(1, _PIECE_ELEMENTS // (2 * weight.codes.shape[1]))

    def __call__(self, x: Tensor) -> Tensor:
        if self._fused:
            from bitsandbytes import matmul_4bit

            fused: Tensor = matmul_4bit(x, self._weight.codes.view(-1, 1), self._state, bias=self._bias)
            return fused
        pieces = zip(*(torch.split(part, self._piece_rows) for part in self._weight), strict=True)
        outs = [F.linear(x, Nf4Rows(*piece).dequantized(x.dtype)) for piece in pieces]
        out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)
        return out if self._bias is None else out.add_(self._bias)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """`residual + self(x)`."""
        return self(x).add_(residual)

    def back(self, grad: Tensor) -> Tensor:
        """`grad @ weight`."""
        pieces = zip(*(torch.split(part, self._piece_rows) for part in self._weight), strict=True)
        return _back(grad, (Nf4Rows(*piece) for piece in pieces))

    @property
    def nbytes(self) -> int:
        return self._weight.codes.nbytes + self._weight.scales.nbytes + _nbytes(self._bias)


class PackedNf4Linear:
    """A 4-bit weight in the layout of bitsandbytes' CPU kernel: bfloat16 activations and scales."""

    __slots__ = ("_bias", "_codes", "_state")

    def __init__(self, weight: Nf4Rows, bias: Tensor | None = None) -> None:
        functional = bitsandbytes()
        codes, scales = [], []
        rows = _PACKED_ROWS * max(1, _PIECE_ELEMENTS // (2 * _PACKED_ROWS * weight.codes.shape[1]))
        for piece in zip(*(torch.split(part, rows) for part in weight), strict=True):
            own = Nf4Rows(*piece)
            state = _state(own, torch.bfloat16)
            packed, state = functional._convert_weight_packed_for_cpu(own.codes.contiguous(), state)
            codes.append(packed)
            scales.append(state.absmax)
        self._codes = torch.cat(codes)
        self._state = _state(weight, torch.bfloat16)
        self._state.absmax = torch.cat(scales, dim=1)
        self._state.packing_format_for_cpu = True
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = bitsandbytes().gemv_4bit(x.bfloat16(), self._codes, state=self._state).to(x.dtype)
        return out if self._bias is None else out.add_(self._bias)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """`residual + self(x)`."""
        return self(x).add_(residual)

    def back(self, grad: Tensor) -> Tensor:
        """`grad @ weight`, of scales rounded as the kernel has them."""
        rows, halves = self._codes.shape
        step = _PACKED_ROWS * max(1, _PIECE_ELEMENTS // (2 * _PACKED_ROWS * halves))
        return _back(grad, (self._rows(first, min(first + step, rows)) for first in range(0, rows, step)))

    def _rows(self, start: int, stop: int) -> Nf4Rows:
        """The rows `start:stop`, whole groups, in the canonical layout."""
        # For 32 rows and each pair of columns there are 32 bytes, their low bits for the first 16 rows: the
        # pair of the first, of the second, and so on.
        packed = self._codes[start:stop].view(-1, self._codes.shape[1], _PACKED_ROWS // 2, 2)
        codes = torch.cat([packed & 15, packed >> 4], dim=2).transpose(1, 2)
        codes = (codes[..., 0] << 4 | codes[..., 1]).reshape(stop - start, -1)
        return Nf4Rows(codes.contiguous(), self._state.absmax[:, start:stop].t().float().contiguous())

    @property
    def nbytes(self) -> int:
        return self._codes.nbytes + int(self._state.absmax.nbytes) + _nbytes(self._bias)


def _back(grad: Tensor, pieces: Iterable[Nf4Rows]) -> Tensor:
    """`grad @ weight` for a weight that comes in pieces of its rows; summed in float32."""
    total: Tensor | None = None
    row = 0
    for piece in pieces:
        weight = piece.dequantized(grad.dtype)
        part = grad[:, row : row + len(weight)] @ weight
        row += len(weight)
        total = part if total is None else total.float().add_(part)
    assert total is not None, "a weight has rows"
    return total.to(grad.dtype)


def _nbytes(bias: Tensor | None) -> int:
    return 0 if bias is None else bias.nbytes


@cache
def packing_works(block_size: int) -> bool:
    """Whether the packed kernel is there for this CPU, and right: bitsandbytes promises no such layout."""
    functional = bitsandbytes()
    generator = torch.Generator().manual_seed(0)
    try:
        if not functional.has_avx512bf16():
            return False
        weight = quantize_nf4(torch.randn(3 * _PACKED_ROWS, 4 * block_size, generator=generator))
        x = torch.randn(3, 4 * block_size, generator=generator)
        found, expected = PackedNf4Linear(weight)(x), Nf4Linear(weight)(x)
    except (AttributeError, TypeError, RuntimeError, NotImplementedError, AssertionError):
        return False
    return bool((found - expected).norm() < 0.01 * expected.norm())


def make_nf4_linear(weight: Nf4Rows, bias: Tensor | None) -> PackedNf4Linear | Nf4Linear:
    """The fastest kind for the device that the weight is on."""
    on_cpu, grouped = weight.codes.device.type == "cpu", weight.codes.shape[0] % _PACKED_ROWS == 0
    if on_cpu and grouped and packing_works(weight.block_size):
        return PackedNf4Linear(weight, bias)
    return Nf4Linear(weight, bias)
