"""Products by Triton kernels, interpreted, against the same products in float32."""

from __future__ import annotations

import pytest
import torch

from tests import kernel_interpreter

kernel_interpreter.require()

from petal_swarm.models.int8 import Int8Linear, quantize_int8  # noqa: E402
from petal_swarm.models.kernels import linears, products  # noqa: E402
from petal_swarm.models.kernels.trials import ROWS, distance  # noqa: E402
from petal_swarm.models.nf4 import Nf4Linear, bitsandbytes, quantize_nf4  # noqa: E402

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}
# The second is summed in parts, none is a multiple of the tiles.
SHAPES = [(200, 40), (2100, 24)]


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def activations(rows: int, inner: int, dtype: torch.dtype) -> torch.Tensor:
    x = numbers(rows, inner, seed=1)
    x[:, 3] *= 40  # an outlier
    return x.to(dtype)


def added(rows: int, outer: int, dtype: torch.dtype) -> list[tuple[torch.Tensor | None, torch.Tensor | None]]:
    return [(None, None), (numbers(outer, seed=2).to(dtype), numbers(rows, outer, seed=3).to(dtype))]


def expect(x, weight, bias, residual) -> torch.Tensor:
    found = x.float() @ weight.dequantized().t()
    for more in (bias, residual):
        if more is not None:
            found = found + more.float()
    return found


@pytest.mark.parametrize(("inner", "outer"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_int8_by_sums(rows, dtype, inner, outer):
    weight, x = quantize_int8(numbers(outer, inner)), activations(rows, inner, dtype)
    for bias, residual in added(rows, outer, dtype):
        found = products.int8_by_sums(x, weight, bias, residual)
        assert found.dtype == dtype
        assert distance(found, expect(x, weight, bias, residual)) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("rows", "inner", "outer", "dtype"),
    [
        (1, 2100, 40, torch.float16),
        (17, 200, 72, torch.float32),
        (40, 96, 72, torch.float16),
        (130, 72, 136, torch.float32),
    ],
)
def test_int8_by_tiles(rows, inner, outer, dtype):
    weight, x = quantize_int8(numbers(outer, inner)), activations(rows, inner, dtype)
    for bias, residual in added(rows, outer, dtype):
        found = products.int8_by_tiles(x, weight, bias, residual)
        assert found.dtype == dtype
        assert distance(found, expect(x, weight, bias, residual)) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", ["int8_by_sums", "int8_by_tiles"])
def test_what_is_not_finite_stays_in_its_row(name):
    weight, x = quantize_int8(numbers(24, 64)), activations(4, 64, torch.float32)
    whole = getattr(products, name)(x, weight, None, None)
    x[1, 5] = torch.nan
    found = getattr(products, name)(x, weight, None, None)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2, 3]], whole[[0, 2, 3]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_int8_by_tensor_cores_keeps_outliers_exact(dtype):
    rows, inner, outer = 40, 512, 136
    weight, x = quantize_int8(numbers(outer, inner)), numbers(rows, inner, seed=1)
    x[:, :: inner // products.OUTLIER_COLUMNS] *= 40  # as many as there are places
    x[7] = 0
    x = x.to(dtype)
    for bias, residual in added(rows, outer, dtype):
        found = products.int8_by_tensor_cores(x, weight, bias, residual)
        assert found.dtype == dtype
        assert distance(found, expect(x, weight, bias, residual)) < 1e-3 + TOLERANCE[dtype]


def test_int8_by_tensor_cores_rounds_what_is_ordinary():
    weight, x = quantize_int8(numbers(136, 512)), numbers(40, 512, seed=1)
    off = distance(products.int8_by_tensor_cores(x, weight, None, None), expect(x, weight, None, None))
    assert 1e-3 < off < 0.01


@pytest.mark.parametrize(
    ("rows", "inner", "outer", "dtype"),
    [(1, 192, 24, torch.float32), (1, 2176, 24, torch.bfloat16), (3, 32 * 5, 24, torch.float32)],
)
def test_nf4_by_sums(rows, inner, outer, dtype):
    weight, x = quantize_nf4(numbers(outer, inner)), activations(rows, inner, dtype)
    levels = bitsandbytes().get_4bit_type("nf4", device="cpu")
    for bias, residual in added(rows, outer, dtype):
        found = products.nf4_by_sums(x, weight, levels, bias, residual)
        assert found.dtype == dtype
        assert distance(found, expect(x, weight, bias, residual)) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", ["int8 by sums", "int8 by tiles", "int8 by tensor cores", None])
def test_a_projection_takes_the_way_that_was_chosen(name, monkeypatch):
    outer, inner, dtype = 40, 64, torch.float32
    chosen = dict.fromkeys([(linears.QuickInt8Linear, outer, inner, dtype, torch.device("cpu"))], [name] * 10)
    monkeypatch.setattr(linears, "_chosen", chosen)
    weight, bias = quantize_int8(numbers(outer, inner)), numbers(outer, seed=2)
    quick, plain = linears.QuickInt8Linear(weight, bias), Int8Linear(weight, bias, fused=False)
    rows = 3 if name == "int8 by sums" else 33
    x, residual = activations(rows, inner, dtype), numbers(rows, outer, seed=3)
    kept = residual.clone()
    allowed = 0.01 if name == "int8 by tensor cores" else 1e-6
    assert distance(quick(x), plain(x)) < allowed
    assert distance(quick.plus(x, residual), plain.plus(x, residual)) < allowed
    assert torch.equal(residual, kept)
    assert torch.equal(quick.back(residual), plain.back(residual))
    assert quick.nbytes == plain.nbytes


def test_a_projection_tries_all_ways_once_for_a_shape(monkeypatch):
    monkeypatch.setattr(linears, "_chosen", {})
    monkeypatch.setattr(linears, "device_clock", lambda device: lambda work: 1.0)  # the last way wins
    weight = quantize_nf4(numbers(16, 64))
    quick, x = linears.QuickNf4Linear(weight), activations(2, 64, torch.float32)
    assert distance(quick(x), Nf4Linear(weight)(x)) < 1e-6
    ((names),) = linears._chosen.values()
    assert names == ["nf4 by sums"] * 3 + [None] * (len(ROWS) - 3)
    monkeypatch.setattr(linears, "fastest", None)
    linears.QuickNf4Linear(weight)(x)


def test_a_projection_without_a_device_is_the_plain_one():
    assert linears.quick_linear(quantize_int8(numbers(16, 64)), None) is None
