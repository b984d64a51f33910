"""How hops of one session are found and opened, at its beginning and again whenever some are replaced."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence

from petal_swarm.client.adapters import Adapter, NamedAdapter, ensure_adapter, name_at, upload_s
from petal_swarm.client.dialling import OpenFailedError
from petal_swarm.client.members import Member, neighbour, open_hop, open_hops
from petal_swarm.client.view import ModelRef, View
from petal_swarm.errors import PetalSwarmError
from petal_swarm.net.transport import Transport
from petal_swarm.routing.blocks import format_blocks
from petal_swarm.routing.route import Hop, Route
from petal_swarm.span import Span
from petal_swarm.wire.messages.opening import Open
from petal_swarm.wire.messages.parts import NO_STEP, Neighbour

#: To dial a far peer takes several round trips; one that says nothing for longer is not worth waiting for.
PING_TIMEOUT_S = 2.0


class Openings:
    """What all openings of a session have in common: model, adapter, the room it needs, and whom to avoid."""

    def __init__(
        self,
        view: View,
        transport: Transport,
        model: ModelRef,
        *,
        max_length: int,
        adapter: Adapter | NamedAdapter | None = None,
    ) -> None:
        self._adapter = adapter
        self.view = view
        self.config = view.config
        self._transport = transport
        self._model = model
        self._max_length = max_length

    @property
    def whole(self) -> Span:
        """All blocks of the model."""
        return Span(0, self._model.num_blocks)

    @property
    def timeout_s(self) -> float:
        """How long a hop may take in a repair."""
        return self.config.repair_open_timeout_s

    @property
    def repair_timeout_s(self) -> float:
        """How long a repair may take in all."""
        return self.config.repair_timeout_s + upload_s(self._adapter)

    async def find_part(
        self,
        span: Span,
        *,
        avoid: frozenset[str],
        like: Collection[Hop],
        min_batch_tokens: int = 0,
        fresh: bool,
        before: str | None = None,
        after: str | None = None,
    ) -> Route:
        """See `View.find_part`.

        Raises:
            MissingBlocksError: nobody else serves some of the blocks.
        """
        return await self.view.find_part(
            self._model,
            span,
            kv_tokens=self._max_length,
            avoid=avoid,
            like=like,
            min_batch_tokens=min_batch_tokens,
            fresh=fresh,
            before=before,
            after=after,
        )

    async def prepare(self, hops: Sequence[Hop], timeout_s: float | None = None) -> None:
        """Let these hops have the session's adapter, all at once: before any is opened, since they wait for
        each other then.

        Raises:
            OpenFailedError: one of them cannot have it.
        """
        if self._adapter is None or isinstance(self._adapter, NamedAdapter):
            return
        works = [self._upload(self._adapter, hop, timeout_s or self.timeout_s) for hop in hops]
        for outcome in await asyncio.gather(*works, return_exceptions=True):
            if outcome is not None:
                raise outcome

    async def _upload(self, adapter: Adapter, hop: Hop, timeout_s: float) -> None:
        try:
            await ensure_adapter(self._transport, hop, self._model.key, adapter, timeout_s)
        except PetalSwarmError as error:
            raise OpenFailedError(hop.peer_id, hop.span, error) from error

    async def open_one(self, hop: Hop, opening: Open) -> Member:
        """See `open_hop`; the hop must be prepared."""
        member = await open_hop(self._transport, hop, opening, self.timeout_s, self._ping)
        self.view.vouch(hop.peer_id)
        return member

    async def open_all(
        self, hops: Sequence[Hop], opening: Callable[[int], Open], timeout_s: float | None = None
    ) -> list[Member]:
        """See `prepare` and `open_hops`."""
        await self.prepare(hops, timeout_s)
        members = await open_hops(self._transport, hops, opening, timeout_s or self.timeout_s, self._ping)
        for hop in hops:
            self.view.vouch(hop.peer_id)
        return members

    async def _ping(self, hop: Hop) -> bool:
        return await self.view.is_there(hop, PING_TIMEOUT_S)

    def blame(self, peer_id: str, error: PetalSwarmError) -> None:
        """See `View.blame`."""
        self.view.blame(peer_id, error)

    def of_session(
        self, session: bytes, hops: Sequence[Hop], *, wait_s: float = 0.0, answered: int = NO_STEP
    ) -> Callable[[int], Open]:
        """What each hop of a new session is told."""
        nodes: list[Hop | None] = [None, *hops, None]

        def opening(index: int) -> Open:
            return self.of_hop(
                session,
                0,
                hops[index].span,
                before=nodes[index],
                after=nodes[index + 2],
                answered=answered,
                wait_s=wait_s,
            )

        return opening

    def of_hop(
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
        """What one hop is told: who sends to it, and whom it sends to."""
        return Open(
            session=session,
            epoch=epoch,
            model=self._model.key,
            span=span,
            max_length=self._max_length,
            upstream=None if before is None else before.peer_id,
            next=None if after is None else neighbour_of(after),
            share_prefixes=self.config.share_prefixes and not self.config.audit_rate,
            receipts=self.config.audit_rate > 0,
            wait_s=wait_s,
            answered=answered,
            spare=spare,
            adapter=None if self._adapter is None else name_at(self._adapter, span),
        )


def neighbour_of(node: Member | Hop) -> Neighbour:
    return neighbour(node if isinstance(node, Hop) else node.hop)


def route_of(members: Sequence[Member]) -> Route:
    return Route(tuple(member.hop for member in members), sum(member.hop.step_s for member in members))


def named(hops: Sequence[Hop]) -> str:
    """Hops as people know them."""
    return ", ".join(f"{hop.name or hop.peer_id[-8:]} ({format_blocks(hop.span.blocks())})" for hop in hops)
