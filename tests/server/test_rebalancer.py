"""When a server looks, what it says before it moves, and when it takes that back; on a virtual clock."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Coroutine, Sequence
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from benchmarks.rebalancing import Scenario, run, simulate
from petal_swarm.errors import PeerUnreachableError
from petal_swarm.net.memory import VirtualClockLoop
from petal_swarm.server.rebalancer import MAX_CHECKS, Rebalancer, Timing
from petal_swarm.span import Span
from petal_swarm.wire.announcement import Announcement

GAP = Span(4, 8)
TIMING = Timing()


def host(peer_id: str, start: int = 0, end: int = 4, **fields: Any) -> Announcement:
    return Announcement(
        peer_id, "model", Span(start, end), **{"block_time_s": 0.01, "movable": True, **fields}
    )


class Stage:
    """A server "b" of `0:4` among `swarm`, whose actions are written down with their time."""

    def __init__(self, swarm: Sequence[Announcement]) -> None:
        self.swarm = list(swarm)
        self.me = host("b")
        self.log: list[tuple[float, object]] = []
        self.dead: set[str] = set()
        self.asked: set[str] = set()
        self.unheard = False
        self.on_intention: Callable[[], None] = lambda: None
        self.lookup_s = 0.1
        self.ping_s = 0.0
        self.failing_lookups: set[int] = set()
        self.lookups = 0

    def announcement(self) -> Announcement:
        return self.me

    async def others(self) -> list[Announcement]:
        self.lookups += 1
        if self.lookups in self.failing_lookups:
            raise PeerUnreachableError("nobody answers")
        await asyncio.sleep(self.lookup_s)
        return self.swarm.copy()

    async def alive(self, peers: Sequence[Announcement]) -> Collection[str]:
        self.asked |= {peer.peer_id for peer in peers}
        await asyncio.sleep(self.ping_s)
        return {peer.peer_id for peer in peers} - self.dead

    async def intend(self, target: Span | None) -> bool:
        self._write(("intends", target))
        self.me = replace(self.me, moving_to=target)
        if target is not None:
            self.on_intention()
        return not self.unheard

    async def move(self, target: Span) -> None:
        self._write(("moves", target))
        self.me = replace(self.me, span=target, moving_to=None, movable=False)

    @property
    def actions(self) -> list[object]:
        return [action for _, action in self.log]

    def _write(self, action: object) -> None:
        self.log.append((asyncio.get_running_loop().time(), action))


def play(stage: Stage, seconds: float, *also: Coroutine[Any, Any, None]) -> Stage:
    """Let the rebalancer run for so long."""

    async def work() -> None:
        loop = asyncio.get_running_loop()
        rebalancer = Rebalancer(stage, 8, rng=Random(0), now=loop.time)
        running = asyncio.create_task(rebalancer.run())
        await asyncio.wait({running, *map(asyncio.ensure_future, also)}, timeout=seconds)
        if running.done():
            running.result()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    loop = VirtualClockLoop()
    try:
        loop.run_until_complete(work())
    finally:
        loop.close()
    return stage


NEEDED = [host("c"), host("d", movable=False)]


def test_it_says_so_waits_looks_again_and_goes() -> None:
    stage = play(Stage(NEEDED), 100)
    assert stage.actions == [("intends", GAP), ("moves", GAP)]
    (said_s, _), (went_s, _) = stage.log
    assert TIMING.look_s * 0.5 <= said_s <= TIMING.look_s * 1.7
    assert went_s - said_s == pytest.approx(TIMING.notice_s + stage.lookup_s, abs=0.01)
    assert stage.asked == {"c", "d"}


@pytest.mark.parametrize(
    "swarm",
    [
        [host("d", movable=False)],
        [host("c", movable=False), host("d", 4, 8, state="joining")],
        [host("a"), host("d", movable=False)],
    ],
    ids=["it is needed", "another comes", "another is to go"],
)
def test_it_stays(swarm: list[Announcement]) -> None:
    if swarm[0].peer_id == "d":
        swarm = [replace(swarm[0], span=Span(4, 8))]
    assert play(Stage(swarm), TIMING.patience_s - 10).actions == []


def test_nobody_is_waited_for_for_ever() -> None:
    """ "a" should go, and does not."""
    stage = play(Stage([host("a"), host("d", movable=False)]), 200)
    assert stage.actions == [("intends", GAP), ("moves", GAP)]
    assert TIMING.patience_s < stage.log[0][0] < TIMING.patience_s + 2 * TIMING.max_look_s


def test_it_takes_back_what_has_become_needless() -> None:
    stage = Stage(NEEDED)
    stage.on_intention = lambda: stage.swarm.extend(host(p, 4, 8, state="joining") for p in "ae")
    assert play(stage, 100).actions == [("intends", GAP), ("intends", None)]


def test_it_does_not_leave_its_blocks_to_the_dead() -> None:
    stage = Stage(NEEDED)
    stage.dead = {"c", "d"}
    actions = play(stage, 30).actions
    assert actions[:2] == [("intends", GAP), ("intends", None)]
    assert all(kind == "intends" for kind, _ in actions)  # type: ignore[misc]
    one_dead = Stage(NEEDED)
    one_dead.dead = {"d"}
    assert ("moves", GAP) in play(one_dead, 30).actions


def test_what_nobody_heard_is_not_done() -> None:
    stage = Stage(NEEDED)
    stage.unheard = True
    assert set(play(stage, 60).actions) == {("intends", GAP), ("intends", None)}


def test_it_does_not_go_by_an_old_view() -> None:
    stage = Stage(NEEDED)

    def slow() -> None:
        stage.lookup_s = 100.0

    stage.on_intention = slow
    assert play(stage, 20).actions == [("intends", GAP), ("intends", None)]


def test_it_does_not_go_when_asking_took_long() -> None:
    stage = Stage(NEEDED)
    stage.ping_s = TIMING.late_s
    assert play(stage, 20).actions == [("intends", GAP), ("intends", None)]


def test_a_directory_that_fails_ends_nothing() -> None:
    stage = Stage(NEEDED)
    stage.failing_lookups = {1, 3}  # the second finds that it should go, the third is after the notice
    assert play(stage, 100).actions == [("intends", GAP), ("intends", None), ("intends", GAP), ("moves", GAP)]


@pytest.mark.parametrize("yields", [True, False])
def test_it_waits_for_those_who_have_to_give_way(yields: bool) -> None:
    """ "c" means to go as well, and there is nobody else. It says so at the same moment."""
    stage = Stage([host("c")])

    def both() -> None:
        stage.swarm = [replace(host("c"), moving_to=GAP)]
        asyncio.get_running_loop().call_later(TIMING.notice_s + 1, answer)

    def answer() -> None:
        if yields:
            stage.swarm = [host("c")]

    stage.on_intention = both
    seconds = 10 + MAX_CHECKS * TIMING.notice_s
    play(stage, seconds)
    assert stage.actions[:2] == [
        ("intends", GAP),
        ("moves" if yields else "intends", GAP if yields else None),
    ]
    assert stage.log[1][0] - stage.log[0][0] > 1.5 * TIMING.notice_s


def test_after_a_move_it_stays_unless_there_is_a_gap() -> None:
    stage = Stage([*(host(f"d{i}", movable=False) for i in range(4)), host("e", 4, 8)])
    stage.me = replace(stage.me, movable=False)
    assert play(stage, 100).actions == []
    stage.swarm.pop()
    assert play(stage, 30).actions == [("intends", GAP), ("moves", GAP)]


def test_a_server_that_does_not_serve_does_nothing() -> None:
    stage = Stage(NEEDED)
    stage.me = replace(stage.me, state="joining")
    assert play(stage, 100).actions == []


def test_a_large_swarm_is_looked_at_less_often() -> None:
    few, many = (Stage([host(f"c{i:03}", 0, 8, movable=False) for i in range(n)]) for n in (2, 600))
    few.me = many.me = host("b", 0, 8)
    assert play(few, 600).lookups > 2 * play(many, 600).lookups > 20


@pytest.mark.parametrize("uneven", [False, True])
def test_a_simulated_swarm_recovers_without_a_gap_and_comes_to_rest(uneven: bool) -> None:
    scenario = Scenario(60, uneven=uneven, settle_s=30.0)
    result = run(simulate(scenario, seed=1, rest_s=300.0))
    assert result.gaps_by_moves == 0
    assert result.part[60] >= 0.9 * result.best_of_bound
    assert result.moves > 0
    assert result.moves_per_server_hour_at_rest <= 2
