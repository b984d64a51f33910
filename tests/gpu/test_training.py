"""Gradients of blocks on the device, against those on the CPU in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from petal_swarm.engine.training import Passes
from petal_swarm.models.adapters import AdapterLayout, LoraPlace
from petal_swarm.models.families import family_of
from petal_swarm.models.stack import BlockStack
from tests.models.tiny_models import make

from .stacks import MODES, Stack, distance, random_rows

LENGTHS = (30, 30, 300, 1)


@pytest.fixture(scope="module", params=["bloom", "llama", "qwen2-window", "qwen3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    with torch.inference_mode(False):
        make(request.param).save_pretrained(path)
    return path


def gradients(stack: BlockStack, prefix_tokens: int) -> list[Tensor]:
    """What comes out, and the gradients of what goes in and of an adapter."""
    config, span = stack.config, stack.span
    shapes = family_of(config).block_shapes(config)
    stems = [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2]
    places = tuple(LoraPlace(block, stem, 2, 0.5) for block in span.blocks() for stem in stems)
    layout = AdapterLayout(places, prefix_tokens)
    numbers = 0.2 * random_rows(1, layout.numbers(config, span))[0]
    hidden = random_rows(sum(LENGTHS), config.hidden_size)
    passes = Passes(stack)
    forward = passes.forward("a", hidden, LENGTHS, span, (layout, numbers), keep=True)
    found: list[Tensor] = []
    while True:
        try:
            next(forward)
        except StopIteration as end:
            found.append(end.value)
            break
    backward = passes.backward("a", hidden.flip(0))
    while True:
        try:
            next(backward)
        except StopIteration as end:
            return [*found, *end.value]


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("prefix_tokens", [0, 5])
def test_gradients(folder: Path, device: torch.device, name: str, prefix_tokens: int) -> None:
    mode = MODES[name]
    expected = gradients(Stack(folder, MODES["float32"], "cpu").blocks, prefix_tokens)
    found = gradients(Stack(folder, mode, device).blocks, prefix_tokens)
    for own, other in zip(found, expected, strict=True):
        assert own.device.type == device.type
        assert distance(own, other) < 4 * mode.tolerance
