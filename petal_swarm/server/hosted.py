"""One session at one hop: steps in from the client or the previous hop, results out along the ring."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from typing import Any

from petal_swarm.engine.compute import Compute
from petal_swarm.engine.steps import StepRequest, StepResult
from petal_swarm.errors import (
    BadMessageError,
    BadTensorError,
    HopLostError,
    IdleError,
    NetworkError,
    PetalSwarmError,
    ProtocolError,
    RemoteError,
    TooSlowError,
    UnknownVersionError,
    VersionMismatchError,
)
from petal_swarm.net.channel import Channel
from petal_swarm.server.config import SessionLimits
from petal_swarm.server.prefix_steps import PrefixSteps
from petal_swarm.server.quotas import Usage
from petal_swarm.server.slow_peers import SlowReader, SlowWriter
from petal_swarm.wire.frames import Buffer
from petal_swarm.wire.messages import (
    Error,
    FindPrefix,
    Message,
    Open,
    Output,
    PrefixFound,
    Step,
    TensorMeta,
)
from petal_swarm.wire.tensors import DTYPES, decode_tensor, encode_tensor

logger = logging.getLogger(__name__)

#: A step of more tokens is part of a prompt.
OVERHEAD_TOKENS = 4
#: How much one new measurement moves the running mean of a hop's own overhead.
_SMOOTHING = 0.1


class Overhead:
    """A running mean of what a step costs here besides computing, in seconds."""

    def __init__(self) -> None:
        self.mean_s = 0.0

    def add(self, value_s: float) -> None:
        self.mean_s += (value_s - self.mean_s) * (_SMOOTHING if self.mean_s else 1.0)


class HostedSession:
    """The hop's side of a session. Lives in the event loop; the engine runs its steps in another thread."""

    def __init__(
        self,
        opening: Open,
        client: Channel,
        *,
        compute: Compute,
        limits: SessionLimits,
        overhead: Overhead,
        usage: Usage,
    ) -> None:
        self.opening = opening
        self._client = client
        self._compute = compute
        self._limits = limits
        self._overhead = overhead
        self._loop = asyncio.get_running_loop()
        self._next: Channel | None = None
        self._source: Channel | None = None
        self._source_ended: asyncio.Future[None] | None = None
        self._throttled: asyncio.Task[None] | None = None
        self._last_step = -1
        self._last_active = math.inf  # to wait for room, or for the next hop, is not to be idle
        self._in_flight = 0
        self._usage = usage
        self._slow_client = SlowWriter(limits)
        self._slow_source = SlowWriter(limits)
        self._slow_output = SlowReader(limits)
        self._computing = 0
        self._prefixes = PrefixSteps(self, compute) if opening.share_prefixes else None
        self._wanted_bytes = 0  # of a step of which a part has come, and which has to wait
        self._settled = asyncio.Event()
        self._room = asyncio.Event()
        self._ended = asyncio.Event()
        #: Set once there is room for the session, or it has ended without.
        self.admitted = asyncio.Event()

    @property
    def idle_s(self) -> float:
        """Seconds since the last step was done; none while one is being computed."""
        return 0.0 if self._in_flight else self._loop.time() - self._last_active

    @property
    def ended(self) -> bool:
        return self._ended.is_set()

    def attach_next(self, channel: Channel) -> None:
        """Results of this hop go to `channel`, a push stream to the next hop."""
        self._next = channel
        if self._prefixes is not None:
            self._prefixes.attach_next(channel)

    async def take_steps(self, source: Channel) -> None:
        """Take steps from `source` until it or the session ends; reads no faster than results leave.

        Steps are handled as the bytes come, without a task between: that saves a wake-up for each.

        Raises:
            RemoteProtocolError, RemoteError: a message or step that is not valid.
        """
        if self.ended:
            return
        self._source = source
        ended = self._source_ended = self._loop.create_future()

        def on_message(message: Message) -> None:
            if not self.ended:  # else it has come after that
                self._submit(message)
                self._throttle()

        def on_end(error: Exception | None) -> None:
            if ended.done():
                return
            if error is None:
                ended.set_result(None)
            else:
                ended.set_exception(error)

        def on_part(nbytes: int) -> None:
            if nbytes != self._usage.reserved_bytes and not self.ended:
                self._wanted_bytes = nbytes
                self._throttle()

        source.subscribe(on_message, on_end, on_part)
        try:
            await ended
        finally:
            self._source = self._source_ended = None

    def _throttle(self) -> None:
        """Let the sender wait when too much is being computed, or results do not get away."""
        if self._throttled is not None:
            return
        if self._full or self._output.congested:
            if self._source is not None:
                self._source.pause()
            self._throttled = self._loop.create_task(self._resume_when_free())
        elif self._wanted_bytes:
            self._reserve()

    async def _resume_when_free(self) -> None:
        try:
            while self._full and not self.ended:
                await self._wait_for_room()
            self._reserve()
            async with asyncio.timeout(self._limits.write_timeout_s):
                await self._output.drain()
        except (NetworkError, TimeoutError) as error:
            self.fail(self._blame_output(error))
            return
        self._throttled = None  # before what has come meanwhile may make it necessary again
        if self._source is not None:
            self._source.resume()

    async def _wait_for_room(self) -> None:
        """Until a step is done here, the peer has less under way elsewhere, or may move bytes again."""
        self._room.clear()
        self._usage.wake_when_free(self._room.set)
        debt_s = self._usage.debt_s
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(debt_s or None):
                await self._room.wait()

    def _reserve(self) -> None:
        """The rest of a step of which a part has come may come."""
        if self._wanted_bytes:
            self._usage.reserve(self._wanted_bytes)
            self._wanted_bytes = 0

    @property
    def _full(self) -> bool:
        limits = self._limits
        return (
            self._in_flight >= limits.max_steps_in_flight
            or self._usage.nbytes >= limits.max_bytes_in_flight
            or self._usage.must_wait
        )

    def cut_off_slow_peers(self, now: float) -> None:
        """End the session if somebody began a frame and does not go on with it, or takes no results."""
        if self.ended:
            return
        source = self._source
        excused = self._throttled is not None
        if source not in (None, self._client) and self._slow_source.is_too_slow(
            now, source.incoming, excused=excused
        ):
            self.fail(
                HopLostError(f"the hop before, {source.peer_id}, sent a part of a step and not its rest")
            )
        elif self._slow_client.is_too_slow(now, self._client.incoming, excused=excused):
            self.fail(TooSlowError("a part of a message came, and its rest did not come in time"))
        elif self._slow_output.is_too_slow(
            now, sent_bytes=self._usage.sent_bytes, unsent_bytes=self._output.unsent_bytes
        ):
            self.fail(self._blame_output(TimeoutError()))

    def _blame_output(self, error: NetworkError | TimeoutError) -> Exception:
        """Why results do not get away: for the client, its own slowness is another thing than a hop's."""
        if self._next is not None:
            return HopLostError(f"the next hop {self._next.peer_id} does not take what it is sent: {error}")
        return error if isinstance(error, NetworkError) else TooSlowError("results were not read in time")

    @property
    def _output(self) -> Channel:
        return self._next or self._client

    async def watch_idle(self) -> None:
        """Wait until no step has come for too long, then end the session.

        One timer for each session, not one for each step, which would cost as much as a small block.
        """
        self._last_active = self._loop.time()
        while True:
            limit_s = self._idle_limit_s
            left_s = limit_s - self.idle_s
            if left_s <= 0:
                break
            # Looks this often at least: the limit becomes shorter if the source of steps goes.
            await asyncio.sleep(min(left_s, self._limits.first_step_timeout_s))
        self.fail(IdleError(f"the session was idle for {limit_s:g} s"))

    @property
    def _idle_limit_s(self) -> float:
        """Short before the first step, and where no step can come any more; the client may still wait
        for room elsewhere. Behind another hop the first step takes as long as it takes there, and over
        a slow link as long as it takes to arrive.
        """
        limits = self._limits
        if self._source is not None:
            may_take_long = self.opening.upstream is not None or self._source.receiving
            if self._last_step >= 0 or may_take_long:
                return limits.idle_timeout_s
        waiting_s = min(self.opening.wait_s, limits.max_wait_s)
        return min(limits.idle_timeout_s, limits.first_step_timeout_s + waiting_s)

    async def watch_next(self) -> None:
        """Wait for the next hop to fail, and tell the client so."""
        assert self._next is not None
        try:
            while isinstance(message := await self._next.receive(), PrefixFound):
                if self._prefixes is not None:
                    self._prefixes.answered(message)
            reason = message.message if isinstance(message, Error) else "it ended the stream"
        except PetalSwarmError as error:
            reason = str(error)
        self.fail(HopLostError(f"the next hop {self._next.peer_id} is gone: {reason}"))

    async def watch_client(self) -> None:
        """Wait for the client to leave; at a hop that gets its steps from another, it must not send any."""
        message = await self._client.receive()
        if message is not None:
            raise BadMessageError("steps of this session come from its upstream hop")

    def fail(self, error: Exception, step: int | None = None) -> None:
        """End the session with an error to the client."""
        if self.ended:
            return
        self._end()
        with contextlib.suppress(ProtocolError):
            self._client.send(error_message(error, step))

    async def close(self) -> None:
        """End the session, free its cache and close the stream to the next hop. Idempotent."""
        self._end()
        self._usage.close()
        if self._throttled is not None:
            self._throttled.cancel()
        if self._prefixes is not None:
            self._prefixes.close()
        if self._next is not None:
            await self._next.close()

    async def wait_ended(self) -> None:
        await self._ended.wait()

    def _end(self) -> None:
        if not self.ended:
            self._ended.set()
            self._room.set()
            if self._source_ended is not None and not self._source_ended.done():
                self._source_ended.set_result(None)
            self._compute.close_session(self.opening.session)

    def _submit(self, message: Message) -> None:
        """Check what can be checked here and hand the step to the engine."""
        if isinstance(message, FindPrefix) and self._prefixes is not None and self._source is not None:
            if message.epoch == self.opening.epoch:
                self._prefixes.ask(message, self._source)
            return
        if not isinstance(message, Step):
            raise BadMessageError(f"expected a step, got {message.type!r}")
        if message.epoch < self.opening.epoch:
            return
        if message.epoch > self.opening.epoch or message.step <= self._last_step:
            raise BadMessageError(
                f"step {message.step} of epoch {message.epoch} came after"
                f" step {self._last_step} of epoch {self.opening.epoch}"
            )
        if message.tensor.shape[0] > self._compute.engine.max_batch_tokens:
            raise BadTensorError(
                f"a step of {message.tensor.shape[0]} tokens is over this server's limit of"
                f" {self._compute.engine.max_batch_tokens}"
            )
        arrived = time.perf_counter()
        self._last_step = message.step
        self._in_flight += 1
        self._usage.take(message.tensor.shape[0], message.tensor.nbytes)
        if self._prefixes is not None and self._prefixes.takes(message):
            self._prefixes.hold(message, arrived)
        else:
            self.hand_over(message, arrived)

    def request_of(self, step: Step) -> StepRequest:
        """What the engine is asked for a step of this session."""
        return StepRequest(
            session=self.opening.session,
            blocks=self.opening.span,
            slices=step.slices,
            hidden=decode_tensor(step.tensor, step.payload),
            forks=step.forks,
            rows=step.rows if self.opening.next is None else "all",
            keys=step.keys,
            peer=self._client.peer_id,
        )

    def hand_over(self, step: Step, arrived: float, held_s: float = 0.0) -> None:
        """Give a step to the engine; `arrived` is when it came, `held_s` how long it was held back since."""
        request = self.request_of(step)
        self._computing += 1
        # Behind a step that waits in the other thread this one would overtake it.
        result = self._compute.run_now(request) if self._computing == 1 else None
        if result is not None:
            self._deliver(step, arrived, held_s, *_encode(step, result))
        else:
            self._compute.submit(request, lambda result: self._computed(step, arrived, held_s, result))

    def nothing_left(self, step: Step) -> None:
        """A step all of whose rows are known already, and of which nobody wants an answer."""
        self._in_flight -= 1
        self._last_active = self._loop.time()
        self.shrunk(step.tensor.shape[0], step.tensor.nbytes)

    def shrunk(self, rows: int, nbytes: int) -> None:
        """So many rows in flight need not be computed."""
        self._usage.give_back(rows, nbytes)
        self._room.set()

    async def settled(self) -> None:
        """Wait until the engine has computed every step that it was given."""
        while self._computing:
            self._settled.clear()
            await self._settled.wait()

    def _computed(self, step: Step, arrived: float, held_s: float, result: StepResult) -> None:
        """In the compute thread: encode there, so that the event loop only writes."""
        outcome = _encode(step, result)
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has stopped
            self._loop.call_soon_threadsafe(self._delivered_late, step, arrived, held_s, *outcome)

    def _delivered_late(self, *delivery: Any) -> None:
        """In the event loop: no message has just come that would look whether results get away."""
        self._deliver(*delivery)
        if not self.ended:
            self._throttle()

    def _deliver(
        self,
        step: Step,
        arrived: float,
        held_s: float,
        result: StepResult,
        encoded: tuple[TensorMeta, Buffer] | None,
    ) -> None:
        self._computing -= 1
        self._in_flight -= 1
        self._last_active = self._loop.time()
        sent_bytes = (
            0 if encoded is None or (self._next is None and step.rows == "none") else encoded[0].nbytes
        )
        self._usage.give_back(step.tensor.shape[0], step.tensor.nbytes, sent_bytes=sent_bytes)
        self._settled.set()
        self._room.set()
        if self.ended:
            return
        if result.error is not None or encoded is None:
            self.fail(result.error or RemoteError("the engine returned nothing"), step.step)
            return
        meta, payload = encoded
        elapsed = time.perf_counter() - arrived
        if step.tensor.shape[0] <= OVERHEAD_TOKENS:
            self._overhead.add(elapsed - result.compute_s - result.queued_s - held_s)
        trace = (*step.trace, elapsed)
        try:
            if self._next is not None:
                step.tensor, step.payload, step.trace, step.keys = meta, payload, trace, result.keys
                self._next.send(step)
            elif step.rows != "none":
                self._client.send(
                    Output(step=step.step, epoch=step.epoch, tensor=meta, payload=payload, trace=trace)
                )
        except ProtocolError as error:
            # The neighbour has just ended the stream with an error of its own, which its reader reports.
            self.fail(HopLostError(str(error)), step.step)


def error_message(error: BaseException, step: int | None = None) -> Error:
    """What a peer is told of an error: its own mistakes as they are, everything else without details."""
    if isinstance(error, RemoteError):
        return Error(error.code, str(error), step, error.retry_after_s)
    if isinstance(error, UnknownVersionError):
        return Error(VersionMismatchError.code, str(error), step)
    if isinstance(error, ProtocolError):
        return Error(BadMessageError.code, str(error), step)
    if isinstance(error, TimeoutError):
        return Error(TooSlowError.code, "nothing came in time", step)
    if isinstance(error, NetworkError):
        return Error(HopLostError.code, str(error), step)
    return Error(RemoteError.code, "internal error", step)


def _encode(step: Step, result: StepResult) -> tuple[StepResult, tuple[TensorMeta, Buffer] | None]:
    """The result in the dtype that the step came in. A device that fails late fails here, for one step."""
    if result.hidden is None:
        return result, None
    try:
        return result, encode_tensor(result.hidden.to(DTYPES[step.tensor.dtype]))
    except Exception as error:
        logger.exception("the result of a step cannot be sent")
        failure = RemoteError(f"the server failed to compute: {type(error).__name__}")
        return StepResult(None, failure, result.compute_s), None
