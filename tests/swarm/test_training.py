"""Gradients through a swarm are those of one process: transformers with PEFT is the judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from petal_swarm.client.model import SwarmModelForCausalLM
from tests.checkpoints import VOCABULARY, reference
from tests.models import peft_models
from tests.swarm.local import LocalSwarm

SPANS = {1: ["0:8"], 2: ["0:4", "4:8"], 4: ["0:2", "2:4", "4:6", "6:8"]}
TOLERANCE = 1e-4


def batch(sequences: int = 3, width: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask and labels; padded on the right, as in training."""
    ids = torch.randint(5, VOCABULARY, (sequences, width), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row in range(1, sequences):
        mask[row, width - 3 * row :] = 0
    return ids, mask, ids.masked_fill(mask == 0, -100)


def assert_near(found: Tensor | None, expected: Tensor | None, what: str = "") -> None:
    """Relative to the norm of all of it."""
    assert found is not None, what
    assert expected is not None, what
    assert expected.norm() > 0, what
    error = ((found - expected).norm() / expected.norm()).item()
    assert error <= TOLERANCE, f"{what}: {error:.2g}"


def lora_pair(checkpoint: Path, model: SwarmModelForCausalLM) -> tuple[Any, list[Tensor], list[Tensor]]:
    """PEFT's model, its LoRA parameters, and those of `model`, which get the same numbers."""
    local = peft_models.add_lora(reference(checkpoint))
    adapter = model.add_adapter(local.peft_config["default"])
    theirs = peft_models.lora_parameters(local, adapter.layout)
    ours = list(adapter.parameters())
    with torch.no_grad():
        for mine, other in zip(ours, theirs, strict=True):
            mine.copy_(other)
    return local, ours, theirs


@pytest.mark.parametrize("servers", SPANS)
def test_lora(checkpoint: Path, servers: int) -> None:
    ids, mask, labels = batch()
    with LocalSwarm(checkpoint, SPANS[servers]) as swarm:
        model = swarm.model()
        local, ours, theirs = lora_pair(checkpoint, model)
        expected = local(input_ids=ids, attention_mask=mask, labels=labels)
        found = model(ids, attention_mask=mask, labels=labels)
        assert_near(found.logits[mask.bool()], expected.logits[mask.bool()], "logits")
        assert_near(found.loss, expected.loss, "loss")
        expected.loss.backward()
        found.loss.backward()
        for index, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_near(mine.grad, other.grad, f"parameter {index}")
