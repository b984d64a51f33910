"""What a peer has sent on in a session: replayed to whoever takes the place of the next hop.

Positions are absolute, so the same steps in the same order give the same KV cache. Pure: no I/O.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from itertools import islice

from petal_swarm.span import Slice
from petal_swarm.wire.messages.parts import DTYPE_BYTES, NO_STEP, TensorMeta
from petal_swarm.wire.messages.steps import Step

#: What an entry costs besides its payload.
_ENTRY_BYTES = 512


class LogBudget:
    """Bounds what all logs of a process hold together, in bytes. Past `limit_bytes` the largest gives up."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self._logs: set[StepLog] = set()

    def new_log(self) -> StepLog:
        """An empty log, which counts here until it is closed."""
        log = StepLog(self)
        self._logs.add(log)
        return log

    def _grown(self, nbytes: int) -> None:
        self.used_bytes += nbytes
        if self.used_bytes > self.limit_bytes:
            max(self._logs, key=lambda log: log.nbytes).give_up()

    def _closed(self, log: StepLog) -> None:
        self._logs.discard(log)


class StepLog:
    """The steps of one session, in order. Made by `LogBudget.new_log`.

    A log is of use only if it begins where the session does and has no gap; one that gave up to save
    memory, or in which a sequence begins behind a shared prefix that was never sent, is not `complete`.
    """

    __slots__ = ("_budget", "_lengths", "_numbers", "_steps", "complete", "last_step", "nbytes")

    def __init__(self, budget: LogBudget) -> None:
        self.complete = True
        self.last_step = NO_STEP
        self.nbytes = 0
        self._budget = budget
        self._steps: list[Step] = []
        self._numbers: list[int] = []
        self._lengths: dict[int, int] = {}

    def append(self, step: Step) -> None:
        """Keep a step, and its payload, which nobody may change afterwards."""
        self.last_step = step.step
        if not self.complete:
            return
        lengths = self._lengths
        if step.forks is not None:
            self._lengths = lengths = {
                index: lengths.get(source, 0) for index, source in enumerate(step.forks)
            }
        for sequence, position, length in step.slices:
            if position > lengths.get(sequence, 0):
                self.give_up()
                return
            lengths[sequence] = position + length
        self._steps.append(step)
        self._numbers.append(step.step)
        nbytes = len(step.payload) + _ENTRY_BYTES
        self.nbytes += nbytes
        self._budget._grown(nbytes)

    def after(self, number: int, *, done: int = NO_STEP, max_rows: int = 1) -> list[Step] | None:
        """The steps with a greater number, in order; None if not all of them are known.

        Those up to `done`, of which nobody wants the results any more, are joined to steps of up to
        `max_rows` rows: a thousand tokens of decoding are then computed as fast as a prompt.
        """
        if number >= self.last_step:
            return []
        if not self.complete:
            return None
        first, joined = bisect_right(self._numbers, number), bisect_right(self._numbers, done)
        return [*join_steps(self._steps[first:joined], max_rows), *self._steps[max(first, joined) :]]

    def between(self, first: int, last: int) -> Iterator[Step]:
        """The steps of these numbers, in order; nothing if not all are known."""
        begin, end = bisect_left(self._numbers, first), bisect_right(self._numbers, last)
        return islice(self._steps, begin, end)

    @property
    def max_rows(self) -> int:
        """Rows of the largest step."""
        return max((step.tensor.shape[0] for step in self._steps), default=0)

    def give_up(self) -> None:
        """Forget everything: from now on nothing can be replayed."""
        self.complete = False
        self._steps.clear()
        self._numbers.clear()
        self._lengths.clear()
        self._budget.used_bytes -= self.nbytes
        self.nbytes = 0

    def close(self) -> None:
        """The session has ended. Idempotent."""
        self.give_up()
        self._budget._closed(self)


def join_steps(steps: Iterable[Step], max_rows: int) -> Iterator[Step]:
    """Fewer steps that leave the same KV cache behind, and return no rows.

    Steps that append to what the one before them has left become one, with the number of the last.
    """
    waiting: list[Step] = []
    ends: dict[int, int] = {}
    rows = 0
    for step in steps:
        appends = step.forks is None and all(
            position == ends.get(sequence, position) for sequence, position, _ in step.slices
        )
        fits = rows + step.tensor.shape[0] <= max_rows
        if waiting and not (appends and fits and step.tensor.dtype == waiting[0].tensor.dtype):
            yield _join(waiting)
            waiting, ends, rows = [], {}, 0
        waiting.append(step)
        rows += step.tensor.shape[0]
        for sequence, position, length in step.slices:
            ends[sequence] = position + length
    if waiting:
        yield _join(waiting)


def _join(steps: list[Step]) -> Step:
    first, last = steps[0], steps[-1]
    if len(steps) == 1:
        return first
    columns = first.tensor.shape[1]
    row_bytes = columns * DTYPE_BYTES[first.tensor.dtype]
    starts: dict[int, int] = {}
    lengths: dict[int, int] = {}
    parts: dict[int, list[memoryview]] = {}
    for step in steps:
        payload, offset = memoryview(step.payload), 0
        for sequence, position, length in step.slices:
            starts.setdefault(sequence, position)
            lengths[sequence] = lengths.get(sequence, 0) + length
            parts.setdefault(sequence, []).append(payload[offset : offset + length * row_bytes])
            offset += length * row_bytes
    return Step(
        step=last.step,
        epoch=last.epoch,
        slices=tuple(Slice(sequence, start, lengths[sequence]) for sequence, start in starts.items()),
        tensor=TensorMeta(first.tensor.dtype, (sum(lengths.values()), columns)),
        payload=b"".join(part for sequence in starts for part in parts[sequence]),
        rows="none",
        forks=first.forks,
    )
