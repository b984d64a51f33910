"""Whether a conversation goes back to the servers that hold its beginning, or along the fastest route."""

from __future__ import annotations

from dataclasses import dataclass

from petal_swarm.routing.route import Hop, Route

#: Nobody knows how long an answer will be: a faster route is taken to save its time in so many steps.
ASSUMED_STEPS = 128


@dataclass(frozen=True, slots=True)
class Held:
    """Consecutive hops, and how many leading tokens of a prompt are probably in the KV caches of all."""

    hops: tuple[Hop, ...]
    tokens: int


def goes_back(held_tokens: int, again: Route, fastest: Route, steps: int = ASSUMED_STEPS) -> bool:
    """Whether computing `held_tokens` anew costs at least what `steps` save along the fastest route.

    `again` is the route of those who hold them, at today's figures. All its hops would be lost together:
    pages behind the first hop are filed under the peer id of the hop before.
    """
    saved_s = held_tokens * sum(hop.token_s for hop in again.hops)
    return steps * (again.cost_s - fastest.cost_s) <= saved_s
