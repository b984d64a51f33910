"""Runs an engine's steps: decode first, prefill in chunks beside it. No threads; the clock is an argument.

`advance` does one thing and returns: a decode batch, blocks of a prefill batch until somebody has something
more urgent, or a piece of a training pass. A prefill batch that was interrupted stays where it is between two
blocks.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, NamedTuple, TypeVar

from petal_swarm.engine.engine import Batch, Chunk, Engine
from petal_swarm.engine.pace import Company, Pace, prefill_share
from petal_swarm.engine.scheduler import Job, Portion, Scheduler
from petal_swarm.engine.steps import StepResult
from petal_swarm.engine.works import Work, Works, internal_error
from petal_swarm.errors import CacheFullError, PetalSwarmError

logger = logging.getLogger(__name__)
T = TypeVar("T")

#: How long a step waits for room in the KV cache before it may fail.
CACHE_WAIT_S = 10.0
#: After one step has failed for want of room, the others have this long to get what its session held.
GRACE_S = 1.0
#: So many times `cache_wait_s` is the end, however many others failed meanwhile.
MAX_CACHE_WAITS = 3


class Finished(NamedTuple, Generic[T]):
    """The result of a step, and whose it is."""

    owner: T
    result: StepResult


class _Paused(NamedTuple, Generic[T]):
    """A prefill batch between two of its blocks."""

    batch: Batch
    portions: list[Portion[T]]


class Executor(Generic[T]):
    """Owns what waits and what is under way. All but `queue_s` is for one thread at a time.

    A step for which there is no room in the KV cache waits for others to leave. Of the steps that have
    waited for `cache_wait_s` one fails at a time: its session's end may be room enough for the rest.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        pace: Pace | None = None,
        cache_wait_s: float = CACHE_WAIT_S,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.engine = engine
        self._pace = pace or _measured_pace(engine)
        self._cache_wait_s = cache_wait_s
        self._clock = clock
        self._scheduler: Scheduler[T] = Scheduler(engine.max_batch_tokens)
        self._works = Works()
        self._paused: _Paused[T] | None = None
        self._retired: list[Hashable] = []
        self._company = Company()
        self._free_when_parked = 0
        self._spared_until_s = -math.inf
        self._given_up: int | None = None  # the number of the job that is tried for the last time
        self._ended: list[Finished[T]] = []

    @property
    def steps_parked(self) -> int:
        """How many steps wait for room in the KV cache. Any thread may ask."""
        return self._scheduler.num_parked

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing is under way."""
        return not len(self._scheduler) and self._paused is None and not self._works

    def add(self, job: Job[T]) -> None:
        """A step has arrived; the steps of a session keep their order."""
        self._scheduler.add(job)

    def add_work(self, work: Work) -> None:
        """Something to be done piece by piece, when decode and prefill leave time for it."""
        self._works.add(work)

    def drop_works(self, error: PetalSwarmError) -> None:
        """All works fail."""
        self._works.clear(error)

    def piece_rows(self) -> int:
        """Of how many rows a piece of work may compute a block, for decoding to go on. Any thread may ask."""
        return self._pace.chunk_rows(self._clock())

    def close_session(self, session: Hashable) -> None:
        """Drop a session's steps and free its cache: at once, or after the batch that reads it."""
        self._company.left(session)
        running = self._scheduler.discard(session)
        if running is None:
            self.engine.close_session(session)
        else:
            self._retired.append(self.engine.retire_session(session))

    def ran(self, elapsed_s: float, blocks: int) -> None:
        """Somebody ran a decode step past this queue, while it was idle."""
        self._pace.decoded(self._clock(), elapsed_s, blocks, prefill_share=0.0)

    def queue_s(self, more_steps: int = 0, more_rows: int = 0) -> float:
        """An estimate of the work that waits, in seconds, and of more decode steps and rows of prefill."""
        scheduler = self._scheduler
        steps = scheduler.decode_steps + more_steps
        batches = math.ceil(steps / max(1, len(scheduler)))
        return self._pace.estimate_s(batches, scheduler.prefill_rows + more_rows, len(self.engine.stack.span))

    def wait_s(self) -> float | None:
        """How long `advance` will have nothing to do; None if nothing comes of itself."""
        scheduler = self._scheduler
        if self._paused is not None or scheduler.decodes_ready or scheduler.prefill_ready:
            return 0.0
        deadlines = [self._deadline(job) for job in scheduler.parked]
        if self._works:
            if self._pace.spares_time(self._clock()):
                return 0.0
            deadlines.append(self._pace.work_due_s)
        if not deadlines:
            return None
        if scheduler.parked and self.engine.kv_tokens_free > self._free_when_parked:
            return 0.0
        return max(0.0, min(deadlines) - self._clock())

    def linger_s(self) -> float:
        """How long to wait for more decode steps before `advance` runs those that are there."""
        ready = self._scheduler.decodes_ready
        if not ready or self._prefill_waits:
            return 0.0
        return self._company.linger_s(self._clock(), ready, self._pace.decode_s)

    def advance(self, interrupted: Callable[[], bool]) -> list[Finished[T]]:
        """Do what is most urgent, if anything: a decode batch, prefill until `interrupted`, a piece of work.

        `interrupted` is asked between two blocks. Returns the steps that have ended.
        """
        now = self._clock()
        self._retry_parked(now)
        decodes = self._scheduler.decodes_ready
        if self._works and self._work_goes_first(now):
            elapsed = self._works.advance(self._clock)
            self._pace.worked(self._clock(), elapsed)
        elif decodes and not (self._pace.owes_prefill and self._prefill_waits):
            self._decode(now)
        else:
            if self._paused is None and self._scheduler.prefill_ready:
                self._begin_prefill(now)
            if self._paused is not None and not self._ended:
                self._continue_prefill(self._paused, interrupted)
        return self._take_ended()

    def abandon(self, error: Exception) -> list[Finished[T]]:
        """After a bug in `advance`: every step here fails, and nothing of them is left. Does not raise.

        Returns them all, and those that had ended when `advance` failed.
        """
        failure = internal_error(error)
        self._works.clear(failure)
        now = self._clock()
        for job in self._scheduler.clear():
            queued_s = max(0.0, now - job.waiting_since_s - job.compute_s)
            self._ended.append(Finished(job.owner, StepResult(None, failure, job.compute_s, queued_s)))
        self._paused = None
        retired, self._retired = self._retired, []
        for session in retired:
            try:
                self.engine.close_session(session)
            except Exception:
                logger.exception("the cache of a session that has ended could not be freed")
        return self._take_ended()

    def _take_ended(self) -> list[Finished[T]]:
        ended, self._ended = self._ended, []
        return ended

    @property
    def _prefill_waits(self) -> bool:
        return self._paused is not None or self._scheduler.prefill_ready

    def _prefilling_peers(self) -> list[str]:
        """Whose prompts wait or are under way, a session each."""
        peers = self._scheduler.prefilling_peers
        if self._paused is not None:
            peers += [job.request.peer for job, _ in self._paused.portions]
        return peers

    def _work_goes_first(self, now: float) -> bool:
        if self._pace.work_due_s <= now:
            return True
        idle = not self._scheduler.decodes_ready and not self._prefill_waits
        return idle and self._pace.spares_time(now)

    def _decode(self, now: float) -> None:
        portions = self._place(self._scheduler.next_decodes(), now)
        if not portions:
            return
        try:
            elapsed = self.engine.compute(_chunks(portions))
        except Exception as error:
            self._fail_all(portions, error)
            return
        now = self._clock()
        blocks = len(portions[0].job.request.blocks)
        share = prefill_share((job.request.peer for job, _ in portions), self._prefilling_peers())
        self._pace.decoded(now, elapsed, blocks, prefill_share=share)
        self._company.decoded(now, [job.request.session for job, _ in portions])
        self._computed(portions, elapsed, now)

    def _begin_prefill(self, now: float) -> None:
        rows = min(self._pace.chunk_rows(now), self.engine.fitting_rows)
        portions = self._place(self._scheduler.next_prefills(rows), now)
        if portions:
            try:
                self._paused = _Paused(self.engine.begin(_chunks(portions)), portions)
            except Exception as error:
                self._fail_all(portions, error)

    def _continue_prefill(self, paused: _Paused[T], interrupted: Callable[[], bool]) -> None:
        batch, portions = paused
        pace, scheduler = self._pace, self._scheduler
        try:
            while not batch.done:
                pace.prefilled(batch.advance(), batch.rows)
                decode_first = scheduler.decodes_ready and not pace.owes_prefill
                work_first = self._works and pace.work_due_s <= self._clock()
                if not batch.done and (decode_first or work_first or interrupted()):
                    return
        except Exception as error:
            self._fail_all(portions, error)
        else:
            self._computed(portions, batch.compute_s, self._clock())
        self._paused = None
        for session in self._retired:
            self.engine.close_session(session)
        self._retired.clear()

    def _place(self, portions: Sequence[Portion[T]], now: float) -> list[Portion[T]]:
        """The portions whose steps have their places in the cache; the others are parked, or end."""
        placed = []
        for portion in portions:
            job = portion.job
            try:
                if job.step is None:
                    job.step = self.engine.place(job.request)
                placed.append(portion)
            except CacheFullError as error:
                if job.no_room_since_s is None:
                    job.no_room_since_s = now
                in_vain = job.number == self._given_up or now >= self._last_deadline(job)
                if not in_vain and self.engine.could_place(job.request):
                    self._scheduler.park(job)
                    self._free_when_parked = self.engine.kv_tokens_free
                else:
                    self._end(job, now, error)
            except PetalSwarmError as error:
                self._end(job, now, error)
            except Exception as error:
                self._end(job, now, internal_error(error))
        return placed

    def _retry_parked(self, now: float) -> None:
        """Try parked steps again when something was freed, or those whose time is up.

        Of the latter the youngest is tried for the last time. Sessions that decode in step meet a full cache
        together, and would all fail; so one makes room. The younger a step, the less was waited in vain.
        """
        parked = self._scheduler.parked
        if not parked:
            return
        again = parked
        if self.engine.kv_tokens_free <= self._free_when_parked:
            again = [job for job in parked if now >= self._deadline(job)]
            if again:
                self._given_up = again[-1].number
                self._spared_until_s = now + GRACE_S
        for job in again:
            self._scheduler.unpark(job)

    def _deadline(self, job: Job[T]) -> float:
        """When a parked step may be the next to fail."""
        assert job.no_room_since_s is not None
        deadline = max(job.no_room_since_s + self._cache_wait_s, self._spared_until_s)
        return min(deadline, self._last_deadline(job))

    def _last_deadline(self, job: Job[T]) -> float:
        assert job.no_room_since_s is not None
        return job.no_room_since_s + MAX_CACHE_WAITS * self._cache_wait_s

    def _computed(self, portions: Sequence[Portion[T]], elapsed: float, now: float) -> None:
        """A batch has ended: steps with rows left go back, the others have their results."""
        for job, _ in portions:
            job.compute_s += elapsed
            error = None if job.step is None else job.step.error
            if job.rows_left and error is None:
                self._scheduler.put_back(job)
            elif not job.dropped:
                self._end(job, now, error)

    def _fail_all(self, portions: Sequence[Portion[T]], error: Exception) -> None:
        """A bug, or a device out of memory: the steps of this batch fail, the server lives."""
        failure = error if isinstance(error, PetalSwarmError) else internal_error(error)
        now = self._clock()
        for job, _ in portions:
            if not job.dropped:
                self._end(job, now, failure)

    def _end(self, job: Job[T], now: float, error: PetalSwarmError | None = None) -> None:
        self._scheduler.finish(job)
        queued_s = max(0.0, now - job.waiting_since_s - job.compute_s)
        result = StepResult(None, error, job.compute_s, queued_s)
        if error is None and job.step is not None:
            try:
                result.hidden = job.step.result()
                result.keys = self.engine.file(job.request)
            except Exception as failure:  # no memory to join the chunks' rows
                result.error = internal_error(failure)
        self._ended.append(Finished(job.owner, result))


def _chunks(portions: Sequence[Portion[T]]) -> list[Chunk]:
    chunks = []
    for job, rows in portions:
        assert job.step is not None, "a step is computed once it has its place"
        chunks.append(Chunk(job.step, rows))
    return chunks


def _measured_pace(engine: Engine) -> Pace:
    """A pace that begins with what was measured at the start."""
    blocks = len(engine.stack.span)
    rate, block_s = engine.prefill_tokens_per_s, engine.block_time_s
    row_s = 1 / (rate * blocks) if rate else 0.0
    return Pace(engine.max_batch_tokens, row_s=row_s, decode_s=block_s * blocks, block_s=block_s)
