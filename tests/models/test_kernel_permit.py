"""Kernels of our own are used by those who ask for them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from petal_swarm.engine.ranks import RankSettings
from petal_swarm.engine.worker import set_process
from petal_swarm.models import kernels
from petal_swarm.models.checkpoint import Checkpoint, open_checkpoint
from petal_swarm.models.stack import BlockStack, load_blocks
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


@pytest.mark.parametrize("asked", [False, True])
def test_other_ranks_try_them_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: bool) -> None:
    """Their processes are told what the leader's was."""
    told: list[RankSettings] = []

    def load(checkpoint: Checkpoint, settings: RankSettings, *_: object) -> BlockStack:
        told.append(settings)
        return load_blocks(checkpoint, settings.span, dtype=settings.dtype)

    monkeypatch.setattr("petal_swarm.server.loader.load_ranks", load)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(kernels, "_usable", lambda device: device.type == "cuda")
    monkeypatch.setattr(kernels, "_permitted", False)
    checkpoint = open_checkpoint(str(save_bloom(tmp_path, blocks=1)))
    config = ServerConfig(
        model="m",
        new_swarm=True,
        device="cpu",
        kv_tokens=64,
        max_batch_tokens=16,
        kernels=asked,
        tensor_parallel=2,
    )
    Loader(config, checkpoint).load(Span(0, 1))
    monkeypatch.setattr(kernels, "_permitted", False)
    set_process(told[0])
    assert kernels.ready(torch.device("cuda", 0)) is asked
