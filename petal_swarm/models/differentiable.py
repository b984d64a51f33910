"""The operations of blocks as autograd functions: frozen weights, and nothing kept that need not be.

Packed and quantized products have no backward in torch, and of norms, gates and rotations it would keep
every intermediate result. Weights are attributes of a function's context, not saved tensors: who counts what
is kept for the backward does not count them, and they may have been made in inference mode.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from petal_swarm.models.linear import Projection
from petal_swarm.models.lora import LoraDelta
from petal_swarm.models.rope import rotate_


def product(projection: Projection, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """`projection(x)`, or `projection.plus(x, residual)`."""
    return _apply(_Product, x, residual, projection)


def adapted_product(
    projection: Projection, delta: LoraDelta, x: Tensor, residual: Tensor | None = None
) -> Tensor:
    """As `product`, plus what `delta` gives."""
    return _apply(_AdaptedProduct, x, residual, projection, delta, delta.a, *[p.b for p in delta.pieces])


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Over the last dimension."""
    return _apply(_LayerNorm, x, weight, bias, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `norms.RMSNorm`."""
    return _apply(_RMSNorm, x, weight, eps)


def silu_gate(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` for `gate_up [tokens, 2 * inner]`."""
    return _apply(_SiluGate, gate_up)


def rotate(heads: Tensor, rotation: Tensor, count: int) -> Tensor:
    """`rope.rotate_` of the first `count` heads of `heads [tokens, heads, head_dim]`, in place."""
    return _apply(_Rotate, heads, rotation, count)


def _apply(function: type[Function], *arguments: Any) -> Tensor:
    result: Tensor = function.apply(*arguments)  # type: ignore[no-untyped-call]
    return result


def _base_product(projection: Projection, x: Tensor, residual: Tensor | None) -> Tensor:
    """Never some rows of something larger, which would be kept alive, and could not be turned in place."""
    out = projection(x) if residual is None else projection.plus(x, residual)
    return out.clone() if out._is_view() else out


class _Product(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, projection: Projection) -> Tensor:
        ctx.projection = projection
        return _base_product(projection, x, residual)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_grad = ctx.projection.back(grad) if ctx.needs_input_grad[0] else None
        return x_grad, grad if ctx.needs_input_grad[1] else None, None


class _AdaptedProduct(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        projection: Projection,
        delta: LoraDelta,
        a: Tensor,
        *bs: Tensor,
    ) -> Tensor:
        out = _base_product(projection, x, residual)
        reduced = delta.reduce(x)
        delta.expand_into(out, reduced)
        ctx.projection = projection
        ctx.places = [piece[:4] for piece in delta.pieces]
        ctx.save_for_backward(x, reduced, a, *bs)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, reduced, a, *bs = ctx.saved_tensors
        b_grads, reduced_grads = [], []
        for (start, stop, first, last), b in zip(ctx.places, bs, strict=True):
            part = grad[:, start:stop].to(b.dtype)
            b_grads.append((reduced[first:last] @ part).t())
            reduced_grads.append(b.t() @ part.t())
        reduced_grad = reduced_grads[0] if len(bs) == 1 else torch.cat(reduced_grads)
        a_grad = reduced_grad @ x.to(a.dtype)
        x_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = ctx.projection.back(grad)
            if x_grad.dtype is a.dtype:
                x_grad.addmm_(reduced_grad.t(), a)
            else:
                x_grad += reduced_grad.t() @ a
        return x_grad, grad if ctx.needs_input_grad[1] else None, None, None, a_grad, *b_grads


class _LayerNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        out, mean, inverse = torch.native_layer_norm(x, weight.shape, weight, bias, eps)
        ctx.weight, ctx.bias = weight, bias
        ctx.save_for_backward(x, mean, inverse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, inverse = ctx.saved_tensors
        weight = ctx.weight
        x_grad, _, _ = torch.ops.aten.native_layer_norm_backward.default(
            grad.contiguous(), x, weight.shape, mean, inverse, weight, ctx.bias, [True, False, False]
        )
        return x_grad, None, None, None


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        inverse = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse.add_(eps).rsqrt_()
        ctx.weight = weight
        ctx.save_for_backward(x, inverse)
        normed: Tensor = (wide * inverse).to(x.dtype)
        return normed.mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, inverse = ctx.saved_tensors
        scaled = (grad * ctx.weight).float()
        normed = x.float() * inverse
        along = (scaled * normed).mean(-1, keepdim=True)
        x_grad = torch.addcmul(scaled, normed, along, value=-1).mul_(inverse)
        return x_grad.to(x.dtype), None, None


class _SiluGate(Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=1)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=1)
        found = torch.empty_like(gate_up)
        gate_grad, up_grad = found.chunk(2, dim=1)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=gate_grad)
        torch.mul(torch.nn.functional.silu(gate), grad, out=up_grad)
        return found


class _Rotate(Function):
    @staticmethod
    def forward(ctx: Any, heads: Tensor, rotation: Tensor, count: int) -> Tensor:
        ctx.rotation, ctx.count = rotation, count
        ctx.mark_dirty(heads)
        rotate_(heads[:, :count], rotation)
        return heads

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found = grad.clone(memory_format=torch.contiguous_format)
        rotate_(found[:, : ctx.count], ctx.rotation.conj())
        return found, None, None
