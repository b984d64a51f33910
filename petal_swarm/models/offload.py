"""A span of which not all blocks fit the device's memory: some stay there, the others are streamed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import psutil
import torch
from torch import Tensor

from petal_swarm.errors import ConfigError
from petal_swarm.models import devices
from petal_swarm.models.block_source import BlockSource
from petal_swarm.models.checkpoint import Progress
from petal_swarm.models.chunk_files import ChunkFolder
from petal_swarm.models.chunks import ChunkLayout
from petal_swarm.models.family import Block
from petal_swarm.models.quantization import PARTS, Weight, from_parts, part_shapes, viewed
from petal_swarm.models.streaming import SLOTS, Streaming, Transfer, streamed_places
from petal_swarm.models.transfers import (
    MappedTransfer,
    ReadingTransfer,
    StreamTransfer,
    bring_ahead,
    give_back,
    pinned,
)
from petal_swarm.span import Span

Offload = Literal["none", "cpu", "disk"]
OFFLOADS: tuple[Offload, ...] = ("none", "cpu", "disk")


@dataclass(frozen=True)
class Residence:
    """The device's memory has room for `fitting` blocks; if a span has more they stay where `offload` says.

    "cpu" is the host's memory, pinned; "disk" is files below `folder`.
    """

    offload: Offload
    fitting: int
    folder: Path | None = None


class Housed(NamedTuple):
    """The blocks of a span in order, those that are streamed among them; `streaming` is None if all stay."""

    blocks: list[Block]
    streaming: Streaming | None


def house(
    source: BlockSource,
    span: Span,
    residence: Residence,
    progress_of: Callable[[int], Progress | None],
) -> Housed:
    """Reads the blocks of `span`; `progress_of(place)` is told how far each is.

    Raises:
        ConfigError: there is no room for those that are streamed.
        CheckpointError: as `BlockSource.read`.
    """
    layout = ChunkLayout(_build(source, _zeros(source)))
    assert residence.fitting > 0, "there is room for a block"
    slots = min(SLOTS, residence.fitting)
    places = streamed_places(len(span), residence.fitting - slots) if residence.fitting < len(span) else ()
    shelf = _shelf(source, layout, residence, len(places))
    chunks: list[Tensor] = []
    staying: dict[int, Block] = {}
    for place, number in enumerate(span.blocks()):
        if place in places:
            chunks.append(shelf.put(number, progress_of(place)))
        else:
            tensors = source.read(number, progress_of(place))
            staying[place] = source.checkpoint.family.build_block(source.checkpoint.config, tensors)
    if not places:
        return Housed([staying[place] for place in range(len(span))], None)
    streaming = Streaming(places, shelf.transfer(chunks, slots))
    streamed = {place: streaming.block(number) for number, place in enumerate(places)}
    return Housed([(staying | streamed)[place] for place in range(len(span))], streaming)


class _Shelf(Protocol):
    """Where streamed blocks stay."""

    def put(self, number: int, progress: Progress | None) -> Tensor:
        """The chunk of the model's block `number`."""
        ...

    def transfer(self, chunks: Sequence[Tensor], slots: int) -> Transfer:
        """What brings `chunks` from here to the device."""
        ...


class _HostMemory:
    """Pinned, where a device copies from it."""

    def __init__(self, source: BlockSource, layout: ChunkLayout) -> None:
        self._source = source
        self._layout = layout
        self._device = torch.device(source.device)

    def put(self, number: int, progress: Progress | None) -> Tensor:
        chunk = pinned(self._layout.nbytes, self._device)
        self._layout.write(_build(self._source, self._source.read(number, progress)), chunk)
        return chunk

    def transfer(self, chunks: Sequence[Tensor], slots: int) -> Transfer:
        if devices.streams(self._device) is not None:
            return StreamTransfer(self._layout, chunks, slots, self._device)

        def read(number: int, target: Tensor) -> None:
            target.copy_(chunks[number])

        return ReadingTransfer(self._layout, read, slots, self._device)


class _Disk:
    """Files that are mapped, and stay for the next start."""

    def __init__(self, source: BlockSource, layout: ChunkLayout, folder: Path) -> None:
        # Quantized blocks are kept here as they are used: once is enough.
        self._source = replace(source, cache=None)
        self._layout = layout
        self._device = torch.device(source.device)
        self._folder = ChunkFolder.of(folder, source.checkpoint, source.quant, source.dtype, layout)

    def put(self, number: int, progress: Progress | None) -> Tensor:
        chunk = self._folder.open(number)
        if chunk is not None:
            self._source.pass_over(number, progress)
        else:
            made = torch.zeros(self._layout.nbytes, dtype=torch.uint8)
            self._layout.write(_build(self._source, self._source.read(number, progress)), made)
            chunk = self._folder.store(number, made)
        give_back(chunk)
        return chunk

    def transfer(self, chunks: Sequence[Tensor], slots: int) -> Transfer:
        if devices.on_host(self._device):
            return MappedTransfer(self._layout, chunks, slots)

        def read(number: int, target: Tensor) -> None:
            bring_ahead(chunks[number])
            target.copy_(chunks[number])
            give_back(chunks[number])

        return ReadingTransfer(self._layout, read, slots, self._device)


def _shelf(source: BlockSource, layout: ChunkLayout, residence: Residence, count: int) -> _Shelf:
    if residence.offload == "disk":
        assert residence.folder is not None, "files have a folder"
        return _Disk(source, layout, residence.folder)
    free_bytes = int(psutil.virtual_memory().available)
    if count * layout.nbytes > free_bytes:
        raise ConfigError(
            f"--offload cpu: {count} blocks of {layout.nbytes >> 20} MiB do not fit the"
            f" {free_bytes >> 20} MiB of memory that are free; host fewer blocks, or use --offload disk"
        )
    return _HostMemory(source, layout)


def _build(source: BlockSource, tensors: Mapping[str, Weight]) -> Block:
    """A block that can be taken apart."""
    views = {name: viewed(weight) for name, weight in tensors.items()}
    return source.checkpoint.family.build_block(source.checkpoint.config, views)


def _zeros(source: BlockSource) -> dict[str, Weight]:
    """The tensors of a block, as `BlockSource.read` gives them, of zeros."""
    found: dict[str, Weight] = {}
    for name, shape in source.checkpoint.family.block_shapes(source.checkpoint.config).items():
        if source.quant == "none" or len(shape) < 2:
            found[name] = torch.zeros(shape, dtype=source.dtype, device=source.device)
            continue
        shapes, kinds = part_shapes(source.quant, shape), PARTS[source.quant]
        parts = [torch.zeros(shapes[part], dtype=kinds[part], device=source.device) for part in kinds]
        found[name] = from_parts(source.quant, parts)
    return found
