"""Which waiting steps run next, as one batch. Pure: no threads, no clock, no arithmetic on tensors."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from typing import Generic, NamedTuple, TypeVar

from petal_swarm.engine.engine import StepRequest

T = TypeVar("T")


class Job(NamedTuple, Generic[T]):
    """A waiting step and whatever its owner needs to be reminded of when it is done."""

    request: StepRequest
    owner: T


class Scheduler(Generic[T]):
    """Steps in order of arrival; those that can share a batch with the oldest one join it.

    A batch holds steps of the same blocks, at most one of each session (a session's steps depend on
    each other), and at most `max_batch_tokens` tokens unless its first step alone is larger.
    """

    def __init__(self, max_batch_tokens: int) -> None:
        self._max_batch_tokens = max_batch_tokens
        self._waiting: deque[Job[T]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, request: StepRequest, owner: T) -> None:
        self._waiting.append(Job(request, owner))

    def next_batch(self) -> list[Job[T]]:
        """Take the next batch out of the queue; empty if nothing waits."""
        if not self._waiting:
            return []
        batch = [self._waiting.popleft()]
        if not self._waiting:
            return batch
        first = batch[0].request
        tokens = first.hidden.shape[0]
        blocked = {first.session}
        skipped: deque[Job[T]] = deque()
        for job in self._waiting:
            request = job.request
            fits = tokens + request.hidden.shape[0] <= self._max_batch_tokens
            if request.session not in blocked and request.blocks == first.blocks and fits:
                batch.append(job)
                tokens += request.hidden.shape[0]
            else:
                skipped.append(job)
            blocked.add(request.session)
        self._waiting = skipped
        return batch

    def discard(self, session: Hashable) -> None:
        """Forget the waiting steps of a session."""
        self._waiting = deque(job for job in self._waiting if job.request.session != session)
