"""Watches the swarm for a server, and moves it to other blocks when they need it more.

What to do is decided by `routing.balance`; here is only when to ask. A server that is to move says so
and waits until everybody knows, looks again, asks those to whom it leaves its blocks whether they are
alive, and only then goes, or takes it back. Reasons: `docs/routing.md`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Protocol

from petal_swarm.errors import PetalSwarmError
from petal_swarm.routing.balance import Check, check_move, plan_moves
from petal_swarm.routing.blocks import missing_blocks
from petal_swarm.span import Span
from petal_swarm.wire.announcement import Announcement

logger = logging.getLogger(__name__)

#: How often one looks whether those who must give way have done so.
MAX_CHECKS = 3


class Movable(Protocol):
    """A server as the rebalancer sees it: a real one, or one of a simulation."""

    def announcement(self) -> Announcement:
        """What it says of itself now, `movable` only when it does not have to stay."""
        ...

    async def others(self) -> list[Announcement]:
        """Everybody else who hosts blocks of its model.

        Raises:
            PetalSwarmError: the directory does not answer.
        """
        ...

    async def alive(self, peers: Sequence[Announcement]) -> Collection[str]:
        """The ids of those that answer now."""
        ...

    async def intend(self, target: Span | None) -> bool:
        """Announce that it means to move to `target`, or no longer to; whether anybody heard it."""
        ...

    async def move(self, target: Span) -> None:
        """Leave its blocks, then host `target`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds between one thing and the next.

    `look_s` grows by `look_s_per_server`, for a view of a large swarm costs much to fetch, and each pause is
    drawn from half to one and a half of it. `notice_s`: from the intention to the move. It must be more than
    an announcement needs to be seen everywhere: of two servers that may not both go, the one that declared
    itself later has then seen the other. `late_s`: what was looked up is too old to go by after that.
    `stay_s`: from one move to the next, except where a block has no server at all. `patience_s`:
    who should have moved for so long is not reckoned with for `doubt_s`.
    """

    look_s: float = 5.0
    look_s_per_server: float = 0.02
    max_look_s: float = 30.0
    notice_s: float = 6.0
    late_s: float = 4.0
    stay_s: float = 300.0
    patience_s: float = 45.0
    doubt_s: float = 600.0


class Rebalancer:
    """The task of one server; `run` it, and cancel it. `now` and `sleep` are of one clock, in seconds."""

    def __init__(
        self,
        server: Movable,
        num_blocks: int,
        *,
        rng: Random,
        now: Callable[[], float],
        timing: Timing | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._server = server
        self._num_blocks = num_blocks
        self._rng = rng
        self._now = now
        self._timing = timing or Timing()
        self._sleep = sleep
        self._awaited: dict[str, float] = {}
        self._doubted_until: dict[str, float] = {}
        self._swarm_size = 1

    async def run(self) -> None:
        """Look again and again. Ends only with an error of a move that left the server without blocks."""
        while True:
            await self._sleep(self._pause_s())
            try:
                target = await self._look()
                if target is None or not await self._may_go(target):
                    continue
            except (PetalSwarmError, TimeoutError) as error:
                logger.info("cannot see whether the swarm needs this server elsewhere: %s", error)
                continue
            await self._server.move(target)

    def _pause_s(self) -> float:
        timing = self._timing
        mean_s = min(timing.look_s + timing.look_s_per_server * self._swarm_size, timing.max_look_s)
        return mean_s * self._rng.uniform(0.5, 1.5)

    async def _look(self) -> Span | None:
        """Where this server should go, if anywhere."""
        view = await self._view()
        self._swarm_size = len(view)
        me = view[-1]
        if me.state != "serving":
            return None
        if not me.movable:  # it has moved a moment ago: only for blocks that nobody serves, or will
            if not missing_blocks(_arrived(view), self._num_blocks):
                return None
            view[-1] = replace(me, movable=True)
        now = self._now()
        doubted = [peer_id for peer_id, until in self._doubted_until.items() if until > now]
        # A plan for a large swarm takes a while, and others' steps must not wait for it.
        moves = await asyncio.to_thread(plan_moves, view, self._num_blocks, unmovable=doubted)
        targets = {move.peer_id: move.target for move in moves}
        self._await(targets, now)
        return targets.get(me.peer_id)

    def _await(self, planned: Collection[str], now: float) -> None:
        """Keep account of who should move: nobody waits long for those who do not."""
        self._awaited = {peer_id: self._awaited.get(peer_id, now) for peer_id in planned}
        for peer_id, since in self._awaited.items():
            if now - since > self._timing.patience_s:
                self._doubted_until[peer_id] = now + self._timing.doubt_s

    async def _may_go(self, target: Span) -> bool:
        """Announce the intention, wait until it is known and look again; take it back if all is not well."""
        source = self._server.announcement().span
        refusal = "nobody heard of it"
        try:
            if await self._server.intend(target):
                refusal = await self._refusal(target)
        except (PetalSwarmError, TimeoutError):
            await self._server.intend(None)
            raise
        if refusal:
            logger.info("stays at blocks %s and does not move to %s: %s", source, target, refusal)
            await self._server.intend(None)
            return False
        logger.info("moves from blocks %s to %s, which hold the swarm up", source, target)
        return True

    async def _refusal(self, target: Span) -> str:
        """Why not to move, or nothing; after the time that it takes until everybody knows of it."""
        for _ in range(MAX_CHECKS):
            await self._sleep(self._timing.notice_s)
            started = self._now()
            view = await self._view()
            check = await asyncio.to_thread(check_move, view, view[-1].peer_id, target, self._num_blocks)
            if not check.again:
                break
        if check.refusal:
            return check.refusal
        if await self._abandoned(check, view):
            return "those who would go on serving its blocks do not all answer"
        if self._now() - started > self._timing.late_s:
            return "it took too long to look"
        return ""

    async def _abandoned(self, check: Check, view: Sequence[Announcement]) -> bool:
        """Whether of some block no witness lives."""
        named = {peer_id for witnesses in check.witnesses for peer_id in witnesses}
        alive = await self._server.alive([other for other in view if other.peer_id in named])
        return any(not set(witnesses) & set(alive) for witnesses in check.witnesses)

    async def _view(self) -> list[Announcement]:
        """The swarm, with this server last, as it is now."""
        me = self._server.announcement()
        async with asyncio.timeout(self._timing.late_s):
            others = await self._server.others()
        return [*(other for other in others if other.peer_id != me.peer_id), me]


def _arrived(view: Sequence[Announcement]) -> list[Announcement]:
    """As it will be when all have arrived."""
    return [replace(a, span=a.moving_to or a.span, state="serving") for a in view if a.state != "left"]
