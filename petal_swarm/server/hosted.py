"""One session at one hop: steps in from the client or the previous hop, results out along the ring."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable

from petal_swarm.engine.compute import Compute
from petal_swarm.engine.steps import StepRequest, StepResult
from petal_swarm.errors import (
    BadMessageError,
    BadTensorError,
    HopLostError,
    IdleError,
    NetworkError,
    ProtocolError,
    RemoteError,
    TooSlowError,
    UnknownVersionError,
    VersionMismatchError,
)
from petal_swarm.net.channel import Channel
from petal_swarm.server.config import SessionLimits
from petal_swarm.server.downstream import Dial, Downstream
from petal_swarm.server.prefix_steps import PrefixSteps
from petal_swarm.server.recall import Receipts, answer
from petal_swarm.wire.frames import Buffer
from petal_swarm.wire.messages import (
    NO_STEP,
    Error,
    FindPrefix,
    Leaving,
    Lost,
    Message,
    Open,
    Output,
    PrefixFound,
    Probe,
    Progress,
    Recall,
    Reroute,
    Rerouted,
    Step,
    TensorMeta,
)
from petal_swarm.wire.step_log import StepLog
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
    """The hop's side of a session. Lives in the event loop; the engine runs its steps in another thread.

    Its neighbours in the ring may be lost and replaced; the session ends with the client's stream, with
    an error of its own, or when nobody has replaced a lost neighbour for too long.
    """

    def __init__(
        self,
        opening: Open,
        client: Channel,
        *,
        compute: Compute,
        limits: SessionLimits,
        overhead: Overhead,
        log: StepLog,
        dial: Dial,
        on_reroute: Callable[[], None],
    ) -> None:
        self.opening = opening
        #: Who may push steps into this session now, and as which epoch.
        self.upstream = opening.upstream
        self.source_epoch = opening.epoch
        self._client = client
        self._compute = compute
        self._limits = limits
        self._overhead = overhead
        self._on_reroute = on_reroute
        self._loop = asyncio.get_running_loop()
        self._log = log
        self._downstream: Downstream | None = None
        if opening.next is not None:
            self._downstream = Downstream(
                log,
                dial,
                tell=self._tell,
                on_change=self._next_changed,
                answered=self._prefix_answered,
                stall_s=limits.write_timeout_s,
            )
        #: The last hop: whether it only fills its KV cache for now, and what it will answer if it is needed.
        self._receipts = Receipts()
        self._is_spare = opening.spare
        self._answered = opening.answered
        self._unanswered: list[Output] = []
        self._epoch = opening.epoch
        self._source: Channel | None = None
        self._source_ended: asyncio.Future[None] | None = None
        self._client_ended: asyncio.Future[None] = self._loop.create_future()
        self._throttled: asyncio.Task[None] | None = None
        self._unrepaired: asyncio.TimerHandle | None = None
        self.last_step = NO_STEP
        self._last_done = NO_STEP
        self._last_active = math.inf  # to wait for room, or for the next hop, is not to be idle
        self._in_flight = 0
        self._bytes_in_flight = 0
        self._computing = 0
        self._prefixes = PrefixSteps(self, compute) if opening.share_prefixes else None
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

    async def connect_next(self) -> None:
        """Connect to the next hop, if one follows and this is no spare.

        Raises:
            HopLostError: it cannot be reached, or refuses.
        """
        if self._downstream is None or self.opening.next is None:
            return
        link = None
        if not self._is_spare:
            link = await self._downstream.connect(self.opening.next, self.opening.epoch)
        if self._prefixes is None:
            return
        if link is not None and link.after == NO_STEP:
            self._prefixes.attach_next(link.channel)
        else:
            self._prefixes.give_up_next()

    async def serve_client(self) -> None:
        """Take what the client says until it leaves: where steps go, and, at the first hop, the steps.

        Steps are handled as the bytes come, without a task between: that saves a wake-up for each.

        Raises:
            RemoteProtocolError, RemoteError: a message or step that is not valid.
        """
        if self.opening.upstream is None:
            self._source = self._client
        ended = self._client_ended

        def on_message(message: Message) -> None:
            if not self.ended:
                self._hear(message)

        def on_end(error: Exception | None) -> None:
            if ended.done():
                return
            if error is None:
                ended.set_result(None)
            else:
                ended.set_exception(error)

        self._client.subscribe(on_message, on_end)
        await ended

    def _hear(self, message: Message) -> None:
        """One message of the client."""
        if isinstance(message, Step):
            if self._source is not self._client:
                raise BadMessageError("steps of this session come from its upstream hop")
            self._submit(message)
            self._throttle()
        elif isinstance(message, Probe):
            self._tell(Progress(message.number, self.last_step, self._last_done))
        elif isinstance(message, Reroute):
            self._reroute(message)
        elif isinstance(message, Recall):
            for recalled in answer(message, self._log, self._receipts):
                self._tell(recalled)
        else:
            raise BadMessageError(f"expected a step, got {message.type!r}")

    def _reroute(self, told: Reroute) -> None:
        if told.epoch <= self._epoch and not (told.next and told.epoch == self._epoch):
            raise BadMessageError(f"epoch {told.epoch} comes after epoch {self._epoch}")
        self._epoch = told.epoch
        if told.upstream is not None:
            if self.opening.upstream is None:
                raise BadMessageError("the first hop gets its steps from the client")
            self._leave_source()
            self.upstream, self.source_epoch = told.upstream, told.epoch
            self._on_reroute()
        if told.answered is not None and self._downstream is None:
            self._answer_from(told.answered)
        if told.next is None:
            self._tell(Rerouted(told.epoch))
        elif self._downstream is None:
            raise BadMessageError("the last hop has no next one")
        else:
            if self._prefixes is not None:
                self._prefixes.give_up_next()
            self._is_spare = False
            done = NO_STEP if told.answered is None else told.answered
            self._downstream.reroute(told.next, told.epoch, also=told.also, done=done)

    def _answer_from(self, answered: int) -> None:
        """The last hop, until now a spare, answers the client from here on."""
        self._is_spare = False
        self._answered = answered
        held, self._unanswered = self._unanswered, []
        for output in held:
            if output.step > answered:
                self._tell(output)

    def _leave_source(self) -> None:
        """Take nothing more from the hop before this one."""
        if self._source is not None:
            self._source.abort()
            self._source = None
        if self._source_ended is not None and not self._source_ended.done():
            self._source_ended.set_result(None)

    def _tell(self, message: Message) -> None:
        """Say something to the client, who may have just ended the session."""
        if not self.ended:
            with contextlib.suppress(ProtocolError):
                self._client.send(message)

    def announce_leaving(self) -> None:
        """Ask the client to let another server take this one's place."""
        self._tell(Leaving())

    def _prefix_answered(self, message: PrefixFound) -> None:
        if self._prefixes is not None:
            self._prefixes.answered(message)

    def _next_changed(self) -> None:
        """The next hop is lost, or there is a new one."""
        assert self._downstream is not None
        self._room.set()  # whoever waits for a lost link to drain
        if self._unrepaired is not None:
            self._unrepaired.cancel()
            self._unrepaired = None
        if self._downstream.is_connected or self.ended:
            return
        if self._prefixes is not None:
            self._prefixes.give_up_next()
        limit_s = self._limits.repair_timeout_s
        lost = HopLostError(f"the next hop was lost, and not replaced for {limit_s:g} s")
        self._unrepaired = self._loop.call_later(limit_s, self.fail, lost)

    async def take_steps(self, source: Channel) -> None:
        """Take the steps that the hop before this one pushes, until it, the session or its turn ends.

        Raises:
            RemoteProtocolError, RemoteError: a message or step that is not valid; the session has ended.
        """
        if self.ended:
            return
        self._leave_source()
        self._source = source
        epoch = self.source_epoch
        ended = self._source_ended = self._loop.create_future()

        def on_message(message: Message) -> None:
            if not self.ended and self._source is source:  # else it has come after that
                self._submit(message)
                self._throttle()

        def on_end(error: Exception | None) -> None:
            if ended.done():
                return
            if error is None or isinstance(error, NetworkError):
                ended.set_result(None)
            else:
                ended.set_exception(error)

        source.subscribe(on_message, on_end)
        try:
            await ended
        except Exception as error:
            self.fail(error)
            raise
        finally:
            if self._source is source:
                self._source = self._source_ended = None
                self._tell(
                    Lost(epoch, upstream=True, replayable=True, reason=f"no more steps from {source.peer_id}")
                )

    def _throttle(self) -> None:
        """Let the sender wait when too much is being computed, or results do not get away."""
        if self._source is None:
            return
        if self._throttled is None and (self._full or self._congested):
            self._source.pause()
            self._throttled = self._loop.create_task(self._resume_when_free(self._source))

    async def _resume_when_free(self, source: Channel) -> None:
        try:
            while self._full and not self.ended:
                self._room.clear()
                await self._room.wait()
            async with asyncio.timeout(self._limits.write_timeout_s):
                if self._downstream is not None:
                    await self._downstream.outbox.drain()
                else:
                    await self._client.drain()
            source.resume()
        except (NetworkError, TimeoutError) as error:
            self.fail(error)
        finally:
            self._throttled = None

    @property
    def _full(self) -> bool:
        limits = self._limits
        return (
            self._in_flight >= limits.max_steps_in_flight
            or self._bytes_in_flight >= limits.max_bytes_in_flight
        )

    @property
    def _congested(self) -> bool:
        if self._downstream is not None:
            return self._downstream.outbox.congested
        return self._client.congested

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
            if self.last_step >= 0 or may_take_long:
                return limits.idle_timeout_s
        waiting_s = min(self.opening.wait_s, limits.max_wait_s)
        return min(limits.idle_timeout_s, limits.first_step_timeout_s + waiting_s)

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
        if self._throttled is not None:
            self._throttled.cancel()
        if self._unrepaired is not None:
            self._unrepaired.cancel()
        if self._prefixes is not None:
            self._prefixes.close()
        if self._downstream is not None:
            await self._downstream.close()
        self._log.close()

    async def wait_ended(self) -> None:
        await self._ended.wait()

    def _end(self) -> None:
        if not self.ended:
            self._ended.set()
            self._room.set()
            if self._source_ended is not None and not self._source_ended.done():
                self._source_ended.set_result(None)
            if not self._client_ended.done():
                self._client_ended.set_result(None)
            self._compute.close_session(self.opening.session)

    def _submit(self, message: Message) -> None:
        """Check what can be checked here and hand the step to the engine."""
        if isinstance(message, FindPrefix) and self._prefixes is not None and self._source is not None:
            if message.epoch == self.source_epoch:
                self._prefixes.ask(message, self._source)
            return
        if not isinstance(message, Step):
            raise BadMessageError(f"expected a step, got {message.type!r}")
        if message.epoch < self.source_epoch:
            return
        if message.epoch > self.source_epoch or message.step <= self.last_step:
            raise BadMessageError(
                f"step {message.step} of epoch {message.epoch} came after"
                f" step {self.last_step} of epoch {self.source_epoch}"
            )
        if message.tensor.shape[0] > self._compute.engine.max_batch_tokens:
            raise BadTensorError(
                f"a step of {message.tensor.shape[0]} tokens is over this server's limit of"
                f" {self._compute.engine.max_batch_tokens}"
            )
        arrived = time.perf_counter()
        self.last_step = message.step
        self._receipts.keep(message)
        self._in_flight += 1
        self._bytes_in_flight += message.tensor.nbytes
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
            rows=step.rows if self._downstream is None else "all",
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
        self.shrunk(step.tensor.nbytes)

    def shrunk(self, nbytes: int) -> None:
        """So many bytes in flight need not be computed."""
        self._bytes_in_flight -= nbytes
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
            self._loop.call_soon_threadsafe(self._deliver, step, arrived, held_s, *outcome)

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
        self._bytes_in_flight -= step.tensor.nbytes
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
        self._last_done = step.step
        if self._downstream is not None:
            step.tensor, step.payload, step.trace, step.keys = meta, payload, trace, result.keys
            self._downstream.outbox.send(step)
        elif step.rows != "none" and step.step > self._answered:
            output = Output(step=step.step, epoch=step.epoch, tensor=meta, payload=payload, trace=trace)
            if self._is_spare:
                self._unanswered.append(output)
            else:
                self._tell(output)


def error_message(error: BaseException, step: int | None = None) -> Error:
    """What a peer is told of an error: its own mistakes as they are, everything else without details."""
    if isinstance(error, RemoteError):
        return Error(error.code, str(error), step)
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
        hidden = result.hidden.to(DTYPES[step.tensor.dtype])
        if hidden.untyped_storage().nbytes() > hidden.nbytes:
            hidden = hidden.clone()  # it is kept for a while, and the rest of its batch should not be
        return result, encode_tensor(hidden)
    except Exception as error:
        logger.exception("the result of a step cannot be sent")
        failure = RemoteError(f"the server failed to compute: {type(error).__name__}")
        return StepResult(None, failure, result.compute_s), None
