"""One session along one route: a stream to every hop, steps into the first, answers from the last.

Hops may be lost at any time. The ring notices, keeps what was sent, and lets `Repairer` find others; who
waits for an answer only waits a little longer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

from petal_swarm.client.members import LinkFailedError, Member
from petal_swarm.errors import (
    BadMessageError,
    BadTensorError,
    HopLostError,
    IdleError,
    PetalSwarmError,
    RemoteError,
    RemoteProtocolError,
    SessionTooLongError,
    StreamClosedError,
    VersionMismatchError,
    remote_error,
)
from petal_swarm.net.outbox import Link, Outbox
from petal_swarm.routing.route import Route
from petal_swarm.wire.messages import Message
from petal_swarm.wire.messages.audit import Recalled
from petal_swarm.wire.messages.error import Error
from petal_swarm.wire.messages.parts import NO_STEP
from petal_swarm.wire.messages.repair import Leaving, Lost, Progress, Rerouted
from petal_swarm.wire.messages.steps import Output, Step
from petal_swarm.wire.step_log import StepLog

logger = logging.getLogger(__name__)

#: A link to the first hop on which nothing moves for so long is lost.
STALL_S = 30.0
#: Silence is suspicious after so many mean steps, within these bounds in seconds.
QUIET_STEPS = 8.0
MIN_QUIET_S = 0.1
MAX_QUIET_S = 1.0
#: A session without a step for so long is not worth a repair before the next one.
LAZY_AFTER_S = 60.0
#: What is being uploaded may take as long as over a slow home connection.
SLOW_UPLOAD_BYTES_PER_S = 1.25e6
_SMOOTHING = 0.1

#: Errors that the next server would answer with as well.
_FINAL = (SessionTooLongError, VersionMismatchError)
#: Errors by which a hop says that what came to it is wrong.
_BLAMING = (BadMessageError, BadTensorError)


class Observer(Protocol):
    """Sees a ring's answers: an `Auditor`, or a test."""

    def observe(self, ring: Ring, output: Output) -> None: ...

    async def close(self) -> None: ...


class _Pending(NamedTuple):
    """An answer that is waited for, its shape, and how many bytes had been sent with its step."""

    answer: asyncio.Future[Output]
    shape: tuple[int, int]
    sent_bytes: int


class Ring:
    """An open session; made by `Swarm.open_ring`. All methods run in the event loop.

    `keeper` is called, at most once at a time, when hops are gone, cut off, leaving or silent; it returns
    once they are not, or calls `fail`. The `observer` is closed with the ring.
    """

    def __init__(
        self,
        session: bytes,
        route: Route,
        members: Sequence[Member],
        log: StepLog,
        *,
        keeper: Callable[[Ring], Awaitable[None]],
        observer: Observer | None = None,
    ) -> None:
        self.session = session
        self.error: PetalSwarmError | None = None
        self.repairs = 0
        self.epoch = 0
        self.members: list[Member] = []
        self._loop = asyncio.get_running_loop()
        self._pending: dict[int, _Pending] = {}
        self.last_sent = NO_STEP
        #: All steps up to this one have been through all hops, and their answers have come.
        self.answered = NO_STEP
        self._log = log
        self._outbox = Outbox(log, self._stalled, stall_s=STALL_S)
        self._keeper = keeper
        self._observer = observer
        #: Whether what the hops hold cannot be trusted: everything is to be sent again, to others.
        self.is_spoiled = False
        self._keeping: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        #: What hops said of links of the present epoch that are not in use yet.
        self._early: dict[Member, Lost] = {}
        self._watch: asyncio.TimerHandle | None = None
        self._progress_s = self._loop.time()
        self._sent_bytes = 0
        self._answered_bytes = 0
        #: Running mean of the time between two answers that were due.
        self.step_s = 0.0
        self.is_quiet = False
        #: Whether the keeper is finding out already why nothing comes.
        self.is_looked_into = False
        self.adopt(members, route)
        self.dtypes = tuple(member.opened.dtype for member in members)

    # -- steps -----------------------------------------------------------------------------------

    def send(self, step: Step) -> asyncio.Future[Output] | None:
        """Send a step to the first hop; the future is of the last hop's output, None if no rows are wanted.

        Raises:
            PetalSwarmError: why the session has ended.
        """
        if self.error is not None:
            raise self.error
        if self.last_sent == self.answered:
            self._progress_s = self._loop.time()
            if self._watch is None:
                self._watch = self._loop.call_later(self.quiet_s, self._look)
        self.last_sent = step.step
        self._sent_bytes += len(step.payload)
        answer = None
        if step.rows != "none":
            answer = self._loop.create_future()
            rows, columns = step.tensor.shape
            shape = (len(step.slices) if step.rows == "last" else rows, columns)
            self._pending[step.step] = _Pending(answer, shape, self._sent_bytes)
        self._outbox.send(step)
        if self.is_broken and self._keeping is None:
            self.wake()
        return answer

    async def exchange(self, steps: Iterable[Step]) -> list[Output | None]:
        """Send steps, all before the first answer is waited for; the output of each that wants rows.

        Steps are taken from the iterable as the network takes them.

        Raises:
            PetalSwarmError: why the session has ended.
        """
        answers = []
        for step in steps:
            answers.append(self.send(step))
            if self._outbox.congested:
                await self._outbox.drain()
        return [None if answer is None else await answer for answer in answers]

    async def close(self) -> None:
        """End the session at every hop. Idempotent; never raises for dead peers."""
        self.fail(StreamClosedError("the session is closed"))
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
        if self._observer is not None:
            await self._observer.close()
        await self._outbox.close()
        await asyncio.gather(*(member.channel.close() for member in self.members))

    def fail(self, error: PetalSwarmError) -> None:
        """The session is over: whoever waits for an answer gets this error."""
        if self.error is None:
            self.error = error
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        for answer, *_ in self._pending.values():
            if not answer.done():
                answer.set_exception(self.error)
                answer.exception()  # seen: the one who waits raises it, if there is one
        self._pending.clear()

    # -- what a repairer sees --------------------------------------------------------------------

    @property
    def route(self) -> Route:
        """The hops now in use."""
        return self._route

    @property
    def is_broken(self) -> bool:
        """Whether a hop is gone or cut off from the one before it."""
        return any(member.error is not None or member.is_cut for member in self.members)

    @property
    def is_leaving(self) -> bool:
        """Whether a hop wants to be replaced."""
        return any(member.is_leaving for member in self.members)

    @property
    def log(self) -> StepLog:
        return self._log

    @property
    def quiet_s(self) -> float:
        """How long no answer may come before somebody asks why: it follows from the steps so far."""
        steps_s = min(MAX_QUIET_S, max(MIN_QUIET_S, QUIET_STEPS * self.step_s))
        return steps_s + (self._sent_bytes - self._answered_bytes) / SLOW_UPLOAD_BYTES_PER_S

    @property
    def is_waiting(self) -> bool:
        """Whether anything was sent that no answer covers yet."""
        return self.last_sent > self.answered

    @property
    def is_over(self) -> bool:
        return self.error is not None

    @property
    def idle_s(self) -> float:
        """For how long there has been nothing to do."""
        return 0.0 if self.is_waiting else self._loop.time() - self._progress_s

    def is_due(self, step: int) -> bool:
        """Whether the answer of a step up to this one is wanted, and has not come."""
        return any(number <= step for number in self._pending)

    def adopt(self, members: Sequence[Member], route: Route) -> None:
        """Go on along these hops, which are connected to each other; those no longer in use are left."""
        kept = {id(member) for member in members}
        known = {id(member) for member in self.members}
        first = self.members[0] if self.members else None
        for member in self.members:
            if id(member) not in kept:
                member.lose(HopLostError("it was replaced"))
                member.channel.abort()
        self.members = list(members)
        self.max_batch_tokens = min(member.opened.max_batch_tokens for member in members)
        self._route = route
        for member in members:
            member.is_cut = False
            if id(member) not in known:
                self._listen(member)
        if members[0] is not first:
            self._send_to(members[0])
        self._progress_s = self._loop.time()
        self.is_quiet = False
        early, self._early = self._early, {}
        for member, lost in early.items():
            self._hear_lost(member, lost)

    def mirror(self, member: Member) -> Link | None:
        """Send all steps to another first hop as well; None if the first ones are not known any more."""
        return self._outbox.connect(
            member.channel,
            member.link_epoch,
            after=member.opened.last_step,
            done=self.answered,
            max_rows=member.opened.max_batch_tokens,
        )

    def unmirror(self, link: Link) -> None:
        """Send no more steps there."""
        self._outbox.drop(link)

    async def changed(self) -> None:
        """Wait until something else is lost, or wants to leave, than what the keeper was called for."""
        await self._changed.wait()

    def lose(self, member: Member, error: PetalSwarmError) -> None:
        """A hop is gone."""
        if member.error is not None:
            return
        member.lose(error)
        if self.error is None and member in self.members:
            # Who is idle too long is not wanted now: it may come back when it has something to say.
            self.wake(unless_idle=isinstance(error, IdleError))

    def distrust(self, member: Member, error: PetalSwarmError) -> None:
        """A hop computes something else: the hops behind it hold what follows from that."""
        self.is_spoiled = True
        self.lose(member, error)

    def cut(self, member: Member) -> None:
        """A hop is cut off from the one before it."""
        if member.error is None and not member.is_cut:
            member.is_cut = True
            self.wake()

    def wake(self, *, unless_idle: bool = False) -> None:
        """There is something to repair; a session unused for a while can wait for its next step."""
        self._changed.set()
        if not self.is_waiting and not self.is_leaving:
            unless_idle = unless_idle or self._loop.time() - self._progress_s > LAZY_AFTER_S
        if self.error is None and self._keeping is None and not (unless_idle and not self.is_waiting):
            self._keeping = self._loop.create_task(self._keep())

    # -- inside ----------------------------------------------------------------------------------

    def _send_to(self, head: Member) -> None:
        """Steps go to this first hop alone: all of them, unless it has them already as a mirror."""
        mirrored = False
        for link in list(self._outbox.links):
            if link.channel is head.channel:
                mirrored = True
            else:
                self._outbox.drop(link)
        if not mirrored and self.mirror(head) is None:
            self.fail(HopLostError("the first hop is gone, and the session too long to be sent again"))

    async def _keep(self) -> None:
        try:
            while self.error is None and (self.is_broken or self.is_leaving or self.is_quiet):
                self._changed.clear()
                await self._keeper(self)
        except PetalSwarmError as error:
            if self.is_waiting or not self._log.complete:
                self.fail(error)
            else:
                logger.info("%s; that can wait until the session is used again", error)
        except Exception as error:
            logger.exception("a session could not be repaired")
            self.fail(HopLostError(f"the session could not be repaired: {type(error).__name__}"))
        finally:
            self._keeping = None

    def _look(self) -> None:
        """A timer of its own while answers are due, not one for each step."""
        self._watch = None
        if not self.is_waiting or self.error is not None:
            return
        quiet_s = self.quiet_s
        left_s = self._progress_s + quiet_s - self._loop.time()
        if left_s <= 0:
            if not self.is_looked_into:
                self.is_quiet = True
                self.wake()
            left_s = MAX_QUIET_S
        self._watch = self._loop.call_later(left_s, self._look)

    def _listen(self, member: Member) -> None:
        """Take what one hop says: outputs, or why it ended."""

        def on_message(message: Message) -> None:
            if isinstance(message, Output):
                self._take_output(member, message)
            else:
                self._hear(member, message)

        def on_end(error: Exception | None) -> None:
            if isinstance(error, RemoteError):
                self._refused(member, error)
                return
            reason = f": {error}" if error else ""
            self.lose(member, HopLostError(f"peer {member.peer_id} is gone{reason}", peer_id=member.peer_id))

        member.channel.subscribe(on_message, on_end)

    def _take_output(self, member: Member, output: Output) -> None:
        if member is not self.members[-1]:
            if member in self.members:
                raise RemoteProtocolError(f"peer {member.peer_id} sent an output, and is not the last hop")
            return
        pending = self._pending.get(output.step)
        if pending is None:
            return
        answer, shape, sent_bytes = pending
        if output.tensor.shape != shape:
            raise RemoteProtocolError(
                f"peer {member.peer_id} answered with shape {list(output.tensor.shape)},"
                f" expected {list(shape)}"
            )
        del self._pending[output.step]
        if not answer.done():
            answer.set_result(output)
        now = self._loop.time()
        passed_s = now - self._progress_s
        self.step_s += (passed_s - self.step_s) * (_SMOOTHING if self.step_s else 1.0)
        self._progress_s = now
        # Every hop keeps their order: those before it have been everywhere, too.
        if output.step < min(self._pending, default=output.step + 1):
            self.answered, self._answered_bytes = output.step, sent_bytes
        if self._observer is not None:
            self._observer.observe(self, output)

    def _hear(self, member: Member, message: Message) -> None:
        if isinstance(message, Error):
            raise remote_error(
                message.code, message.message, peer_id=member.peer_id, retry_after_s=message.retry_after_s
            )
        if isinstance(message, Rerouted):
            member.rerouted(message.epoch)
        elif isinstance(message, Progress):
            member.progressed(message)
        elif isinstance(message, Recalled):
            member.recalled(message)
        elif isinstance(message, Leaving):
            if not member.is_leaving:
                member.is_leaving = True
                self.wake()
        elif isinstance(message, Lost):
            self._hear_lost(member, message)
        else:
            raise RemoteProtocolError(f"peer {member.peer_id} sent {message.type!r}")

    def _hear_lost(self, member: Member, lost: Lost) -> None:
        failure = LinkFailedError(lost.reason, replayable=lost.replayable)
        if not lost.upstream and member.rerouted(lost.epoch, failure):
            return
        if member not in self.members:
            return
        index = self.members.index(member) + (not lost.upstream)
        if index < len(self.members) and self.members[index].link_epoch == lost.epoch:
            self.cut(self.members[index])
        elif lost.epoch == self.epoch:
            self._early[member] = lost

    def _refused(self, member: Member, error: RemoteError) -> None:
        """A hop ended the session with an error."""
        if isinstance(error, _FINAL) or (isinstance(error, _BLAMING) and member is self.members[0]):
            member.lose(error)
            self.fail(error)
            return
        if isinstance(error, _BLAMING) and member in self.members:
            before = self.members[self.members.index(member) - 1]
            self.lose(before, HopLostError(f"what it sent on was refused: {error}", peer_id=before.peer_id))
        self.lose(member, error)

    def _stalled(self, link: Link) -> None:
        if self._outbox.drop(link) and self.members[0].channel is link.channel:
            self.lose(self.members[0], HopLostError("the first hop took nothing for too long"))
