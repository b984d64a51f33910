"""Which blocks stay, and when the others come: against brute force, and a transfer that watches its slots."""

from __future__ import annotations

from itertools import combinations
from random import Random

import pytest

from petal_swarm.models.streaming import SLOTS, Streaming, streamed_places


class Watched:
    """Slots of which only what came last may be used, and only once it was waited for."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.nbytes = 0
        self.begun: list[int] = []
        self.fails = False
        self._coming: list[int | None] = [None] * slots
        self._there: list[int | None] = [None] * slots
        self._failed = [False] * slots

    def block(self, number, slot):
        return lambda: self._use(number, slot)

    def _use(self, number, slot):
        assert self._there[slot] == number, f"slot {slot} has {self._there[slot]}, not {number}"
        return number

    def begin(self, number, slot):
        self.begun.append(number)
        self._coming[slot], self._there[slot] = number, None
        self._failed[slot] = self.fails

    def wait(self, slot):
        assert self._coming[slot] is not None
        if self._failed[slot]:
            raise OSError("unplugged")
        self._there[slot] = self._coming[slot]


class Span:
    """`count` blocks, those at `places` streamed; a block returns its number among those, or None."""

    def __init__(self, count: int, places: tuple[int, ...], slots: int = SLOTS) -> None:
        self.transfer = Watched(slots)
        self.places = places
        self._count = count
        self._streaming = Streaming(places, self.transfer)
        stays = [lambda: None] * count
        self._blocks = [
            self._streaming.block(places.index(place)) if place in places else stays[place]
            for place in range(count)
        ]

    def walk(self, start: int = 0, stop: int | None = None):
        """The places of a pass, one for each `next`."""
        stop = self._count if stop is None else stop
        own = self._streaming.begin(self._blocks, start, stop)
        for place in range(start, stop):
            expected = self.places.index(place) if place in self.places else None
            assert own[place]() == expected
            yield place


def time_of_pass(count: int, places: tuple[int, ...], transfer_s: float, compute_s: float) -> float:
    """Of one pass after another: blocks come one at a time, and each is computed once it is there."""
    ready = [0.0] * SLOTS

    class Clocked(Watched):
        free = now = 0.0

        def begin(self, number, slot):
            self.free = max(self.free, self.now) + transfer_s
            ready[slot] = self.free

        def wait(self, slot):
            self.now = max(self.now, ready[slot])

    clock = Clocked(SLOTS)
    streaming = Streaming(places, clock)
    ends = []
    for _ in range(6):
        own = streaming.begin([None] * count, 0, count)
        for place in range(count):
            own[place]
            clock.now += compute_s
        ends.append(clock.now)
    return ends[-1] - ends[-2]


@pytest.mark.parametrize("count", [3, 5, 6, 8])
@pytest.mark.parametrize("transfer_s", [0.5, 1.3, 2.0, 4.0])
def test_no_choice_of_blocks_waits_much_less(count, transfer_s):
    for kept in range(count - SLOTS):
        chosen = time_of_pass(count, streamed_places(count, kept), transfer_s, 1.0)
        every = combinations(range(count), count - kept)
        best = min(time_of_pass(count, places, transfer_s, 1.0) for places in every)
        assert best <= chosen <= 1.04 * best


def test_transfers_that_are_slow_never_pause():
    places = streamed_places(24, 10)
    assert len(places) == 14
    assert time_of_pass(24, places, 3.0, 1.0) == pytest.approx(14 * 3.0)
    assert time_of_pass(24, places, 1.6, 1.0) == pytest.approx(24.0), "and fast ones cost nothing"


@pytest.mark.parametrize(("count", "kept"), [(n, k) for n in range(1, 12) for k in range(n)])
def test_places_are_as_many_as_do_not_stay(count, kept):
    places = streamed_places(count, kept)
    assert len(set(places)) == count - kept
    assert list(places) == sorted(places)
    assert set(places) <= set(range(count))


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("kept", range(6))
def test_each_block_comes_at_most_once_in_a_pass(slots, kept):
    span = Span(7, streamed_places(7, kept), slots)
    list(span.walk())
    for _ in range(2):
        before = len(span.transfer.begun)
        list(span.walk())
        comes = len(span.transfer.begun) - before
        assert comes <= 7 - kept
        # One that is no multiple leaves some slots to one block each.
        assert comes == 7 - kept or (7 - kept) % slots or 7 - kept == slots


def test_the_next_pass_finds_its_first_block_on_the_way():
    span = Span(6, (1, 3, 4, 5))
    list(span.walk())
    assert span.transfer.begun[-1] == 0


def test_a_pass_through_some_blocks_begins_with_the_first_of_them():
    span = Span(8, (0, 2, 3, 5, 6, 7))
    list(span.walk(2, 6))
    assert span.transfer.begun == [1, 2, 3]
    list(span.walk(2, 6))
    assert set(span.transfer.begun) == {1, 2, 3}
    begun = len(span.transfer.begun)
    assert list(span.walk(4, 5)) == [4], "one that stays"
    assert len(span.transfer.begun) == begun


@pytest.mark.parametrize("seed", range(10))
def test_passes_that_interrupt_each_other(seed):
    rng = Random(seed)
    span = Span(9, streamed_places(9, rng.randrange(7)), rng.choice([1, 2, 3]))
    passes = []
    for _ in range(300):
        if not passes or rng.random() < 0.1:
            start = rng.randrange(9)
            passes.append(span.walk(start, rng.randrange(start + 1, 10)))
        walking = rng.choice(passes)
        if next(walking, None) is None:
            passes.remove(walking)


def test_what_could_not_be_read_is_read_again():
    span = Span(4, (0, 1, 2))
    span.transfer.fails = True
    with pytest.raises(OSError, match="unplugged"):
        next(span.walk())
    span.transfer.fails = False
    list(span.walk())
    assert span.transfer.begun.count(0) == 3, "once in vain, once again, and ahead of the next pass"


def test_the_watch_notices_a_block_that_is_not_there():
    span = Span(4, (0, 1, 2, 3))
    next(span.walk())
    with pytest.raises(AssertionError, match="slot 0 has 0, not 2"):
        span._blocks[2]()
