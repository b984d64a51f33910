"""The thread that owns torch in a server: it takes steps from others and calls them back with results.

Whoever submits decides what `done` does; it runs in the compute thread and must not block. The engine
is used by one thread at a time: this one, or, for a step so short that handing it over would cost more
than computing it, the caller's (`run_now`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Protocol, TypeAlias, TypeVar

from petal_swarm.engine.engine import Engine
from petal_swarm.engine.executor import CACHE_WAIT_S, Executor
from petal_swarm.engine.scheduler import Job
from petal_swarm.engine.steps import StepRequest, StepResult
from petal_swarm.engine.works import Pieces, Work, internal_error
from petal_swarm.errors import CacheFullError, PetalSwarmError, RemoteError
from petal_swarm.models.devices import is_out_of_memory

logger = logging.getLogger(__name__)
T = TypeVar("T")

Done: TypeAlias = Callable[[StepResult], None]

#: A step that should take less than this may run in the caller's thread. Two hand-overs cost about
#: 0.2 ms on a busy machine, and an event loop may well be held up for a millisecond.
RUN_NOW_S = 0.001
RUN_NOW_TOKENS = 4


class Compute(Protocol):
    """Whoever runs an engine's steps: a thread of its own in a server, the caller's in a simulation."""

    engine: Engine

    def start(self) -> None: ...

    def stop(self, timeout_s: float = 10.0) -> None: ...

    def submit(self, request: StepRequest, done: Done) -> None: ...

    def run_now(self, request: StepRequest) -> StepResult | None: ...

    def call(self, function: Callable[[], T]) -> Future[T]: ...

    def run_work(self, pieces: Pieces[T], peer: str) -> Future[T]: ...

    def piece_rows(self) -> int: ...

    def close_session(self, key: Hashable) -> None: ...

    def queue_s(self) -> float: ...

    @property
    def steps_waiting_for_room(self) -> int: ...


class InlineCompute:
    """Runs every step at once in the caller's thread: for simulations on a virtual clock, and tests."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def start(self) -> None:
        pass

    def stop(self, timeout_s: float = 10.0) -> None:
        pass

    def submit(self, request: StepRequest, done: Done) -> None:
        done(_run_guarded(self.engine, request))

    def run_now(self, request: StepRequest) -> StepResult:
        return _run_guarded(self.engine, request)

    def call(self, function: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        _run_into(future, function)
        return future

    def run_work(self, pieces: Pieces[T], peer: str) -> Future[T]:
        future: Future[T] = Future()
        work = Work(pieces, future, peer)
        while work.advance():
            pass
        return future

    def piece_rows(self) -> int:
        return self.engine.max_batch_tokens

    def close_session(self, key: Hashable) -> None:
        self.engine.close_session(key)

    def queue_s(self) -> float:
        return 0.0

    @property
    def steps_waiting_for_room(self) -> int:
        return 0


class ComputeThread:
    """Runs an `Engine`; start with `start`, end with `stop`."""

    def __init__(self, engine: Engine, *, cache_wait_s: float = CACHE_WAIT_S) -> None:
        self.engine = engine
        self._executor: Executor[Done] = Executor(engine, cache_wait_s=cache_wait_s)
        self._inbox: SimpleQueue[Job[Done] | Callable[[], None]] = SimpleQueue()
        self._counting = threading.Lock()
        self._inbox_steps = 0
        self._inbox_rows = 0
        self._stopping = False
        self._busy = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="petal-swarm-compute", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float = 10.0) -> None:
        """Finish the decode batch or the block that is running, drop the rest, wait for the thread to end."""
        self._stopping = True
        self._inbox.put(lambda: None)
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def submit(self, request: StepRequest, done: Done) -> None:
        """Queue a step; `done` is called in the compute thread. Steps of one session keep their order.

        The steps of a session that is closed meanwhile are dropped, and `done` is not called for them.
        """
        job = Job(request, done, time.perf_counter())
        self._count_inbox(job, 1)
        self._inbox.put(job)

    def run_now(self, request: StepRequest) -> StepResult | None:
        """Run a step in the calling thread if it should be short and nothing else waits; None if not."""
        engine = self.engine
        if engine.stack.device.type != "cpu" or request.hidden.shape[0] > RUN_NOW_TOKENS:
            return None
        if not self._inbox.empty() or not self._executor.idle:
            return None
        if not 0.0 < engine.block_time_s * len(request.blocks) < RUN_NOW_S:
            return None
        if not self._busy.acquire(blocking=False):
            return None
        try:
            result = _run_guarded(engine, request)
            if isinstance(result.error, CacheFullError):
                return None  # in the queue it may wait for room
            self._executor.ran(result.compute_s, len(request.blocks))
            return result
        finally:
            self._busy.release()

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run `function` in the compute thread, before any batch or block that has not started yet."""
        future: Future[T] = Future()
        self._inbox.put(lambda: _run_into(future, function))
        return future

    def run_work(self, pieces: Pieces[T], peer: str) -> Future[T]:
        """Do `pieces` in the compute thread, one at a time between batches, peers by turns.

        The future has what they return, or the error that they raise; one that is no `PetalSwarmError` is
        logged, and reported as a `RemoteError`. Cancelling it ends the work before its next piece.
        """
        future: Future[T] = Future()
        work = Work(pieces, future, peer)
        self._inbox.put(lambda: self._executor.add_work(work))
        return future

    def piece_rows(self) -> int:
        """Of how many rows a piece of work may compute a block at present, so that decoding goes on."""
        return self._executor.piece_rows()

    def close_session(self, key: Hashable) -> None:
        """Drop the waiting steps of a session and free its cache, soon."""
        self.call(lambda: self._executor.close_session(key))

    def queue_s(self) -> float:
        """An estimate of the work that is waiting, in seconds."""
        return self._executor.queue_s(self._inbox_steps, self._inbox_rows)

    @property
    def steps_waiting_for_room(self) -> int:
        """Steps for which the KV cache has no pages now, and which wait for others to leave."""
        return self._executor.steps_parked

    def _run(self) -> None:
        while not self._stopping:
            waiting = self._take_inbox()
            with self._busy:
                for function in waiting:
                    function()
                try:
                    finished = self._executor.advance(self._interrupted)
                except Exception as error:
                    # Without this thread the server would go on announcing itself, and answer nobody.
                    finished = self._executor.abandon(error)
            for done, result in finished:
                try:
                    done(result)
                except Exception:
                    # Whatever it is, the other sessions' steps must go on.
                    logger.exception("a step's result could not be handed over")
        self._executor.drop_works(RemoteError("the server is stopping"))

    def _interrupted(self) -> bool:
        return not self._inbox.empty()

    def _take_inbox(self) -> list[Callable[[], None]]:
        """Hand waiting steps to the executor, and return the functions to call.

        Waits while the executor has nothing to do, or a decode batch waits for more to join it.
        """
        functions: list[Callable[[], None]] = []
        wait_s = self._executor.wait_s()
        woken_s = 0.0
        while True:
            try:
                item = self._inbox.get(timeout=wait_s) if wait_s != 0.0 else self._inbox.get_nowait()
            except Empty:
                waited = wait_s != 0.0
                wait_s = 0.0 if waited or functions else self._executor.linger_s()
                if wait_s == 0.0:
                    return functions
                continue
            if wait_s is None:
                woken_s = time.perf_counter()  # nothing was in the way of a step that came before
            wait_s = 0.0
            if isinstance(item, Job):
                self._count_inbox(item, -1)
                item.waiting_since_s = max(item.waiting_since_s, woken_s)
                self._executor.add(item)
            else:
                functions.append(item)

    def _count_inbox(self, job: Job[Done], sign: int) -> None:
        with self._counting:
            if job.decodes:
                self._inbox_steps += sign
            else:
                self._inbox_rows += sign * job.rows


def _run_into(future: Future[T], function: Callable[[], T]) -> None:
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(function())
        except BaseException as error:
            if isinstance(error, Exception) and is_out_of_memory(error):
                error = internal_error(error)  # nobody's bug: an adapter's prefix found no room on the device
            future.set_exception(error)


def _run_guarded(engine: Engine, request: StepRequest) -> StepResult:
    try:
        return engine.run([request])[0]
    except PetalSwarmError as error:
        return StepResult(None, error, 0.0)
    except Exception as error:
        return StepResult(None, internal_error(error), 0.0)
