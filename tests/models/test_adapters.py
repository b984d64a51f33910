"""The shape of adapters: which numbers, in what order, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import BLOCKS, CONFIGS

from petal_swarm.errors import ConfigError
from petal_swarm.models.adapters import AdapterLayout, LoraPlace
from petal_swarm.models.config import ModelConfig
from petal_swarm.span import Span

WHOLE = Span(0, BLOCKS)


@pytest.fixture(scope="module", params=["bloom", "llama"])
def config(request):
    fields = CONFIGS[request.param]()
    fields.architectures = ["BloomForCausalLM" if request.param == "bloom" else "LlamaForCausalLM"]
    return ModelConfig.from_hf(fields.to_dict())


def stem(config):
    return "mlp.dense_4h_to_h" if config.family == "bloom" else "mlp.down_proj"


def place(config, block, rank=2, scale=0.5):
    return LoraPlace(block, stem(config), rank, scale)


def layout(config, *blocks, prefix_tokens=0):
    return AdapterLayout(tuple(place(config, block) for block in blocks), prefix_tokens)


def prefix_numbers(config, tokens):
    return 2 * config.num_kv_heads * tokens * config.head_dim


def place_numbers(config):
    return 2 * (config.intermediate_size + config.hidden_size)


def test_places_are_kept_in_order(config):
    assert layout(config, 2, 0, 1) == layout(config, 0, 1, 2)
    assert [own.block for own in layout(config, 2, 0, 1).places] == [0, 1, 2]


def test_numbers_of_a_span(config):
    made = layout(config, 0, 2, prefix_tokens=3)
    of_place, of_prefix = place_numbers(config), prefix_numbers(config, 3)
    assert made.numbers(config, WHOLE) == 2 * of_place + 3 * of_prefix
    assert made.numbers(config, Span(1, 2)) == of_prefix
    assert made.bounds(config, Span(0, 1)) == (0, of_place + of_prefix)
    assert made.bounds(config, Span(2, 3)) == (of_place + 2 * of_prefix, 2 * of_place + 3 * of_prefix)


def test_a_span_has_its_part_of_the_layout_and_of_the_vector(config):
    made = layout(config, 0, 1, 2, prefix_tokens=2)
    numbers = torch.arange(made.numbers(config, WHOLE), dtype=torch.float32)
    whole = made.split(config, numbers, WHOLE)
    span = Span(1, 3)
    start, stop = made.bounds(config, span)
    part = made.of_span(span).split(config, numbers[start:stop], span)
    assert sorted(part) == [1, 2]
    for block in span.blocks():
        own, expected = part[block], whole[block]
        assert torch.equal(own.prefix, expected.prefix)
        assert own.lora.keys() == expected.lora.keys() == {stem(config)}
        assert torch.equal(own.lora[stem(config)].a, expected.lora[stem(config)].a)
        assert torch.equal(own.lora[stem(config)].b, expected.lora[stem(config)].b)


def test_numbers_lie_block_by_block_a_before_b_before_the_prefix(config):
    made = layout(config, 1, prefix_tokens=1)
    numbers = torch.arange(made.numbers(config, WHOLE), dtype=torch.float32)
    split = made.split(config, numbers, WHOLE)
    order = [
        split[0].prefix,
        split[1].lora[stem(config)].a,
        split[1].lora[stem(config)].b,
        split[1].prefix,
        split[2].prefix,
    ]
    assert torch.equal(torch.cat([own.flatten() for own in order]), numbers)
    assert split[1].lora[stem(config)].a.shape == (2, config.intermediate_size)
    assert split[1].lora[stem(config)].b.shape == (config.hidden_size, 2)
    assert split[1].lora[stem(config)].scale == 0.5
    assert split[1].prefix.shape == (2, config.num_kv_heads, 1, config.head_dim)


def test_gradients_flow_through_the_views(config):
    made = layout(config, 0, prefix_tokens=1)
    numbers = torch.zeros(made.numbers(config, WHOLE), requires_grad=True)
    split = made.split(config, numbers, WHOLE)
    (split[0].lora[stem(config)].b.sum() + 2 * split[2].prefix.sum()).backward()
    counts = {value: int((numbers.grad == value).sum()) for value in (0, 1, 2)}
    of_b, of_prefix = 2 * config.hidden_size, prefix_numbers(config, 1)
    assert counts == {0: len(numbers) - of_b - of_prefix, 1: of_b, 2: of_prefix}


@pytest.mark.parametrize("difference", [-1, 1])
def test_a_vector_of_another_length(config, difference):
    made = layout(config, 0)
    with pytest.raises(ConfigError, match="numbers"):
        made.split(config, torch.zeros(made.numbers(config, WHOLE) + difference), WHOLE)


def test_nothing_is_an_adapter_too(config):
    made = AdapterLayout()
    made.check(config)
    assert made.numbers(config, WHOLE) == 0
    split = made.split(config, torch.empty(0), WHOLE)
    assert all(own.prefix is None and not own.lora for own in split.values())


def test_what_cannot_be_laid_out(config):
    with pytest.raises(ConfigError, match="twice"):
        AdapterLayout((place(config, 0), place(config, 0, rank=3)))
    with pytest.raises(ConfigError, match="negative"):
        AdapterLayout((), -1)


def test_what_the_model_does_not_have(config):
    least = min(config.intermediate_size, config.hidden_size)
    layout(config, 0, BLOCKS - 1).check(config)
    AdapterLayout((place(config, 0, rank=least),)).check(config)
    bad = [
        place(config, BLOCKS),
        place(config, -1),
        LoraPlace(0, "mlp.nothing", 2, 1.0),
        LoraPlace(0, "input_layernorm", 2, 1.0),
        place(config, 0, rank=0),
        place(config, 0, rank=least + 1),
        place(config, 0, scale=math.inf),
        place(config, 0, scale=math.nan),
    ]
    for own in bad:
        with pytest.raises(ConfigError):
            AdapterLayout((own,)).check(config)
