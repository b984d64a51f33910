"""Kernels of our own are used by those who ask for them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from petal_swarm.models import kernels
from petal_swarm.models.checkpoint import open_checkpoint
from petal_swarm.server.config import ServerConfig
from petal_swarm.server.loader import Loader
from petal_swarm.span import Span
from tests.checkpoints import save_bloom


@pytest.mark.parametrize("asked", [False, True])
def test_kernels_are_tried_by_servers_that_were_told_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(kernels, "_usable", lambda device: device.type == "cuda")
    monkeypatch.setattr(kernels, "_permitted", False)
    checkpoint = open_checkpoint(str(save_bloom(tmp_path, blocks=1)))
    config = ServerConfig(
        model="m", new_swarm=True, device="cpu", kv_tokens=64, max_batch_tokens=16, kernels=asked
    )
    assert not kernels.ready(device)
    Loader(config, checkpoint).load(Span(0, 1))
    assert kernels.ready(device) is asked
    assert not kernels.ready(torch.device("cpu"))
