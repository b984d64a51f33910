"""How hops of lanes are found and opened, at the beginning and whenever some are replaced."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Sequence

from petal_swarm.client.adapters import ensure_adapter
from petal_swarm.client.dialling import all_or_none, unless_silent
from petal_swarm.client.members import neighbour
from petal_swarm.client.openings import PING_TIMEOUT_S
from petal_swarm.client.training.adapters import TrainedAdapter
from petal_swarm.client.training.members import TrainMember, open_member
from petal_swarm.client.view import ModelRef, View
from petal_swarm.net.transport import Transport
from petal_swarm.routing.route import Hop, Route
from petal_swarm.span import Span
from petal_swarm.wire.messages.opening import SESSION_ID_BYTES
from petal_swarm.wire.messages.parts import Neighbour
from petal_swarm.wire.messages.tuning import TrainOpen


class LaneOpenings:
    """What all openings of one client's lanes have in common."""

    def __init__(self, view: View, transport: Transport, model: ModelRef) -> None:
        self.view = view
        self.config = view.config
        self._transport = transport
        self._model = model

    async def find_route(self, blocks: Span, *, avoid: frozenset[str], pass_tokens: int) -> Route:
        """See `View.find_route`; servers that do not train are left out, and those that take only smaller
        passes if possible.

        Raises:
            MissingBlocksError: nobody trains some of the blocks.
        """
        return await self.view.find_route(
            self._model,
            kv_tokens=0,
            avoid=avoid,
            span=blocks,
            trains=True,
            min_batch_tokens=pass_tokens,
        )

    async def find_part(
        self,
        span: Span,
        *,
        avoid: frozenset[str],
        like: Collection[Hop],
        min_batch_tokens: int,
        fresh: bool,
        before: str | None,
        after: str | None,
    ) -> Route:
        """See `View.find_part`; all take passes of so many tokens.

        Raises:
            MissingBlocksError: nobody else trains some of the blocks.
        """
        return await self.view.find_part(
            self._model,
            span,
            kv_tokens=0,
            avoid=avoid,
            like=like,
            min_batch_tokens=min_batch_tokens,
            fresh=fresh,
            before=before,
            after=after,
            trains=True,
        )

    async def open_route(self, hops: Sequence[Hop]) -> tuple[bytes, list[TrainMember]]:
        """A new run along these hops.

        Raises:
            OpenFailedError: a hop failed; none stays open.
        """
        run = secrets.token_bytes(SESSION_ID_BYTES)
        nodes: list[Hop | None] = [None, *hops, None]
        members = await all_or_none(
            self.open_one(
                hop,
                self.of_hop(run, 0, hop.span, before=nodes[index], after=nodes[index + 2]),
                timeout_s=self.config.open_timeout_s,
            )
            for index, hop in enumerate(hops)
        )
        return run, members

    async def open_one(self, hop: Hop, opening: TrainOpen, *, timeout_s: float | None = None) -> TrainMember:
        """One hop; without a timeout of its own it has as long as in a repair.

        Raises:
            OpenFailedError: it, or the hop that it shall send to, is unreachable or refuses.
        """
        timeout_s = timeout_s or self.config.repair_open_timeout_s
        return await unless_silent(hop, open_member(self._transport, hop, opening, timeout_s), self.is_there)

    def of_hop(
        self, run: bytes, epoch: int, span: Span, *, before: Hop | None, after: Hop | None
    ) -> TrainOpen:
        """What one hop is told: who sends to it, and whom it sends to."""
        return TrainOpen(
            run=run,
            epoch=epoch,
            model=self._model.key,
            span=span,
            upstream=None if before is None else before.peer_id,
            next=next_of(after),
        )

    async def upload(self, hop: Hop, adapter: TrainedAdapter) -> None:
        """The hop has the part of the adapter that concerns it when this returns.

        Raises:
            PetalSwarmError: it is gone, or does not take it.
        """
        await ensure_adapter(
            self._transport, hop, self._model.key, adapter, self.config.repair_open_timeout_s, eager=True
        )

    async def is_there(self, hop: Hop) -> bool:
        """Whether a server answers a ping."""
        return await self.view.is_there(hop, PING_TIMEOUT_S)


def next_of(node: TrainMember | Hop | None) -> Neighbour | None:
    """What a hop is told of the one behind it."""
    if node is None:
        return None
    return neighbour(node if isinstance(node, Hop) else node.hop)
