"""The tensors of one block after another, as they are used: plain, or quantized while they are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from petal_swarm.models.block_cache import BlockCache
from petal_swarm.models.checkpoint import Checkpoint, Progress
from petal_swarm.models.family import Shape
from petal_swarm.models.quantization import Quant, Weight, check_quant, map_parts, quantize
from petal_swarm.models.sharding import Shard


@dataclass(frozen=True)
class BlockSource:
    """Where blocks come from; `cache` holds quantized ones only. With `shard`, that part of each.

    Raises:
        ConfigError: this model cannot be quantized so, or what that needs is not installed.
    """

    checkpoint: Checkpoint
    dtype: torch.dtype
    device: torch.device | str = "cpu"
    quant: Quant = "none"
    cache: BlockCache | None = None
    threads: int | None = None
    shard: Shard | None = None

    def __post_init__(self) -> None:
        check_quant(self.quant, self.checkpoint.family.block_shapes(self.checkpoint.config).values())

    def read(self, number: int, progress: Progress | None) -> dict[str, Weight]:
        """The tensors of block `number` by their names in the block; `progress(done, total)` counts bytes.

        Raises:
            CheckpointError: some are missing, misshapen, damaged or not finite.
        """
        family, config = self.checkpoint.family, self.checkpoint.config
        tensors = self._plain(number, progress) if self.quant == "none" else self._quantized(number, progress)
        prefix = family.block_prefix.format(number)
        return {name.removeprefix(prefix): tensors.pop(name) for name in family.block_tensors(config, number)}

    def pass_over(self, number: int, progress: Progress | None) -> None:
        """Tell `progress` of block `number` the same as if it had been read."""
        if progress is not None:
            shapes = self.checkpoint.family.block_tensors(self.checkpoint.config, number).values()
            kind = self.dtype if self.quant == "none" else torch.float32
            size = sum(torch.Size(shape).numel() for shape in shapes) * kind.itemsize
            progress(size, size)

    def _plain(self, number: int, progress: Progress | None) -> dict[str, Weight]:
        shapes = self.checkpoint.family.block_tensors(self.checkpoint.config, number)
        if self.shard is None:
            plain = self.checkpoint.load(
                shapes, dtype=self.dtype, device=self.device, progress=progress, threads=self.threads
            )
            return {**plain}
        convert = partial(self._convert, number)
        parts = self.checkpoint.load_converted(
            shapes, convert, dtype=self.dtype, progress=progress, threads=self.threads
        )
        return {name: map_parts(parts.pop(name), self._move) for name in shapes}

    def _quantized(self, number: int, progress: Progress | None) -> dict[str, Weight]:
        shapes = self.checkpoint.family.block_tensors(self.checkpoint.config, number)
        tensors = None if self.cache is None else self.cache.load(number, self.quant, self._own(shapes))
        if tensors is not None:
            self.pass_over(number, progress)
        else:
            convert = partial(self._convert, number)
            tensors = self.checkpoint.load_converted(shapes, convert, progress=progress, threads=self.threads)
            if self.cache is not None:
                self.cache.store(number, tensors)
        return {name: map_parts(tensors.pop(name), self._move) for name in shapes}

    def _convert(self, number: int, name: str, tensor: Tensor) -> Weight:
        """What is kept of a tensor. Rows can be cut before they are quantized; columns need the whole row."""
        if self.shard is None:
            return self._quantize(name, tensor)
        family, config = self.checkpoint.family, self.checkpoint.config
        local = name.removeprefix(family.block_prefix.format(number))
        own = self._quantize(name, self.shard.first_cut(family, config, local, tensor))
        return self.shard.second_cut(family, config, local, own)

    def _quantize(self, name: str, tensor: Tensor) -> Weight:
        plain = tensor.dim() < 2 or self.quant == "none"
        return tensor.to(self.dtype) if plain else quantize(name, tensor, self.quant)

    def _own(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Of these shapes of a block's whole tensors, those of what is kept."""
        if self.shard is None:
            return dict(shapes)
        own = self.shard.shapes(self.checkpoint.family, self.checkpoint.config)
        return dict(zip(shapes, own.values(), strict=True))

    def _move(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device)
