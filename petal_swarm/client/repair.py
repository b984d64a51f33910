"""Repairing a ring: others take the place of hops that are gone, silent or leaving.

Three ways, the first that works: a link that broke between two living hops is made again; a part of the
route is replaced, and the hop before it (or the client) replays what it has sent; the whole session
begins again along another route, from the client's own log.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import secrets
from collections.abc import Awaitable, Callable, Collection, Sequence
from itertools import groupby

from petal_swarm.client.members import (
    LinkFailedError,
    Member,
    OpenFailedError,
    neighbour,
    open_hop,
    open_hops,
)
from petal_swarm.client.ring import Ring
from petal_swarm.client.view import ModelRef, View
from petal_swarm.errors import (
    BusyError,
    CacheFullError,
    HopLostError,
    IdleError,
    MissingBlocksError,
    PetalSwarmError,
)
from petal_swarm.net.transport import Transport
from petal_swarm.routing.blocks import format_blocks
from petal_swarm.routing.route import Hop, Route
from petal_swarm.span import Span
from petal_swarm.wire.messages import NO_STEP, SESSION_ID_BYTES, Neighbour, Open, Probe, Progress, Reroute

logger = logging.getLogger(__name__)

#: Several streams tell of one death; whoever heard the first waits for the others.
GATHER_S = 0.02
#: A hop that says nothing when it is asked, for so many mean steps within these bounds, is gone.
MAX_PROBE_S = 1.0
MIN_PROBE_S = 0.5
PROBE_STEPS = 8.0
#: Two neighbours that both answer, and nothing goes from one to the other for so long.
STUCK_S = 1.0
#: A living hop that computes nothing for so long; it may wait for room in its KV cache for 30 s.
STALLED_S = 45.0
#: After so many attempts to replace a part of the route, the whole is replaced.
MEND_ATTEMPTS = 3
RETRY_S = 0.2
CATCH_UP_LOOK_S = 0.02
CATCH_UP_TIMEOUT_S = 60.0
#: A spare may take over when it is so many steps behind.
CATCH_UP_STEPS = 1


class Repairer:
    """Keeps one ring alive; `keep` is the ring's keeper."""

    def __init__(self, view: View, transport: Transport, model: ModelRef, *, max_length: int) -> None:
        self._view = view
        self._transport = transport
        self._config = view.config
        self._model = model
        self._max_length = max_length
        self._probes = 0
        #: That nobody else serves what is gone, if that was so in this repair.
        self._missing: MissingBlocksError | None = None
        #: Where each hop was when it was last asked, and since when it has been there.
        self._stood_still: dict[int, tuple[tuple[int, ...], float]] = {}

    async def keep(self, ring: Ring) -> None:
        """Look after whatever is the matter; returns when it is done, or when something else has come up."""
        if ring.is_broken:
            await self._repair(ring)
        elif ring.is_quiet:
            await self._interrupted_by_change(ring, self._look_into(ring))
        else:
            await self._interrupted_by_change(ring, self._relieve(ring))

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

    # -- silence ---------------------------------------------------------------------------------

    async def _look_into(self, ring: Ring) -> None:
        """No answer has come for too long: ask every hop whether it is there, and how far."""
        ring.is_quiet, ring.is_looked_into = False, True
        members = list(ring.members)
        asked = [asyncio.create_task(self._ask(ring, member)) for member in members]
        try:
            found = await asyncio.gather(*asked)
        finally:
            ring.is_looked_into = False
            for task in asked:
                task.cancel()
        now = asyncio.get_running_loop().time()
        silent = [member for member, progress in zip(members, found, strict=True) if progress is None]
        if silent and ring.is_waiting and await self._can_do_without(silent):
            for member in silent:
                ring.lose(member, HopLostError(f"peer {member.peer_id} is silent", peer_id=member.peer_id))
        if ring.is_broken or not ring.is_waiting:
            return
        for index, (member, progress) in enumerate(zip(members, found, strict=True)):
            if not progress:
                continue
            stood_s = self._stood_for(index, progress, now)
            before = found[index - 1] if index else None
            arrived, done = progress
            if before and before[1] > arrived and stood_s >= STUCK_S:
                ring.cut(member)
            elif arrived > done and stood_s >= STALLED_S:
                ring.lose(member, HopLostError(f"peer {member.peer_id} computes nothing"))

    async def _can_do_without(self, silent: Sequence[Member]) -> bool:
        """Whether others could take their place. If not, they may be too busy to answer: better to wait."""
        try:
            await self._view.find_part(
                self._model,
                Span(0, self._model.num_blocks),
                kv_tokens=self._max_length,
                avoid=frozenset(member.peer_id for member in silent),
                like=[member.hop for member in silent],
                min_batch_tokens=0,
                fresh=False,
            )
        except MissingBlocksError:
            logger.info("%s silent, and nobody else serves its blocks", _named([m.hop for m in silent]))
            return False
        return True

    def _stood_for(self, index: int, progress: tuple[int, ...], now: float) -> float:
        before, since = self._stood_still.get(index, ((), now))
        if before != progress:
            since = now
        self._stood_still[index] = (progress, since)
        return now - since

    async def _ask(self, ring: Ring, member: Member) -> tuple[int, ...] | None:
        """How far a hop is: the last step that came and the last that was done. Or only that it is there,
        if steps on the way keep the question waiting; None if it is not.
        """
        timeout_s = min(MAX_PROBE_S, max(MIN_PROBE_S, PROBE_STEPS * ring.step_s))
        self._probes += 1
        probing = asyncio.create_task(member.probe(Probe(self._probes), self._probes))
        pinging = asyncio.create_task(self._view.is_there(member.hop, timeout_s))
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

    # -- loss ------------------------------------------------------------------------------------

    async def _repair(self, ring: Ring) -> None:
        """Put others in the place of what is gone.

        Raises:
            PetalSwarmError: nobody could be found in time.
        """
        loop = asyncio.get_running_loop()
        limit_s = self._config.repair_timeout_s
        deadline = loop.time() + limit_s
        await asyncio.sleep(GATHER_S)
        first = self._tell(ring)
        self._missing = None
        attempts = 0
        while ring.error is None:
            attempts += 1
            try:
                async with asyncio.timeout(max(0.0, deadline - loop.time())):
                    await self._attempt(ring, attempts)
            except (PetalSwarmError, TimeoutError) as error:
                logger.info("repairing, attempt %d: %s", attempts, str(error) or "timeout")
                if isinstance(error, MissingBlocksError) and isinstance(first, (CacheFullError, BusyError)):
                    raise first from None  # the user can do more about that than about the rest
                if loop.time() + RETRY_S >= deadline:
                    reason = str(self._missing or error) or "no answer in time"
                    raise HopLostError(
                        f"{first}; nobody took its place within {limit_s:g} s: {reason}"
                    ) from None
            else:
                ring.repairs += 1
                logger.info("the session goes on along %s", _named(ring.route.hops))
                return
            if attempts == MEND_ATTEMPTS:
                logger.warning("%s; looking for another server for up to %g s", first, limit_s)
            await asyncio.sleep(RETRY_S)

    async def _attempt(self, ring: Ring, number: int) -> None:
        if number % (MEND_ATTEMPTS + 1):
            try:
                await self._mend(ring, fresh=number > 1)
                return
            except MissingBlocksError:
                pass  # one that is in use for another part of the route may serve these blocks as well
            except LinkFailedError as error:
                if error.replayable:
                    raise
        await self._begin_again(ring)

    def _tell(self, ring: Ring) -> PetalSwarmError:
        """Log who is gone and remember to avoid them; returns why the first one is."""
        first: PetalSwarmError | None = None
        for member in ring.members:
            if member.error is None:
                continue
            first = first or member.error
            self._blame(member.peer_id, member.error)
            logger.info("hop %s (blocks %s) is gone: %s", member.peer_id, member.hop.span, member.error)
        return first or HopLostError("two hops lost each other")

    def _blame(self, peer_id: str, error: PetalSwarmError) -> None:
        avoidance = self._view.avoidance
        if isinstance(error, (CacheFullError, BusyError)):
            avoidance.busy(peer_id, self._config.retry_busy_s)
        elif not isinstance(error, IdleError):
            avoidance.failed(peer_id)

    async def _mend(self, ring: Ring, *, fresh: bool) -> None:
        """Replace what is gone, and only that."""
        plan = await self._plan(ring, fresh=fresh)
        ring.epoch += 1
        epoch, answered = ring.epoch, ring.answered
        work: list[Awaitable[Member | None]] = []
        for index, node in enumerate(plan):
            before = plan[index - 1] if index else None
            after = plan[index + 1] if index + 1 < len(plan) else None
            if isinstance(node, Hop):
                opening = self._opening(
                    ring.session, epoch, node.span, before=before, after=after, answered=answered
                )
                work.append(open_hop(self._transport, node, opening, self._timeout_s))
                continue
            new_upstream = before is not None and (isinstance(before, Hop) or node.is_cut)
            new_next = after is not None and (isinstance(after, Hop) or after.is_cut)
            if new_upstream:
                node.is_cut = True  # until all of this has worked
                node.link_epoch = epoch
            if new_upstream or new_next:
                told = Reroute(
                    epoch,
                    upstream=_peer_id(before) if new_upstream and before else None,
                    next=_neighbour(after) if new_next and after else None,
                    answered=answered,
                )
                work.append(self._reroute(node, told, after))
            work.append(self._expect_there(ring, node))
        opened = iter(await self._all(ring, work))
        members = [next(opened) if isinstance(node, Hop) else node for node in plan]
        ring.adopt(members, _route(members))

    async def _plan(self, ring: Ring, *, fresh: bool) -> list[Member | Hop]:
        """The new ring: hops that live, and between them those that are to be opened.

        Raises:
            MissingBlocksError: nobody else serves the blocks of a hop that is gone.
        """
        plan: list[Member | Hop] = []
        avoid = {member.peer_id for member in ring.members if member.error is None}
        runs = [(gone, list(run)) for gone, run in groupby(ring.members, lambda m: m.error is not None)]
        for number, (gone, run) in enumerate(runs):
            if not gone:
                plan += run
                continue
            after = runs[number + 1][1][0].peer_id if number + 1 < len(runs) else None
            route = await self._find_others(
                ring,
                Span(run[0].hop.span.start, run[-1].hop.span.end),
                like=run,
                avoid=avoid,
                fresh=fresh,
                before=_peer_id(plan[-1]) if plan else None,
                after=after,
            )
            plan += route.hops
            avoid.update(hop.peer_id for hop in route.hops)
        return plan

    async def _find_others(
        self,
        ring: Ring,
        span: Span,
        *,
        like: Sequence[Member],
        avoid: Collection[str] = (),
        fresh: bool,
        before: str | None = None,
        after: str | None = None,
    ) -> Route:
        """Who could compute `span` in place of `like`; where nobody else does, those that were lost.

        Raises:
            MissingBlocksError: nobody could.
        """
        gone = [m for m in ring.members if m.error is not None and not isinstance(m.error, IdleError)]
        find = functools.partial(
            self._view.find_part,
            self._model,
            span,
            kv_tokens=self._max_length,
            like=[member.hop for member in like],
            min_batch_tokens=ring.log.max_rows,
            fresh=fresh,
            before=before,
            after=after,
        )
        try:
            return await find(avoid=frozenset(avoid).union(m.peer_id for m in gone))
        except MissingBlocksError as error:
            self._missing = error
            # It may have been the connection that broke, and not the peer.
            lost = {member.peer_id for member in gone if isinstance(member.error, HopLostError)}
            if not lost:
                raise
        for member in gone:
            member.channel.abort()  # it may not know that it was lost
        return await find(avoid=frozenset(avoid).union(m.peer_id for m in gone if m.peer_id not in lost))

    async def _expect_there(self, ring: Ring, member: Member) -> None:
        """A hop that is to stay may be silent itself: what it is told would be waited for in vain.

        Raises:
            HopLostError: it is, and others could take its place.
        """
        if await self._ask(ring, member) is None and await self._can_do_without([member]):
            silent = HopLostError(f"peer {member.peer_id} is silent", peer_id=member.peer_id)
            self._blame(member.peer_id, silent)
            ring.lose(member, silent)
            raise silent

    async def _reroute(self, member: Member, told: Reroute, after: Member | Hop | None) -> None:
        try:
            await member.reroute(told, self._timeout_s)
        except LinkFailedError as error:
            if error.replayable and isinstance(after, Hop):
                self._view.avoidance.failed(after.peer_id)
            elif error.replayable and isinstance(after, Member):
                after.lose(HopLostError(f"{member.peer_id} cannot reach it: {error}", peer_id=after.peer_id))
            raise

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
                self._blame(worst.peer_id, worst.error)
            raise worst from None

    async def _begin_again(self, ring: Ring) -> None:
        """Open the session anew along whatever route there is, and send everything again."""
        if not ring.log.complete:
            ring.fail(HopLostError("a hop is gone, and the session is too long to be sent again"))
            return
        route = await self._find_others(ring, Span(0, self._model.num_blocks), like=ring.members, fresh=True)
        session = secrets.token_bytes(SESSION_ID_BYTES)
        try:
            members = await open_hops(
                self._transport,
                route.hops,
                self.opening_of(session, route.hops, answered=ring.answered),
                self._timeout_s,
            )
        except OpenFailedError as error:
            self._blame(error.peer_id, error.error)
            raise error.error from None
        ring.session, ring.epoch = session, 0
        ring.adopt(members, route)

    # -- leaving ---------------------------------------------------------------------------------

    async def _relieve(self, ring: Ring) -> None:
        """Another server takes the place of one that wants to leave, once its KV cache is filled."""
        index = next(i for i, member in enumerate(ring.members) if member.is_leaving)
        leaving = ring.members[index]
        before = ring.members[index - 1] if index else None
        after = ring.members[index + 1] if index + 1 < len(ring.members) else None
        try:
            await self._replace(ring, leaving, before, after)
            ring.repairs += 1
            logger.info("%s leaves; the session goes on along %s", leaving.peer_id, _named(ring.route.hops))
        except (PetalSwarmError, TimeoutError) as error:
            # It may serve to the end, or go and be replaced then.
            logger.info("%s wants to leave, and cannot be replaced now: %s", leaving.peer_id, error)
            await asyncio.sleep(self._config.retry_busy_s)

    async def _replace(
        self, ring: Ring, leaving: Member, before: Member | None, after: Member | None
    ) -> None:
        route = await self._view.find_part(
            self._model,
            leaving.hop.span,
            kv_tokens=self._max_length,
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
            self._opening(
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
        spares = await open_hops(self._transport, route.hops, openings.__getitem__, self._timeout_s)
        link = None
        try:
            if before is None:
                link = ring.mirror(spares[0])
                if link is None:
                    raise LinkFailedError("the session is too long to be sent again", replayable=False)
            else:
                told = Reroute(epoch, next=spares[0].neighbour(), also=True, answered=ring.answered)
                await before.reroute(told, self._timeout_s)
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
            ring.adopt(members, _route(members))
            told = Reroute(epoch, answered=ring.answered)
            work.append(last.reroute(told, self._timeout_s))
        else:
            after.is_cut, after.link_epoch = True, epoch
            work.append(after.reroute(Reroute(epoch, upstream=last.peer_id), self._timeout_s))
            ring.adopt(members, _route(members))
            after.is_cut = True
            work.append(last.reroute(Reroute(epoch, next=after.neighbour()), self._timeout_s))
        if before is not None:
            work.append(before.reroute(Reroute(mirrored, next=spares[0].neighbour()), self._timeout_s))
        await asyncio.gather(*work)
        if after is not None:
            after.is_cut = False

    # -- opening ---------------------------------------------------------------------------------

    @property
    def _timeout_s(self) -> float:
        return self._config.repair_open_timeout_s

    def opening_of(
        self, session: bytes, hops: Sequence[Hop], *, wait_s: float = 0.0, answered: int = NO_STEP
    ) -> Callable[[int], Open]:
        """What each hop of a new session is told."""
        nodes: list[Hop | None] = [None, *hops, None]

        def opening(index: int) -> Open:
            return self._opening(
                session,
                0,
                hops[index].span,
                before=nodes[index],
                after=nodes[index + 2],
                answered=answered,
                wait_s=wait_s,
            )

        return opening

    def _opening(
        self,
        session: bytes,
        epoch: int,
        span: Span,
        *,
        before: Member | Hop | None,
        after: Member | Hop | None,
        answered: int = NO_STEP,
        spare: bool = False,
        wait_s: float = 0.0,
    ) -> Open:
        return Open(
            session=session,
            epoch=epoch,
            model=self._model.key,
            span=span,
            max_length=self._max_length,
            upstream=None if before is None else _peer_id(before),
            next=None if after is None else _neighbour(after),
            share_prefixes=self._config.share_prefixes,
            wait_s=wait_s,
            answered=answered,
            spare=spare,
        )


def _peer_id(node: Member | Hop) -> str:
    return node.peer_id


def _neighbour(node: Member | Hop) -> Neighbour:
    return neighbour(node if isinstance(node, Hop) else node.hop)


def _route(members: Sequence[Member]) -> Route:
    return Route(tuple(member.hop for member in members), sum(member.hop.step_s for member in members))


def _named(hops: Sequence[Hop]) -> str:
    return ", ".join(f"{hop.name or hop.peer_id[-8:]} ({format_blocks(hop.span.blocks())})" for hop in hops)
