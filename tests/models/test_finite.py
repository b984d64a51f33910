"""Sums that hide nothing: infinities that cancel, and finite numbers that overflow."""

from __future__ import annotations

import pytest
import torch

from petal_swarm.models.finite import all_finite

LARGE = torch.finfo(torch.float32).max


@pytest.mark.parametrize(
    ("numbers", "finite"),
    [
        ([1.0, -2.0, 0.0], True),
        ([LARGE, LARGE, LARGE], True),
        ([torch.inf, -torch.inf], False),
        ([1.0, torch.nan], False),
        ([-torch.inf, LARGE, 1.0], False),
        ([], True),
    ],
)
def test_all_finite(numbers: list[float], finite: bool) -> None:
    assert all_finite(torch.tensor(numbers)) == finite
