"""Blocks that come to the device ahead of use: the same as when all of them stay there."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from petal_swarm.models.checkpoint import open_checkpoint
from petal_swarm.models.devices import wait_for
from petal_swarm.models.offload import Residence
from petal_swarm.models.packing import KVPool, PackedBatch, PackedSlice
from petal_swarm.models.stack import BlockStack, load_blocks
from petal_swarm.models.transfers import ReadingTransfer, StreamTransfer
from petal_swarm.span import Span
from tests.checkpoints import save_bloom

from .stacks import random_rows

BLOCKS, HIDDEN = 8, 512
WHOLE = Span(0, BLOCKS)
pytestmark = [
    pytest.mark.parametrize("offload", ["cpu", "disk"]),
    pytest.mark.parametrize("fitting", [1, 3, 4]),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bloom(tmp_path_factory.mktemp("bloom"), blocks=BLOCKS, hidden=HIDDEN, heads=8)


@pytest.fixture(params=["none", "int8"])
def stacks(
    request: Any, folder: Path, device: torch.device, offload: Any, fitting: int, tmp_path: Path
) -> list[BlockStack]:
    if request.param == "int8" and device.type == "cpu":
        pytest.skip("a CPU packs the int8 weights that stay, and rounds activations for them")
    residences = (None, Residence(offload, fitting, tmp_path))
    checkpoint, options = open_checkpoint(str(folder)), {"dtype": torch.float32, "quant": request.param}
    return [load_blocks(checkpoint, WHOLE, device=device, residence=own, **options) for own in residences]


@torch.inference_mode()
def test_passes_that_interrupt_each_other(
    stacks: list[BlockStack], device: torch.device, offload: str
) -> None:
    """Launched without waiting, so that a copy that came too early or too late would be seen."""
    streaming = stacks[1]._streaming
    assert streaming is not None
    by_stream = offload == "cpu" and device.type != "cpu"
    assert isinstance(streaming._transfer, StreamTransfer if by_stream else ReadingTransfer)
    rng = Random(0)
    walks: list[Any] = []
    pools = [KVPool.allocate(stacks[0].config, WHOLE, 4096, torch.float32, device) for _ in stacks]
    position = [0] * 8
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for turn in range(200):
        number = rng.randrange(8)
        if all(walk[0] != number for walk in walks):
            hidden = random_rows(rng.choice([1, 1, 9]), HIDDEN, turn).to(device)
            end = position[number] + len(hidden)
            extents = ((512 * number, 512 * number + end),)
            batch = PackedBatch.build([PackedSlice(0, len(hidden), position[number], extents)], device)
            pairs = zip(stacks, pools, strict=True)
            walks.append(
                (number, [stack.forward_by_block(hidden, batch, pool, WHOLE) for stack, pool in pairs])
            )
            position[number] = end
        for _ in range(rng.randrange(6)):
            walk = rng.choice(walks)
            both = [next(own, None) for own in walk[1]]
            if both[0] is None or both[1] is None:
                walks.remove(walk)
                break
            found.append((both[0], both[1]))
    wait_for(device)
    assert len(found) > 300
    for expected, own in found:
        assert float((own - expected).norm()) <= 1e-5 * float(expected.norm())


@torch.inference_mode()
def test_a_stack_that_goes_while_blocks_come(cuda: torch.device, stacks: list[BlockStack]) -> None:
    """What gets its memory is not overwritten by a copy that is under way."""
    pool = KVPool.allocate(stacks[1].config, WHOLE, 64, torch.float32, cuda)
    hidden = random_rows(3, HIDDEN).to(cuda)
    batch = PackedBatch.build([PackedSlice(0, 3, 0, ((0, 3),))], cuda)
    stacks[1].forward(hidden, batch, pool, WHOLE)
    stacks.clear()
    taken = [torch.full((1 << 20,), 7.0, device=cuda) for _ in range(32)]
    wait_for(cuda)
    torch.cuda.synchronize(cuda)
    assert all(bool((own == 7.0).all()) for own in taken)
