"""The passes of one run at one hop: what comes of them, and what is made of it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from petal_swarm.engine.compute import Compute
from petal_swarm.engine.training import Passes
from petal_swarm.engine.works import Pieces
from petal_swarm.errors import (
    AdapterMissingError,
    BadTensorError,
    PassGoneError,
    PetalSwarmError,
    RemoteError,
)
from petal_swarm.server.config import SessionLimits
from petal_swarm.server.quotas import Quotas
from petal_swarm.server.results import error_message
from petal_swarm.server.training.ledger import Ledger, Pass, Retained
from petal_swarm.server.training.limits import TrainingLimits
from petal_swarm.server.training.ways import Way
from petal_swarm.server.training.work import (
    Adapter,
    PassKey,
    gradient_parts,
    run_backward,
    run_forward,
)
from petal_swarm.server.upstream import Upstream
from petal_swarm.span import Span
from petal_swarm.wire.messages import Message
from petal_swarm.wire.messages.tuning import (
    Backward,
    Backwarded,
    Failed,
    Forward,
    Forwarded,
    PassStates,
    TrainOpen,
)

logger = logging.getLogger(__name__)
T = TypeVar("T")

#: The adapter that a peer calls so, as far as it concerns the blocks of a span; None if there is none.
AdapterOf = Callable[[str, str, Span], Adapter | None]


@dataclass(frozen=True, slots=True)
class Trainer:
    """What all runs of a server share."""

    compute: Compute
    passes: Passes
    adapter_of: AdapterOf
    limits: SessionLimits
    training: TrainingLimits
    quotas: Quotas
    retained: Retained
    max_pass_tokens: int


@dataclass(frozen=True, slots=True)
class Ways:
    """Where rows and gradients come from, and where they go: None is the client."""

    rows: Upstream
    gradients: Upstream
    down: Way | None
    up: Way | None


class RunPasses:
    """Takes rows and gradients, has them computed in another thread, and sends on what comes out.

    `tell` says something to the client `peer_id`. Everything here may happen twice, and makes no difference.
    """

    def __init__(
        self, opening: TrainOpen, peer_id: str, trainer: Trainer, tell: Callable[[Message], None]
    ) -> None:
        self._run = opening.run
        self._span = opening.span
        self._peer_id = peer_id
        self._trainer = trainer
        self._tell = tell
        self._loop = asyncio.get_running_loop()
        self._ledger = Ledger(
            peer_id, trainer.retained, self._loop.time, max_passes=trainer.training.max_passes
        )
        self._closed = False
        self.computing = 0

    def attach(self, ways: Ways) -> None:
        """Before anything else."""
        self._ways = ways

    def __len__(self) -> int:
        """Passes that are not finished."""
        return len(self._ledger)

    def output_of(self, number: int) -> Forward | None:
        """What pass `number` sent on; None if not computed, or dropped, which the client is told."""
        held = self._ledger.find(number)
        if held is None or held.failed or not held.forward_done:
            return None
        if held.output is None:
            self._tell_failed(number, _gone("what this pass sent on"))
        return held.output

    def gradient_of(self, number: int) -> Backward | None:
        """What pass `number` sent back; None if not computed, or dropped, which the client is told."""
        held = self._ledger.find(number)
        if held is None or held.failed or not held.gradient_done:
            return None
        if held.gradient is None:
            self._tell_failed(number, _gone("the gradient of this pass"), backward=True)
        return held.gradient

    def known(self, numbers: Iterable[int]) -> list[int]:
        """Those of these passes that are here and not finished."""
        return [number for number in numbers if self._ledger.find(number) is not None]

    def states(self, number: int) -> PassStates:
        """The answer to the probe of that number."""
        return PassStates(number, tuple((held.number, held.state) for held in self._ledger))

    def tell_failed_of(self, numbers: Iterable[int]) -> None:
        """Say again which of these have failed here."""
        for number in numbers:
            held = self._ledger.find(number)
            if held is not None and held.failed:
                self._tell_failed(number, _gone("this pass"))

    def finish(self, numbers: Iterable[int]) -> None:
        """Drop these passes, whatever their state."""
        for held in self._ledger.finish(numbers):
            self._forget(held)

    def expire(self) -> None:
        """Drop what nothing was heard of for too long; the client is told when it asks for it."""
        for held in self._ledger.expire(self._trainer.training.keep_s):
            self._forget(held)

    def close(self) -> None:
        """Drop everything. Idempotent."""
        self._closed = True
        for held in self._ledger.close():
            self._forget(held)

    def take_forward(self, message: Forward) -> None:
        held = self._begin(message)
        if held is None or held.forward_arrived:
            return
        held.forward_arrived = True
        trainer = self._trainer
        try:
            self._check_rows(message)
            adapter = self._adapter(message.adapter)
        except RemoteError as error:
            self._fail_pass(held, error)
            return
        held.adapted, held.rows = adapter is not None, message.tensor.shape[0]
        work = run_forward(trainer.passes, self._key(held), held, message, self._span, adapter)
        arrived = time.perf_counter()
        self._ways.rows.begun(message.tensor.shape[0], message.tensor.nbytes)
        self._start(held, work, functools.partial(self._forwarded, held, _head(message), arrived))

    def take_backward(self, message: Backward) -> None:
        held = self._begin(message)
        if held is None or held.backward_arrived:
            return
        held.backward_arrived = True
        try:
            self._check_rows(message)
        except RemoteError as error:
            self._fail_pass(held, error, backward=True)
            return
        if held.forward_done:
            self._start_backward(held, message)
        else:
            held.backward = message
            self._ledger.changed(held)

    def _begin(self, message: Forward | Backward) -> Pass | None:
        """The pass of a message; None if there is nothing to be done about it."""
        try:
            held = self._ledger.begin(message.number)
        except RemoteError as error:
            self._tell_failed(message.number, error)
            return None
        if held is not None and held.failed:
            self._tell_failed(message.number, _gone("this pass"))
            return None
        return held

    def _check_rows(self, message: Forward | Backward) -> None:
        rows, columns = message.tensor.shape
        width = self._trainer.compute.engine.stack.config.hidden_size
        if columns != width:
            raise BadTensorError(f"rows of {columns} numbers; this model's have {width}")
        if rows > self._trainer.max_pass_tokens:
            limit = self._trainer.max_pass_tokens
            raise BadTensorError(f"a pass of {rows} rows is over this server's limit of {limit}")

    def _adapter(self, name: str | None) -> Adapter | None:
        if name is None:
            return None
        found = self._trainer.adapter_of(self._peer_id, name, self._span)
        if found is None:
            raise AdapterMissingError(f"there is no adapter {name!r} of yours here; send it first")
        return found

    def _start_backward(self, held: Pass, message: Backward) -> None:
        rows = message.tensor.shape[0]
        if rows != held.rows:
            wrong = BadTensorError(f"a gradient of {rows} rows for a pass of {held.rows}")
            self._fail_pass(held, wrong, backward=True)
            return
        work = run_backward(self._trainer.passes, self._key(held), held, message)
        arrived = time.perf_counter()
        self._ways.gradients.begun(message.tensor.shape[0], message.tensor.nbytes)
        self._start(held, work, functools.partial(self._backwarded, held, _head(message), arrived))

    def _start(self, held: Pass, work: Pieces[T], done: Callable[[Future[Any]], None]) -> None:
        held.working = True
        self.computing += 1

        def computed(future: Future[Any]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has stopped
                self._loop.call_soon_threadsafe(done, future)

        future = self._trainer.compute.run_work(work, self._peer_id)
        future.add_done_callback(computed)

    def _forwarded(self, held: Pass, message: Forward, arrived: float, future: Future[Any]) -> None:
        encoded = self._result(held, future, self._ways.rows, message, backward=False)
        if encoded is None:
            return
        held.forward_done = True
        meta, payload = encoded
        trace = (*message.trace, time.perf_counter() - arrived)
        if self._ways.down is None:
            self._tell(Forwarded(message.number, meta, payload, trace))
        else:
            held.output = Forward(
                message.number, message.lengths, meta, payload, message.keep, message.adapter, trace
            )
            self._ways.down.send(message.number)
            self._ledger.changed(held)  # it may be dropped at once
        self._ways.rows.throttle()
        if held.backward is not None:
            waiting, held.backward = held.backward, None
            self._ledger.changed(held)
            self._start_backward(held, waiting)

    def _backwarded(self, held: Pass, message: Backward, arrived: float, future: Future[Any]) -> None:
        result = self._result(held, future, self._ways.gradients, message, backward=True)
        if result is None:
            return
        held.gradient_done = True
        meta, payload = result.rows
        trace = (*message.trace, time.perf_counter() - arrived)
        if result.numbers is not None and held.adapted:
            for part in gradient_parts(message.number, result.numbers):
                self._tell(part)
        if self._ways.up is None:
            if not message.inputs:
                meta, payload = meta._replace(shape=(0, meta.shape[1])), b""
            self._tell(Backwarded(message.number, meta, payload, trace))
        else:
            held.gradient = Backward(message.number, meta, payload, message.inputs, trace)
            self._ways.up.send(message.number)
            self._ledger.changed(held)  # it may be dropped at once
        self._ways.gradients.throttle()

    def _result(
        self,
        held: Pass,
        future: Future[Any],
        ways_in: Upstream,
        message: Forward | Backward,
        *,
        backward: bool,
    ) -> Any:
        """What was computed; None if that is nothing, or nobody wants it any more."""
        held.working = False
        self.computing -= 1
        error = future.exception()
        # What comes out is as large as what went in.
        sent_bytes = message.tensor.nbytes if error is None else 0
        ways_in.done(message.tensor.shape[0], message.tensor.nbytes, sent_bytes=sent_bytes)
        if self._closed or held.finished:
            self._forget(held)
            return None
        if error is None and not held.failed:
            return future.result()
        if error is not None and not isinstance(error, PetalSwarmError):
            logger.error("a pass failed", exc_info=error)
        self._fail_pass(held, error or _gone("what this pass needs"), backward=backward)
        return None

    def _fail_pass(self, held: Pass, error: BaseException, *, backward: bool = False) -> None:
        self._ledger.fail(held)
        self._forget(held)
        self._tell_failed(held.number, error, backward=backward)

    def _tell_failed(self, number: int, error: BaseException, *, backward: bool = False) -> None:
        told = error_message(error)
        self._tell(Failed(number, told.code, told.message, backward, told.retry_after_s))

    def _forget(self, held: Pass) -> None:
        """In the compute thread, which may be busy with it."""
        if not held.working:
            passes, key = self._trainer.passes, self._key(held)
            self._trainer.compute.call(lambda: passes.forget(key))

    def _key(self, held: Pass) -> PassKey:
        return self._peer_id, self._run, held.number


def _head(message: Forward | Backward) -> Any:
    """The message without its payload, which need not be kept longer than it is computed on."""
    return replace(message, payload=b"")


def _gone(what: str) -> PassGoneError:
    return PassGoneError(f"{what} was dropped here; send it again under another number")
