"""Which servers a session goes through, how a long prompt is cut for them, and who hosts which blocks.

Pure functions of announcements and measurements: no I/O, no clock, no global random numbers. So
the same code runs in a client, in a server and in a simulator. The reasons are in `docs/routing.md`.
"""

from petal_swarm.routing.affinity import Held, goes_back
from petal_swarm.routing.balance import Check, Move, check_move, plan_moves
from petal_swarm.routing.blocks import coverage, format_blocks, latest, missing_blocks
from petal_swarm.routing.links import Measurements
from petal_swarm.routing.placement import block_throughputs, choose_span
from petal_swarm.routing.prefill import Stage, choose_chunk, stages_of
from petal_swarm.routing.route import Hop, Route, find_route, price_route

__all__ = [
    "Check",
    "Held",
    "Hop",
    "Measurements",
    "Move",
    "Route",
    "Stage",
    "block_throughputs",
    "check_move",
    "choose_chunk",
    "choose_span",
    "coverage",
    "find_route",
    "format_blocks",
    "goes_back",
    "latest",
    "missing_blocks",
    "plan_moves",
    "price_route",
    "stages_of",
]
