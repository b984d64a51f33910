"""Where a session may start behind a prefix that others have left: steps wait here for the question's answer.

The first hop finds the prefixes of the inputs it got in its own KV cache, and asks the next hop for the
same ones, which asks the hop behind it. What all of them hold need not be computed: each hop attaches
its pages to the sequence, and the step goes on without those rows. Absolute positions do the rest: what
only some hops hold is truncated by the position at which the step then starts.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from petal_swarm.engine.compute import Compute
from petal_swarm.errors import BadMessageError, HopLostError, PetalSwarmError
from petal_swarm.net.channel import Channel
from petal_swarm.span import Slice
from petal_swarm.wire.messages.parts import TensorMeta
from petal_swarm.wire.messages.prefixes import PAGE_TOKENS, FindPrefix, PageKeys, PrefixFound
from petal_swarm.wire.messages.steps import Step

if TYPE_CHECKING:
    from petal_swarm.server.hosted import HostedSession

logger = logging.getLogger(__name__)

#: For longer, a silent hop is not worth waiting for: the prefix is computed instead.
ANSWER_TIMEOUT_S = 5.0
#: Who asks waits for the answer before it asks again, and asks no more if none comes.
MAX_QUESTIONS = 4


class PrefixSteps:
    """Holds steps of one session, in order, while what they share with others is being found out."""

    def __init__(self, owner: HostedSession, compute: Compute) -> None:
        self._owner = owner
        self._compute = compute
        self._first = owner.opening.upstream is None
        self._epoch = owner.opening.epoch  # of the first link, the only one that is asked
        self._session = owner.opening.session
        self._next: Channel | None = None
        self._held: deque[tuple[Step | FindPrefix, float]] = deque()
        self._questions = 0
        self._source: Channel | None = None
        self._task: asyncio.Task[None] | None = None
        self._asked: tuple[int, asyncio.Future[tuple[int, ...]]] | None = None
        self._next_is_silent = False
        self._closed = False
        #: How far each sequence has been found in the cache without a gap.
        self._known: dict[int, int] = {}

    def attach_next(self, channel: Channel) -> None:
        self._next = channel

    def give_up_next(self) -> None:
        """The next hop is lost, another one, or holds more of this session than this hop: asked for a prefix,
        it would forget the rest. So nothing is shared from here on.
        """
        self._next_is_silent = True
        if self._asked is not None and not self._asked[1].done():
            self._asked[1].set_result(())

    def takes(self, step: Step) -> bool:
        """Whether `step` must wait here: behind others, or since it may start with a known prefix."""
        if self._task is not None:
            return True
        if not self._first or step.tensor.shape[0] < PAGE_TOKENS:
            return False
        return self._may_skip(step)

    def hold(self, step: Step, arrived: float) -> None:
        self._enqueue(step, arrived)

    def ask(self, question: FindPrefix, source: Channel) -> None:
        """The hop before this one wants to know; it is answered when earlier steps are through.

        Raises:
            BadMessageError: more questions than one who waits for the answers would ask.
        """
        if self._first or self._questions >= MAX_QUESTIONS:
            raise BadMessageError("a question about prefixes that nobody waits for")
        self._questions += 1
        self._source = source
        self._enqueue(question, 0.0)

    def answered(self, answer: PrefixFound) -> None:
        """The next hop's answer; one that comes too late is ignored."""
        if self._asked is not None and self._asked[0] == answer.step and not self._asked[1].done():
            self._asked[1].set_result(answer.pages)

    def close(self) -> None:
        self._closed = True
        self._held.clear()
        if self._task is not None:
            self._task.cancel()

    def _enqueue(self, item: Step | FindPrefix, arrived: float) -> None:
        if self._closed:
            return
        self._held.append((item, arrived))
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._work())

    async def _work(self) -> None:
        try:
            while self._held:
                item, arrived = self._held.popleft()
                if isinstance(item, FindPrefix):
                    self._questions -= 1
                    await self._answer(item)
                else:
                    await self._shorten(item, arrived)
        except Exception as error:
            if not isinstance(error, PetalSwarmError):
                logger.exception("a prefix could not be looked up")
            self._owner.fail(error)
        finally:
            self._task = None

    def _may_skip(self, step: Step) -> bool:
        """Prompts only: what starts at position 0, or goes on where everything so far was known."""
        if step.forks is not None:
            self._known.clear()
        if step.rows == "all":
            return False
        return any(
            piece.length >= PAGE_TOKENS and piece.position == self._known.get(piece.sequence, 0)
            for piece in step.slices
        )

    async def _shorten(self, step: Step, arrived: float) -> None:
        """Hand over a step without the rows that every hop knows already."""
        if not (self._first and step.forks is None and self._may_skip(step)):
            self._owner.hand_over(step, arrived)
            return
        await self._owner.settled()
        engine, request = self._compute.engine, self._owner.request_of(step)

        def find() -> list[PageKeys]:
            return engine.attach(self._session, engine.find_prefixes(request, spare_last=step.rows != "none"))

        found = await asyncio.wrap_future(self._compute.call(find))
        pages = await self._everywhere(step.step, found)
        self._remember(step.slices, pages)
        before = step.tensor
        if not drop_rows(step, [count * PAGE_TOKENS for count in pages]):
            self._owner.nothing_left(step)
            return
        self._owner.shrunk(before.shape[0] - step.tensor.shape[0], before.nbytes - step.tensor.nbytes)
        self._owner.hand_over(step, arrived, time.perf_counter() - arrived)

    async def _answer(self, question: FindPrefix) -> None:
        await self._owner.settled()
        engine, session = self._compute.engine, self._session

        def find() -> list[PageKeys]:
            return engine.attach(session, engine.scoped_keys(session, question.keys))

        found = await asyncio.wrap_future(self._compute.call(find))
        pages = await self._everywhere(question.step, found)
        assert self._source is not None
        self._source.send(PrefixFound(question.step, tuple(pages)))

    async def _everywhere(self, step: int, found: Sequence[PageKeys]) -> list[int]:
        """How many of these pages all hops from here on hold, for each entry."""
        pages = [len(entry.keys) for entry in found]
        if self._next_is_silent:
            return [0] * len(pages)
        if self._next is None or not any(pages):
            return pages
        asked = [index for index, count in enumerate(pages) if count]
        answer: asyncio.Future[tuple[int, ...]] = asyncio.get_running_loop().create_future()
        self._asked = (step, answer)
        self._next.send(FindPrefix(step, self._epoch, tuple(found[index] for index in asked)))
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                behind = await answer
        except TimeoutError:
            # Its answer may still come, and more questions would only queue up there.
            self._next_is_silent = True
            behind = ()
        finally:
            self._asked = None
        if self._next_is_silent:
            return [0] * len(pages)
        if len(behind) != len(asked):
            raise HopLostError(f"the next hop {self._next.peer_id} gave an answer that fits no question")
        for index, count in zip(asked, behind, strict=True):
            pages[index] = min(pages[index], count)
        return pages

    def _remember(self, slices: Sequence[Slice], pages: Sequence[int]) -> None:
        for piece, count in zip(slices, pages, strict=True):
            if count * PAGE_TOKENS == piece.length:
                self._known[piece.sequence] = piece.end
            else:
                self._known.pop(piece.sequence, None)


def drop_rows(step: Step, counts: Sequence[int]) -> bool:
    """Let each slice of `step` start `counts[i]` tokens later; False, and no change, if no row is left."""
    if not any(counts):
        return True
    columns = step.tensor.shape[1]
    row_bytes = step.tensor.nbytes // step.tensor.shape[0]
    payload, row = memoryview(step.payload), 0
    slices, parts, rows = [], [], 0
    for piece, count in zip(step.slices, counts, strict=True):
        if count < piece.length:
            slices.append(Slice(piece.sequence, piece.position + count, piece.length - count))
            parts.append(payload[(row + count) * row_bytes : (row + piece.length) * row_bytes])
            rows += piece.length - count
        row += piece.length
    if not slices:
        return False
    step.slices = tuple(slices)
    step.payload = parts[0] if len(parts) == 1 else b"".join(parts)
    step.tensor = TensorMeta(step.tensor.dtype, (rows, columns), step.tensor.codec)
    return True
