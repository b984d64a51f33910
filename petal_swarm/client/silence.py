"""No answer comes: finding out which hop of a ring is gone, cut off from the one before it, or slow."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from petal_swarm.client.members import Member
from petal_swarm.client.openings import Openings, named
from petal_swarm.client.ring import Ring
from petal_swarm.errors import HopLostError, MissingBlocksError
from petal_swarm.wire.messages.repair import Probe

logger = logging.getLogger(__name__)

#: A hop that says nothing when it is asked, for so many mean steps within these bounds, is gone.
MAX_PROBE_S = 1.0
MIN_PROBE_S = 0.5
PROBE_STEPS = 8.0
#: Two neighbours that both answer, and nothing goes from one to the other for so long.
STUCK_S = 1.0
#: A living hop that computes nothing for so long; it may wait for room in its KV cache for 30 s.
STALLED_S = 45.0


class Silence:
    """Finds out why nothing comes from one ring."""

    def __init__(self, openings: Openings) -> None:
        self._openings = openings
        self._probes = 0
        #: Where each hop was when it was last asked, after which answer, and since when it has been there.
        self._stood_still: dict[int, tuple[object, float]] = {}

    async def look_into(self, ring: Ring) -> None:
        """No answer has come for too long: ask every hop whether it is there, and how far."""
        ring.is_quiet, ring.is_looked_into = False, True
        members = list(ring.members)
        asked = [asyncio.create_task(self.ask(ring, member)) for member in members]
        try:
            found = await asyncio.gather(*asked)
        finally:
            ring.is_looked_into = False
            for task in asked:
                task.cancel()
        now = asyncio.get_running_loop().time()
        silent = [member for member, progress in zip(members, found, strict=True) if progress is None]
        if silent and ring.is_waiting and await self.can_do_without(silent):
            for member in silent:
                ring.lose(member, HopLostError(f"peer {member.peer_id} is silent", peer_id=member.peer_id))
        if ring.is_broken or not ring.is_waiting:
            return
        for index, (member, progress) in enumerate(zip(members, found, strict=True)):
            if not progress:
                continue
            stood_s = self._stood_for(index, (member.peer_id, progress, ring.answered), now)
            before = found[index - 1] if index else None
            arrived, done = progress
            if before and before[1] > arrived and stood_s >= STUCK_S:
                ring.cut(member)
            elif arrived > done and stood_s >= STALLED_S:
                ring.lose(member, HopLostError(f"peer {member.peer_id} computes nothing"))
            elif member is members[-1] and done > ring.answered and ring.is_due(done):
                # It would have sent the answer before it said so.
                ring.lose(member, HopLostError(f"peer {member.peer_id} does not answer"))

    async def expect_there(self, ring: Ring, member: Member) -> None:
        """A hop that is to stay may be silent itself: what it is told would be waited for in vain.

        Raises:
            HopLostError: it is, and others could take its place.
        """
        if await self.ask(ring, member) is None and await self.can_do_without([member]):
            silent = HopLostError(f"peer {member.peer_id} is silent", peer_id=member.peer_id)
            self._openings.blame(member.peer_id, silent)
            ring.lose(member, silent)
            raise silent

    async def can_do_without(self, silent: Sequence[Member]) -> bool:
        """Whether others could take their place. If not, they may be too busy to answer: better to wait."""
        try:
            await self._openings.find_part(
                self._openings.whole,
                avoid=frozenset(member.peer_id for member in silent),
                like=[member.hop for member in silent],
                fresh=False,
            )
        except MissingBlocksError:
            logger.info("%s silent, and nobody else serves its blocks", named([m.hop for m in silent]))
            return False
        return True

    def _stood_for(self, index: int, place: object, now: float) -> float:
        before, since = self._stood_still.get(index, (None, now))
        if before != place:
            since = now
        self._stood_still[index] = (place, since)
        return now - since

    async def ask(self, ring: Ring, member: Member) -> tuple[int, ...] | None:
        """How far a hop is: the last step that came and the last that was done. Or only that it is there,
        if steps on the way keep the question waiting; None if it is not.
        """
        timeout_s = min(MAX_PROBE_S, max(MIN_PROBE_S, PROBE_STEPS * ring.step_s))
        self._probes += 1
        probing = asyncio.create_task(member.probe(Probe(self._probes), self._probes))
        pinging = asyncio.create_task(self._openings.view.is_there(member.hop, timeout_s))
        try:
            await asyncio.wait({probing, pinging}, return_when=asyncio.FIRST_COMPLETED)
            if not probing.done() and pinging.result():
                await asyncio.wait({probing}, timeout=timeout_s / 4)
            if probing.done() and probing.exception() is None:
                return (probing.result().arrived, probing.result().done)
            return () if member.error is None and await pinging else None
        finally:
            probing.cancel()
            pinging.cancel()
            await asyncio.gather(probing, pinging, return_exceptions=True)
