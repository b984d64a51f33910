"""What ranks of one server say to each other, and how they add up: torch.distributed between processes.

Rank 0, the leader, is the server. The others compute what it tells them, in that order, and know nothing of
sessions. Commands come by a pipe, tensors by the group: gloo between CPUs, NCCL between CUDA devices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from petal_swarm.models.adapters import AdapterLayout
from petal_swarm.models.devices import to_device
from petal_swarm.models.meetings import MeetingError, Meetings
from petal_swarm.models.packing import PackedSlice
from petal_swarm.models.quantization import Quant
from petal_swarm.models.rank_sums import Group
from petal_swarm.models.sharding import Shard
from petal_swarm.span import Span

#: How long a rank waits for others that compute, or that have still to come.
TIMEOUT_S = 300.0
# Up to so many numbers gloo takes longer to arrange its sum than to send everything to everybody: 1024 to
# 65,536 of them take 280 us by `allreduce`, 80 to 140 us by sending [measured, loopback].
_SENT_NUMBERS = 1 << 16
# An adapter's numbers travel in pieces, for which there is room where there is none for all of them.
_PIECE_NUMBERS = 1 << 18
# Between CPUs a sum in two halves takes as long as what is saved by sharing out norms, or longer; between
# devices the rows that are not kept twice are worth it.
_SPREAD_FROM_CPU = 1 << 30
_SPREAD_FROM_CUDA = 1024


@dataclass(frozen=True)
class RankSettings:
    """What a rank has to know to load its part; `rendezvous` is a file that only this server's ranks see,
    `quantized` where quantized parts are kept; `spread_from` as in `Group`, None is what measured best. With
    `kernels` each rank tries ours for its own products: what is added up may be computed in several ways.
    """

    model: str
    span: Span
    shard: Shard
    dtype: torch.dtype
    device: str
    quant: Quant
    rendezvous: Path = Path()
    quantized: Path | None = None
    threads: int | None = None
    spread_from: int | None = None
    kernels: bool = False


class LoraRows(NamedTuple):
    """As `packed_adapters.Segment`, of the adapter `number`."""

    start: int
    stop: int
    number: int


class Begin(NamedTuple):
    """The batch `number` is to go through `blocks`, so many `at_once`; its hidden states are shared next."""

    number: int
    blocks: Span
    at_once: int
    slices: tuple[PackedSlice, ...]
    lora: tuple[LoraRows, ...]


class Advance(NamedTuple):
    """The batch `number` goes through one more block."""

    number: int


class Drop(NamedTuple):
    """The batch `number` will not go on."""

    number: int


class Vote(NamedTuple):
    """See `Meetings.vote`."""


class Allocate(NamedTuple):
    """See `BlockStack.allocate`."""

    pool_tokens: int
    kv_dtype: str


class CopyRows(NamedTuple):
    """See `KVPool.copy_rows`."""

    source: int
    target: int
    rows: int


class Adapt(NamedTuple):
    """See `BlockStack.serve_adapter`: the adapter `number`, of `size` numbers that are shared."""

    number: int
    layout: AdapterLayout
    blocks: Span
    size: int
    dtype: torch.dtype


class WritePrefix(NamedTuple):
    """See `KVPool.write_prefix`."""

    number: int
    extents: tuple[tuple[int, int], ...]


class Forget(NamedTuple):
    """Nobody uses the adapter `number` any more."""

    number: int


class TrainAdapter(NamedTuple):
    """See `graphs.AdapterState`: the `number`, of `size` numbers in float32 that are shared next."""

    number: int
    layout: AdapterLayout
    blocks: Span
    size: int


class EndAdapter(NamedTuple):
    """No pass uses the adapter state `number` any more."""

    number: int


class BeginPass(NamedTuple):
    """See `graphs.Pass`: the pass `number`, with the adapter state `adapter`."""

    number: int
    blocks: Span
    lengths: tuple[tuple[int, ...], ...]
    adapter: int | None


class EndPass(NamedTuple):
    """Nothing is needed of the pass `number` any more."""

    number: int


class Place(NamedTuple):
    """A block of a pass, and the group of sequences that is meant."""

    number: int
    group: int
    block: int


class Train(NamedTuple):
    """A group goes through a block, whose graph is kept or not. Its rows are shared next, in the dtype
    `shared`; None: they are what the last `Train` or `Through` resulted in.
    """

    place: Place
    kept: bool
    shared: torch.dtype | None


class DropGraph(NamedTuple):
    """The graph at `place` is not needed."""

    place: Place


class BeginGradient(NamedTuple):
    """See `graphs.Gradient`: the gradient `number`, of the pass `of`."""

    number: int
    of: int


class Through(NamedTuple):
    """The gradient `gradient` goes on through the graph at `place`; what comes is as `Train` says."""

    gradient: int
    place: Place
    shared: torch.dtype | None


class EndGradient(NamedTuple):
    """The gradient `number` is done with; what ranks have of an adapter's numbers is added up if it is
    `complete`.
    """

    number: int
    complete: bool


TrainingCommand: TypeAlias = (
    TrainAdapter
    | EndAdapter
    | BeginPass
    | EndPass
    | Train
    | DropGraph
    | BeginGradient
    | Through
    | EndGradient
)
Command: TypeAlias = (
    Begin | Advance | Drop | Vote | Allocate | CopyRows | Adapt | WritePrefix | Forget | TrainingCommand
)


def share_numbers(group: Group, numbers: Tensor, device: torch.device) -> None:
    """Gives everybody what rank 0 has in `numbers [n]`, piece by piece: see `take_numbers`."""
    for piece in torch.split(numbers, _PIECE_NUMBERS):
        group.share(to_device(piece, device).contiguous())


def take_numbers(meetings: Meetings, count: int, dtype: torch.dtype) -> Tensor | None:
    """What the leader gives by `share_numbers`; None if there is no memory to keep it."""
    taken = meetings.take((count,), dtype)
    for start in range(0, max(count, 1), _PIECE_NUMBERS):
        size = min(count - start, _PIECE_NUMBERS)
        meetings.share(meetings.room((size,), dtype) if taken is None else taken[start : start + size])
    return taken


def take_rows(meetings: Meetings, count: int, dtype: torch.dtype) -> Tensor | None:
    """The next `[count, hidden_size]` that the leader gives; None if there is no memory to keep them."""
    meetings.attempt(lambda: meetings.set_aside(count, dtype))
    shape = (count, meetings.width)
    taken = meetings.take(shape, dtype)
    meetings.share(meetings.room(shape, dtype) if taken is None else taken)
    return taken


class TorchGroup:
    """A `sharded_stack.Group` between processes; made when all ranks are there.

    Raises:
        RuntimeError: a rank does not come.
        MeetingError: one goes; after that the group is of no use.
    """

    def __init__(self, settings: RankSettings) -> None:
        shard = self.shard = settings.shard
        self._others = [rank for rank in range(shard.ranks) if rank != shard.rank]
        self._on_host = torch.device(settings.device).type == "cpu"
        best = _SPREAD_FROM_CPU if self._on_host else _SPREAD_FROM_CUDA
        self.spread_from = best if settings.spread_from is None else settings.spread_from
        sent_bytes = _SENT_NUMBERS * torch.float32.itemsize * shard.ranks if self._on_host else 0
        self._aside = torch.empty(sent_bytes, dtype=torch.uint8)
        kind: Any = dist
        store = kind.FileStore(str(settings.rendezvous), shard.ranks)
        self._group = (_gloo if self._on_host else _nccl)(store, shard)
        # Who is through may remove the rendezvous, which others still read: only with this all are.
        met = torch.zeros(1, device=settings.device)
        self.sum(met)
        met.item()

    def share(self, tensor: Tensor) -> None:
        """See `Group`."""
        _wait(lambda: self._group.broadcast(tensor, 0))

    def sum(self, tensor: Tensor) -> None:
        """See `Group`."""
        if not self._on_host or tensor.numel() > _SENT_NUMBERS:
            _wait(lambda: self._group.allreduce([tensor]))
            return
        found = self._scratch(tensor)
        self._swap([tensor] * self.shard.ranks, list(found))
        if self.shard.ranks == 2:
            tensor.add_(found[1 - self.shard.rank])
        else:
            found[self.shard.rank] = tensor
            torch.sum(found, 0, out=tensor)

    def _scratch(self, tensor: Tensor) -> Tensor:
        """Room for such a tensor of each rank."""
        shape = (self.shard.ranks, *tensor.shape)
        try:
            return tensor.new_empty(shape)
        except (RuntimeError, MemoryError):
            # A rank that lacks memory for a block has to meet the others still.
            return self._aside[: tensor.nbytes * self.shard.ranks].view(tensor.dtype).view(shape)

    def sum_rows(self, tensor: Tensor, out: Tensor | None = None) -> Tensor:
        """See `Group`."""
        parts = tensor.chunk(self.shard.ranks)
        own = parts[self.shard.rank]
        out = torch.empty_like(own) if out is None else out
        if not self._on_host:
            options = dist.ReduceScatterOptions()
            _wait(lambda: self._group._reduce_scatter_base(out, tensor, options))
            return out
        found = tensor.new_empty(self.shard.ranks, *own.shape)
        found[self.shard.rank] = own
        self._swap(parts, list(found))
        return torch.sum(found, 0, out=out)

    def join_rows(self, tensor: Tensor, out: Tensor | None = None) -> Tensor:
        """See `Group`."""
        out = tensor.new_empty(self.shard.ranks * len(tensor), *tensor.shape[1:]) if out is None else out
        if not self._on_host:
            _wait(lambda: self._group._allgather_base(out, tensor))
            return out
        parts = out.chunk(self.shard.ranks)
        parts[self.shard.rank].copy_(tensor)
        self._swap([tensor] * self.shard.ranks, parts)
        return out

    def _swap(self, given: Sequence[Tensor], taken: Sequence[Tensor]) -> None:
        """Each other rank gets its own of `given`, and what it gives is put into its own of `taken`."""
        try:
            sent = [self._group.send([given[rank]], rank, 0) for rank in self._others]
            for coming in [self._group.recv([taken[rank]], rank, 0) for rank in self._others]:
                coming.wait()
            for going in sent:
                going.wait()
        except (RuntimeError, MemoryError) as error:
            raise _torn(error) from error


def _wait(begin: Callable[[], Any]) -> None:
    try:
        begin().wait()
    except (RuntimeError, MemoryError) as error:
        raise _torn(error) from error


def _torn(error: BaseException) -> MeetingError:
    """Even if memory was lacking: nobody knows how far the exchange came, so nothing can take its place."""
    return MeetingError(f"ranks do not meet: {str(error).partition(chr(10))[0]}")


def _gloo(store: Any, shard: Shard) -> Any:
    """On loopback, whatever the machine's name resolves to: nothing of this leaves it."""
    kind: Any = dist.ProcessGroupGloo
    options = kind._Options()
    options._devices = [kind.create_device(hostname="127.0.0.1")]
    options._timeout = timedelta(seconds=TIMEOUT_S)
    options._threads = 1
    return kind(store, shard.rank, shard.ranks, options)


def _nccl(store: Any, shard: Shard) -> Any:
    kind: Any = dist.ProcessGroupNCCL
    options = kind.Options()
    options._timeout = timedelta(seconds=TIMEOUT_S)
    return kind(store, shard.rank, shard.ranks, options)
