"""A hop wants to leave: another one is filled beside it, and then takes its place without a pause."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Sequence

from petal_swarm.client.members import LinkFailedError, Member
from petal_swarm.client.openings import Openings, named, route_of
from petal_swarm.client.ring import Ring
from petal_swarm.errors import PetalSwarmError
from petal_swarm.wire.messages.repair import Probe, Progress, Reroute

logger = logging.getLogger(__name__)

CATCH_UP_LOOK_S = 0.02
CATCH_UP_TIMEOUT_S = 60.0
#: A spare may take over when it is so many steps behind.
CATCH_UP_STEPS = 1


class Relief:
    """Replaces hops of one ring that are still there."""

    def __init__(self, openings: Openings) -> None:
        self._openings = openings
        self._probes = 0

    async def relieve(self, ring: Ring) -> None:
        """Another server takes the place of one that wants to leave, once its KV cache is filled."""
        index = next(i for i, member in enumerate(ring.members) if member.is_leaving)
        leaving = ring.members[index]
        before = ring.members[index - 1] if index else None
        after = ring.members[index + 1] if index + 1 < len(ring.members) else None
        try:
            await self._replace(ring, leaving, before, after)
            ring.repairs += 1
            logger.info("%s leaves; the session goes on along %s", leaving.peer_id, named(ring.route.hops))
        except (PetalSwarmError, TimeoutError) as error:
            # It may serve to the end, or go and be replaced then.
            logger.info("%s wants to leave, and cannot be replaced now: %s", leaving.peer_id, error)
            await asyncio.sleep(self._openings.config.retry_busy_s)

    async def _replace(
        self, ring: Ring, leaving: Member, before: Member | None, after: Member | None
    ) -> None:
        route = await self._openings.find_part(
            leaving.hop.span,
            avoid=frozenset(member.peer_id for member in ring.members),
            like=[leaving.hop],
            min_batch_tokens=ring.log.max_rows,
            fresh=True,
            before=before.peer_id if before else None,
            after=after.peer_id if after else None,
        )
        ring.epoch += 1
        epoch = ring.epoch
        nodes = [before, *route.hops, after]
        openings = [
            self._openings.of_hop(
                ring.session,
                epoch,
                hop.span,
                before=nodes[place],
                after=nodes[place + 2],
                answered=ring.answered,
                spare=place + 1 == len(route.hops),
            )
            for place, hop in enumerate(route.hops)
        ]
        spares = await self._openings.open_all(route.hops, openings.__getitem__)
        link = None
        try:
            if before is None:
                link = ring.mirror(spares[0])
                if link is None:
                    raise LinkFailedError("the session is too long to be sent again", replayable=False)
            else:
                told = Reroute(epoch, next=spares[0].neighbour(), also=True, answered=ring.answered)
                await before.reroute(told, self._openings.timeout_s)
            await self._catch_up(ring, spares[-1])
            await self._take_over(ring, leaving, before, after, spares)
            link = None
        except BaseException:
            for spare in spares:
                spare.channel.abort()
            raise
        finally:
            if link is not None:
                ring.unmirror(link)

    async def _catch_up(self, ring: Ring, spare: Member) -> None:
        """Wait until the spare has computed nearly all that was sent.

        Nobody listens to the spare yet but this.
        """
        async with asyncio.timeout(CATCH_UP_TIMEOUT_S):
            while True:
                self._probes += 1
                spare.channel.send(Probe(self._probes))
                progress = await spare.channel.expect(Progress, timeout_s=CATCH_UP_TIMEOUT_S)
                if progress.done >= ring.last_sent - CATCH_UP_STEPS:
                    return
                await asyncio.sleep(CATCH_UP_LOOK_S)

    async def _take_over(
        self,
        ring: Ring,
        leaving: Member,
        before: Member | None,
        after: Member | None,
        spares: Sequence[Member],
    ) -> None:
        """From now on the spares' results count, and the leaving hop is let go."""
        mirrored = ring.epoch
        ring.epoch += 1
        epoch, last = ring.epoch, spares[-1]
        index = ring.members.index(leaving)
        members = [*ring.members[:index], *spares, *ring.members[index + 1 :]]
        work: list[Awaitable[None]] = []
        if after is None:
            ring.adopt(members, route_of(members))
            told = Reroute(epoch, answered=ring.answered)
            work.append(last.reroute(told, self._openings.timeout_s))
        else:
            after.is_cut, after.link_epoch = True, epoch
            work.append(after.reroute(Reroute(epoch, upstream=last.peer_id), self._openings.timeout_s))
            ring.adopt(members, route_of(members))
            after.is_cut = True
            work.append(last.reroute(Reroute(epoch, next=after.neighbour()), self._openings.timeout_s))
        if before is not None:
            work.append(
                before.reroute(Reroute(mirrored, next=spares[0].neighbour()), self._openings.timeout_s)
            )
        await asyncio.gather(*work)
        if after is not None:
            after.is_cut = False
