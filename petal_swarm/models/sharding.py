"""Which part of a block is whose when several ranks compute it together (Megatron-LM, arXiv:1909.08053).

Heads and the inner rows of the MLP are shared out. What goes into them is whole at every rank; what comes out
of `columns` projections is a summand at each. Pure arithmetic on shapes and tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from petal_swarm.errors import ConfigError
from petal_swarm.models.adapters import BlockAdapter
from petal_swarm.models.config import ModelConfig
from petal_swarm.models.family import Family, Shape, Split
from petal_swarm.models.lora import LoraMatrices
from petal_swarm.models.nf4 import BLOCK_SIZES, block_size_for
from petal_swarm.models.quantization import Quant, Weight, map_parts


class Part(NamedTuple):
    """The parts `start` to `stop` of `total` equal ones."""

    start: int
    stop: int
    total: int

    def of(self, size: int) -> slice:
        """Of a dimension of `size`."""
        assert self.start * size % self.total == self.stop * size % self.total == 0, "parts are equal"
        return slice(self.start * size // self.total, self.stop * size // self.total)


@dataclass(frozen=True)
class Shard:
    """The share of rank `rank` of `ranks`."""

    rank: int
    ranks: int

    def heads(self, config: ModelConfig) -> Part:
        each = config.num_heads // self.ranks
        return Part(self.rank * each, (self.rank + 1) * each, config.num_heads)

    def kv_heads(self, config: ModelConfig) -> Part:
        """Those that this rank's query heads attend to; with fewer heads than ranks several have the same."""
        kv = config.num_kv_heads
        start = self.rank * kv // self.ranks
        return Part(start, start + max(1, kv // self.ranks), kv)

    def inner(self, config: ModelConfig) -> Part:
        """Numbers inside the MLP, in whole units that share a scale when they are quantized."""
        size = config.intermediate_size
        unit = next((unit for unit in BLOCK_SIZES if size % unit == 0 and size >= unit * self.ranks), 1)
        units = size // unit
        start, stop = (rank * units // self.ranks for rank in (self.rank, self.rank + 1))
        return Part(start, stop, units)

    def config(self, config: ModelConfig) -> ModelConfig:
        """A model of the same hidden size whose blocks are this rank's part of those of `config`."""
        heads, kv = self.heads(config), self.kv_heads(config)
        inner = self.inner(config).of(config.intermediate_size)
        return replace(
            config,
            num_heads=heads.stop - heads.start,
            num_kv_heads=kv.stop - kv.start,
            intermediate_size=inner.stop - inner.start,
        )

    def shapes(self, family: Family, config: ModelConfig) -> dict[str, Shape]:
        """As `family.block_shapes`, of this rank's part."""
        shapes = family.block_shapes(config)
        return {name: self._shape(family, config, name, shape) for name, shape in shapes.items()}

    def first_cut(self, family: Family, config: ModelConfig, name: str, tensor: Tensor) -> Tensor:
        """The rows of a whole tensor that this rank has: what can be cut before it is quantized.

        What is added once to a sum is zero at all ranks but the first.
        """
        split, part = self._of(family, config, name)
        if split is None:
            return tensor
        if split.by == "rows":
            return tensor[part.of(tensor.shape[0])].clone()
        return tensor if tensor.dim() > 1 or not self.rank else torch.zeros_like(tensor)

    def second_cut(self, family: Family, config: ModelConfig, name: str, weight: Weight) -> Weight:
        """The columns of it; those of a quantized matrix keep the scales of whole rows."""
        split, part = self._of(family, config, name)
        if split is None or split.by == "rows" or (isinstance(weight, Tensor) and weight.dim() < 2):
            return weight
        return map_parts(weight, lambda rows: _columns(rows, part))

    def adapter(self, family: Family, config: ModelConfig, adapter: BlockAdapter) -> BlockAdapter:
        """This rank's part of what is added to a block: views, through which gradients flow.

        What several ranks have, such as `a` where `b` is cut, adds up: so do the gradients of all parts.
        """
        lora: dict[str, LoraMatrices] = {}
        for stem, own in adapter.lora.items():
            a, b = own.a, own.b
            split, part = self._of(family, config, f"{stem}.weight")
            if split is not None and split.by == "rows":
                b = b[part.of(b.shape[0])]
            elif split is not None:
                a = a[:, part.of(a.shape[1])]
            lora[stem] = LoraMatrices(a, b, own.scale)
        prefix = adapter.prefix
        if prefix is not None:
            prefix = prefix[:, self.kv_heads(config).of(config.num_kv_heads)]
        return BlockAdapter(lora, prefix)

    def _shape(self, family: Family, config: ModelConfig, name: str, shape: Shape) -> Shape:
        split, part = self._of(family, config, name)
        if split is None or (split.by == "columns" and len(shape) < 2):
            return shape
        axis = 0 if split.by == "rows" else 1
        own = part.of(shape[axis])
        return (*shape[:axis], own.stop - own.start, *shape[axis + 1 :])

    def _of(self, family: Family, config: ModelConfig, name: str) -> tuple[Split | None, Part]:
        split = family.splits.get(name.rpartition(".")[0])
        if split is None:
            return None, Part(0, 1, 1)
        parts = {"heads": self.heads, "kv": self.kv_heads, "inner": self.inner}
        return split, parts[split.of](config)


def check_ranks(ranks: int, family: Family, config: ModelConfig, quant: Quant) -> None:
    """Whether blocks can be computed by so many ranks together.

    Raises:
        ConfigError: says what does not divide.
    """
    if not _fit(config, ranks):
        able = [str(count) for count in range(2, config.num_heads + 1) if _fit(config, count)]
        heads = f"{config.num_heads} heads"
        if config.num_kv_heads != config.num_heads:
            heads += f" ({config.num_kv_heads} of keys and values)"
        advice = f"it may be {', '.join(able)}" if able else "leave it out"
        raise ConfigError(f"--tensor-parallel {ranks} does not divide this model's {heads}; {advice}")
    if quant != "nf4":
        return
    whole = family.block_shapes(config)
    for name, shape in Shard(0, ranks).shapes(family, config).items():
        if len(shape) > 1 and shape[1] % block_size_for(whole[name][1]):
            raise ConfigError(
                f"--tensor-parallel {ranks} cuts rows of {name} where --quant nf4 shares a scale; use fewer"
            )


def _fit(config: ModelConfig, ranks: int) -> bool:
    kv = config.num_kv_heads
    divides = config.num_heads % ranks == 0 and (kv % ranks == 0 or ranks % kv == 0)
    return divides and config.intermediate_size >= ranks


def _columns(rows: Tensor, part: Part) -> Tensor:
    """Of one part of a matrix; scales of whole rows stay."""
    if rows.dim() < 2:
        return rows
    return rows[:, part.of(rows.shape[1])].clone(memory_format=torch.contiguous_format)
