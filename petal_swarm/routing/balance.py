"""Which servers should host other blocks than they do, and whether one of them may go there now.

Everybody makes the same plan from the same view, so all whom it names can move at once; what views
that are seconds old get wrong is caught by `check_move`, which each server asks before it goes. The
protocol between the two, and why no move opens a gap, is in `docs/routing.md`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
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

_ROUNDING = 1e-9

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

    `again`: it may if others, who have to give way to it, do; so it looks again when they had the time to.
    `witnesses` holds, for each block that it leaves, peers that go on serving it. One of each tuple must
    be known to live: a record outlives its peer by seconds.
    """

    refusal: str = ""
    again: bool = False
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

    Each is of a server in state "serving" that says it is movable. Every block keeps another server that
    serves and stays, and none gets weaker meanwhile than the weakest is now, even when all of them go at
    once. Servers on their way count as arrived for what they bring, and as gone for what they leave. The
    best move comes first; the same announcements, in any order, give the same moves.

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

    It relies on nobody who means to go as well. Of those who may not all go, the one with the lowest peer
    id waits for the others to give way; for what they bring to where they go, only lower ones count.

    Raises:
        ConfigError: the model has less than one block.
    """
    known = latest(announcements)
    if all(a.peer_id != peer_id or a.state != "serving" for a in known):
        return Check("it does not serve now")
    first = _Fleet([replace(a, moving_to=None) if a.peer_id >= peer_id else a for a in known], num_blocks)
    alone = _Fleet([replace(a, moving_to=None) if a.peer_id == peer_id else a for a in known], num_blocks)
    if peer_id not in first.peer_ids:
        return Check("it hosts blocks that the model does not have")
    me = first.peer_ids.index(peer_id)
    if len(target) != first.lengths[me] or target.end > num_blocks:
        return Check(f"it has no room for blocks {target}")
    if first.gains(np.array([me]))[0, target.start] <= _NEGLIGIBLE:
        return Check("it would not help any more")
    if len(thin := np.flatnonzero(first.thin()[me])):
        return Check(f"block {thin[0]} needs it where it is")
    me = alone.peer_ids.index(peer_id)
    if len(thin := np.flatnonzero(alone.thin()[me])):
        return Check(f"others mean to leave block {thin[0]} too", again=True)
    return Check(witnesses=tuple(alone.witnesses(int(b), me) for b in np.flatnonzero(alone.hosts[me])))


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
        self.mean = float(self.speeds @ self.lengths) / num_blocks
        self.hosts = _hosts([_place(a) for a in there], num_blocks)
        serves = np.array([a.state == "serving" for a in there], dtype=bool)
        #: The weakest block's throughput at present, while those who mean to go have not gone.
        self.floor = float(((self.speeds * serves) @ _hosts([a.span for a in there], num_blocks)).min())
        self.serving: Bools = serves & np.array([a.moving_to is None for a in there], dtype=bool)
        self.movable: Bools = self.serving & np.array([a.movable for a in there], dtype=bool)

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

    @property
    def serving_throughputs(self) -> Floats:
        """Of each block, by those who serve it now and stay."""
        sums: Floats = (self.speeds * self.serving) @ self.hosts
        return sums

    def quality(self) -> _Quality:
        throughputs = self.throughputs
        hosted = throughputs[throughputs > 0]
        return _Quality(self.num_blocks - len(hosted), float(hosted.min()) if len(hosted) else 0.0)

    def witnesses(self, block: int, me: int) -> tuple[str, ...]:
        """Some who serve `block`, and stay, besides server `me`."""
        peers = [i for i in np.flatnonzero(self.hosts[:, block] & self.serving) if i != me]
        return tuple(self.peer_ids[i] for i in peers[:WITNESSES])

    def move(self, index: int, start: int) -> None:
        blocks = np.arange(self.num_blocks)
        self.starts[index] = start
        self.hosts[index] = (start <= blocks) & (blocks < start + self.lengths[index])
        self.serving[index] = self.movable[index] = False

    def best_move(self) -> tuple[int, int] | None:
        """The server, and its new start, that lower the strain most; None if nobody lowers it noticeably."""
        rows = np.flatnonzero(self.movable & ~self.thin().any(axis=1))
        if not len(rows):
            return None
        gains = self.gains(rows)
        starts = gains.argmax(axis=1)
        best = gains[np.arange(len(rows)), starts]
        row = int(best.argmax())
        return (int(rows[row]), int(starts[row])) if best[row] > _NEGLIGIBLE else None

    def thin(self) -> Bools:
        """`[server, block]`: who hosts blocks that cannot spare it.

        Each must keep a server, and may not get weaker than the weakest is now: a move takes a while,
        and nobody is to be worse off for it meanwhile.
        """
        kept = self.serving_throughputs - self.speeds[:, None]
        thin: Bools = self.hosts & ((self.coverage < 2) | (kept < self.floor * (1 - _ROUNDING)))
        return thin

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


def _hosts(spans: Sequence[Span], num_blocks: int) -> Bools:
    """`[server, block]`: who hosts what."""
    blocks = np.arange(num_blocks)
    starts = np.array([span.start for span in spans], dtype=np.int64)
    ends = np.array([span.end for span in spans], dtype=np.int64)
    hosts: Bools = (starts[:, None] <= blocks) & (blocks < ends[:, None])
    return hosts


def _place(announcement: Announcement) -> Span:
    return announcement.moving_to or announcement.span
