"""A rank that has no memory for a block meets the others all the same.

They wait for its part of each sum of the block. So it brings NaN to those that are left, and computes nothing
else. No other message is needed: what comes out is NaN in every number, at all ranks, so the leader sees by
any of them that it is worth asking who lacked memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, TypeAlias, TypeVar

import torch
from torch import Tensor

from petal_swarm.errors import PetalSwarmError
from petal_swarm.models.devices import is_out_of_memory, release_cached
from petal_swarm.models.rank_sums import Group

T = TypeVar("T")
Kind: TypeAlias = Literal["sum", "sum_rows", "join_rows"]
#: What ranks meet for in a block, there or back: rows that all have,
WHOLE: tuple[Kind, ...] = ("sum", "sum")
#: or that are spread,
SPREAD: tuple[Kind, ...] = ("join_rows", "sum_rows", "join_rows", "sum_rows")
#: and put together behind the last block.
SPREAD_LAST: tuple[Kind, ...] = (*SPREAD, "join_rows")

_LEAST_BYTES = 1 << 20


class MeetingError(PetalSwarmError):
    """A rank cannot meet the others, who wait for it: no rank is of use any more."""


class Meetings:
    """A `Group` whose meetings are counted in each block; `width` and `dtype` are those of hidden states.

    Memory for the rows of the largest batch so far is set aside: somebody else may have taken all there is.
    """

    def __init__(self, group: Group, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shard = group.shard
        self.spread_from = group.spread_from
        #: Whether there was no memory for something here. A vote takes it back.
        self.lacked = False
        self._group = group
        self.width = width
        self._dtype = dtype
        self._met = 0
        self._aside = _bytes(_LEAST_BYTES, device)

    def share(self, tensor: Tensor) -> None:
        """See `Group`."""
        self._group.share(tensor)

    def sum(self, tensor: Tensor) -> None:
        """See `Group`."""
        self._group.sum(tensor)
        self._met += 1

    def sum_rows(self, tensor: Tensor, out: Tensor | None = None) -> Tensor:
        """See `Group`."""
        found = self._group.sum_rows(tensor, out)
        self._met += 1
        return found

    def join_rows(self, tensor: Tensor, out: Tensor | None = None) -> Tensor:
        """See `Group`."""
        found = self._group.join_rows(tensor, out)
        self._met += 1
        return found

    def block(self, compute: Callable[[], Tensor | None], rows: int, owed: tuple[Kind, ...]) -> Tensor:
        """What `compute` gives, which is one block of `rows` rows, whose meetings are those `owed`.

        It is NaN if there was no memory for it, or if nothing is given since there was none before.
        """
        self._met = 0
        out = self.attempt(compute)
        if out is None:
            return self._miss(rows, owed)
        assert self._met == len(owed), "all blocks meet alike"
        return out

    def attempt(self, do: Callable[[], T]) -> T | None:
        """What comes of it; None if there was no memory for it here."""
        try:
            return do()
        except BaseException as error:
            if not is_out_of_memory(error):
                raise
            self.lacked = True
        return None

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """A tensor to be filled; None if there is no memory for it here."""
        return self.attempt(lambda: torch.empty(shape, dtype=dtype, device=self._aside.device))

    def set_aside(self, rows: int, dtype: torch.dtype) -> None:
        """See to it that there is room for so many rows of `dtype`.

        Raises:
            RuntimeError: there is no memory for it; `is_out_of_memory` tells.
        """
        nbytes = self._padded(rows) * self.width * dtype.itemsize
        if nbytes > self._aside.nbytes:
            self._aside = _bytes(nbytes, self._aside.device)

    def room(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Of what was set aside; used for whatever comes next, too.

        Raises:
            MeetingError: it is not enough.
        """
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes > self._aside.nbytes:
            raise MeetingError("there is no memory to meet the other ranks with")
        return self._aside[:nbytes].view(dtype).view(shape)

    def vote(self) -> list[int]:
        """The ranks that lacked memory since they voted last; all take part."""
        flags = self.room((self.shard.ranks,), torch.float32).zero_()
        if self.lacked:
            self.lacked = False
            flags[self.shard.rank] = 1
            release_cached(flags.device)
        self._group.sum(flags)
        found: list[int] = flags.nonzero().flatten().tolist()
        return found

    def _miss(self, rows: int, owed: tuple[Kind, ...]) -> Tensor:
        self.lacked = True
        padded = self._padded(rows)
        nothing = self.room((padded, self.width), self._dtype)
        own = nothing.chunk(self.shard.ranks)[self.shard.rank]
        for kind in owed[self._met :]:
            nothing.fill_(math.nan)
            if kind == "sum":
                self._group.sum(nothing[:rows])
            elif kind == "sum_rows":
                self._group.sum_rows(nothing, own)
            else:
                self._group.join_rows(own, nothing)
        return nothing.fill_(math.nan)[:rows]

    def _padded(self, rows: int) -> int:
        """So that all ranks have the same number of them."""
        return -(-rows // self.shard.ranks) * self.shard.ranks


def _bytes(count: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it serves training steps, too
        return torch.empty(count, dtype=torch.uint8, device=device)
