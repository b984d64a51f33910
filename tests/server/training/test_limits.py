"""What of the memory for training is whose."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from petal_swarm.server.training.limits import TrainingLimits


def compute_of(device: str, ranks: int) -> Any:
    config = SimpleNamespace(hidden_size=64)
    stack = SimpleNamespace(device=torch.device(device), ranks=ranks, config=config)
    return SimpleNamespace(engine=SimpleNamespace(stack=stack), piece_rows=lambda: 1)


@pytest.mark.parametrize(("device", "ranks", "share"), [("cpu", 1, 1), ("cpu", 4, 4), ("cuda", 4, 1)])
def test_ranks_in_one_memory_share_it(device: str, ranks: int, share: int) -> None:
    limits = TrainingLimits(room_bytes=1 << 20).passes(compute_of(device, ranks), lambda: 0.0).limits
    assert limits.activation_bytes == (1 << 19) // share
    assert limits.adapter_bytes == (1 << 29) // share
    assert limits.input_bytes == 1 << 18, "inputs are at the leader only"
