"""Whether tensors hold numbers only, cheaply."""

from __future__ import annotations

from torch import Tensor


def all_finite(numbers: Tensor) -> bool:
    """Whether nothing in `numbers` is infinite or undefined.

    What is not finite shows in the sum, which is ten times as fast as looking at each; only a sum of finite
    numbers that overflows needs the second look.
    """
    return bool(numbers.sum().isfinite()) or bool(numbers.isfinite().all())
