"""Simulated swarms that rebalance: the weakest block's throughput against the optimum, moves, gaps.

    python -m benchmarks.rebalancing [--scenario equal ...] [--seeds 3] [--rest-minutes 60]

Rebalancer, announcer, planning and checks are the real ones, on a virtual clock. Simulated are the
network, with a directory in which an announcement needs up to 2 s to be seen, a lookup up to 1 s more, and
one in fifty announcements is lost; and the servers: draining takes 1 to 5 s, loading 5 to 15 s, and the speed
they announce is off by 5% (standard deviation), another 5% each time. Only servers that serve count for what
the swarm has; all that live, for what it could have.

No placement can pass the `bound`: capacity x speed of all servers, summed, / blocks. The `best placement
found` is that of fresh greedy placements in several orders, each improved by moves. A gap is counted against
a move if a block of the mover has no other live, serving server at the moment it starts to drain.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import math
import random
import time
from collections.abc import Collection, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from petal_swarm.directory.announcer import Announcer
from petal_swarm.errors import NetworkError
from petal_swarm.net.memory import VirtualClockLoop
from petal_swarm.routing import block_throughputs, choose_span, coverage, plan_moves
from petal_swarm.server.rebalancer import Rebalancer, Timing
from petal_swarm.span import Span
from petal_swarm.wire.announcement import Announcement

BLOCKS = 70
MODEL = "simulated"
SEEN_AFTER_S = (0.2, 2.0)
LOOKUP_S = (0.1, 1.0)
PING_S = (0.02, 0.3)
PING_TIMEOUT_S = 2.0
LOST = 0.02
DRAIN_S = (1.0, 5.0)
LOAD_S = (5.0, 15.0)
NOISE = 0.05
TARGET = 0.9


@dataclass(frozen=True)
class Scenario:
    """`leave` go at once after `settle_s`; `events_per_hour` of joins, leaves and crashes go on throughout.

    `worst`: those who leave are the hosts of the first blocks, not any.
    """

    servers: int
    uneven: bool = False
    leave: float = 0.25
    crash: bool = True
    worst: bool = False
    events_per_hour: float = 0.0
    settle_s: float = 120.0


SCENARIOS = {
    "equal": Scenario(200),
    "farewell": Scenario(200, crash=False),
    "worst": Scenario(200, worst=True),
    "uneven": Scenario(200, uneven=True),
    "small": Scenario(40, uneven=True),
    "churn": Scenario(1000, uneven=True, events_per_hour=600),
}


@dataclass
class World:
    """What is true, and what the directory tells of it."""

    scenario: Scenario
    rng: random.Random
    servers: dict[str, SimulatedServer] = field(default_factory=dict)
    records: dict[str, list[tuple[float, float, Announcement]]] = field(default_factory=dict)
    moves: list[float] = field(default_factory=list)
    refused: int = 0
    gaps_by_moves: int = 0
    gaps_by_leaving: int = 0
    joined: int = 0

    @property
    def now(self) -> float:
        return asyncio.get_running_loop().time()

    def truth(self) -> list[Announcement]:
        return [server.true() for server in self.servers.values()]

    def weakest(self) -> float:
        return min(block_throughputs([a for a in self.truth() if a.state == "serving"], BLOCKS))

    def gaps(self) -> int:
        return coverage(self.truth(), BLOCKS).count(0)


class SlowDirectory:
    """One peer's view: announcements arrive late, or not at all."""

    def __init__(self, world: World) -> None:
        self._world = world

    async def announce(self, announcement: Announcement, *, ttl_s: float) -> None:
        world = self._world
        if world.rng.random() < LOST:
            raise NetworkError("lost")
        seen_at = world.now + world.rng.uniform(*SEEN_AFTER_S)
        history = world.records.setdefault(announcement.peer_id, [])
        if history and history[-1][0] > seen_at:
            seen_at = history[-1][0]
        history.append((seen_at, world.now + ttl_s, announcement))
        del history[:-4]

    async def lookup(self, model: str) -> list[Announcement]:
        world = self._world
        as_of = world.now
        await asyncio.sleep(world.rng.uniform(*LOOKUP_S))
        found = []
        for history in world.records.values():
            for seen_at, expires_at, announcement in reversed(history):
                if seen_at <= as_of:
                    if expires_at > world.now and announcement.state != "left":
                        found.append(announcement)
                    break
        return found

    async def records(self, model: str) -> list[bytes]:
        return []

    async def close(self) -> None:
        pass


class SimulatedServer:
    """A `Movable` whose blocks are numbers."""

    def __init__(self, world: World, capacity: int, block_time_s: float) -> None:
        self._world = world
        self.peer_id = f"peer-{world.rng.getrandbits(64):016x}"
        self.capacity = min(capacity, BLOCKS)
        self._block_time_s = block_time_s
        self._rng = random.Random(self.peer_id)
        self._directory = SlowDirectory(world)
        self._span = Span(0, self.capacity)
        self._state = "joining"
        self._intention: Span | None = None
        self._moved_at = -math.inf
        self._timing = Timing()
        self._announcer: Announcer | None = None
        self._tasks: list[asyncio.Task[Any]] = []

    @property
    def speed(self) -> float:
        return 1 / (self.capacity * self._block_time_s)

    def true(self) -> Announcement:
        return Announcement(
            self.peer_id, MODEL, self._span, state=self._state, block_time_s=self._block_time_s, movable=True
        )

    def announcement(self) -> Announcement:
        return replace(
            self.true(),
            block_time_s=self._block_time_s * math.exp(self._rng.gauss(0, NOISE)),
            movable=self._world.now - self._moved_at > self._timing.stay_s,
            moving_to=self._intention,
        )

    async def others(self) -> list[Announcement]:
        return [a for a in await self._directory.lookup(MODEL) if a.peer_id != self.peer_id]

    async def alive(self, peers: Sequence[Announcement]) -> Collection[str]:
        await asyncio.sleep(self._world.rng.uniform(*PING_S))
        alive = {peer.peer_id for peer in peers} & set(self._world.servers)
        await asyncio.sleep(0 if len(alive) == len(peers) else PING_TIMEOUT_S)
        return alive

    async def intend(self, target: Span | None) -> bool:
        self._world.refused += target is None
        self._intention = target
        return await self._announce()

    async def move(self, target: Span) -> None:
        world = self._world
        others = coverage([a for a in world.truth() if a.peer_id != self.peer_id], BLOCKS)
        world.gaps_by_moves += sum(others[block] == 0 for block in self._span.blocks())
        world.moves.append(world.now)
        self._span, self._state, self._intention = target, "joining", None
        await self._announce()
        await asyncio.sleep(world.rng.uniform(*DRAIN_S))
        await self._load()
        self._moved_at = world.now

    def begin(self, span: Span) -> None:
        """Serve `span` as if from long ago."""
        self._span, self._state = span, "serving"
        self._world.servers[self.peer_id] = self
        history = self._world.records.setdefault(self.peer_id, [])
        history.append((self._world.now, self._world.now + 12.0, self.announcement()))
        self._tasks.append(asyncio.create_task(self._live()))

    async def join(self) -> None:
        """Come as a new server does."""
        self._span = choose_span(await self.others(), BLOCKS, self.capacity, tie_break=self._rng)
        self._world.servers[self.peer_id] = self
        self._world.joined += 1
        self._tasks.append(asyncio.create_task(self._live(loads=True)))

    async def leave(self, *, crash: bool) -> None:
        world = self._world
        before = world.gaps()
        del world.servers[self.peer_id]
        world.gaps_by_leaving += max(0, world.gaps() - before)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._announcer is not None:
            if crash:
                assert self._announcer._task is not None
                self._announcer._task.cancel()
            else:
                await self._announcer.leave()

    async def _live(self, *, loads: bool = False) -> None:
        await asyncio.sleep(0 if loads else self._world.rng.uniform(0, 4))
        self._announcer = Announcer(self._directory, self.announcement())
        await self._announcer.start()
        if loads:
            await self._load()
        rebalancer = Rebalancer(
            self, BLOCKS, rng=self._rng, now=asyncio.get_running_loop().time, timing=self._timing
        )
        await asyncio.gather(rebalancer.run(), self._update())

    async def _update(self) -> None:
        while self._announcer is not None:
            await asyncio.sleep(1)
            self._announcer.update(self.announcement())

    async def _load(self) -> None:
        await asyncio.sleep(self._world.rng.uniform(*LOAD_S))
        self._state = "serving"
        await self._announce()

    async def _announce(self) -> bool:
        assert self._announcer is not None
        self._announcer.update(self.announcement())
        return await self._announcer.refresh_now()


def bound(servers: Sequence[Announcement]) -> float:
    return sum(1 / a.block_time_s for a in servers) / BLOCKS


def best_found(servers: Sequence[Announcement], rng: random.Random, tries: int = 6) -> float:
    """The weakest block's throughput in the best placement of these servers that a search finds."""
    best = 0.0
    for attempt in range(tries):
        order = list(servers)
        rng.shuffle(order)
        if attempt % 2:
            order.sort(key=lambda a: -len(a.span))
        placed: list[Announcement] = []
        for server in order:
            span = choose_span(placed, BLOCKS, len(server.span))
            placed.append(replace(server, span=span, state="serving", movable=True, moving_to=None))
        for _ in range(20):
            best = max(best, min(block_throughputs(placed, BLOCKS)))
            targets = {m.peer_id: m.target for m in plan_moves(placed, BLOCKS, threshold=1e-3, limit=1000)}
            if not targets:
                break
            placed = [replace(a, span=targets.get(a.peer_id, a.span)) for a in placed]
    return best


def new_server(world: World) -> SimulatedServer:
    rng = world.rng
    if world.scenario.uneven:
        return SimulatedServer(
            world, rng.randint(4, 24), math.exp(rng.uniform(math.log(0.002), math.log(0.05)))
        )
    return SimulatedServer(world, 10, 0.01)


def populate(world: World) -> None:
    placed: list[Announcement] = []
    for _ in range(world.scenario.servers):
        server = new_server(world)
        span = choose_span(placed, BLOCKS, server.capacity, tie_break=random.Random(server.peer_id))
        server.begin(span)
        placed.append(server.true())


async def churn(world: World) -> None:
    """Joins as often as departures; half of those who go do not say so."""
    while True:
        await asyncio.sleep(world.rng.expovariate(world.scenario.events_per_hour / 3600))
        if world.rng.random() < 0.5:
            await new_server(world).join()
        else:
            server = world.servers[world.rng.choice(sorted(world.servers))]
            await server.leave(crash=world.rng.random() < 0.5)


async def depart(world: World, seed: int) -> None:
    """A part of the swarm goes at once."""
    going = sorted(world.servers)
    if world.scenario.worst:
        going.sort(key=lambda peer_id: world.servers[peer_id].true().span.start)
    else:
        random.Random(f"{seed} departures").shuffle(going)
    going = going[: round(world.scenario.leave * len(going))]
    await asyncio.gather(*(world.servers[peer_id].leave(crash=world.scenario.crash) for peer_id in going))


@dataclass
class Result:
    """`part` holds, for each second since the departure, the weakest block's part of the bound."""

    part: list[float]
    best_of_bound: float
    before: float
    moves: int
    moves_per_server_hour_at_rest: float
    withdrawn: int
    gaps_by_moves: int
    gaps_by_leaving: int
    took_s: float

    def reached_s(self) -> float:
        """When it had 90% of the best placement found, for good in the first two minutes; inf if never."""
        goal = TARGET * self.best_of_bound
        below = [second for second, part in enumerate(self.part[:120]) if part < goal]
        return below[-1] + 1 if below and below[-1] < 119 else math.inf if below else 0


async def simulate(scenario: Scenario, seed: int, rest_s: float) -> Result:
    started = time.perf_counter()
    world = World(scenario, random.Random(f"{seed}"))
    populate(world)
    background = [asyncio.create_task(churn(world))] if scenario.events_per_hour else []
    await asyncio.sleep(scenario.settle_s)
    before = world.weakest() / bound(world.truth())
    moves_before = len(world.moves)
    await depart(world, seed)
    best = best_found(world.truth(), random.Random(seed)) / bound(world.truth())
    part = []
    for _ in range(121):
        part.append(world.weakest() / bound(world.truth()))
        await asyncio.sleep(1)
    await asyncio.sleep(180)
    rest_began, moved = world.now, len(world.moves)
    servers = len(world.servers)
    await asyncio.sleep(rest_s)
    rate = (len(world.moves) - moved) / servers / ((world.now - rest_began) / 3600)
    for task in [*background, *(t for s in world.servers.values() for t in s._tasks)]:
        task.cancel()
    return Result(
        part=part,
        best_of_bound=best,
        before=before,
        moves=moved - moves_before,
        moves_per_server_hour_at_rest=rate,
        withdrawn=world.refused,
        gaps_by_moves=world.gaps_by_moves,
        gaps_by_leaving=world.gaps_by_leaving,
        took_s=time.perf_counter() - started,
    )


def run(work: Coroutine[Any, Any, Result]) -> Result:
    loop = VirtualClockLoop()
    try:
        return loop.run_until_complete(work)
    finally:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


def report(name: str, seed: int, result: Result) -> None:
    curve = "  ".join(f"{second} s {result.part[second]:.2f}" for second in (0, 10, 20, 30, 40, 60, 90, 120))
    print(f"{name}, seed {seed}: before {result.before:.2f}; after: {curve} of the bound")
    of_best = result.part[60] / result.best_of_bound
    print(
        f"    best placement found {result.best_of_bound:.3f} of the bound; at 60 s {of_best:.1%} of it,"
        f" and from {result.reached_s():g} s on at least {TARGET:.0%}"
    )
    print(
        f"    {result.moves} moves in 5 minutes, then {result.moves_per_server_hour_at_rest:.3f} a server and"
        f" hour; {result.withdrawn} taken back; gaps opened by moves {result.gaps_by_moves},"
        f" by departures {result.gaps_by_leaving}; {result.took_s:.0f} s to simulate",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenario", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rest-minutes", type=float, default=60.0)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    for name in arguments.scenario:
        for seed in range(arguments.seeds):
            report(name, seed, run(simulate(SCENARIOS[name], seed, arguments.rest_minutes * 60)))


if __name__ == "__main__":
    main()
