"""The lanes over one span of blocks: disjoint routes, and who takes the next pass."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Sequence

from petal_swarm.client.dialling import OpenFailedError
from petal_swarm.client.training.lane import Lane
from petal_swarm.client.training.mender import Mender
from petal_swarm.client.training.openings import LaneOpenings
from petal_swarm.errors import ConfigError, HopLostError, MissingBlocksError, PetalSwarmError
from petal_swarm.span import Span

logger = logging.getLogger(__name__)

#: After no further route was found, the next look is so many seconds later.
LOOK_AGAIN_S = 30.0
RETRY_S = 0.5


class TooManyTokensError(ConfigError):
    """No lane takes so large a pass; several smaller ones may go through."""


class LanePool:
    """Opens lanes as they are needed, and closes those that are done. Lives in the event loop."""

    def __init__(self, openings: LaneOpenings, blocks: Span) -> None:
        self._openings = openings
        self._blocks = blocks
        self._lanes: list[Lane] = []
        self._mender = Mender(openings)
        self._opening = asyncio.Lock()
        self._freed = asyncio.Event()
        self._look_s = 0.0
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def lanes(self) -> list[Lane]:
        """Those that take passes."""
        return [lane for lane in self._lanes if lane.error is None and not lane.is_leaving]

    async def prepare(self, passes: int, tokens: int) -> list[Lane]:
        """Lanes that take passes of so many tokens: one at least, more where the swarm has further routes.

        Raises:
            TooManyTokensError: no servers take so many.
            MissingBlocksError: nobody trains some of the blocks.
            PetalSwarmError: what the last attempt to open a route failed with.
        """
        async with self._opening:
            self._tidy()
            if not self._wide(tokens):
                await self._add(await self._open(frozenset(), tokens), tokens)
                self._look_s = 0.0
            now = asyncio.get_running_loop().time()
            wanted = min(passes, self._openings.config.training_lanes)
            while len(self.lanes) < wanted and now >= self._look_s:
                taken = frozenset(m.peer_id for lane in self._lanes for m in lane.members)
                try:
                    await self._add(await self._open(taken, tokens), tokens)
                except PetalSwarmError as error:
                    logger.debug("no further route for training: %s", error)
                    self._look_s = now + LOOK_AGAIN_S
            return self._wide(tokens)

    @contextlib.asynccontextmanager
    async def lane(self, tokens: int) -> AsyncIterator[Lane]:
        """The lane that will probably be done first with a pass of so many tokens, once it has a place.

        Raises:
            TooManyTokensError, MissingBlocksError, PetalSwarmError: as `prepare`.
        """
        while True:
            able = self._wide(tokens) or await self.prepare(1, tokens)
            best = _soonest(able)
            if best.taken < best.window:
                break
            self._freed.clear()
            await self._freed.wait()
        async with self.place(best):
            yield best

    @contextlib.asynccontextmanager
    async def place(self, lane: Lane) -> AsyncIterator[None]:
        """Wait for a place in this very lane, and have it inside the `with` block."""
        while lane.taken >= lane.window and lane.error is None:
            self._freed.clear()
            await self._freed.wait()
        lane.taken += 1
        try:
            yield
        finally:
            lane.taken -= 1
            self._freed.set()

    async def replace(self, peer_id: str, error: PetalSwarmError) -> None:
        """Do without a server that fails again and again, if others can take its place."""
        lost = HopLostError(f"peer {peer_id} fails again and again: {error}", peer_id=peer_id)
        for lane in list(self._lanes):
            for member in list(lane.members):
                if member.peer_id == peer_id and await self._mender.can_do_without(lane, [member]):
                    self._openings.view.blame(peer_id, lost)
                    lane.lose(member, lost)

    @property
    def is_idle(self) -> bool:
        """Whether no pass is under way, or waits for its backward."""
        return not any(lane.courses or lane.taken for lane in self._lanes)

    async def close(self) -> None:
        """End all lanes."""
        lanes, self._lanes = self._lanes, []
        await asyncio.gather(*(lane.close() for lane in lanes), *self._closing)

    def _wide(self, tokens: int) -> list[Lane]:
        return [lane for lane in self.lanes if lane.max_pass_tokens >= tokens]

    async def _add(self, lane: Lane, tokens: int) -> None:
        if lane.max_pass_tokens < tokens:
            await lane.close()
            raise TooManyTokensError(
                f"a sequence of {tokens} tokens is longer than the {lane.max_pass_tokens} that these servers"
                " take at once in training; cut it, or start servers with a larger --max-batch-tokens"
            )
        self._lanes.append(lane)

    def _tidy(self) -> None:
        """Leave lanes that have failed, and those of servers that leave once their passes are done."""
        kept: list[Lane] = []
        for lane in self._lanes:
            if lane.error is None and not (lane.is_leaving and not lane.courses):
                kept.append(lane)
                continue
            closing = asyncio.ensure_future(lane.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
        self._lanes = kept

    async def _open(self, taken: frozenset[str], tokens: int) -> Lane:
        """A lane along the fastest route without those peers, around servers that fail or refuse.

        Where no other lane is, and servers cannot be reached, it tries again for `wait_for_blocks_s`.
        """
        config, loop = self._openings.config, asyncio.get_running_loop()
        deadline = loop.time() + (0.0 if taken else config.wait_for_blocks_s)
        failed: set[str] = set()
        last: OpenFailedError | None = None
        attempts = 0
        while attempts < config.open_attempts or (last and last.is_unreachable and loop.time() < deadline):
            attempts += 1
            try:
                route = await self._openings.find_route(
                    self._blocks, avoid=taken | failed, pass_tokens=tokens
                )
                run, members = await self._openings.open_route(route.hops)
            except MissingBlocksError:
                if last is None:
                    raise
                if not last.is_unreachable or loop.time() >= deadline:
                    break
                failed.clear()  # it may have been the connection; and others may come
                await asyncio.sleep(RETRY_S)
            except OpenFailedError as error:
                logger.info("training without %s: %s", error.peer_id, error)
                last = error
                failed.add(error.peer_id)
                self._openings.view.blame(error.peer_id, error.error)
            else:
                logger.info("training along %s", route)
                return Lane(
                    run, self._blocks, members, keeper=self._mender.keep, upload=self._openings.upload
                )
        assert last is not None
        raise last.error from None


def _soonest(lanes: Sequence[Lane]) -> Lane:
    """The lane where one more pass is done first; one that is not measured yet counts as the mean."""
    known = [lane.forward_s for lane in lanes if lane.forward_s]
    usual_s = sum(known) / len(known) if known else 1.0
    return min(lanes, key=lambda lane: (lane.taken + 1) * (lane.forward_s or usual_s))
