"""Milliseconds that `find_route` and `choose_span` take over seeded random swarms.

    python -m benchmarks.routing [--swarms 20] [--seed 0]

`wan`: spans of 8 to 20 blocks, servers up to 100 ms from the client. `lan`: the same within 1 ms and
with speeds that differ a hundredfold, which tempts routes to return to a server they left. `whole`:
every server hosts every block, the densest graph there is. `nested`: made to be slow, a fifth of the
servers hosts everything at a hundredth of the speed of the others, which host one block each, side by side.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from petal_swarm.routing import Measurements, choose_span, find_route
from petal_swarm.span import Span
from petal_swarm.wire.announcement import MAX_NEIGHBOURS, Announcement

BLOCKS = 70
STEP_BYTES = 28_672  # hidden size 14336 in bf16: BLOOM-176B


@dataclass(frozen=True)
class Kind:
    name: str
    diameter_s: float
    spans: tuple[int, int]
    block_times_s: tuple[float, float]
    slow_whole_servers: bool = False


KINDS = (
    Kind("wan", 0.1, (8, 20), (0.001, 0.01)),
    Kind("lan", 0.001, (8, 20), (0.0002, 0.02)),
    Kind("whole", 0.1, (BLOCKS, BLOCKS), (0.001, 0.01)),
    Kind("nested", 0.001, (1, 1), (0.01, 0.02), slow_whole_servers=True),
)


def random_swarm(kind: Kind, servers: int, rng: random.Random) -> tuple[list[Announcement], Measurements]:
    """Servers in a square with the client in its middle; each measured some of the others."""
    places = {f"peer{i:04}": (rng.uniform(-1, 1), rng.uniform(-1, 1)) for i in range(servers)}

    def rtt_s(a: tuple[float, float], b: tuple[float, float]) -> float:
        return kind.diameter_s / 2 * math.dist(a, b) * rng.uniform(1, 1.3)

    swarm: list[Announcement] = []
    for i, (peer_id, place) in enumerate(places.items()):
        slow = kind.slow_whole_servers and i % 5 == 0
        length = BLOCKS if slow else rng.randint(*kind.spans)
        anywhere = rng.randint(0, BLOCKS - length)
        # The first ten see to it that every block is served.
        span = choose_span(swarm, BLOCKS, length) if i < 10 else Span(anywhere, anywhere + length)
        neighbours = rng.sample([p for p in places if p != peer_id], min(MAX_NEIGHBOURS, servers - 1))
        swarm.append(
            Announcement(
                peer_id=peer_id,
                model="bloom",
                span=span,
                block_time_s=math.exp(rng.uniform(*map(math.log, kind.block_times_s))) * (100 if slow else 1),
                step_time_s=0.0003,
                queue_s=rng.choice([0.0, 0.0, 0.01]),
                bandwidth_bytes_per_s=rng.uniform(1e6, 1e8),
                next_rtts_s={p: rtt_s(place, places[p]) for p in neighbours},
            )
        )
    measured = {p: rtt_s(place, (0.0, 0.0)) for p, place in places.items() if rng.random() < 0.8}
    return swarm, Measurements(client_rtts_s=measured, default_rtt_s=kind.diameter_s)


def timed_ms(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) * 1e3


def report(what: str, times_ms: list[float]) -> None:
    print(f"{what:32}  median {statistics.median(times_ms):8.2f} ms   worst {max(times_ms):8.2f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--swarms", type=int, default=20, help="random swarms of each size and kind")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for servers in (10, 100, 1000):
        for kind in KINDS:
            routes_ms, spans_ms = [], []
            for i in range(args.swarms):
                swarm, known = random_swarm(kind, servers, random.Random(f"{args.seed} {i}"))
                routes_ms.append(
                    timed_ms(lambda: find_route(swarm, BLOCKS, measurements=known, step_bytes=STEP_BYTES))  # noqa: B023
                )
                spans_ms.append(timed_ms(lambda: choose_span(swarm, BLOCKS, 10)))  # noqa: B023
            size = f"{servers} x {BLOCKS} {kind.name}"
            report(f"find_route   {size}", routes_ms)
            report(f"choose_span  {size}", spans_ms)


if __name__ == "__main__":
    main()
