"""What a hop knows of the passes of its runs, and how much it keeps. Pure: the clock is an argument."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from petal_swarm.errors import BusyError
from petal_swarm.wire.messages.tuning import (
    ARRIVED,
    BACKWARD_ARRIVED,
    BACKWARD_DONE,
    FORWARD_DONE,
    GONE,
    Backward,
    Forward,
)

#: Late copies of finished passes are known as such for so many passes.
REMEMBERED_PASSES = 4_096
#: What a message costs besides its payload, and each number in its header.
_ENTRY_BYTES = 512
_NUMBER_BYTES = 40


class Pass:
    """One pass at one hop. `output` and `gradient` went to the neighbours; None: not yet, or dropped."""

    __slots__ = (
        "adapted",
        "backward",
        "backward_arrived",
        "failed",
        "finished",
        "forward_arrived",
        "forward_done",
        "gradient",
        "gradient_done",
        "number",
        "output",
        "rows",
        "touched_s",
        "working",
    )

    def __init__(self, number: int, now: float) -> None:
        self.number = number
        self.touched_s = now
        self.adapted = False
        self.rows = 0
        self.forward_arrived = False
        self.forward_done = False
        #: A gradient that waits until the rows have gone through.
        self.backward: Backward | None = None
        self.backward_arrived = False
        self.gradient_done = False
        self.output: Forward | None = None
        self.gradient: Backward | None = None
        self.working = False
        #: It can go no further here.
        self.failed = False
        #: The client wants nothing of it any more.
        self.finished = False

    @property
    def state(self) -> int:
        """As `PassStates` says it."""
        if self.failed:
            return GONE
        if self.gradient_done:
            return BACKWARD_DONE
        if not self.forward_done:
            return ARRIVED
        return BACKWARD_ARRIVED if self.backward_arrived else FORWARD_DONE

    @property
    def kept(self) -> Iterator[Forward | Backward]:
        """The messages whose payloads it holds."""
        return (each for each in (self.output, self.gradient, self.backward) if each is not None)

    def let_go(self) -> None:
        """Hold no payloads any more. Without the gradient that waited the pass can go no further."""
        if self.backward is not None:
            self.failed = True
        self.output = self.gradient = self.backward = None


class Retained:
    """Bounds what all runs hold together. Past that, who holds most gives up its oldest."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        #: Of each peer: its passes that hold something, the oldest first, and how much.
        self._held: dict[str, dict[Pass, int]] = {}
        self._nbytes: dict[str, int] = {}
        self.nbytes = 0

    def update(self, peer_id: str, held: Pass) -> None:
        """The pass holds more, or less, than before."""
        nbytes = sum(map(_cost_bytes, held.kept))
        passes = self._held.setdefault(peer_id, {})
        self._add(peer_id, nbytes - passes.pop(held, 0))
        if nbytes:
            passes[held] = nbytes
        if not passes:
            del self._held[peer_id], self._nbytes[peer_id]
        while self.nbytes > self._limit_bytes:
            self._drop_oldest(max(self._nbytes, key=self._nbytes.__getitem__))

    def _drop_oldest(self, peer_id: str) -> None:
        oldest = next(iter(self._held[peer_id]))
        oldest.let_go()
        self.update(peer_id, oldest)

    def _add(self, peer_id: str, nbytes: int) -> None:
        self._nbytes[peer_id] = self._nbytes.get(peer_id, 0) + nbytes
        self.nbytes += nbytes


class Ledger:
    """The passes of one run of `peer_id` that are not finished."""

    def __init__(
        self, peer_id: str, retained: Retained, clock: Callable[[], float], *, max_passes: int
    ) -> None:
        self._peer_id = peer_id
        self._retained = retained
        self._clock = clock
        self._max_passes = max_passes
        self._passes: dict[int, Pass] = {}
        self._finished: dict[int, None] = {}

    def __len__(self) -> int:
        return len(self._passes)

    def __iter__(self) -> Iterator[Pass]:
        return iter(list(self._passes.values()))

    def find(self, number: int) -> Pass | None:
        return self._passes.get(number)

    def begin(self, number: int) -> Pass | None:
        """The pass of that number, which may be new; None if it is finished.

        Raises:
            BusyError: it is new, and one too many.
        """
        found = self._passes.get(number)
        if found is None:
            if number in self._finished:
                return None
            if len(self._passes) >= self._max_passes:
                raise BusyError(f"{self._max_passes} passes of this run are not finished; finish some first")
            found = self._passes[number] = Pass(number, self._clock())
        found.touched_s = self._clock()
        return found

    def changed(self, held: Pass) -> None:
        """What the pass holds may be more or less than before. Something else may be dropped for it."""
        held.touched_s = self._clock()
        if not held.finished:
            self._retained.update(self._peer_id, held)

    def fail(self, held: Pass) -> None:
        """The pass can go no further. Its number stays, so that copies that come later are known as such."""
        held.failed = True
        held.let_go()
        self._retained.update(self._peer_id, held)

    def finish(self, numbers: Iterable[int]) -> list[Pass]:
        """Forget these passes; those that were here are returned. What comes of them later is late."""
        ended: list[Pass] = []
        for number in numbers:
            self._finished[number] = None
            held = self._passes.pop(number, None)
            if held is not None:
                held.let_go()
                self._retained.update(self._peer_id, held)
                held.finished = True
                ended.append(held)
        while len(self._finished) > REMEMBERED_PASSES:
            del self._finished[next(iter(self._finished))]
        return ended

    def expire(self, keep_s: float) -> list[Pass]:
        """Fail the passes that nothing was heard of for so long, and return them."""
        limit_s = self._clock() - keep_s
        late = [held for held in self if not held.failed and not held.working and held.touched_s < limit_s]
        for held in late:
            self.fail(held)
        return late

    def close(self) -> list[Pass]:
        """The run has ended."""
        return self.finish(list(self._passes))


def _cost_bytes(message: Forward | Backward) -> int:
    numbers = len(message.trace) + (len(message.lengths) if isinstance(message, Forward) else 0)
    return _ENTRY_BYTES + _NUMBER_BYTES * numbers + message.tensor.nbytes
