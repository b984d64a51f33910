"""Streams and events of the simulated device, as `torch.cuda` has them, and pinned memory.

Everything is computed at once. What is kept is who is ordered behind whom, as vector clocks: a launch that
uses memory which another stream has used, and does not come after that, raises `RaceError`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor

#: How many launches of each stream something comes after.
Clock: TypeAlias = "dict[Stream, int]"


class RaceError(AssertionError):
    """On a real device the numbers might be others."""


class Memory:
    """Stands for the storage of a tensor of the device: `host` holds the numbers."""

    def __init__(self, host: torch.UntypedStorage, device: torch.device) -> None:
        self.host = host
        self.device = device
        #: The launches that used it last.
        self.written: Clock = {}
        self.read: Clock = {}

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def nbytes(self) -> int:
        return self.host.nbytes()


class Event:
    def __init__(self, machine: Streams) -> None:
        self._machine = machine
        self.clock: Clock = {}

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or self._machine.current_stream()
        self.clock = dict(stream.clock)


class Stream:
    def __init__(self, machine: Streams) -> None:
        self._machine = machine
        self.clock: Clock = {}
        self._reading: list[tuple[Tensor, Tensor]] = []

    def launch(self, reads: Iterable[Memory], writes: Iterable[Memory]) -> None:
        """
        Raises:
            RaceError: it is not known that others are done with that memory.
        """
        _merge(self.clock, self._machine.host_clock)
        number = self.clock[self] = self.clock.get(self, 0) + 1
        for memory in reads:
            self._comes_after(memory.written)
            memory.read[self] = number
        for memory in writes:
            self._comes_after(memory.written)
            self._comes_after(memory.read)
            memory.written, memory.read = {self: number}, {}

    def reads_host(self, source: Tensor) -> None:
        """A copy from pinned memory begins."""
        self._reading.append((source, source.clone()))

    def wait_event(self, event: Event) -> None:
        _merge(self.clock, event.clock)

    def wait_stream(self, other: Stream) -> None:
        _merge(self.clock, other.clock)

    def record_event(self) -> Event:
        event = Event(self._machine)
        event.record(self)
        return event

    def synchronize(self) -> None:
        self._machine.waited("synchronize")
        self.finish()

    def finish(self) -> None:
        """The host has waited for all of it.

        Raises:
            RaceError: pinned memory was overwritten while a copy from it might be under way.
        """
        _merge(self._machine.host_clock, self.clock)
        reading, self._reading = self._reading, []
        for source, then in reading:
            if not torch.equal(source.reshape(-1).view(torch.uint8), then.reshape(-1).view(torch.uint8)):
                raise RaceError("pinned memory was written to before the copy from it was known to be done")

    def _comes_after(self, uses: Clock) -> None:
        if any(self.clock.get(other, 0) < number for other, number in uses.items()):
            raise RaceError("memory is used that another stream may still be using")


class Streams:
    """What `torch.cuda` is to CUDA, for one device. `waited` is told whenever the host waits."""

    def __init__(self, waited: Callable[[str], None]) -> None:
        self.waited = waited
        #: What the host knows to be done. All threads as one: an order between those is not looked at.
        self.host_clock: Clock = {}
        self.pinned = Pinned(self)
        #: The current one, if the program has said so.
        self.chosen: object = None
        self._main = Stream(self)
        self._all = [self._main]
        self._current = threading.local()

    def Stream(self, device: object) -> Stream:  # noqa: N802 - as torch calls it
        self._all.append(Stream(self))
        return self._all[-1]

    def Event(self) -> Event:  # noqa: N802
        return Event(self)

    def current_stream(self, device: object = None) -> Stream:
        return getattr(self._current, "stream", self._main)

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self._current.stream = self.current_stream(), stream
        try:
            yield
        finally:
            self._current.stream = before

    @contextmanager
    def device(self, device: object) -> Iterator[None]:
        before, self.chosen = self.chosen, device
        try:
            yield
        finally:
            self.chosen = before

    def synchronize(self, device: object) -> None:
        self.waited("synchronize the device")
        for stream in self._all:
            stream.finish()

    def empty_cache(self) -> None:
        self.synchronize(None)

    def cudart(self) -> Pinned:
        return self.pinned


class Pinned:
    """Which of the host's memory is pinned; with the two functions of CUDA's runtime that pin some."""

    def __init__(self, machine: Streams) -> None:
        self._machine = machine
        self._sizes: dict[int, int] = {}

    def copy(self, host: Tensor) -> Tensor:
        """What `Tensor.pin_memory` returns."""
        made = host.clone(memory_format=torch.contiguous_format)
        start = made.untyped_storage().data_ptr()
        self._sizes[start] = made.untyped_storage().nbytes()
        weakref.finalize(made, self._sizes.pop, start, None).atexit = False
        return made

    def holds(self, host: Tensor) -> bool:
        start = host.data_ptr()
        return not host.numel() or any(
            first <= start < first + size for first, size in list(self._sizes.items())
        )

    def cudaHostRegister(self, start: int, nbytes: int, flags: int) -> int:  # noqa: N802
        assert self._machine.chosen is not None, "CUDA asks which device is the current one"
        self._sizes[start] = nbytes
        return 0

    def cudaHostUnregister(self, start: int) -> int:  # noqa: N802
        return 0 if self._sizes.pop(start, 0) else 1


def _merge(clock: Clock, other: Clock) -> None:
    for stream, number in other.items():
        clock[stream] = max(clock.get(stream, 0), number)
