"""How ranks that share blocks out meet: sums, and what becomes of those on a gradient's way back.

Megatron-LM's f and g (arXiv:1909.08053): what all ranks have whole is one thing on the way there, and the
sum of what each makes of it on the way back; what they have added up goes back to each as it is.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor
from torch.autograd import Function

from petal_swarm.models.sharding import Shard


class Group(Protocol):
    """The ranks that compute a stack together. All call the same things in the same order.

    Tensors are contiguous, and on the device of the group. `spread_from` is of how many rows a batch is
    worth spreading. Whoever lacks memory for a meeting says so before anything is exchanged, or never.
    """

    shard: Shard
    spread_from: int

    def share(self, tensor: Tensor) -> None:
        """Gives everybody what rank 0 has in `tensor`."""
        ...

    def sum(self, tensor: Tensor) -> None:
        """Adds up what all ranks have, in place; the same at all of them to the last bit."""
        ...

    def sum_rows(self, tensor: Tensor, out: Tensor | None = None) -> Tensor:
        """`[ranks * n, ...]` to `[n, ...]`: this rank's rows of the sum, in `out` if there is one."""
        ...

    def join_rows(self, tensor: Tensor, out: Tensor | None = None) -> Tensor:
        """`[n, ...]` to `[ranks * n, ...]`: the rows of all ranks, in `out` if there is one."""
        ...


def entered(x: Tensor, group: Group) -> Tensor:
    """`x`, which all ranks have, for a projection of which each has a part: their gradients are added up."""
    return _apply(_Entered, x, group)


def summed(out: Tensor, residual: Tensor | None, group: Group) -> Tensor:
    """The sum of what ranks have in `out`, which it is written to, and of a `residual` that all have."""
    return _apply(_Summed, out, residual, group)


def _apply(function: type[Function], *arguments: Any) -> Tensor:
    result: Tensor = function.apply(*arguments)  # type: ignore[no-untyped-call]
    return result


class _Entered(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()  # made by the one projection that `x` has entered, and nobody else's
        ctx.group.sum(grad)
        return grad, None


class _Summed(Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, residual: Tensor | None, group: Group) -> Tensor:
        if residual is not None and not group.shard.rank:
            out.add_(residual)
        group.sum(out)
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, grad if ctx.needs_input_grad[1] else None, None
