"""The parts of a block against torch's own, in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from petal_swarm.models.differentiable import silu_gate
from petal_swarm.models.linear import Linear
from petal_swarm.models.norms import LayerNorm, RMSNorm


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 40])
@pytest.mark.parametrize("shape", [(24, 16), (768, 512)])
@pytest.mark.parametrize("biased", [False, True])
def test_linear(rows, shape, biased):
    generator = torch.Generator().manual_seed(rows)
    weight, x = torch.randn(shape, generator=generator), torch.randn(rows, shape[1], generator=generator)
    bias = torch.randn(shape[0], generator=generator) if biased else None
    residual = torch.randn(rows, shape[0], generator=generator)
    before = residual.clone()
    linear = Linear(weight, bias)
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(linear(x).double(), exact, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(linear.plus(x, residual).double(), exact + residual, rtol=1e-5, atol=1e-4)
    assert torch.equal(residual, before)
    grad = torch.randn(rows, shape[0], generator=generator)
    torch.testing.assert_close(linear.back(grad), grad @ weight, rtol=1e-5, atol=1e-4)
    assert linear(x).is_contiguous(), "attention takes strided views of it"
    assert linear.nbytes == weight.nbytes + (0 if bias is None else bias.nbytes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 100.0])
def test_norms(dtype, scale):
    generator = torch.Generator().manual_seed(1)
    x = (torch.randn(5, 48, generator=generator) * scale + scale).to(dtype)
    weight, bias = (torch.randn(48, generator=generator).to(dtype) for _ in range(2))
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps + 1e-5, "atol": 4 * torch.finfo(dtype).eps}
    found = RMSNorm(weight, 1e-6)(x).double()
    torch.testing.assert_close(found, F.rms_norm(x.double(), (48,), weight.double(), 1e-6), **tolerance)
    found = LayerNorm(weight, bias, 1e-5)(x).double()
    exact = F.layer_norm(x.double(), (48,), weight.double(), bias.double(), 1e-5)
    torch.testing.assert_close(found, exact, **tolerance)


def test_rms_norm_with_a_weight_for_each_head():
    x, weight = torch.randn(3, 2, 16), torch.randn(2, 16)
    found = RMSNorm(weight, 1e-6)(x)
    for head in range(2):
        torch.testing.assert_close(found[:, head], F.rms_norm(x[:, head], (16,), weight[head], 1e-6))


def test_parts_are_differentiable():
    x = torch.randn(3, 16, dtype=torch.float32, requires_grad=True)
    RMSNorm(torch.randn(16), 1e-6)(x).square().sum().backward()
    expected = x.grad.clone()
    assert expected.isfinite().all()
    Linear(torch.randn(8, 16), torch.randn(8)).plus(x, torch.zeros(3, 8)).sum().backward()
    assert not torch.equal(x.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inference_weights", [False, True])
def test_gradients_of_norms(dtype, inference_weights):
    """Also with weights that were made in inference mode, which torch saves for no backward."""
    generator = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(5, 48, generator=generator).to(dtype) for _ in range(2))
    with torch.inference_mode(inference_weights):
        weight, bias = (torch.randn(48, generator=generator).to(dtype) for _ in range(2))
        norms = RMSNorm(weight, 1e-6), LayerNorm(weight, bias, 1e-5)
    own = weight.double().clone(), bias.double().clone()
    exact = (
        lambda x: F.rms_norm(x, (48,), own[0], 1e-6),
        lambda x: F.layer_norm(x, (48,), *own, 1e-5),
    )
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps + 1e-5, "atol": 16 * torch.finfo(dtype).eps}
    for norm, double in zip(norms, exact, strict=True):
        narrow, wide = x.clone().requires_grad_(), x.double().requires_grad_()
        out = norm(narrow)
        torch.testing.assert_close(out.detach(), norm(x), **tolerance)
        (found,) = torch.autograd.grad(out, narrow, grad)
        (expected,) = torch.autograd.grad(double(wide), wide, grad.double())
        torch.testing.assert_close(found.double(), expected, **tolerance)


def test_gradient_of_a_norm_for_each_head():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 3, 16, generator=generator).requires_grad_()
    weight, grad = torch.randn(3, 16, generator=generator), torch.randn(5, 3, 16, generator=generator)
    (found,) = torch.autograd.grad(RMSNorm(weight, 1e-6)(x), x, grad)
    (expected,) = torch.autograd.grad(F.rms_norm(x, (16,), None, 1e-6) * weight, x, grad)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_gradient_of_a_gate():
    generator = torch.Generator().manual_seed(1)
    gate_up = torch.randn(5, 24, generator=generator).requires_grad_()
    grad = torch.randn(5, 12, generator=generator)
    gate, up = gate_up.chunk(2, dim=1)
    out = silu_gate(gate_up)
    torch.testing.assert_close(out, F.silu(gate) * up)
    (found,) = torch.autograd.grad(out, gate_up, grad)
    (expected,) = torch.autograd.grad(F.silu(gate) * up, gate_up, grad)
    torch.testing.assert_close(found, expected)
