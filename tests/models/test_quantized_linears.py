"""Every kind of quantized product against float64, with outliers, zeros and undefined numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from petal_swarm.errors import ConfigError
from petal_swarm.models.int8 import (
    OUTLIER,
    OUTLIER_TO_MEAN,
    Int8Linear,
    Int8Rows,
    PackedInt8Linear,
    make_int8_linear,
    packing_works,
    quantize_int8,
)
from petal_swarm.models.linear import Linear
from petal_swarm.models.nf4 import Nf4Linear, Nf4Rows, PackedNf4Linear, block_size_for, quantize_nf4
from petal_swarm.models.nf4 import packing_works as nf4_packing_works
from petal_swarm.models.quantization import make_linear, map_parts, stack_rows

needs_packing = pytest.mark.skipif(not packing_works(), reason="needs oneDNN and VNNI")
needs_packed_nf4 = pytest.mark.skipif(not nf4_packing_works(64), reason="needs AVX512-BF16")

# Largest relative errors against the dequantized weight: activations of 8 bits, of bfloat16, of float32.
KINDS = [
    pytest.param(quantize_int8, PackedInt8Linear, 0.015, id="int8-packed", marks=needs_packing),
    pytest.param(quantize_int8, lambda w, b: Int8Linear(w, b, fused=True), 0.006, id="int8-fused"),
    pytest.param(quantize_int8, lambda w, b: Int8Linear(w, b, fused=False), 0.003, id="int8-dequantized"),
    pytest.param(quantize_nf4, Nf4Linear, 0.003, id="nf4-dequantized"),
    pytest.param(quantize_nf4, PackedNf4Linear, 0.008, id="nf4-packed", marks=needs_packed_nf4),
]
ROWS = [1, 2, 3, 8, 17, 128, 600]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def off(found: Tensor, exact: Tensor) -> float:
    """Error relative to the size of the exact result, over all of it."""
    assert found.shape == exact.shape
    return float((found.double() - exact).norm() / exact.norm())


def exact_product(weight: Int8Rows | Nf4Rows, x: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x.double(), weight.dequantized().double(), None if bias is None else bias.double())


@pytest.mark.parametrize(("quantize", "kind", "tolerance"), KINDS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products(quantize, kind, tolerance, rows, biased, dtype):
    weight = quantize(normal(192, 256))
    bias = normal(192, seed=1).to(dtype) if biased else None
    x, residual = normal(rows, 256, seed=2).to(dtype), normal(rows, 192, seed=3).to(dtype)
    before = residual.clone()
    linear, exact = kind(weight, bias), exact_product(weight, x, bias)
    tolerance += 0.004 if dtype is torch.bfloat16 else 0
    with torch.inference_mode():
        found, sums = linear(x), linear.plus(x, residual)
    assert found.dtype == sums.dtype == dtype
    assert found.is_contiguous(), "attention takes strided views of it"
    assert off(found, exact) < tolerance
    assert off(sums, exact + residual.double()) < tolerance
    assert torch.equal(residual, before)


@pytest.mark.parametrize(("quantize", "kind", "tolerance"), KINDS)
def test_memory(quantize, kind, tolerance):
    plain = Linear(normal(1024, 1024), normal(1024))
    share = kind(quantize(plain.weight), plain.bias).nbytes / plain.nbytes
    assert share <= (0.27 if quantize is quantize_int8 else 0.16)


@pytest.mark.parametrize(("quantize", "kind", "tolerance"), KINDS)
def test_zeros_and_extremes(quantize, kind, tolerance):
    plain = normal(64, 128)
    plain[3] = 0
    plain[4] = 1e-35
    linear = kind(quantize(plain), None)
    assert not linear(torch.zeros(1, 128)).any()
    assert not linear(torch.zeros(3, 128)).any()
    for rows in (1, 3):
        for scale in (1e-30, 1e-6, 1e6, 1e30):
            found = linear(normal(rows, 128, seed=1) * scale)
            assert found.isfinite().all()
            assert not found[:, 3].any()
            assert found[:, :3].any() or scale == 1e-30


@pytest.mark.parametrize(("quantize", "kind", "tolerance"), KINDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_undefined_stays_in_its_row(quantize, kind, tolerance, bad):
    linear = kind(quantize(normal(64, 128)), None)
    x = normal(20, 128, seed=1)
    x[4, 9] = 50.0
    expected = linear(x)
    spoiled = x.clone()
    spoiled[7, 9] = bad
    found = linear(spoiled)
    others = torch.arange(20) != 7
    torch.testing.assert_close(found[others], expected[others], rtol=1e-5, atol=1e-4)
    assert not found[7].isfinite().any()
    assert not linear(spoiled[7:8]).isfinite().any()


@pytest.mark.parametrize("quantize", [quantize_int8, quantize_nf4])
def test_large_weights_are_multiplied_in_pieces(quantize):
    weight = quantize(normal(2100, 1024))
    kind = Int8Linear(weight, fused=False) if isinstance(weight, Int8Rows) else Nf4Linear(weight)
    assert kind._piece_rows < 2100
    x = normal(2, 1024, seed=1)
    assert off(kind(x), exact_product(weight, x, None)) < 1e-5


def test_rounding_of_int8():
    plain = normal(50, 256) * torch.logspace(-6, 6, 50)[:, None]
    rows = quantize_int8(plain)
    assert rows.values.abs().amax() == 127
    steps = plain.abs().amax(1, keepdim=True) / 127
    assert ((rows.dequantized() - plain).abs() <= steps * 0.5001).all()


@pytest.mark.parametrize("columns", [64, 96, 1024])
def test_rounding_of_nf4(columns):
    plain = normal(50, columns)
    rows = quantize_nf4(plain)
    size = block_size_for(columns)
    assert (rows.codes.shape, rows.scales.shape) == ((50, columns // 2), (50, columns // size))
    blocks = (rows.dequantized() - plain).view(50, -1, size)
    # The widest gap between two of the 16 levels is 0.30 of the largest number of the block.
    assert (blocks.abs() <= 0.153 * plain.view(50, -1, size).abs().amax(2, keepdim=True)).all()
    assert off(rows.dequantized(), plain.double()) < 0.1


def test_rows_that_cannot_be_cut_into_blocks():
    with pytest.raises(ConfigError, match="a multiple of 32 long, and this model has some of 48"):
        quantize_nf4(normal(4, 48))


@pytest.mark.parametrize("quantize", [quantize_int8, quantize_nf4])
def test_rows_are_reordered_and_stacked_like_plain_ones(quantize):
    first, second = normal(32, 64), normal(64, 64, seed=1)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    found = stack_rows([map_parts(quantize(first), lambda part: part[order]), quantize(second)])
    expected = quantize(torch.cat([first[order], second]))
    assert all(map(torch.equal, found, expected))
    assert make_linear(found)(normal(1, 64)).shape == (1, 96)


@needs_packing
def test_small_int8_weights_are_not_packed():
    assert isinstance(make_int8_linear(quantize_int8(normal(256, 256)), None), PackedInt8Linear)
    small = make_int8_linear(quantize_int8(normal(255, 256)), None)
    assert isinstance(small, Int8Linear)
    x = normal(9, 256, seed=1)
    torch.testing.assert_close(small(x)[:1], small(x[:1]), msg="fewer rows, the same numbers")


def test_plain_int8_is_for_machines_without_the_packed_product(monkeypatch):
    monkeypatch.setattr("petal_swarm.models.int8.packing_works", lambda: False)
    assert isinstance(make_int8_linear(quantize_int8(normal(8, 64)), None), Int8Linear)


# Outliers.


def absmax_rows(x: Tensor) -> Tensor:
    """Tokens rounded to 8 bits with a scale each, in float64."""
    steps = x.double().abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
    return (x / steps).round() * steps


def absmax_int8(x: Tensor, weight: Tensor) -> Tensor:
    """Plain int8: all activations of a token share its scale."""
    return absmax_rows(x) @ weight.double().t()


def llm_int8(x: Tensor, weight: Tensor) -> Tensor:
    """LLM.int8() to the letter: columns with an activation above 6.0 in floating point, others in int8."""
    columns = (x.abs() > 6.0).any(0)
    inner = absmax_rows(x.masked_fill(columns, 0))
    return inner @ weight.double().t() + x[:, columns].double() @ weight[:, columns].double().t()


@needs_packing
@pytest.mark.parametrize("rows", [1, 8, 128])
@pytest.mark.parametrize("size", [20.0, 60.0, 300.0])
@pytest.mark.parametrize("affected", ["all tokens", "some tokens"])
def test_outliers(rows, size, affected):
    weight = quantize_int8(normal(256, 1024))
    x = normal(rows, 1024, seed=1)
    x[:: 1 if affected == "all tokens" else 3, [5, 77, 300, 301, 512, 900]] = size
    with_outliers = (x.abs() > OUTLIER).any(1)
    dequantized = weight.dequantized()
    exact = exact_product(weight, x, None)
    found = PackedInt8Linear(weight)(x)
    error = (found.double() - exact)[with_outliers].norm()
    plain = (absmax_int8(x, dequantized) - exact)[with_outliers].norm()
    literal = (llm_int8(x, dequantized) - exact)[with_outliers].norm()
    assert error < 0.01 * plain
    assert error < size / 800 * literal, "16 bits of the outlier against 8 bits of all else"
    assert off(found, exact) < 0.015


@needs_packing
def test_outliers_in_every_column():
    """The case in which LLM.int8() becomes a floating-point product; here it costs a second row, as ever."""
    weight = quantize_int8(normal(64, 256))
    x = normal(9, 256, seed=1) * 40
    assert off(PackedInt8Linear(weight)(x), exact_product(weight, x, None)) < 1e-3


@needs_packing
def test_small_tokens_have_outliers_too():
    """None of these numbers is above 6.0, and yet 8 bits for all of a token lose what is not the largest."""
    weight = quantize_int8(normal(64, 1024))
    x = normal(5, 1024, seed=1) * 0.02
    x[:, 17] = 3.0
    assert x[0].abs().max() > OUTLIER_TO_MEAN * x[0].abs().mean()
    exact = exact_product(weight, x, None)
    for found in (PackedInt8Linear(weight)(x), torch.cat([PackedInt8Linear(weight)(row[None]) for row in x])):
        assert (found.double() - exact).norm() < 0.02 * (absmax_int8(x, weight.dequantized()) - exact).norm()


@needs_packing
@pytest.mark.parametrize("size", [1.0, 5.9, 6.1, 60.0])
def test_a_token_does_not_depend_on_its_batch(size):
    """Or a session would get other tokens when it shares a step, or when its prompt is sent again."""
    linear = PackedInt8Linear(quantize_int8(normal(96, 512)), normal(96, seed=2))
    x = normal(700, 512, seed=1)
    x[::3, 40] = size
    together = linear(x)
    alone = torch.cat([linear(row[None]) for row in x])
    pairs = torch.cat([linear(pair) for pair in x.split(2)])
    tolerance = 1e-6 * together.abs().amax()
    assert (together - alone).abs().amax() < tolerance
    assert (together - pairs).abs().amax() < tolerance


@pytest.mark.parametrize(("quantize", "kind", "tolerance"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(192, 256), (96, 64), (1056, 2048)])
def test_gradients_of_inputs(quantize, kind, tolerance, dtype, shape):
    """Those of the dequantized weight, also of one that is dequantized in several pieces."""
    weight = quantize(normal(*shape))
    grad = normal(5, shape[0], seed=3).to(dtype)
    found = kind(weight, None).back(grad)
    assert found.dtype == dtype
    assert off(found, grad.double() @ weight.dequantized().double()) < 0.004
