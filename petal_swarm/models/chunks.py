"""A block as one contiguous chunk of bytes, so that it is moved by a single copy.

A block is taken apart as pickle does it, into tensors and a skeleton of everything else. Blocks that are
built alike have the same skeleton and the same places of tensors: one layout serves all blocks of a model.
Skeletons stay in memory; only numbers are ever written to disk.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from petal_swarm.models.family import Block

#: Where a tensor may begin: what the kernels of CPUs and GPUs like best.
_ALIGNMENT = 256
#: Chunks are whole pages, so that each can be mapped, and given back, by itself.
PAGE_BYTES = 4096


class _View(NamedTuple):
    """A tensor: a view of the storage `number`, in elements of `dtype`."""

    number: int
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class ChunkLayout:
    """Where the tensors of blocks that are built like `template` lie in a chunk of `nbytes` bytes."""

    def __init__(self, template: Block) -> None:
        apart = _TakenApart(template)
        self._skeleton = apart.skeleton
        self._views = apart.views
        self._starts: list[int] = []
        end = 0
        for storage in apart.storages:
            self._starts.append(end)
            end += -(-storage.nbytes() // _ALIGNMENT) * _ALIGNMENT
        self.nbytes = -(-end // PAGE_BYTES) * PAGE_BYTES

    @property
    def digest(self) -> str:
        """Differs between layouts: a chunk is only to be read by the one that it was written by."""
        facts = repr((self.nbytes, self._starts, self._views)).encode()
        return hashlib.blake2b(facts, digest_size=8).hexdigest()

    def write(self, block: Block, chunk: Tensor) -> None:
        """Copies the numbers of `block` into `chunk`, uint8 `[nbytes]`, wherever each of them is."""
        apart = _TakenApart(block)
        assert apart.views == self._views, "blocks of a model are built alike"
        for storage, start in zip(apart.storages, self._starts, strict=True):
            numbers = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            chunk[start : start + len(numbers)].copy_(numbers)

    def block(self, chunk: Tensor) -> Block:
        """A block whose tensors are views of `chunk`: it computes with whatever is in there at the time."""
        storage, first = chunk.untyped_storage(), chunk.storage_offset()

        def view(place: _View) -> Tensor:
            start = first + self._starts[place.number]
            assert start % place.dtype.itemsize == 0, "chunks begin where tensors may"
            empty = torch.empty(0, dtype=place.dtype, device=chunk.device)
            at = start // place.dtype.itemsize + place.offset
            return empty.set_(storage, at, place.shape, place.stride)

        return cast(Block, _Unpickler(self._skeleton, view).load())


class _TakenApart(pickle.Pickler):
    """`storages` of the tensors of a block, each once, and the `views` of them, in the order of the walk."""

    def __init__(self, block: Block) -> None:
        file = io.BytesIO()
        super().__init__(file, protocol=5)
        self.storages: list[torch.UntypedStorage] = []
        self.views: list[_View] = []
        self._numbers: dict[int, int] = {}
        self.dump(block)
        self.skeleton = file.getvalue()

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return None
        storage = value.untyped_storage()
        number = self._numbers.setdefault(storage.data_ptr(), len(self.storages))
        if number == len(self.storages):
            self.storages.append(storage)
        offset, shape, stride = int(value.storage_offset()), tuple(value.shape), value.stride()
        self.views.append(_View(number, value.dtype, offset, shape, stride))
        return self.views[-1]


class _Unpickler(pickle.Unpickler):
    def __init__(self, skeleton: bytes, view: Any) -> None:
        super().__init__(io.BytesIO(skeleton))
        self._view = view

    def persistent_load(self, place: Any) -> Tensor:
        found: Tensor = self._view(place)
        return found
