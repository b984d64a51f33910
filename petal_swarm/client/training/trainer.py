"""Forward and backward of whole batches: cut into passes, along all lanes; what fails is done again."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from petal_swarm.client.training.adapters import TrainedAdapter
from petal_swarm.client.training.courses import Gradient, Pass
from petal_swarm.client.training.lane import Lane
from petal_swarm.client.training.microbatches import choose_passes, cut_batch
from petal_swarm.client.training.openings import LaneOpenings
from petal_swarm.client.training.pool import LanePool, TooManyTokensError
from petal_swarm.errors import (
    AdapterFullError,
    AdapterMissingError,
    BusyError,
    HopLostError,
    IdleError,
    NetworkError,
    PassGoneError,
    PetalSwarmError,
    RemoteError,
    RemoteProtocolError,
    TooSlowError,
    UnknownSessionError,
)
from petal_swarm.span import Span
from petal_swarm.wire.frames import MAX_PAYLOAD_BYTES
from petal_swarm.wire.messages.parts import MAX_SEQUENCES

logger = logging.getLogger(__name__)
T = TypeVar("T")

#: A pass that fails so often fails for good.
PASS_ATTEMPTS = 5
RETRY_S = 0.2
#: Whatever a hop says of when to try again.
MAX_RETRY_S = 30.0
#: Others take the place of a hop, if there are any, where so many attempts at one pass have failed in a row.
PATIENCE = 2
#: Lanes over so many different spans of blocks are kept open.
MAX_POOLS = 8
#: Failures of one pass that say nothing of the next attempt, there or elsewhere.
_AGAIN = (
    PassGoneError,
    AdapterMissingError,
    AdapterFullError,
    BusyError,
    HopLostError,
    IdleError,
    TooSlowError,
    UnknownSessionError,
    NetworkError,
    RemoteProtocolError,
)


class Trainer:
    """All training of one client; lives in its event loop. Nothing here is differentiable: see `function`."""

    def __init__(self, openings: LaneOpenings) -> None:
        self._openings = openings
        self._pools: dict[Span, LanePool] = {}
        #: Passes whose backward nobody can ask for any more; others than the loop's thread add to it.
        self.abandoned: deque[Pass] = deque()

    async def forward(
        self,
        rows: Tensor,
        lengths: Sequence[int],
        blocks: Span,
        adapter: TrainedAdapter | None,
        *,
        keep: bool,
    ) -> tuple[Tensor, list[Pass]]:
        """What comes out of the blocks for `rows [tokens, hidden]`, sequences of `lengths`; float32.

        The rows are on the CPU, and nobody changes them. With `keep` the passes are for `backward`.

        Raises:
            ConfigError: a sequence is longer than any server takes.
            MissingBlocksError: nobody trains some of the blocks.
            PetalSwarmError: the swarm failed.
        """
        self._drop_abandoned()
        pool = await self._pool(blocks)
        lanes = await pool.prepare(len(lengths), max(lengths))
        most = min(lane.max_pass_tokens for lane in lanes)
        cut = cut_batch(
            lengths,
            max_tokens=max(1, min(most, MAX_PAYLOAD_BYTES // (rows.shape[1] * 4))),
            max_sequences=MAX_SEQUENCES,
            passes=sum(choose_passes(rows.shape[0] // len(lanes), lane.hops) for lane in lanes),
        )
        passes = [Pass(rows[each.start : each.stop], each.lengths, blocks, adapter) for each in cut]
        made = list(passes)
        try:
            found = await _all([self._forward(pool, each, made, keep=keep) for each in passes])
        except BaseException:
            for each in made:  # nobody will ask for their backward
                each.drop()
            raise
        done = [part for parts in found for part in parts]
        return torch.cat([output.float() for _, output in done]), [each for each, _ in done]

    async def backward(self, passes: Sequence[Pass], gradient: Tensor, *, inputs: bool) -> Gradient:
        """The gradients that follow from `gradient [tokens, hidden]` of what came out of `passes`.

        Those of the rows are None without `inputs`, those of the numbers without an adapter. It may be called
        again: the forward is then done again.

        Raises:
            PetalSwarmError: the swarm failed.
        """
        self._drop_abandoned()
        pool = await self._pool(passes[0].blocks)
        numbers = _OrderedSum()

        async def part_of(index: int, each: Pass, part: Tensor) -> Tensor | None:
            found = await self._backward(pool, each, part, inputs=inputs)
            numbers.add(index, found.numbers)
            return found.rows

        work, stop = [], gradient.shape[0]
        # What was computed last is what servers have kept, if they could not keep it all.
        for index, each in enumerate(reversed(passes)):
            work.append(part_of(index, each, gradient[stop - each.tokens : stop]))
            stop -= each.tokens
        rows = [part.float() for part in reversed(await _all(work)) if part is not None]
        return Gradient(torch.cat(rows) if rows else None, numbers.total)

    async def close(self) -> None:
        """End all lanes. Idempotent."""
        pools, self._pools = list(self._pools.values()), {}
        await asyncio.gather(*(pool.close() for pool in pools))

    # -- one pass --------------------------------------------------------------------------------

    async def _forward(
        self, pool: LanePool, each: Pass, made: list[Pass], *, keep: bool
    ) -> list[tuple[Pass, Tensor]]:
        """What comes out; of several passes, added to `made`, if no server is left that takes it as one."""
        try:
            return [(each, await self._insist(pool, lambda: self._forward_once(pool, each, keep=keep)))]
        except TooManyTokensError:
            halves = each.halves()
            if not halves:
                raise
        made += halves
        return [part for half in halves for part in await self._forward(pool, half, made, keep=keep)]

    async def _forward_once(self, pool: LanePool, each: Pass, *, keep: bool) -> Tensor:
        async with pool.lane(each.tokens) as lane:
            if each.adapter is not None:
                await lane.ensure(each.adapter)
            return await lane.forward(each, keep=keep and _has_room(lane))

    async def _backward(self, pool: LanePool, each: Pass, gradient: Tensor, *, inputs: bool) -> Gradient:
        try:
            return await self._insist(pool, lambda: self._backward_once(pool, each, gradient, inputs=inputs))
        except TooManyTokensError:
            halves = each.halves()
            if not halves:
                raise
        each.drop()
        parts = zip(halves, torch.split(gradient, [half.tokens for half in halves]), strict=True)
        first, second = [await self._backward(pool, half, part, inputs=inputs) for half, part in parts]
        return first.joined(second)

    async def _backward_once(self, pool: LanePool, each: Pass, gradient: Tensor, *, inputs: bool) -> Gradient:
        lane = each.lane
        if lane is not None and lane.error is None:
            async with pool.place(lane):
                try:
                    return await lane.backward(each, gradient, inputs=inputs)
                except _AGAIN as error:
                    logger.info("a pass begins again: %s", error)
        async with pool.lane(each.tokens) as lane:
            each.drop()
            if each.adapter is not None:
                await lane.ensure(each.adapter)
            await lane.forward(each, keep=True)
            return await lane.backward(each, gradient, inputs=inputs)

    async def _insist(self, pool: LanePool, attempt: Callable[[], Awaitable[T]]) -> T:
        """Try a few times, since another lane or another moment may do.

        Raises:
            PetalSwarmError: what the last attempt failed with.
        """
        failures: Counter[str] = Counter()
        for number in range(1, PASS_ATTEMPTS):
            try:
                return await attempt()
            except PetalSwarmError as error:
                if not _is_worth_another(error):
                    raise
                logger.info("a pass failed, attempt %d: %s", number, error)
                wait_s = min(getattr(error, "retry_after_s", None) or RETRY_S * number, MAX_RETRY_S)
                if isinstance(error, RemoteError) and error.peer_id is not None:
                    failures[error.peer_id] += 1
                    if failures[error.peer_id] == PATIENCE:
                        await pool.replace(error.peer_id, error)
                        wait_s = RETRY_S
                await asyncio.sleep(wait_s)
        return await attempt()

    async def _pool(self, blocks: Span) -> LanePool:
        pool = self._pools.pop(blocks, None) or LanePool(self._openings, blocks)
        self._pools[blocks] = pool
        idle = [span for span, each in self._pools.items() if each.is_idle and each is not pool]
        for span in idle[: max(0, len(self._pools) - MAX_POOLS)]:
            await self._pools.pop(span).close()
        return pool

    def _drop_abandoned(self) -> None:
        while self.abandoned:
            self.abandoned.popleft().drop()


class _OrderedSum:
    """Adds up what comes in any order as if it had come in its own, and holds no more than it must."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self._next = 0
        self._early: dict[int, Tensor | None] = {}

    def add(self, index: int, numbers: Tensor | None) -> None:
        self._early[index] = numbers
        while self._next in self._early:
            numbers = self._early.pop(self._next)
            self._next += 1
            if numbers is not None:
                self.total = numbers if self.total is None else self.total.add_(numbers)


def _has_room(lane: Lane) -> bool:
    """Whether a pass may stay at the hops until its backward, and others still go through."""
    return len(lane.courses) < lane.max_passes - lane.window


def _is_worth_another(error: PetalSwarmError) -> bool:
    return isinstance(error, _AGAIN) or type(error) is RemoteError


async def _all(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results in order; with the first failure the others are cancelled."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
