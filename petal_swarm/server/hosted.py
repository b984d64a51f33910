"""One session at one hop: steps in from the client or the previous hop, results out along the ring."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable
from typing import Any

from petal_swarm.engine.compute import Compute
from petal_swarm.engine.steps import StepRequest, StepResult
from petal_swarm.errors import (
    BadMessageError,
    BadTensorError,
    IdleError,
    NetworkError,
    ProtocolError,
    RemoteError,
    TooSlowError,
)
from petal_swarm.net.channel import Channel
from petal_swarm.server.config import SessionLimits
from petal_swarm.server.downstream import Dial, Downstream
from petal_swarm.server.prefix_steps import PrefixSteps
from petal_swarm.server.quotas import Usage
from petal_swarm.server.recall import Receipts, answer
from petal_swarm.server.results import OVERHEAD_TOKENS, Overhead, encode_result, error_message
from petal_swarm.server.slow_peers import SlowReader, SlowWriter
from petal_swarm.server.streams import ends
from petal_swarm.server.upstream import Upstream
from petal_swarm.wire.frames import Buffer
from petal_swarm.wire.messages import Message
from petal_swarm.wire.messages.audit import Recall
from petal_swarm.wire.messages.opening import Open
from petal_swarm.wire.messages.parts import NO_STEP, TensorMeta
from petal_swarm.wire.messages.prefixes import FindPrefix, PrefixFound
from petal_swarm.wire.messages.repair import Leaving, Lost, Probe, Progress, Reroute, Rerouted
from petal_swarm.wire.messages.steps import Output, Step
from petal_swarm.wire.step_log import StepLog
from petal_swarm.wire.tensors import decode_tensor

logger = logging.getLogger(__name__)


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
        usage: Usage,
        log: StepLog,
        dial: Dial,
        on_reroute: Callable[[], None],
    ) -> None:
        self.opening = opening
        self._client = client
        self._compute = compute
        self._limits = limits
        self._overhead = overhead
        self._usage = usage
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
        self._output = client if self._downstream is None else self._downstream.outbox
        self.upstream = Upstream(
            opening.upstream, opening.epoch, limits, usage, output=self._output, on_stuck=self._stuck
        )
        self._slow_client = SlowWriter(limits)
        self._slow_output = SlowReader(limits)
        self._receipts = Receipts() if opening.receipts else None
        #: The last hop: whether it only fills its KV cache for now, and what it will answer if it is needed.
        self._is_spare = opening.spare
        self._answered = opening.answered
        self._unanswered: list[Output] = []
        self._unanswered_bytes = 0
        self._epoch = opening.epoch
        self._client_ended: asyncio.Future[None] = self._loop.create_future()
        self._hushed: asyncio.Task[None] | None = None
        self._unrepaired: asyncio.TimerHandle | None = None
        self.last_step = NO_STEP
        self._last_done = NO_STEP
        self._last_active = math.inf  # to wait for room, or for the next hop, is not to be idle
        self._computing = 0
        self._prefixes = PrefixSteps(self, compute) if opening.share_prefixes else None
        # What this session shares is filed under the name of the hop that was before it first.
        self._trusts_keys = True
        self._settled = asyncio.Event()
        self._ended = asyncio.Event()
        #: Set once there is room for the session, or it has ended without.
        self.admitted = asyncio.Event()

    @property
    def idle_s(self) -> float:
        """Seconds since the last step was done; none while one is being computed."""
        return 0.0 if self.upstream.in_flight else self._loop.time() - self._last_active

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
            self.upstream.source = self._client
        ended = self._client_ended

        def on_message(message: Message) -> None:
            if not self.ended:
                self._hear(message)

        first = self.upstream.source is self._client
        self._client.subscribe(on_message, ends(ended), self.upstream.part_came if first else None)
        await ended

    def _hear(self, message: Message) -> None:
        """One message of the client."""
        if isinstance(message, Step):
            if self.upstream.source is not self._client:
                raise BadMessageError("steps of this session come from its upstream hop")
            self._submit(message)
            self.upstream.throttle()
        elif isinstance(message, Probe):
            self._tell(Progress(message.number, self.last_step, self._last_done))
        elif isinstance(message, Reroute):
            self._reroute(message)
        elif isinstance(message, Recall):
            for recalled in answer(message, self._log, self._receipts):
                self._tell(recalled)
        else:
            raise BadMessageError(f"expected a step, got {message.type!r}")
        if self._client.congested and self._hushed is None and not self.ended:
            self._client.pause()
            self._hushed = self._loop.create_task(self._listen_again())

    async def _listen_again(self) -> None:
        """Who takes no answers is asked no questions."""
        try:
            async with asyncio.timeout(self._limits.write_timeout_s):
                await self._client.drain()
        except (NetworkError, TimeoutError) as error:
            self.fail(error)
            return
        self._hushed = None
        self._client.resume()

    def _reroute(self, told: Reroute) -> None:
        if told.epoch <= self._epoch and not (told.next and told.epoch == self._epoch):
            raise BadMessageError(f"epoch {told.epoch} comes after epoch {self._epoch}")
        self._epoch = told.epoch
        if told.upstream is not None:
            if self.opening.upstream is None:
                raise BadMessageError("the first hop gets its steps from the client")
            if told.upstream != self.upstream.peer_id:
                self._trusts_keys = False
            self.upstream.reroute(told.upstream, told.epoch)
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
        if self._unrepaired is not None:
            self._unrepaired.cancel()
            self._unrepaired = None
        if self._downstream.is_connected or self.ended:
            return
        if self._prefixes is not None:
            self._prefixes.give_up_next()
        limit_s = self._limits.repair_timeout_s
        # That is nobody's fault here: the client has left it at that.
        idle = IdleError(f"the next hop was lost, and not replaced for {limit_s:g} s")
        self._unrepaired = self._loop.call_later(limit_s, self.fail, idle)

    async def take_steps(self, source: Channel) -> None:
        """Take the steps that the hop before this one pushes, until it, the session or its turn ends.

        Raises:
            RemoteProtocolError, RemoteError: a message or step that is not valid; the session has ended.
        """
        if self.ended:
            return
        epoch = self.upstream.epoch

        def on_message(message: Message) -> None:
            if not self.ended:
                self._submit(message)
                self.upstream.throttle()

        try:
            lost = await self.upstream.take_from(source, on_message)
        except Exception as error:
            self.fail(error)
            raise
        if lost:
            reason = f"no more steps from {source.peer_id}"
            self._tell(Lost(epoch, upstream=True, replayable=True, reason=reason))

    def cut_off_slow_peers(self, now: float) -> None:
        """End what has no end: somebody began a frame and does not go on with it, or takes no results."""
        if self.ended:
            return
        source = self.upstream.source
        if self.upstream.is_too_slow(now):
            if source is self._client:
                self.fail(TooSlowError("a part of a step came, and its rest did not come in time"))
                return
            self.upstream.leave()
            reason = "the hop before sent a part of a step and not its rest"
            self._tell(Lost(self.upstream.epoch, upstream=True, replayable=True, reason=reason))
        if source is not self._client and self._slow_client.is_too_slow(
            now, self._client.incoming, excused=False
        ):
            self.fail(TooSlowError("a part of a message came, and its rest did not come in time"))
        downstream, unsent_bytes = self._downstream, self._output.unsent_bytes
        sent_bytes = self._usage.sent_bytes if downstream is None else downstream.outbox.sent_bytes
        if self._slow_output.is_too_slow(now, sent_bytes=sent_bytes, unsent_bytes=unsent_bytes):
            self._stuck(TimeoutError())

    def _stuck(self, error: NetworkError | TimeoutError) -> None:
        """Results do not get away: another next hop may take them, another client will not."""
        if self._downstream is not None:
            self._downstream.give_up_stuck_links()
        else:
            late = TooSlowError("results were not read in time")
            self.fail(error if isinstance(error, NetworkError) else late)

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
        source = self.upstream.source
        if source is not None:
            may_take_long = self.opening.upstream is not None or source.receiving
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
        self._usage.close()
        if self._unrepaired is not None:
            self._unrepaired.cancel()
        if self._hushed is not None:
            self._hushed.cancel()
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
            self.upstream.close()
            if not self._client_ended.done():
                self._client_ended.set_result(None)
            self._compute.close_session(self.opening.session)

    def _submit(self, message: Message) -> None:
        """Check what can be checked here and hand the step to the engine."""
        upstream = self.upstream
        if isinstance(message, FindPrefix) and self._prefixes is not None and upstream.source is not None:
            if message.epoch != upstream.epoch:
                return
            if self._trusts_keys:
                self._prefixes.ask(message, upstream.source)
            else:
                upstream.source.send(PrefixFound(message.step, (0,) * len(message.keys)))
            return
        if not isinstance(message, Step):
            raise BadMessageError(f"expected a step, got {message.type!r}")
        if message.epoch < upstream.epoch:
            return
        if message.epoch > upstream.epoch or message.step <= self.last_step:
            raise BadMessageError(
                f"step {message.step} of epoch {message.epoch} came after"
                f" step {self.last_step} of epoch {upstream.epoch}"
            )
        if message.tensor.shape[0] > self._compute.engine.max_batch_tokens:
            raise BadTensorError(
                f"a step of {message.tensor.shape[0]} tokens is over this server's limit of"
                f" {self._compute.engine.max_batch_tokens}"
            )
        arrived = time.perf_counter()
        self.last_step = message.step
        if self._receipts is not None:
            self._receipts.keep(message)
        upstream.begun(message.tensor.shape[0], message.tensor.nbytes)
        if self._prefixes is not None and self._prefixes.takes(message):
            self._prefixes.hold(message, arrived)
        else:
            self.hand_over(message, arrived)

    def _hold_back(self, output: Output) -> None:
        self._unanswered.append(output)
        self._unanswered_bytes += output.tensor.nbytes
        if self._unanswered_bytes > self._limits.max_bytes_in_flight:
            self.fail(TooSlowError("nobody has asked this spare for its answers"))

    def request_of(self, step: Step) -> StepRequest:
        """What the engine is asked for a step of this session."""
        return StepRequest(
            session=self.opening.session,
            blocks=self.opening.span,
            slices=step.slices,
            hidden=decode_tensor(step.tensor, step.payload),
            forks=step.forks,
            rows=step.rows if self._downstream is None else "all",
            keys=step.keys if self._trusts_keys else (),
            peer=self._client.peer_id,
        )

    def hand_over(self, step: Step, arrived: float, held_s: float = 0.0) -> None:
        """Give a step to the engine; `arrived` is when it came, `held_s` how long it was held back since."""
        request = self.request_of(step)
        self._computing += 1
        # Behind a step that waits in the other thread this one would overtake it.
        result = self._compute.run_now(request) if self._computing == 1 else None
        if result is not None:
            self._deliver(step, arrived, held_s, *encode_result(step, result))
        else:
            self._compute.submit(request, lambda result: self._computed(step, arrived, held_s, result))

    def nothing_left(self, step: Step) -> None:
        """A step all of whose rows are known already, and of which nobody wants an answer."""
        self._last_active = self._loop.time()
        self.upstream.done(step.tensor.shape[0], step.tensor.nbytes)

    def shrunk(self, rows: int, nbytes: int) -> None:
        """So many rows in flight need not be computed."""
        self.upstream.shrunk(rows, nbytes)

    async def settled(self) -> None:
        """Wait until the engine has computed every step that it was given."""
        while self._computing:
            self._settled.clear()
            await self._settled.wait()

    def _computed(self, step: Step, arrived: float, held_s: float, result: StepResult) -> None:
        """In the compute thread: encode there, so that the event loop only writes."""
        outcome = encode_result(step, result)
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has stopped
            self._loop.call_soon_threadsafe(self._delivered_late, step, arrived, held_s, *outcome)

    def _delivered_late(self, *delivery: Any) -> None:
        """In the event loop: no message has just come that would look whether results get away."""
        self._deliver(*delivery)
        if not self.ended:
            self.upstream.throttle()

    def _deliver(
        self,
        step: Step,
        arrived: float,
        held_s: float,
        result: StepResult,
        encoded: tuple[TensorMeta, Buffer] | None,
    ) -> None:
        self._computing -= 1
        self._last_active = self._loop.time()
        wanted = encoded is not None and (self._downstream is not None or step.rows != "none")
        sent_bytes = encoded[0].nbytes if encoded is not None and wanted else 0
        self.upstream.done(step.tensor.shape[0], step.tensor.nbytes, sent_bytes=sent_bytes)
        self._settled.set()
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
                self._hold_back(output)
            else:
                self._tell(output)
