"""Response headers that tell the route and the time spent on each hop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from petal_swarm.client.generation.pieces import HopTime, Progress
from petal_swarm.client.status import short_id

MAX_NAME_CHARACTERS = 32
MAX_HOPS = 24


def plain_name(hop: HopTime) -> str:
    """A peer's name, or the end of its id, as printable ASCII that needs no quoting: others chose it."""
    safe = "".join(c if " " < c < "\x7f" and c not in '"\\,;' else "?" for c in hop.name)
    return safe[:MAX_NAME_CHARACTERS] or f"..{short_id(hop.peer_id)}"


def route_header(route: Sequence[HopTime]) -> str:
    """`you -> alice 0:12 -> bob 12:24 -> you`."""
    hops = [f"{plain_name(hop)} {hop.start}:{hop.end}" for hop in route[:MAX_HOPS]]
    more = ["..."] if len(route) > MAX_HOPS else []
    return " -> ".join(["you", *hops, *more, "you"])


def timing_header(progress: Progress, queued_s: float) -> str:
    """`Server-Timing` so far: the wait for room, the time to the first token, and that of each hop."""
    marks = [f"queue;dur={queued_s * 1e3:.1f}"]
    if progress.first_token_s is not None:
        marks.append(f"first;dur={progress.first_token_s * 1e3:.1f}")
    for number, hop in enumerate(progress.route[:MAX_HOPS]):
        place = f"{plain_name(hop)} {hop.start}:{hop.end}"
        marks.append(f'hop{number};desc="{place}";dur={hop.total_s * 1e3:.1f}')
    return ", ".join(marks)


def swarm_headers(progress: Progress, queued_s: float) -> dict[str, str]:
    """Both, where a route is known."""
    headers = {"Server-Timing": timing_header(progress, queued_s)}
    if progress.route:
        headers["X-Swarm-Route"] = route_header(progress.route)
    return headers


def swarm_state(state: str, progress: Progress) -> dict[str, Any]:
    """The same for a page, as the field `swarm` of a chunk."""
    route = [
        {
            "peer_id": short_id(hop.peer_id),
            "name": hop.name,
            "blocks": [hop.start, hop.end],
            "step_ms": round(hop.step_s * 1e3, 3),
            "total_ms": round(hop.total_s * 1e3, 3),
        }
        for hop in progress.route
    ]
    return {
        "state": state,
        "route": route,
        "tokens_per_s": round(progress.tokens_per_s, 2),
        "first_token_s": None if progress.first_token_s is None else round(progress.first_token_s, 3),
        "prompt_tokens": progress.prompt_tokens,
        "new_tokens": progress.new_tokens,
        "repairs": progress.repairs,
    }
