"""A lane: an open chain of hops that takes passes forward, and their gradients back.

Hops may be lost at any time. The lane notices and lets its keeper find others; who waits for an answer
only waits a little longer. A lane without passes is not repaired: the next pass opens another.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

import torch
from torch import Tensor

from petal_swarm.client.training.adapters import TrainedAdapter
from petal_swarm.client.training.courses import Course, Gradient, Pass
from petal_swarm.client.training.members import TrainMember
from petal_swarm.errors import (
    AdapterMissingError,
    BadMessageError,
    BadTensorError,
    BusyError,
    HopLostError,
    NotFiniteError,
    PassGoneError,
    PetalSwarmError,
    RemoteError,
    RemoteProtocolError,
    StreamClosedError,
    remote_error,
)
from petal_swarm.routing.route import Hop
from petal_swarm.span import Span
from petal_swarm.wire.messages import Message
from petal_swarm.wire.messages.error import Error
from petal_swarm.wire.messages.repair import Leaving, Lost, Rerouted
from petal_swarm.wire.messages.tuning import (
    Backward,
    Backwarded,
    Failed,
    Finish,
    Forward,
    Forwarded,
    Gradients,
    PassStates,
)
from petal_swarm.wire.tensors import DTYPES, encode_tensor

logger = logging.getLogger(__name__)

#: Silence is suspicious after so many mean passes, within these bounds in seconds.
QUIET_PASSES = 4.0
MIN_QUIET_S = 0.5
MAX_QUIET_S = 5.0
#: What is on its way may take as long as over a slow home connection.
SLOW_BYTES_PER_S = 1.25e6
_SMOOTHING = 0.3
_SIXTEEN_BIT = ("bfloat16", "float16")

#: What a hop may say of one pass without being wrong about the others.
_OF_ONE_PASS = (PassGoneError, AdapterMissingError, BusyError, NotFiniteError)
#: Errors by which a hop says that what came to it is wrong.
_BLAMING = (BadMessageError, BadTensorError)

Keeper = Callable[["Lane"], Awaitable[None]]
Upload = Callable[[Hop, TrainedAdapter], Awaitable[None]]


class Lane:
    """Made by `LanePool`. All methods run in the event loop.

    `keeper` is called, at most once at a time, when hops are gone, cut off or silent while passes are under
    way; it returns once they are not, or raises. `upload` brings an adapter to a hop.
    """

    def __init__(
        self, run: bytes, blocks: Span, members: Sequence[TrainMember], *, keeper: Keeper, upload: Upload
    ) -> None:
        self.run = run
        self.blocks = blocks
        self.error: PetalSwarmError | None = None
        self.epoch = 0
        self.repairs = 0
        self.members: list[TrainMember] = []
        self.courses: dict[int, Course] = {}
        self.is_leaving = False
        self.is_quiet = False
        #: Whether the neighbours of a hop are being changed: what is sent meanwhile waits.
        self.is_held = False
        #: Passes in the hands of those who wait for their answers; see `LanePool`.
        self.taken = 0
        #: Measured seconds for a token of a pass; each direction has its own.
        self.forward_s = self.backward_s = 0.0
        self._loop = asyncio.get_running_loop()
        self._keeper = keeper
        self._upload = upload
        self._uploading = asyncio.Lock()
        self._keeping: asyncio.Task[None] | None = None
        self._watch: asyncio.TimerHandle | None = None
        self._progress_s = self._loop.time()
        self._finished: list[int] = []
        self._next = 0
        self.adopt(members)
        first = members[0].opened.dtype
        same = all(member.opened.dtype == first for member in members)
        #: Rows travel as the blocks compute, if all do alike.
        self.dtype = DTYPES[first] if same and first in _SIXTEEN_BIT else torch.float32

    # -- passes ----------------------------------------------------------------------------------

    @property
    def window(self) -> int:
        """How many passes may be under way: one at each hop, and one between."""
        return max(1, min(len(self.members) + 1, self.max_passes - 1))

    @property
    def hops(self) -> list[Hop]:
        """The hops now in use."""
        return [member.hop for member in self.members]

    async def ensure(self, adapter: TrainedAdapter) -> None:
        """Every hop has the adapter when this returns.

        Raises:
            PetalSwarmError: it cannot be brought to one of them.
        """
        async with self._uploading:
            lacking = [member for member in self.members if adapter.id not in member.adapters]
            await asyncio.gather(*(self.bring(member, adapter) for member in lacking))

    async def bring(self, member: TrainMember, adapter: TrainedAdapter) -> None:
        """Bring an adapter to one hop; if that fails, the hop is lost.

        Raises:
            PetalSwarmError: it failed.
        """
        try:
            await self._upload(member.hop, adapter)
        except PetalSwarmError as error:
            self.lose(member, error)
            raise
        member.adapters.add(adapter.id)

    async def forward(self, each: Pass, *, keep: bool) -> Tensor:
        """The rows that come out; with `keep` the backward of this pass may follow.

        Raises:
            PetalSwarmError: the pass has failed here; with another lane it may work.
        """
        self._check()
        meta, payload = encode_tensor(each.rows.to(self.dtype))
        number = self._next
        self._next += 1
        message = Forward(
            number, each.lengths, meta, payload, keep, each.adapter.id if each.adapter else None
        )
        course = Course(message, each.adapter, self._loop.create_future(), self._loop.time())
        self.courses[number] = course
        self._depart()
        try:
            rows = await course.output
        except BaseException:
            self.finish(number)
            raise
        if keep:
            each.lane, each.number = self, number
        else:
            self.finish(number)
        return rows

    async def backward(self, each: Pass, gradient: Tensor, *, inputs: bool) -> Gradient:
        """The gradients that follow from that of the rows which came out; the pass is finished then.

        Raises:
            PetalSwarmError: the pass has failed here; done again from its forward on, it may work.
        """
        self._check()
        course = self.courses.get(each.number)
        if course is None or course.error is not None:
            raise (course and course.error) or PassGoneError("the pass is finished")
        # Gradients need the range of bfloat16; float16 would lose small ones.
        dtype = torch.float32 if self.dtype is torch.float16 else self.dtype
        meta, payload = encode_tensor(gradient.to(dtype))
        message = Backward(each.number, meta, payload, inputs)
        answer = course.begin_backward(message, self.blocks, self._loop.time())
        self._depart()
        try:
            return await answer
        finally:
            each.drop()

    def finish(self, number: int) -> None:
        """Nothing of this pass is wanted any more."""
        if self.courses.pop(number, None) is not None:
            if not self._finished:
                self._loop.call_soon(self._tell_finished)
            self._finished.append(number)

    async def close(self) -> None:
        """End the lane at every hop. Idempotent; never raises for dead peers."""
        self.fail(StreamClosedError("the lane is closed"))
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
        await asyncio.gather(*(member.channel.close() for member in self.members))

    def fail(self, error: PetalSwarmError) -> None:
        """The lane is over: whoever waits for an answer gets this error."""
        if self.error is None:
            self.error = error
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        for course in self.courses.values():
            course.fail(self.error)

    # -- what its keeper sees --------------------------------------------------------------------

    @property
    def is_broken(self) -> bool:
        """Whether a hop is gone or cut off from the one before it."""
        return any(member.error is not None or member.is_cut for member in self.members)

    @property
    def is_waiting(self) -> bool:
        """Whether an answer is due."""
        return any(course.is_waited_for for course in self.courses.values())

    @property
    def tokens(self) -> int:
        """Rows of the largest pass that is not finished."""
        return max((course.tokens for course in self.courses.values()), default=0)

    @property
    def quiet_s(self) -> float:
        """How long no answer may come before somebody asks why: it follows from the passes so far."""
        pass_s = self.largest_pass * max(self.forward_s, self.backward_s) * (len(self.members) + 1)
        return min(MAX_QUIET_S, max(MIN_QUIET_S, QUIET_PASSES * pass_s)) + self.way_s

    @property
    def largest_pass(self) -> int:
        """Tokens of the largest pass under way."""
        return max((course.tokens for course in self.courses.values()), default=0)

    @property
    def way_s(self) -> float:
        """What passes under way may take on each link, if that is slow."""
        nbytes = sum(c.forward.tensor.nbytes for c in self.courses.values() if c.is_waited_for)
        return nbytes / SLOW_BYTES_PER_S

    def adapters(self) -> list[TrainedAdapter]:
        """Those of passes under way."""
        found = {c.adapter.id: c.adapter for c in self.courses.values() if c.adapter is not None}
        return list(found.values())

    def adopt(self, members: Sequence[TrainMember]) -> None:
        """Go on along these hops, which are linked to each other; those no longer in use are left."""
        kept = {id(member) for member in members}
        known = {id(member) for member in self.members}
        first, last = (self.members[0], self.members[-1]) if self.members else (None, None)
        for member in self.members:
            if id(member) not in kept:
                member.lose(HopLostError("it was replaced"))
                member.channel.abort()
        self.members = list(members)
        self.max_pass_tokens = min(member.opened.max_pass_tokens for member in members)
        self.max_passes = min(member.opened.max_passes for member in members)
        for member in members:
            member.is_cut = False
            if id(member) not in known:
                self._listen(member)
        for course in self.courses.values():
            course.is_forward_sent = course.is_forward_sent and members[0] is first
            course.is_backward_sent = course.is_backward_sent and members[-1] is last
        self.is_held = self.is_quiet = False
        self._progress_s = self._loop.time()
        self._depart()

    def lose(self, member: TrainMember, error: PetalSwarmError) -> None:
        """A hop is gone."""
        if member.error is not None:
            return
        member.lose(error)
        if self.error is None and member in self.members:
            self._wake()

    def cut(self, member: TrainMember) -> None:
        """A hop is cut off from the one before it."""
        if member.error is None and not member.is_cut:
            member.is_cut = True
            self._wake()

    # -- inside ----------------------------------------------------------------------------------

    def _check(self) -> None:
        if self.error is not None:
            raise self.error

    def _depart(self) -> None:
        """Send what has not been sent to the present first and last hop."""
        if self.is_held or self.error is not None:
            return
        for course in self.courses.values():
            if not course.is_forward_sent:
                course.is_forward_sent = True
                self.members[0].send(course.forward)
            if course.backward is not None and not course.is_backward_sent:
                course.is_backward_sent = True
                self.members[-1].send(course.backward)
        if self._watch is None and self.is_waiting:
            self._progress_s = self._loop.time()
            self._watch = self._loop.call_later(self.quiet_s, self._look)
        if self.is_broken:
            self._wake()

    def _tell_finished(self) -> None:
        numbers, self._finished = tuple(self._finished), []
        for member in self.members:
            member.send(Finish(numbers))
        self._leave_if_done()

    def _leave_if_done(self) -> None:
        """A server that wants to leave may, once no pass needs it; others go along another lane."""
        if self.is_leaving and not self.courses and not self.taken and self.error is None:
            self.fail(StreamClosedError("a server of the lane leaves"))
            for member in self.members:
                member.channel.abort()

    def _wake(self) -> None:
        """There is something to repair, or to find out."""
        if self.error is not None or self._keeping is not None:
            return
        if not self.courses:
            gone = next((member.error for member in self.members if member.error is not None), None)
            self.fail(gone or HopLostError("two hops lost each other"))
            return
        self._keeping = self._loop.create_task(self._keep())

    async def _keep(self) -> None:
        try:
            while self.error is None and (self.is_broken or self.is_quiet):
                await self._keeper(self)
        except PetalSwarmError as error:
            self.fail(error)
        except Exception as error:
            logger.exception("a lane could not be repaired")
            self.fail(HopLostError(f"the lane could not be repaired: {type(error).__name__}"))
        finally:
            self._keeping = None

    def _look(self) -> None:
        """A timer of its own while answers are due, not one for each pass."""
        self._watch = None
        if not self.is_waiting or self.error is not None:
            return
        left_s = self._progress_s + self.quiet_s - self._loop.time()
        if left_s <= 0:
            if self._keeping is None:
                self.is_quiet = True
                self._wake()
            left_s = MAX_QUIET_S
        self._watch = self._loop.call_later(left_s, self._look)

    def _listen(self, member: TrainMember) -> None:
        """Take what one hop says: answers, or why it ended."""

        def on_message(message: Message) -> None:
            self._hear(member, message)

        def on_end(error: Exception | None) -> None:
            if isinstance(error, RemoteError):
                self._refused(member, error)
                return
            reason = f": {error}" if error else ""
            self.lose(member, HopLostError(f"peer {member.peer_id} is gone{reason}", peer_id=member.peer_id))

        member.channel.subscribe(on_message, on_end)

    def _hear(self, member: TrainMember, message: Message) -> None:
        if isinstance(message, (Forwarded, Backwarded, Gradients)):
            self._take(member, message)
        elif isinstance(message, Failed):
            self._hear_failed(member, message)
        elif isinstance(message, (Rerouted, PassStates)):
            member.answered(message)
        elif isinstance(message, Leaving):
            self.is_leaving = True
            self._leave_if_done()
        elif isinstance(message, Lost):
            self._hear_lost(member, message)
        elif isinstance(message, Error):
            raise remote_error(
                message.code, message.message, peer_id=member.peer_id, retry_after_s=message.retry_after_s
            )
        else:
            raise RemoteProtocolError(f"peer {member.peer_id} sent {message.type!r}")

    def _take(self, member: TrainMember, message: Forwarded | Backwarded | Gradients) -> None:
        course = self.courses.get(message.number)
        if course is None or member not in self.members:
            return
        now, taken_up_s = self._loop.time(), max(course.sent_s, self._progress_s)
        if isinstance(message, Forwarded):
            if member is not self.members[-1]:
                raise RemoteProtocolError(f"peer {member.peer_id} answered, and is not the last hop")
            done = course.take_output(message, member.peer_id)
        elif isinstance(message, Gradients):
            done = course.take_numbers(message, member.hop.span, member.peer_id)
        else:
            if member is not self.members[0]:
                raise RemoteProtocolError(f"peer {member.peer_id} answered, and is not the first hop")
            done = course.take_rows(message, member.peer_id)
        self._progress_s = now
        if done:
            self._measure((now - taken_up_s) / course.tokens, backward=course.backward is not None)

    def _measure(self, token_s: float, *, backward: bool) -> None:
        old = self.backward_s if backward else self.forward_s
        new = old + (token_s - old) * (_SMOOTHING if old else 1.0)
        if backward:
            self.backward_s = new
        else:
            self.forward_s = new

    def _hear_failed(self, member: TrainMember, failed: Failed) -> None:
        course = self.courses.get(failed.number)
        if course is None or member not in self.members:
            return
        error = remote_error(
            failed.code, failed.message, peer_id=member.peer_id, retry_after_s=failed.retry_after_s
        )
        if isinstance(error, AdapterMissingError) and course.adapter is not None:
            member.adapters.discard(course.adapter.id)
        if isinstance(error, _OF_ONE_PASS):
            course.fail(error)
        elif isinstance(error, _BLAMING):
            self._blame_neighbour(member, course, error, backward=failed.backward)
        else:
            self.lose(member, error)

    def _blame_neighbour(
        self, member: TrainMember, course: Course, error: RemoteError, *, backward: bool
    ) -> None:
        """What came to the hop is wrong: the fault of whoever sent it, maybe of this client."""
        index = self.members.index(member) + (1 if backward else -1)
        if not 0 <= index < len(self.members):
            course.fail(error)
            return
        sender = self.members[index]
        lost = HopLostError(f"what {sender.peer_id} sent on was refused: {error}", peer_id=sender.peer_id)
        course.fail(lost)  # it is spoiled behind that hop: it goes again, under another number
        self.lose(sender, lost)

    def _hear_lost(self, member: TrainMember, lost: Lost) -> None:
        if not lost.upstream and member.refused(lost):
            return
        if member not in self.members:
            return
        index = self.members.index(member) + (not lost.upstream)
        if index < len(self.members) and self.members[index].link_epoch == lost.epoch:
            self.cut(self.members[index])

    def _refused(self, member: TrainMember, error: RemoteError) -> None:
        """A hop ended the lane with an error."""
        if isinstance(error, _BLAMING) and member in self.members:
            index = self.members.index(member)
            if index == 0:
                member.lose(error)
                self.fail(error)
                return
            before = self.members[index - 1]
            reason = f"what {before.peer_id} sent on was refused: {error}"
            self.lose(before, HopLostError(reason, peer_id=before.peer_id))
        self.lose(member, error)
