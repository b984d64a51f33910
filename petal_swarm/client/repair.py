"""Repairing a ring: others take the place of hops that are gone, silent or leaving.

Three ways, the first that works: a link that broke between two living hops is made again; a part of the
route is replaced, and the hop before it (or the client) replays what it has sent; the whole session
begins again along another route, from the client's own log.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import Counter
from collections.abc import Awaitable, Sequence
from itertools import pairwise

from petal_swarm.client.dialling import OpenFailedError
from petal_swarm.client.members import LinkFailedError, Member
from petal_swarm.client.openings import Openings, named, neighbour_of, route_of
from petal_swarm.client.relief import Relief
from petal_swarm.client.replacement import plan_replacement
from petal_swarm.client.ring import Ring
from petal_swarm.client.silence import Silence
from petal_swarm.errors import (
    BusyError,
    CacheFullError,
    DeadlineError,
    HopLostError,
    IdleError,
    MissingBlocksError,
    PetalSwarmError,
)
from petal_swarm.routing.route import Hop, Route
from petal_swarm.wire.messages.opening import SESSION_ID_BYTES
from petal_swarm.wire.messages.repair import Reroute

logger = logging.getLogger(__name__)

#: Several streams tell of one death; whoever heard the first waits for the others.
GATHER_S = 0.02
#: Two living hops that lost each other have so long to connect again, if others could take their place.
RELINK_S = 1.5
#: A link that is lost more often is not made again.
MAX_RELINKS = 3
#: After so many attempts to replace a part of the route, the whole is replaced.
MEND_ATTEMPTS = 3
#: Pauses between attempts grow from the one to the other.
RETRY_S = 0.2
MAX_RETRY_S = 1.0


class Repairer:
    """Keeps one ring alive; `keep` is the ring's keeper."""

    def __init__(self, openings: Openings) -> None:
        self._openings = openings
        self._config = openings.config
        self._silence = Silence(openings)
        self._relief = Relief(openings)
        self._relinks: Counter[tuple[str, str]] = Counter()

    async def keep(self, ring: Ring) -> None:
        """Look after whatever is the matter; returns when it is done, or when something else has come up."""
        if ring.is_broken:
            await self._repair(ring)
        elif ring.is_quiet:
            await self._interrupted_by_change(ring, self._silence.look_into(ring))
        else:
            await self._interrupted_by_change(ring, self._relief.relieve(ring))

    async def _interrupted_by_change(self, ring: Ring, work: Awaitable[None]) -> None:
        working = asyncio.ensure_future(work)
        changed = asyncio.ensure_future(ring.changed())
        try:
            await asyncio.wait({working, changed}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            working.cancel()
            changed.cancel()
            outcome, _ = await asyncio.gather(working, changed, return_exceptions=True)
        if isinstance(outcome, Exception):
            raise outcome

    async def _repair(self, ring: Ring) -> None:
        """Put others in the place of what is gone.

        Raises:
            PetalSwarmError: nobody could be found in time.
        """
        loop = asyncio.get_running_loop()
        limit_s = self._openings.repair_timeout_s
        deadline = loop.time() + limit_s
        await asyncio.sleep(GATHER_S)
        self._distrust(ring)
        first = self._tell(ring)
        attempts, why = 0, "no answer in time"
        while ring.error is None:
            attempts += 1
            pause_s = min(MAX_RETRY_S, RETRY_S * attempts)
            try:
                async with asyncio.timeout(max(0.0, deadline - loop.time())):
                    await self._attempt(ring, attempts)
            except (PetalSwarmError, TimeoutError) as error:
                logger.info("repairing, attempt %d: %s", attempts, error or "timeout")
                if isinstance(error, MissingBlocksError) and isinstance(first, (CacheFullError, BusyError)):
                    raise first from None  # the user can do more about that than about the rest
                why = str(error) or why
                if loop.time() + pause_s >= deadline:
                    raise HopLostError(
                        f"{first}; nobody took its place within {limit_s:g} s: {why}"
                    ) from None
            else:
                ring.repairs += 1
                logger.info("the session goes on along %s", named(ring.route.hops))
                return
            if attempts == MEND_ATTEMPTS:
                logger.warning("%s; looking for another server for up to %g s", first, limit_s)
            await asyncio.sleep(pause_s)

    async def _attempt(self, ring: Ring, number: int) -> None:
        if (number % (MEND_ATTEMPTS + 1) or not ring.log.complete) and not ring.is_spoiled:
            try:
                await self._mend(ring, fresh=number > 1)
                return
            except MissingBlocksError:
                if not ring.log.complete:
                    raise
                # One that is in use for another part of the route may serve these blocks as well.
            except LinkFailedError as error:
                if error.replayable:
                    raise
        await self._begin_again(ring)

    def _distrust(self, ring: Ring) -> None:
        """Replace both ends of a link that is lost again and again: one of them is wrong, or lies."""
        for before, member in pairwise(ring.members):
            if not member.is_cut or member.error is not None or before.error is not None:
                continue
            link = (before.peer_id, member.peer_id)
            self._relinks[link] += 1
            if self._relinks[link] > MAX_RELINKS:
                reason = f"the link from {before.peer_id} to {member.peer_id} is lost again and again"
                before.lose(HopLostError(reason, peer_id=before.peer_id))
                member.lose(HopLostError(reason, peer_id=member.peer_id))

    def _tell(self, ring: Ring) -> PetalSwarmError:
        """Log who is gone and remember to avoid them; returns why the first one is."""
        first: PetalSwarmError | None = None
        for member in ring.members:
            if member.error is None:
                continue
            first = first or member.error
            self._openings.blame(member.peer_id, member.error)
            logger.info("hop %s (blocks %s) is gone: %s", member.peer_id, member.hop.span, member.error)
        return first or HopLostError("two hops lost each other")

    async def _mend(self, ring: Ring, *, fresh: bool) -> None:
        """Replace what is gone, and only that."""
        plan = await plan_replacement(
            ring.members, self._openings.find_part, min_batch_tokens=ring.log.max_rows, fresh=fresh
        )
        try:
            await self._openings.prepare([node for node in plan if isinstance(node, Hop)])
        except OpenFailedError as error:
            self._openings.blame(error.peer_id, error.error)
            raise
        ring.epoch += 1
        epoch, answered = ring.epoch, ring.answered
        work: list[Awaitable[Member | None]] = []
        for index, node in enumerate(plan):
            before = plan[index - 1] if index else None
            after = plan[index + 1] if index + 1 < len(plan) else None
            if isinstance(node, Hop):
                opening = self._openings.of_hop(
                    ring.session, epoch, node.span, before=before, after=after, answered=answered
                )
                work.append(self._openings.open_one(node, opening))
                continue
            new_upstream = before is not None and (isinstance(before, Hop) or node.is_cut)
            new_next = after is not None and (isinstance(after, Hop) or after.is_cut)
            if new_upstream:
                node.is_cut = True  # until all of this has worked
                node.link_epoch = epoch
            if new_upstream or new_next:
                told = Reroute(
                    epoch,
                    upstream=before.peer_id if new_upstream and before else None,
                    next=neighbour_of(after) if new_next and after else None,
                    answered=answered,
                )
                work.append(self._reroute(ring, node, told, after))
            work.append(self._silence.expect_there(ring, node))
        opened = iter(await self._all(ring, work))
        members = [next(opened) if isinstance(node, Hop) else node for node in plan]
        ring.adopt(members, route_of(members))

    async def _reroute(self, ring: Ring, member: Member, told: Reroute, after: Member | Hop | None) -> None:
        timeout_s = self._openings.timeout_s
        if told.next and isinstance(after, Member) and await self._silence.can_do_without([after]):
            timeout_s = min(timeout_s, RELINK_S)
        try:
            await member.reroute(told, timeout_s)
        except DeadlineError as error:
            if told.next is None:
                raise
            progress = await self._silence.ask(ring, member)
            if progress:  # it listens, so it is still dialling
                self._cannot_reach(member, after, error)
            elif progress is not None:
                # What it has been sent before keeps it from reading this, maybe because of the link itself.
                raise LinkFailedError(str(error), replayable=False) from None
            raise
        except LinkFailedError as error:
            if error.replayable:
                self._cannot_reach(member, after, error)
            raise

    def _cannot_reach(self, member: Member, after: Member | Hop | None, error: PetalSwarmError) -> None:
        if isinstance(after, Hop):
            self._openings.view.avoidance.failed(after.peer_id)
        elif after is not None:
            after.lose(HopLostError(f"{member.peer_id} cannot reach it: {error}", peer_id=after.peer_id))

    async def _all(self, ring: Ring, work: Sequence[Awaitable[Member | None]]) -> list[Member]:
        """The hops that were opened, once all has worked.

        Raises:
            PetalSwarmError: what failed first; nothing that was opened stays so.
        """
        tasks = [asyncio.ensure_future(each) for each in work]
        try:
            return [member for member in await asyncio.gather(*tasks) if member is not None]
        except BaseException as failure:
            worst = failure
            for task in tasks:
                task.cancel()
            for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(outcome, Member):
                    outcome.channel.abort()
                elif isinstance(outcome, LinkFailedError) and not outcome.replayable:
                    worst = outcome
            if isinstance(worst, OpenFailedError):
                self._openings.blame(worst.peer_id, worst.error)
            raise worst from None

    async def _begin_again(self, ring: Ring) -> None:
        """Open the session anew along whatever route there is, and send everything again.

        Who is gone may be back, or may have lost its connection only: where nobody else is left it is tried.
        """
        if not ring.log.complete:
            ring.fail(HopLostError("a hop is gone, and the session is too long to be sent again"))
            return
        missing: MissingBlocksError | None = None
        try:
            route = await self._find_whole(ring, kept_out=Exception)
        except MissingBlocksError as error:
            missing = error
            route = await self._find_whole(ring, kept_out=(CacheFullError, BusyError))
        session = secrets.token_bytes(SESSION_ID_BYTES)
        try:
            members = await self._openings.open_all(
                route.hops, self._openings.of_session(session, route.hops, answered=ring.answered)
            )
        except OpenFailedError as error:
            self._openings.blame(error.peer_id, error.error)
            raise missing or error.error from None
        ring.session, ring.epoch, ring.is_spoiled = session, 0, False
        ring.adopt(members, route)

    async def _find_whole(
        self, ring: Ring, *, kept_out: type[Exception] | tuple[type[Exception], ...]
    ) -> Route:
        """A route without the hops that were lost for such a reason."""
        return await self._openings.find_part(
            self._openings.whole,
            avoid=frozenset(
                member.peer_id
                for member in ring.members
                if isinstance(member.error, kept_out) and not isinstance(member.error, IdleError)
            ),
            like=[member.hop for member in ring.members],
            min_batch_tokens=ring.log.max_rows,
            fresh=True,
        )
