"""What a client adds to frozen blocks: LoRA (arXiv:2106.09685) and prefixes (arXiv:2101.00190).

An `AdapterLayout` says which numbers there are, and in what order; the numbers themselves travel and are
differentiated as one flat vector.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from petal_swarm.errors import ConfigError
from petal_swarm.models.config import ModelConfig
from petal_swarm.models.families import family_of
from petal_swarm.models.lora import LoraMatrices
from petal_swarm.span import Span


@dataclass(frozen=True, order=True)
class LoraPlace:
    """A projection `stem` ("self_attn.q_proj") of a block that gets `scale * b @ a` on top of its weight."""

    block: int
    stem: str
    rank: int
    scale: float


@dataclass(frozen=True)
class BlockAdapter:
    """What is added to one block. `prefix` are keys and values `[2, kv_heads, tokens, head_dim]` that all
    tokens attend to; they stand at the positions before the first token, as they are (not rotated).
    """

    lora: Mapping[str, LoraMatrices] = field(default_factory=dict)
    prefix: Tensor | None = None

    def copied(self) -> BlockAdapter:
        """Of contiguous tensors of its own, so that those it shares can be freed."""

        def copy(tensor: Tensor) -> Tensor:
            return tensor.clone(memory_format=torch.contiguous_format)

        lora = {stem: LoraMatrices(copy(own.a), copy(own.b), own.scale) for stem, own in self.lora.items()}
        return BlockAdapter(lora, None if self.prefix is None else copy(self.prefix))


@dataclass(frozen=True)
class AdapterLayout:
    """Shape of an adapter. Its numbers lie block by block: for each place, by stem, `a` then `b`; then the
    prefix, which every block has or none.
    """

    places: tuple[LoraPlace, ...] = ()
    prefix_tokens: int = 0

    def __post_init__(self) -> None:
        if list(self.places) != sorted(self.places):
            object.__setattr__(self, "places", tuple(sorted(self.places)))
        if len({(place.block, place.stem) for place in self.places}) != len(self.places):
            raise ConfigError("an adapter names a projection twice")
        if self.prefix_tokens < 0:
            raise ConfigError("an adapter's prefix cannot have a negative length")

    def check(self, config: ModelConfig) -> None:
        """Raises:
        ConfigError: the model has no such blocks or projections, or a rank or scale makes no sense.
        """
        shapes = family_of(config).block_shapes(config)
        for place in self.places:
            shape = shapes.get(f"{place.stem}.weight", ())
            if not 0 <= place.block < config.num_blocks or len(shape) != 2:
                raise ConfigError(f"the model has no projection {place.stem!r} in a block {place.block}")
            if not 1 <= place.rank <= min(shape):
                raise ConfigError(f"rank {place.rank} does not fit {place.stem!r} of shape {shape}")
            if not math.isfinite(place.scale):
                raise ConfigError(f"the scale of {place.stem!r} is {place.scale}")

    def numbers(self, config: ModelConfig, blocks: Span) -> int:
        """How many numbers the adapter has for `blocks`."""
        of_prefix = 2 * config.num_kv_heads * self.prefix_tokens * config.head_dim
        shapes = family_of(config).block_shapes(config)
        of_places = sum(
            place.rank * sum(shapes[f"{place.stem}.weight"]) for place in self.places if place.block in blocks
        )
        return of_places + len(blocks) * of_prefix

    def bounds(self, config: ModelConfig, blocks: Span) -> tuple[int, int]:
        """Where the numbers of `blocks` lie in the vector of the whole model."""
        start = self.numbers(config, Span(0, blocks.start)) if blocks.start else 0
        return start, start + self.numbers(config, blocks)

    def of_span(self, blocks: Span) -> AdapterLayout:
        """The part that concerns `blocks`."""
        places = tuple(place for place in self.places if place.block in blocks.blocks())
        return AdapterLayout(places, self.prefix_tokens)

    def split(self, config: ModelConfig, numbers: Tensor, blocks: Span) -> dict[int, BlockAdapter]:
        """Views into `numbers`, the flat vector for `blocks`; gradients flow through them.

        Raises:
            ConfigError: the vector has another length.
        """
        expected = self.numbers(config, blocks)
        if numbers.shape != (expected,):
            raise ConfigError(f"an adapter of {expected} numbers came with {tuple(numbers.shape)}")
        taken = 0

        def take(*shape: int) -> Tensor:
            nonlocal taken
            taken += math.prod(shape)
            return numbers[taken - math.prod(shape) : taken].view(shape)

        shapes = family_of(config).block_shapes(config)
        of_block: dict[int, list[LoraPlace]] = {}
        for place in self.places:
            of_block.setdefault(place.block, []).append(place)
        found: dict[int, BlockAdapter] = {}
        for block in blocks.blocks():
            lora: dict[str, LoraMatrices] = {}
            for place in of_block.get(block, ()):
                rows, columns = shapes[f"{place.stem}.weight"]
                a = take(place.rank, columns)
                lora[place.stem] = LoraMatrices(a, take(rows, place.rank), place.scale)
            prefix = None
            if self.prefix_tokens:
                prefix = take(2, config.num_kv_heads, self.prefix_tokens, config.head_dim)
            found[block] = BlockAdapter(lora, prefix)
        return found
