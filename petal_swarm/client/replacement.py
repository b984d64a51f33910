"""Which hops take the place of those that are gone, in a ring or a lane."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Protocol, TypeVar

from petal_swarm.errors import IdleError, PetalSwarmError
from petal_swarm.routing.route import Hop, Route
from petal_swarm.span import Span


class Replaceable(Protocol):
    """An open hop; `error` says why it is gone, once it is."""

    hop: Hop
    error: PetalSwarmError | None

    @property
    def peer_id(self) -> str: ...


class FindPart(Protocol):
    """As `View.find_part`, with the model and what it is for."""

    async def __call__(
        self,
        span: Span,
        *,
        avoid: frozenset[str],
        like: Sequence[Hop],
        min_batch_tokens: int,
        fresh: bool,
        before: str | None,
        after: str | None,
    ) -> Route: ...


M = TypeVar("M", bound=Replaceable)


async def plan_replacement(
    members: Sequence[M], find_part: FindPart, *, min_batch_tokens: int, fresh: bool
) -> list[M | Hop]:
    """The hops that live, and between them those that are to be opened.

    Who was only idle for too long may be among the new ones.

    Raises:
        MissingBlocksError: nobody else serves the blocks of a hop that is gone.
    """
    plan: list[M | Hop] = []
    avoid = {member.peer_id for member in members if not isinstance(member.error, IdleError)}
    runs = [(gone, list(run)) for gone, run in groupby(members, lambda m: m.error is not None)]
    for number, (gone, run) in enumerate(runs):
        if not gone:
            plan += run
            continue
        after = runs[number + 1][1][0].peer_id if number + 1 < len(runs) else None
        route = await find_part(
            Span(run[0].hop.span.start, run[-1].hop.span.end),
            avoid=frozenset(avoid),
            like=[member.hop for member in run],
            min_batch_tokens=min_batch_tokens,
            fresh=fresh,
            before=plan[-1].peer_id if plan else None,
            after=after,
        )
        plan += route.hops
        avoid.update(hop.peer_id for hop in route.hops)
    return plan
