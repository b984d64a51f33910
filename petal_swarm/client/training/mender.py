"""Mending a lane: others take the place of hops that are gone or silent, and get the passes that those had.

Only the lost hops are replaced. The hop before them sends its rows again, the one behind them its gradients,
the client what it sent itself; everything is idempotent by the number of a pass.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Sequence
from itertools import pairwise

from petal_swarm.client.dialling import OpenFailedError
from petal_swarm.client.members import LinkFailedError
from petal_swarm.client.replacement import plan_replacement
from petal_swarm.client.training.lane import Lane
from petal_swarm.client.training.members import TrainMember
from petal_swarm.client.training.openings import LaneOpenings, next_of
from petal_swarm.errors import DeadlineError, HopLostError, MissingBlocksError, PetalSwarmError
from petal_swarm.routing.route import Hop
from petal_swarm.wire.messages.tuning import ARRIVED, BACKWARD_ARRIVED, BACKWARD_DONE, FORWARD_DONE, Relink

logger = logging.getLogger(__name__)

#: Several streams tell of one death; whoever heard the first waits for the others.
GATHER_S = 0.02
#: After so many attempts the lane is given up: its passes begin again along another.
MEND_ATTEMPTS = 3
RETRY_S = 0.2
PROBE_S = 2.0
#: Neighbours that both answer, and nothing of a pass goes from one to the other for so long.
STUCK_S = 2.0


class Mender:
    """Keeps lanes alive; `keep` is their keeper."""

    def __init__(self, openings: LaneOpenings) -> None:
        self._openings = openings
        self._probes = 0

    async def keep(self, lane: Lane) -> None:
        """Look after whatever is the matter with the lane; returns when it is done.

        Raises:
            PetalSwarmError: it cannot be mended.
        """
        if lane.is_broken:
            await self._repair(lane)
        else:
            await self._look_into(lane)

    # -- replacing -------------------------------------------------------------------------------

    async def _repair(self, lane: Lane) -> None:
        await asyncio.sleep(GATHER_S)
        why = self._tell(lane)
        for attempt in range(1, MEND_ATTEMPTS + 1):
            try:
                async with asyncio.timeout(self._openings.config.repair_timeout_s):
                    await self._mend(lane, fresh=attempt > 1)
            except MissingBlocksError:
                raise why from None
            except (PetalSwarmError, TimeoutError) as error:
                logger.info("mending a lane, attempt %d: %s", attempt, error or "timeout")
                await asyncio.sleep(RETRY_S * attempt)
            else:
                lane.repairs += 1
                logger.info("the lane goes on along %s", [str(member.hop) for member in lane.members])
                return
        raise why

    def _tell(self, lane: Lane) -> PetalSwarmError:
        """Remember to avoid who is gone; returns why the first one is."""
        first: PetalSwarmError | None = None
        for member in lane.members:
            if member.error is not None:
                first = first or member.error
                self._openings.view.blame(member.peer_id, member.error)
                logger.info("hop %s of a lane is gone: %s", member.hop, member.error)
        return first or HopLostError("two hops lost each other")

    async def _mend(self, lane: Lane, *, fresh: bool) -> None:
        """Replace what is gone, and link again what is cut."""
        plan = await plan_replacement(
            lane.members, self._openings.find_part, min_batch_tokens=lane.largest_pass, fresh=fresh
        )
        await self._upload(lane, [node for node in plan if isinstance(node, Hop)])
        lane.epoch += 1
        lane.is_held = True
        passes = tuple(number for number, course in lane.courses.items() if course.is_forward_sent)
        work: list[Awaitable[TrainMember | None]] = []
        for index, node in enumerate(plan):
            before = plan[index - 1] if index else None
            after = plan[index + 1] if index + 1 < len(plan) else None
            if isinstance(node, Hop):
                opening = self._openings.of_hop(
                    lane.run, lane.epoch, node.span, before=_hop(before), after=_hop(after)
                )
                work.append(self._openings.open_one(node, opening))
                continue
            new_upstream = before is not None and (isinstance(before, Hop) or node.is_cut)
            new_next = after is not None and (isinstance(after, Hop) or after.is_cut)
            if new_upstream:
                node.is_cut = True  # until all of this has worked
                node.link_epoch = lane.epoch
            if new_upstream or new_next:
                told = Relink(
                    lane.epoch,
                    upstream=before.peer_id if new_upstream and before else None,
                    next=next_of(after) if new_next else None,
                    passes=passes,
                )
                work.append(self._relink(lane, node, told, after))
            work.append(self._expect_there(lane, node))
        opened = iter(await self._all(work))
        lane.adopt([next(opened) if isinstance(node, Hop) else node for node in plan])

    async def _upload(self, lane: Lane, hops: Sequence[Hop]) -> None:
        """The hops that are to be opened have all adapters of passes under way."""
        uploads = [self._openings.upload(hop, adapter) for hop in hops for adapter in lane.adapters()]
        for error in await asyncio.gather(*uploads, return_exceptions=True):
            if isinstance(error, BaseException):
                raise error

    async def _relink(
        self, lane: Lane, member: TrainMember, told: Relink, after: TrainMember | Hop | None
    ) -> None:
        try:
            await member.relink(told, self._openings.config.repair_open_timeout_s)
        except LinkFailedError as error:
            if isinstance(after, Hop):
                self._openings.view.avoidance.failed(after.peer_id)
            elif after is not None:
                reason = f"{member.peer_id} cannot reach it: {error}"
                lane.lose(after, HopLostError(reason, peer_id=after.peer_id))
            raise
        except DeadlineError as error:
            if not await self._openings.is_there(member.hop):
                lane.lose(member, error)
            raise

    async def _expect_there(self, lane: Lane, member: TrainMember) -> None:
        """A hop that is to stay may be silent itself: what it is told would be waited for in vain."""
        if not await self._openings.is_there(member.hop):
            silent = HopLostError(f"peer {member.peer_id} is silent", peer_id=member.peer_id)
            self._openings.view.blame(member.peer_id, silent)
            lane.lose(member, silent)
            raise silent

    async def _all(self, work: Sequence[Awaitable[TrainMember | None]]) -> list[TrainMember]:
        """The hops that were opened, once all has worked.

        Raises:
            PetalSwarmError: what failed first; nothing that was opened stays so.
        """
        tasks = [asyncio.ensure_future(each) for each in work]
        try:
            return [member for member in await asyncio.gather(*tasks) if member is not None]
        except BaseException as failure:
            for task in tasks:
                task.cancel()
            for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(outcome, TrainMember):
                    outcome.channel.abort()
            if isinstance(failure, OpenFailedError):
                self._openings.view.blame(failure.peer_id, failure.error)
            raise

    # -- silence ---------------------------------------------------------------------------------

    async def _look_into(self, lane: Lane) -> None:
        """No answer has come for too long: ask every hop whether it is there, and how far."""
        lane.is_quiet = False
        members = list(lane.members)
        found = await asyncio.gather(*(self._ask(member) for member in members))
        silent = [member for member, states in zip(members, found, strict=True) if states is None]
        if silent and lane.is_waiting and await self.can_do_without(lane, silent):
            for member in silent:
                lane.lose(member, HopLostError(f"peer {member.peer_id} is silent", peer_id=member.peer_id))
        if lane.is_broken or not lane.is_waiting or silent:
            return
        known = [states or {} for states in found]
        now = asyncio.get_running_loop().time()
        for number, course in list(lane.courses.items()):
            where = tuple(states.get(number, -1) for states in known)
            stood_s = course.stood_s(where, now) - lane.way_s  # on a slow link it may only be on its way
            if not course.is_waited_for or stood_s < STUCK_S:
                continue
            self._unstick(lane, members, where, backward=course.backward is not None)
            if stood_s >= self._openings.config.step_timeout_s:
                await self._give_up_on(lane, members, where)

    async def _give_up_on(self, lane: Lane, members: list[TrainMember], where: tuple[int, ...]) -> None:
        """Replace hops that have what they need for a pass, and compute nothing."""
        idle = [m for m, state in zip(members, where, strict=True) if state in (ARRIVED, BACKWARD_ARRIVED)]
        if idle and await self.can_do_without(lane, idle):
            for member in idle:
                lane.lose(member, HopLostError(f"peer {member.peer_id} computes nothing"))

    def _unstick(
        self, lane: Lane, members: list[TrainMember], where: tuple[int, ...], *, backward: bool
    ) -> None:
        """Cut links over which a pass should have gone long ago, and drop ends that do not answer."""
        for (_, one), (member, other) in pairwise(zip(members, where, strict=True)):
            if (FORWARD_DONE <= one <= BACKWARD_DONE and other < ARRIVED) or (
                backward and one < BACKWARD_ARRIVED and other == BACKWARD_DONE
            ):
                lane.cut(member)
        end = 0 if backward else -1
        mute = members[end]
        if where[end] == (BACKWARD_DONE if backward else FORWARD_DONE) and not mute.channel.receiving:
            lane.lose(mute, HopLostError(f"peer {mute.peer_id} does not answer", peer_id=mute.peer_id))

    async def _ask(self, member: TrainMember) -> dict[int, int] | None:
        """How far each pass is at a hop; empty if it is busy, None if it is not there."""
        self._probes += 1
        probing = asyncio.create_task(member.probe(self._probes, PROBE_S))
        pinging = asyncio.create_task(self._openings.is_there(member.hop))
        try:
            await asyncio.wait({probing, pinging}, return_when=asyncio.FIRST_COMPLETED)
            if not probing.done() and pinging.result():
                await asyncio.wait({probing}, timeout=PROBE_S / 4)
            if probing.done() and probing.exception() is None:
                return dict(probing.result().states)
            return {} if member.error is None and await pinging else None
        finally:
            probing.cancel()
            pinging.cancel()
            await asyncio.gather(probing, pinging, return_exceptions=True)

    async def can_do_without(self, lane: Lane, silent: Sequence[TrainMember]) -> bool:
        """Whether others could take their place. If not, they may just be too busy: better to wait."""
        try:
            await self._openings.find_part(
                lane.blocks,
                avoid=frozenset(member.peer_id for member in silent),
                like=[member.hop for member in silent],
                min_batch_tokens=lane.largest_pass,
                fresh=False,
                before=None,
                after=None,
            )
        except MissingBlocksError:
            logger.info("nobody else trains the blocks of %s", [str(m.hop) for m in silent])
            return False
        return True


def _hop(node: TrainMember | Hop | None) -> Hop | None:
    return node.hop if isinstance(node, TrainMember) else node
