"""Adapters of PEFT with random numbers, and the same numbers as a layout and a vector."""

from __future__ import annotations

import warnings
from typing import Any

import peft
import torch
from torch import Tensor

from petal_swarm.models.adapters import AdapterLayout, LoraPlace
from petal_swarm.models.config import ModelConfig
from petal_swarm.models.families import family_of
from petal_swarm.span import Span

RANK = 3
SCALE = 2.0
PREFIX_TOKENS = 5


def stems(config: ModelConfig) -> list[str]:
    """Every projection of a block."""
    shapes = family_of(config).block_shapes(config)
    return [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2]


def lora_layout(config: ModelConfig, chosen: list[str] | None = None) -> AdapterLayout:
    places = [
        LoraPlace(block, stem, RANK, SCALE)
        for block in range(config.num_blocks)
        for stem in (chosen or stems(config))
    ]
    return AdapterLayout(tuple(places))


def add_lora(model: Any) -> Any:
    """LoRA on every projection; no matrix is zero."""
    settings = peft.LoraConfig(
        r=RANK, lora_alpha=RANK * SCALE, target_modules="all-linear", init_lora_weights=False
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return _adapt(model, settings)


def _adapt(model: Any, settings: Any) -> Any:
    """PEFT uses what transformers has deprecated, and warns of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, settings)


def lora_parameters(adapted: Any, layout: AdapterLayout) -> list[Tensor]:
    """PEFT's parameters in the order of the layout's numbers."""
    named = dict(adapted.named_parameters())
    found = []
    for place in layout.places:
        tail = f".{place.block}.{place.stem}.lora_A.default.weight"
        name = next(name for name in named if name.endswith(tail))
        found += [named[name], named[name.replace("lora_A", "lora_B")]]
    return found


def add_prefix(model: Any) -> Any:
    settings = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PREFIX_TOKENS)
    adapted = _adapt(model, settings)
    with torch.no_grad():
        weight = prefix_parameter(adapted)
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(4)))
    return adapted


def prefix_parameter(adapted: Any) -> Tensor:
    """`[tokens, blocks * 2 * kv_heads * head_dim]`."""
    weight: Tensor = adapted.prompt_encoder["default"].embedding.weight
    return weight


def prefix_numbers(config: ModelConfig, weight: Tensor) -> Tensor:
    """PEFT's prefix in the order of a layout's numbers."""
    shape = (weight.shape[0], config.num_blocks, 2, config.num_kv_heads, config.head_dim)
    return weight.view(shape).permute(1, 2, 3, 0, 4).flatten()


def whole(config: ModelConfig) -> Span:
    return Span(0, config.num_blocks)
