"""Each state of an adapter has an id of its own, and equal numbers are one state."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

from petal_swarm.client.training.adapters import AdapterVersions
from petal_swarm.errors import ConfigError
from petal_swarm.models.adapters import AdapterLayout, LoraPlace
from petal_swarm.models.config import ModelConfig
from petal_swarm.span import Span

CONFIG = ModelConfig.from_hf(
    LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=50,
        architectures=["LlamaForCausalLM"],
    ).to_dict()
)
LAYOUT = AdapterLayout((LoraPlace(1, "self_attn.q_proj", 2, 0.5),))
NUMBERS = 2 * (16 + 16)


def test_equal_numbers_are_one_state() -> None:
    versions, numbers = AdapterVersions(CONFIG), torch.ones(NUMBERS, requires_grad=True)
    first = versions.of(LAYOUT, numbers)
    assert versions.of(LAYOUT, torch.ones(NUMBERS, dtype=torch.float64)) is first
    assert not first.numbers.requires_grad
    with torch.no_grad():
        numbers.add_(1)
    assert torch.equal(first.numbers, torch.ones(NUMBERS))
    second = versions.of(LAYOUT, numbers)
    assert second.id != first.id
    assert second.id.split(":")[0] == first.id.split(":")[0]
    assert AdapterVersions(CONFIG).of(LAYOUT, numbers).id != second.id


def test_where_the_numbers_of_a_span_lie() -> None:
    adapter = AdapterVersions(CONFIG).of(LAYOUT, torch.ones(NUMBERS))
    assert adapter.bounds(Span(0, 1)) == (0, 0)
    assert adapter.bounds(Span(1, 2)) == (0, NUMBERS)


@pytest.mark.parametrize(
    ("layout", "numbers", "message"),
    [
        (LAYOUT, torch.ones(NUMBERS - 1), f"has {NUMBERS} numbers"),
        (LAYOUT, torch.full((NUMBERS,), float("nan")), "not finite"),
        (AdapterLayout((LoraPlace(7, "self_attn.q_proj", 2, 0.5),)), torch.ones(NUMBERS), "no projection"),
    ],
)
def test_what_does_not_fit_is_refused(layout: AdapterLayout, numbers: torch.Tensor, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AdapterVersions(CONFIG).of(layout, numbers)
