"""How the bytes of a block come to where they are computed with: three ways, for three kinds of machine.

A CPU maps files, and computes with them where they are. A device has slots of its own: a side stream copies
pinned memory into them while it computes, and a thread reads files for it.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import sys
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from torch import Tensor

from petal_swarm.models import devices
from petal_swarm.models.chunks import PAGE_BYTES, ChunkLayout
from petal_swarm.models.family import Block

logger = logging.getLogger(__name__)

# Of Linux' madvise(2); the last one since 5.14.
_WILLNEED, _DONTNEED, _POPULATE_READ = 3, 4, 22


class MappedTransfer:
    """Blocks in files that are mapped into memory: nothing is copied, their pages are brought ahead of use.

    A slot is a block's worth of pages; what was in it goes back to the system, which may keep it for the
    next time if it has the room.
    """

    def __init__(self, layout: ChunkLayout, chunks: Sequence[Tensor], slots: int) -> None:
        self.slots = slots
        self.nbytes = slots * layout.nbytes
        self._chunks = chunks
        self._blocks = [layout.block(chunk) for chunk in chunks]
        self._mapped: list[int | None] = [None] * slots  # the reader's
        self._reader = _Reader(slots)

    def block(self, number: int, slot: int) -> Block:
        """It stays where it is, whatever the slot."""
        return self._blocks[number]

    def begin(self, number: int, slot: int) -> None:
        """See `Transfer`."""

        def bring() -> None:
            before, self._mapped[slot] = self._mapped[slot], number
            if before is not None:
                give_back(self._chunks[before])
            bring_ahead(self._chunks[number])

        self._reader.begin(slot, bring)

    def wait(self, slot: int) -> None:
        """See `Transfer`."""
        self._reader.wait(slot)


class ReadingTransfer:
    """Blocks that a thread copies into slots on `device`.

    `read(number, target)` fills `target`, uint8 of a chunk's size, on the host: for a device beside it pinned
    memory, from where a side stream goes on.
    """

    def __init__(
        self,
        layout: ChunkLayout,
        read: Callable[[int, Tensor], None],
        slots: int,
        device: torch.device,
    ) -> None:
        self.slots = slots
        self.nbytes = slots * layout.nbytes
        self._read = read
        self._device = device
        self._filled = [torch.empty(layout.nbytes, dtype=torch.uint8, device=device) for _ in range(slots)]
        self._staging = (
            [] if devices.on_host(device) else [pinned(layout.nbytes, device) for _ in range(slots)]
        )
        self._streams = devices.streams(device)
        self._side = None if self._streams is None else self._streams.Stream(device)
        self._blocks = [layout.block(slot) for slot in self._filled]
        self._reader = _Reader(slots)

    def block(self, number: int, slot: int) -> Block:
        """The block of the slot."""
        return self._blocks[slot]

    def begin(self, number: int, slot: int) -> None:
        """See `Transfer`."""
        target, side = self._filled[slot], self._side
        if not self._staging:
            self._reader.begin(slot, lambda: self._read(number, target))
            return
        staging = self._staging[slot]
        used = None if side is None else self._streams.current_stream(self._device).record_event()

        def bring() -> None:
            self._read(number, staging)
            if side is None:
                target.copy_(staging)
                return
            with self._streams.stream(side):
                side.wait_event(used)
                target.copy_(staging, non_blocking=True)
            side.synchronize()  # by this thread: who computes waits for it only if it is late

        self._reader.begin(slot, bring)

    def wait(self, slot: int) -> None:
        """See `Transfer`."""
        self._reader.wait(slot)


class StreamTransfer:
    """Blocks in pinned memory that a side stream of a CUDA device copies into slots; the host never waits."""

    def __init__(
        self, layout: ChunkLayout, chunks: Sequence[Tensor], slots: int, device: torch.device
    ) -> None:
        self.slots = slots
        self.nbytes = slots * layout.nbytes
        self._chunks = chunks
        self._device = device
        self._filled = [torch.empty(layout.nbytes, dtype=torch.uint8, device=device) for _ in range(slots)]
        self._blocks = [layout.block(slot) for slot in self._filled]
        self._streams = devices.streams(device)
        self._side = self._streams.Stream(device)
        for slot in self._filled:
            # If the stack goes while blocks come, its memory is not reused before.
            slot.record_stream(self._side)
        self._ready = [self._streams.Event() for _ in range(slots)]

    def block(self, number: int, slot: int) -> Block:
        """The block of the slot."""
        return self._blocks[slot]

    def begin(self, number: int, slot: int) -> None:
        """See `Transfer`."""
        used = self._streams.current_stream(self._device).record_event()
        with self._streams.stream(self._side):
            self._side.wait_event(used)
            self._filled[slot].copy_(self._chunks[number], non_blocking=True)
            self._ready[slot].record(self._side)

    def wait(self, slot: int) -> None:
        """See `Transfer`."""
        self._streams.current_stream(self._device).wait_event(self._ready[slot])


class _Reader:
    """A thread that does what was begun for each slot, in order; what was overtaken is left out."""

    def __init__(self, slots: int) -> None:
        # It ends with its last reference.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="petal-swarm-blocks")
        self._coming: list[Future[None] | None] = [None] * slots

    def begin(self, slot: int, work: Callable[[], None]) -> None:
        before = self._coming[slot]
        if before is not None:
            before.cancel()
        # Slots that were made in inference mode are not to be written outside of it.
        self._coming[slot] = self._thread.submit(torch.inference_mode()(work))

    def wait(self, slot: int) -> None:
        coming = self._coming[slot]
        assert coming is not None, "what is waited for was begun"
        coming.result()


def pinned(nbytes: int, device: torch.device) -> Tensor:
    """uint8 `[nbytes]` of the host that `device` reads directly, if there is as much; plain memory if not.

    torch's own pinned memory comes in powers of two, which wastes up to half of it.
    """
    memory = torch.empty(nbytes, dtype=torch.uint8)
    streams = devices.streams(device)
    if streams is None:
        return memory
    start = memory.data_ptr()
    with streams.device(device):  # else the current device would be made to work, too, which takes its memory
        refused = int(streams.cudart().cudaHostRegister(start, nbytes, 0)) != 0
    if refused:
        logger.warning("%d MiB could not be pinned: blocks come from there more slowly", nbytes >> 20)
        return memory
    weakref.finalize(memory, _unpin, streams, start, device).atexit = False
    return memory


def _unpin(streams: Any, start: int, device: torch.device) -> None:
    streams.synchronize(device)  # a copy may be under way
    streams.cudart().cudaHostUnregister(start)


def bring_ahead(chunk: Tensor) -> None:
    """Reads the pages of a mapped chunk, and maps them: who computes with it never waits for the disk.

    Raises:
        OSError: they cannot be read.
    """
    _advise(chunk, _WILLNEED)  # asks for all of it at once; what follows would ask page by page
    if not _advise(chunk, _POPULATE_READ):
        chunk[::PAGE_BYTES].sum()  # a system without it: a byte of each page, while others run


def give_back(chunk: Tensor) -> None:
    """Lets go of the pages of a mapped chunk, which come again when they are read."""
    _advise(chunk, _DONTNEED)


def _advise(chunk: Tensor, advice: int) -> bool:
    """Whether the system took the advice.

    Raises:
        OSError: it tried, and could not read.
    """
    if not sys.platform.startswith("linux"):
        return False
    if _libc().madvise(ctypes.c_void_p(chunk.data_ptr()), ctypes.c_size_t(chunk.nbytes), advice) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS):
        return False
    raise OSError(number, "a block cannot be read from the disk")


@cache
def _libc() -> ctypes.CDLL:
    """Its calls let other threads run, as those of Python's own `mmap.madvise` do not."""
    return ctypes.CDLL(None, use_errno=True)
