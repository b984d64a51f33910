"""Which waiting steps run next, as one batch. Pure: no threads, no clock, no tensors.

A session's steps run in order, one at a time. The first of each is ready, unless it is in a batch or was
parked for want of room. Steps that decode and steps that prefill are batched apart. In either the peer
that got the fewest rows so far goes first: its oldest step says which blocks the batch is of, and other
steps of the same blocks join it.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

from petal_swarm.engine.steps import PlacedStep, StepRequest, count_rows, is_decode

T = TypeVar("T")

#: Rows of prefill that a peer gets before it is another's turn.
QUANTUM = 16


@dataclass(slots=True, eq=False)
class Job(Generic[T]):
    """A step from its arrival to its result, with whatever its owner needs to be reminded of then.

    `rows_left` are the rows that no batch has taken yet; `dropped` says that the session ended while the
    step was in a batch. These and `number` are the scheduler's, the times and `step` its user's.
    """

    request: StepRequest
    owner: T
    waiting_since_s: float = 0.0
    no_room_since_s: float | None = None
    compute_s: float = 0.0
    step: PlacedStep | None = None
    number: int = 0
    dropped: bool = False
    rows: int = field(init=False)
    rows_left: int = field(init=False)
    decodes: bool = field(init=False)

    def __post_init__(self) -> None:
        self.rows = self.rows_left = count_rows(self.request)
        self.decodes = is_decode(self.request)


class Portion(NamedTuple, Generic[T]):
    """The next `rows` rows of a job, to be computed in one batch."""

    job: Job[T]
    rows: int


class Scheduler(Generic[T]):
    """Keeps steps from their arrival to their end; batches have at most `max_batch_tokens` rows.

    `decode_steps` and `prefill_rows` count what waits, parked steps included.
    """

    def __init__(self, max_batch_tokens: int) -> None:
        self._max_batch_tokens = max_batch_tokens
        self._next_number = 0
        # By session. Each has a queue, maybe empty, and one step outside it in one of the four others.
        self._queues: dict[Hashable, deque[Job[T]]] = {}
        self._decodes: dict[Hashable, Job[T]] = {}
        self._prefills: dict[Hashable, Job[T]] = {}
        self._running: dict[Hashable, Job[T]] = {}
        self._parked: dict[Hashable, Job[T]] = {}
        self._decoded_rows: dict[str, int] = {}
        self._prefilled_rows: dict[str, int] = {}
        self.decode_steps = 0
        self.prefill_rows = 0

    def __len__(self) -> int:
        """Sessions that have steps here, waiting or in a batch."""
        return len(self._queues)

    @property
    def decodes_ready(self) -> int:
        """Sessions with a decode step that could run."""
        return len(self._decodes)

    @property
    def prefill_ready(self) -> bool:
        return bool(self._prefills)

    @property
    def prefilling_peers(self) -> list[str]:
        """The peer of each session with rows of prefill that could run."""
        return [job.request.peer for job in self._prefills.values()]

    @property
    def parked(self) -> list[Job[T]]:
        """Steps that wait for room, in order of arrival."""
        return sorted(self._parked.values(), key=_number)

    @property
    def num_parked(self) -> int:
        """How many steps wait for room. Any thread may ask."""
        return len(self._parked)

    def add(self, job: Job[T]) -> None:
        """A step has arrived."""
        job.number = self._next_number
        self._next_number += 1
        self._count(job, 1)
        session = job.request.session
        if session in self._queues:
            self._queues[session].append(job)
        else:
            self._queues[session] = deque()
            self._make_ready(job)

    def next_decodes(self) -> list[Portion[T]]:
        """Take the next batch of decode steps, whole ones; a step that is too large goes alone."""
        return self._next(self._decodes, self._decoded_rows, self._max_batch_tokens, None)

    def next_prefills(self, rows: int) -> list[Portion[T]]:
        """Take the next batch of prefill, at most `rows` rows."""
        return self._next(self._prefills, self._prefilled_rows, min(rows, self._max_batch_tokens), QUANTUM)

    def put_back(self, job: Job[T]) -> None:
        """The batch that held rows of a job has ended, and rows are left."""
        if not job.dropped:
            del self._running[job.request.session]
            self._make_ready(job)

    def finish(self, job: Job[T]) -> None:
        """A job that was in a batch has its result; the session's next step is ready."""
        if job.dropped:
            return
        session = job.request.session
        self._count(job, -1)
        job.rows_left = 0
        del self._running[session]
        if self._queues[session]:
            self._make_ready(self._queues[session].popleft())
        else:
            del self._queues[session]

    def park(self, job: Job[T]) -> None:
        """There is no room for a job that was to be in a batch: leave it out until `unpark`."""
        self._count(job, -1)
        job.rows_left = job.rows
        self._count(job, 1)
        session = job.request.session
        self._parked[session] = self._running.pop(session)

    def unpark(self, job: Job[T]) -> None:
        """A parked job is ready again."""
        self._make_ready(self._parked.pop(job.request.session))

    def discard(self, session: Hashable) -> Job[T] | None:
        """Forget the steps of a session; the one in a batch, if there is one, is dropped and returned."""
        waiting = self._queues.pop(session, deque())
        for table in (self._decodes, self._prefills, self._parked):
            if session in table:
                waiting.append(table.pop(session))
        running = self._running.pop(session, None)
        if running is not None:
            running.dropped = True
            waiting.append(running)
        for job in waiting:
            self._count(job, -1)
        return running

    def clear(self) -> list[Job[T]]:
        """Forget all steps, whether they wait or are in a batch, and return them in order of arrival."""
        tables = (self._decodes, self._prefills, self._running, self._parked)
        known = {job for table in tables for job in table.values()}
        known.update(job for queue in self._queues.values() for job in queue)
        for table in (self._queues, *tables):
            table.clear()
        self.decode_steps = self.prefill_rows = 0
        return sorted(known, key=_number)

    def _make_ready(self, job: Job[T]) -> None:
        table = self._decodes if job.decodes else self._prefills
        table[job.request.session] = job

    def _count(self, job: Job[T], sign: int) -> None:
        if not job.decodes:
            self.prefill_rows += sign * job.rows_left
        elif job.rows_left:
            self.decode_steps += sign

    def _next(
        self, ready: dict[Hashable, Job[T]], served: dict[str, int], rows: int, quantum: int | None
    ) -> list[Portion[T]]:
        if not ready:
            return []
        jobs: dict[str, deque[Job[T]]] = {}
        for job in sorted(ready.values(), key=_number):
            jobs.setdefault(job.request.peer, deque()).append(job)
        _enter(served, jobs)
        first = min(jobs, key=lambda peer: (served[peer], jobs[peer][0].number))
        blocks = jobs[first][0].request.blocks
        same = {
            peer: deque(job for job in queue if job.request.blocks == blocks) for peer, queue in jobs.items()
        }
        portions = _share({peer: queue for peer, queue in same.items() if queue}, served, rows, quantum)
        for job, taken in portions:
            self._count(job, -1)
            job.rows_left -= taken
            self._count(job, 1)
            session = job.request.session
            self._running[session] = ready.pop(session)
        return portions


def _number(job: Job[T]) -> int:
    return job.number


def _enter(served: dict[str, int], peers: Iterable[str]) -> None:
    """Keep only `peers`; one that was not waiting starts with as many rows as the least served that was."""
    least = min((served[peer] for peer in peers if peer in served), default=0)
    kept = {peer: served.get(peer, least) for peer in peers}
    served.clear()
    served.update(kept)


def _share(
    jobs: dict[str, deque[Job[T]]], served: dict[str, int], rows: int, quantum: int | None
) -> list[Portion[T]]:
    """Share `rows` rows out to peers: the least served gets the next quantum, of its oldest job.

    Without a quantum, jobs are taken whole, and one that does not fit lets others pass. Adds to `served`
    what each peer got.
    """
    portions: dict[Job[T], int] = {}
    turns = [(served[peer], queue[0].number, peer) for peer, queue in jobs.items()]
    heapq.heapify(turns)
    while turns and rows > 0:
        _, _, peer = heapq.heappop(turns)
        job = jobs[peer][0]
        left = job.rows_left - portions.get(job, 0)
        taken = left if quantum is None else min(left, quantum, rows)
        if taken <= rows or not portions:
            portions[job] = portions.get(job, 0) + taken
            served[peer] += taken
            rows -= taken
        if taken == left:
            jobs[peer].popleft()
        if jobs[peer]:
            heapq.heappush(turns, (served[peer], jobs[peer][0].number, peer))
    return [Portion(job, taken) for job, taken in portions.items()]
