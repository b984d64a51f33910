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

from petal_swarm.engine.engine import Engine, StepRequest, StepResult
from petal_swarm.engine.scheduler import Job, Scheduler
from petal_swarm.errors import RemoteError

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

    def close_session(self, key: Hashable) -> None: ...

    def queue_s(self) -> float: ...


class InlineCompute:
    """Runs every step at once in the caller's thread: for simulations on a virtual clock, and tests."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def start(self) -> None:
        pass

    def stop(self, timeout_s: float = 10.0) -> None:
        pass

    def submit(self, request: StepRequest, done: Done) -> None:
        done(_run_guarded(self.engine, [request])[0])

    def run_now(self, request: StepRequest) -> StepResult:
        return _run_guarded(self.engine, [request])[0]

    def call(self, function: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        _run_into(future, function)
        return future

    def close_session(self, key: Hashable) -> None:
        self.engine.close_session(key)

    def queue_s(self) -> float:
        return 0.0


class ComputeThread:
    """Runs an `Engine`; start with `start`, end with `stop`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._scheduler: Scheduler[Done] = Scheduler(engine.max_batch_tokens)
        self._inbox: SimpleQueue[Job[Done] | Callable[[], None]] = SimpleQueue()
        self._stopping = False
        self._busy = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="petal-swarm-compute", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float = 10.0) -> None:
        """Finish the step that is running, drop the rest, and wait for the thread to end."""
        self._stopping = True
        self._inbox.put(lambda: None)
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def submit(self, request: StepRequest, done: Done) -> None:
        """Queue a step; `done` is called in the compute thread. Steps of one session keep their order.

        The steps of a session that is closed meanwhile are dropped, and `done` is not called for them.
        """
        self._inbox.put(Job(request, done))

    def run_now(self, request: StepRequest) -> StepResult | None:
        """Run a step in the calling thread if it should be short and nothing else waits; None if not."""
        engine = self.engine
        if engine.stack.device.type != "cpu" or request.hidden.shape[0] > RUN_NOW_TOKENS:
            return None
        if not self._inbox.empty() or len(self._scheduler):
            return None
        if not 0.0 < engine.block_time_s * len(request.blocks) < RUN_NOW_S:
            return None
        if not self._busy.acquire(blocking=False):
            return None
        try:
            return _run_guarded(engine, [request])[0]
        finally:
            self._busy.release()

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run `function` in the compute thread, before any step that has not started yet."""
        future: Future[T] = Future()
        self._inbox.put(lambda: _run_into(future, function))
        return future

    def close_session(self, key: Hashable) -> None:
        """Drop the waiting steps of a session and free its cache, soon."""

        def close() -> None:
            self._scheduler.discard(key)
            self.engine.close_session(key)

        self.call(close)

    def queue_s(self) -> float:
        """An estimate of the work that is waiting, in seconds."""
        return len(self._scheduler) * self.engine.stats().block_time_s * len(self.engine.stack.span)

    def _run(self) -> None:
        while not self._stopping:
            waiting = self._take_inbox(block=not len(self._scheduler))
            with self._busy:
                for function in waiting:
                    function()
                batch = self._scheduler.next_batch()
                results = _run_guarded(self.engine, [job.request for job in batch]) if batch else []
            for job, result in zip(batch, results, strict=True):
                try:
                    job.owner(result)
                except Exception:
                    # Whatever it is, the other sessions' steps must go on.
                    logger.exception("a step's result could not be handed over")

    def _take_inbox(self, *, block: bool) -> list[Callable[[], None]]:
        """Move waiting steps to the scheduler, and return the functions to call."""
        functions: list[Callable[[], None]] = []
        try:
            while True:
                item = self._inbox.get(block=block)
                block = False
                if isinstance(item, Job):
                    self._scheduler.add(item.request, item.owner)
                else:
                    functions.append(item)
        except Empty:
            return functions


def _run_into(future: Future[T], function: Callable[[], T]) -> None:
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)


def _run_guarded(engine: Engine, requests: list[StepRequest]) -> list[StepResult]:
    started = time.perf_counter()
    try:
        return engine.run(requests)
    except Exception as error:
        # A bug, or a device out of memory: this batch fails, the server lives.
        logger.exception("a batch of %d steps failed", len(requests))
        failure = RemoteError(f"the server failed to compute: {type(error).__name__}")
        return [StepResult(None, failure, time.perf_counter() - started) for _ in requests]
