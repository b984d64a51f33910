"""Which servers should host other blocks than they do, and whether one of them may go there now.

Everybody makes the same plan from the same view, so all whom it names can move at once; what views
that are seconds old get wrong is caught by `check_move`, which each server asks before it goes. The
protocol between the two, and why no move opens a gap, is in `docs/routing.md`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from petal_swarm.errors import ConfigError
from petal_swarm.routing.blocks import latest
from petal_swarm.routing.placement import speed_of
from petal_swarm.span import Span
from petal_swarm.wire.announcement import Announcement

THRESHOLD = 0.05
"""A plan must raise the weakest block's throughput by this part of it, or nobody moves."""

MAX_MOVES = 128
"""Of a plan. What more there is to do is planned again when these have gone."""

WITNESSES = 3
"""Servers of each block that are named to be asked whether they are alive, before one leaves it to them."""

_FLOOR = 0.03
"""Of the mean throughput, added to each: a block without a server is very bad, not infinitely."""

_LOW_POWER, _HIGH_POWER, _WEAK = 3, 4, 0.25
"""With a block below `_WEAK` of the mean the high power would drown all the others in rounding."""

_NEGLIGIBLE = 1e-3
"""A part of the strain too small to move for. It also keeps rounding from deciding anything."""

_GOOD_ENOUGH = 0.99
"""A plan ends where its weakest block has this part of the best that it would reach, with fewer moves."""

_FASTEST = 100.0
"""Times the median: what a server claims beyond is not believed."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Move:
    """A server should host `target` instead of what it hosts."""

    peer_id: str
    target: Span


@dataclass(frozen=True, slots=True)
class Check:
    """Whether a server may go: it may if there is no `refusal`, which is a reason to be read.

    `witnesses` holds, for each block that it leaves, peers that go on serving it. One of each tuple must
    be known to live: a record outlives its peer by seconds.
    """

    refusal: str = ""
    witnesses: tuple[tuple[str, ...], ...] = ()


def plan_moves(
    announcements: Iterable[Announcement],
    num_blocks: int,
    *,
    unmovable: Collection[str] = (),
    threshold: float = THRESHOLD,
    limit: int = MAX_MOVES,
) -> tuple[Move, ...]:
    """Moves that together leave fewer blocks without a server, or the weakest block stronger by `threshold`.

    Each is of a server in state "serving" that says it is movable, and leaves every block with another
    server that stays, even when all of them go at once. Servers on their way count as arrived for what
    they bring, and as gone for what they leave. The best move comes first; the same announcements, in
    any order, give the same moves.

    Args:
        announcements: all of the model, with the asker's own.
        unmovable: peers that did not go when they should have.

    Raises:
        ConfigError: the model has less than one block.
    """
    fleet = _Fleet(announcements, num_blocks)
    before = fleet.quality()
    # No plan can do better than to spread all there is evenly.
    if not before.gaps and before.weakest * (1 + threshold) >= fleet.mean:
        return ()
    fleet.movable &= np.array([peer_id not in unmovable for peer_id in fleet.peer_ids], dtype=bool)
    moves: list[Move] = []
    after: list[_Quality] = []
    while len(moves) < limit and (found := fleet.best_move()) is not None:
        index, start = found
        fleet.move(index, start)
        moves.append(Move(fleet.peer_ids[index], Span(start, start + int(fleet.lengths[index]))))
        after.append(fleet.quality())
    return tuple(moves[: _worthwhile(before, after, threshold)])


def check_move(announcements: Iterable[Announcement], peer_id: str, target: Span, num_blocks: int) -> Check:
    """Whether a server that has announced long enough that it means to host `target` may go now.

    Of servers that mean to move, those with lower peer ids go first: they count as gone, and as arrived
    where they go. Those with higher ones give way, and count as where they are.

    Raises:
        ConfigError: the model has less than one block.
    """
    known = latest(announcements)
    yielding = [replace(a, moving_to=None) if a.peer_id >= peer_id else a for a in known]
    fleet = _Fleet(yielding, num_blocks)
    if peer_id not in fleet.peer_ids:
        return Check("it is not announced itself")
    me = fleet.peer_ids.index(peer_id)
    if not fleet.serving[me]:
        return Check("it does not serve now")
    blocks = np.flatnonzero(fleet.hosts[me])
    alone = blocks[fleet.coverage[blocks] < 2]
    if len(alone):
        return Check(f"nobody else is sure to go on serving block {alone[0]}")
    if len(target) != fleet.lengths[me] or target.end > num_blocks:
        return Check(f"blocks {target} are not what it has room for")
    if fleet.gains(np.array([me]))[0, target.start] <= _NEGLIGIBLE:
        return Check("it would not help any more")
    staying = {a.peer_id for a in known if a.moving_to is None}
    return Check(witnesses=tuple(fleet.witnesses(int(block), me, staying) for block in blocks))


@dataclass(frozen=True, slots=True)
class _Quality:
    """Blocks that nobody hosts or will host, and the lowest throughput of the others."""

    gaps: int
    weakest: float


def _worthwhile(before: _Quality, after: list[_Quality], threshold: float) -> int:
    """How many of the moves, whose outcomes are `after`, are to be made."""
    if not after:
        return 0
    best = max(after, key=lambda quality: (-quality.gaps, quality.weakest))
    if best.gaps > before.gaps or (
        best.gaps == before.gaps and best.weakest < before.weakest * (1 + threshold)
    ):
        return 0
    enough = _GOOD_ENOUGH * best.weakest
    return 1 + next(i for i, q in enumerate(after) if q.gaps == best.gaps and q.weakest >= enough)


class _Fleet:
    """The servers as arrays, and what they add up to. Those on their way count as arrived."""

    def __init__(self, announcements: Iterable[Announcement], num_blocks: int) -> None:
        if num_blocks < 1:
            raise ConfigError(f"a model has at least one block, got {num_blocks}")
        there = [a for a in latest(announcements) if a.state != "left" and _place(a).end <= num_blocks]
        self.num_blocks = num_blocks
        self.peer_ids = [a.peer_id for a in there]
        self.starts = np.array([_place(a).start for a in there], dtype=np.int64)
        self.lengths = np.array([len(_place(a)) for a in there], dtype=np.int64)
        speeds = np.array([speed_of(a) for a in there], dtype=np.float64)
        self.speeds: Floats = np.minimum(speeds, _FASTEST * np.median(speeds)) if there else speeds
        self.serving = np.array([a.state == "serving" and a.moving_to is None for a in there], dtype=bool)
        self.movable = np.array([a.movable for a in there], dtype=bool) & self.serving
        blocks = np.arange(num_blocks)
        self.hosts: Bools = (self.starts[:, None] <= blocks) & (
            blocks < (self.starts + self.lengths)[:, None]
        )
        self.mean = float(self.speeds @ self.lengths) / num_blocks

    @property
    def throughputs(self) -> Floats:
        """Of each block. A sum that nobody adds to is exactly 0."""
        sums: Floats = self.speeds @ self.hosts
        return sums

    @property
    def coverage(self) -> Ints:
        """For each block, the servers that serve it now and stay."""
        counts: Ints = self.serving.astype(np.int64) @ self.hosts
        return counts

    def quality(self) -> _Quality:
        throughputs = self.throughputs
        hosted = throughputs[throughputs > 0]
        return _Quality(self.num_blocks - len(hosted), float(hosted.min()) if len(hosted) else 0.0)

    def witnesses(self, block: int, me: int, staying: Collection[str]) -> tuple[str, ...]:
        """Some who serve `block` besides server `me`; first those who do not mean to leave at all."""
        peers = [self.peer_ids[i] for i in np.flatnonzero(self.hosts[:, block] & self.serving) if i != me]
        return tuple(sorted(peers, key=lambda peer_id: peer_id not in staying)[:WITNESSES])

    def move(self, index: int, start: int) -> None:
        blocks = np.arange(self.num_blocks)
        self.starts[index] = start
        self.hosts[index] = (start <= blocks) & (blocks < start + self.lengths[index])
        self.serving[index] = self.movable[index] = False

    def best_move(self) -> tuple[int, int] | None:
        """The server, and its new start, that lower the strain most; None if nobody lowers it noticeably."""
        thin = self.coverage < 2
        rows = np.flatnonzero(self.movable & ~(self.hosts & thin).any(axis=1))
        if not len(rows):
            return None
        gains = self.gains(rows)
        starts = gains.argmax(axis=1)
        best = gains[np.arange(len(rows)), starts]
        row = int(best.argmax())
        return (int(rows[row]), int(starts[row])) if best[row] > _NEGLIGIBLE else None

    def gains(self, rows: Ints) -> Floats:
        """`[i, j]`: by which part the strain falls if server `rows[i]` goes to block j; -inf if it cannot."""
        hosts, speeds, lengths = self.hosts[rows], self.speeds[rows, None], self.lengths[rows, None]
        throughputs = self.throughputs
        power = _LOW_POWER if throughputs.min() < _WEAK * self.mean else _HIGH_POWER
        present, without = self._strain(throughputs, power), self._without(throughputs, hosts, speeds)
        strain = self._strain(without, power)
        loss = ((strain - present) * hosts).sum(axis=1, keepdims=True)
        relief = np.zeros((len(rows), self.num_blocks + 1))
        np.cumsum(strain - self._strain(without + speeds, power), axis=1, out=relief[:, 1:])
        ends = np.arange(self.num_blocks) + lengths
        fits = ends <= self.num_blocks
        windows = np.take_along_axis(relief, np.where(fits, ends, 0), axis=1) - relief[:, :-1]
        gains: Floats = np.where(fits, (windows - loss) / present.sum(), -np.inf)
        return gains

    def _without(self, throughputs: Floats, hosts: Bools, speeds: Floats) -> Floats:
        """Throughputs without one server each."""
        # What rounding leaves of a block's only server is not throughput.
        alone = hosts & (self.hosts.sum(axis=0) == 1)
        left: Floats = np.where(alone, 0.0, np.maximum(throughputs - speeds * hosts, 0.0))
        return left

    def _strain(self, throughputs: Floats, power: int) -> Floats:
        """For each block, how much it holds the swarm up: `2 ** power` is the exponent of its weakness.

        The weakest count nearly alone, but how many they are counts, and then the next-weakest.
        """
        strain: Floats = self.mean / (throughputs + _FLOOR * self.mean)
        for _ in range(power):
            strain = strain * strain
        return strain


def _place(announcement: Announcement) -> Span:
    return announcement.moving_to or announcement.span
