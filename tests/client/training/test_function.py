"""The autograd function of remote blocks, without a swarm."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from petal_swarm.client.training.courses import Gradient
from petal_swarm.client.training.function import _Call, _Function
from petal_swarm.span import Span


class Remote:
    """Doubles what comes; gradients come to the host, wherever the numbers are."""

    def __init__(self) -> None:
        self.abandoned: deque[Any] = deque()

    def forward(self, rows: Tensor, call: _Call, *, keep: bool) -> tuple[Tensor, list[Any]]:
        return rows * 2, []

    def backward(self, passes: list[Any], gradient: Tensor, *, inputs: bool) -> Gradient:
        return Gradient(gradient * 2 if inputs else None, torch.ones(5))


def test_gradients_are_where_their_tensors_are() -> None:
    """A device that is not the host."""
    hidden, numbers = torch.ones(2, 3, requires_grad=True), torch.ones(5, device="meta", requires_grad=True)
    call = _Call(Remote(), (2,), Span(0, 1), None, differentiable=True)  # type: ignore[arg-type]
    output = _Function.apply(hidden, numbers, call)  # type: ignore[no-untyped-call]
    output.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.tolist() == [[2.0] * 3] * 2
    assert numbers.grad is not None
    assert numbers.grad.device.type == "meta"
