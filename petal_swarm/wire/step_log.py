"""What a peer has sent on in a session: replayed to whoever takes the place of the next hop.

Positions are absolute, so the same steps in the same order give the same KV cache. Pure: no I/O.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from petal_swarm.wire.messages import NO_STEP, Step

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

    def after(self, number: int) -> Sequence[Step] | None:
        """The steps with a greater number, in order; None if not all of them are known."""
        if number >= self.last_step:
            return ()
        if not self.complete:
            return None
        return self._steps[bisect_right(self._numbers, number) :]

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
