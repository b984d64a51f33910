"""The waiting line: a bounded number of answers at once, and a bounded, fair line of those who wait."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from petal_swarm.errors import ConfigError
from petal_swarm.gateway.refusals import LineFullError, WaitedTooLongError

#: How long an answer takes, before any was measured.
_GUESS_S = 10.0
#: What the last answer counts for in the mean.
_NEWEST = 0.1
#: Visitors of whom is known what they were let in for.
_REMEMBERED = 1024
_SHORTEST_RETRY_S = 1.0
_LONGEST_RETRY_S = 60.0


@dataclass(frozen=True, slots=True)
class Place:
    """`place` 1 is the next of `of` who wait; `expected_s` is a guess at how long that takes."""

    place: int
    of: int
    expected_s: float


@dataclass(frozen=True, slots=True)
class LineStats:
    """`running` and `room` count sequences, `waiting` requests."""

    room: int
    running: int
    waiting: int
    max_waiting: int


class _Waiter:
    __slots__ = ("admitted", "on_place", "tag", "told", "visitor", "weight")

    def __init__(
        self, visitor: str, weight: int, tag: int, admitted: asyncio.Future[None], on_place: OnPlace | None
    ) -> None:
        self.visitor = visitor
        self.weight = weight
        self.tag = tag
        self.admitted = admitted
        self.on_place = on_place
        self.told: tuple[int, int] | None = None


OnPlace = Callable[[Place], None]


class Line:
    """Room for `room` sequences at once, and for `max_waiting` requests that wait, `max_wait_s` at most.

    Next is the visitor with the fewest sequences under way, and among equals the one who was let in least:
    a visitor who sends a hundred requests waits behind himself. A request that does not fit is not passed
    by smaller ones, else it would wait for ever. When all places are taken, a visitor who has at least two
    more of them than the newcomer loses the last of his.

    Lives in one event loop, whose clock it uses.
    """

    def __init__(self, *, room: int, max_waiting: int, max_wait_s: float = 120.0) -> None:
        """Raises:
        ConfigError: there would be no room at all.
        """
        if room < 1 or max_waiting < 0:
            raise ConfigError(
                f"room for at least one answer is needed, got {room}, and {max_waiting} waiting"
            )
        self._room = room
        self._max_waiting = max_waiting
        self._max_wait_s = max_wait_s
        self._running: dict[str, int] = {}
        self._busy = 0
        self._num_running = 0
        #: Those of one visitor in the order they came.
        self._waiting: dict[str, list[_Waiter]] = {}
        self._num_waiting = 0
        #: Start-time fair queueing: what the visitor was let in for so far, on a scale that begins, for who
        #: comes after a pause, where the others are now.
        self._served: dict[str, int] = {}
        self._now_served = 0
        self._mean_s: float | None = None
        self._telling = False

    @property
    def stats(self) -> LineStats:
        """How full it is."""
        return LineStats(self._room, self._busy, self._num_waiting, self._max_waiting)

    @property
    def retry_after_s(self) -> float:
        """In how many seconds one who comes too early may find a place, as far as can be told."""
        return min(max(_SHORTEST_RETRY_S, self._expected_s(self._num_waiting + 1)), _LONGEST_RETRY_S)

    @asynccontextmanager
    async def enter(
        self, visitor: str, weight: int = 1, *, on_place: OnPlace | None = None
    ) -> AsyncIterator[None]:
        """Room for `weight` sequences, as long as the block lasts. Cancelling leaves the line.

        `on_place` is called whenever the place changes, from the event loop; not at all for who need not
        wait. It must not raise.

        Raises:
            ConfigError: that many never fit.
            LineFullError: there is no place to wait, or it was given to a visitor who had fewer of them.
            WaitedTooLongError: there was no room in time.
        """
        if not 1 <= weight <= self._room:
            raise ConfigError(f"at most {self._room} answers can be made at once here, got {weight}")
        if self._num_waiting or self._busy + weight > self._room:
            await self._wait(visitor, weight, on_place)
        else:
            self._let_in(visitor, weight, self._tag(visitor))
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        try:
            yield
        finally:
            self._measure(loop.time() - began_s)
            self._leave(visitor, weight)

    async def _wait(self, visitor: str, weight: int, on_place: OnPlace | None) -> None:
        if self._num_waiting >= self._max_waiting:
            self._make_place(visitor)
        own = self._waiting.setdefault(visitor, [])
        tag = own[-1].tag + own[-1].weight if own else self._tag(visitor)
        waiter = _Waiter(visitor, weight, tag, asyncio.get_running_loop().create_future(), on_place)
        own.append(waiter)
        self._num_waiting += 1
        self._tell_soon()
        try:
            async with asyncio.timeout(self._max_wait_s):
                await waiter.admitted
        except BaseException as error:
            admitted = waiter.admitted
            if admitted.done() and not admitted.cancelled() and admitted.exception() is None:
                self._leave(visitor, weight)
            else:
                self._give_up(waiter)
            if isinstance(error, TimeoutError):
                message = f"no room became free within {self._max_wait_s:.0f} s; try again later"
                raise WaitedTooLongError(message, retry_after_s=self.retry_after_s) from None
            raise

    def _make_place(self, visitor: str) -> None:
        """A place in a line that is full, from whoever has the most of them."""
        most = max(self._waiting.values(), key=len, default=[])
        if len(most) <= len(self._waiting.get(visitor, ())) + 1:
            raise self._full()
        last = most[-1]
        self._remove(last)
        if not last.admitted.done():  # else it gives up at this moment
            last.admitted.set_exception(self._full())

    def _full(self) -> LineFullError:
        return LineFullError(
            f"all {self._room} places are taken and {self._num_waiting} requests wait; try again later",
            retry_after_s=self.retry_after_s,
        )

    def _tag(self, visitor: str) -> int:
        return max(self._now_served, self._served.get(visitor, 0))

    def _let_in(self, visitor: str, weight: int, tag: int) -> None:
        self._now_served = max(self._now_served, tag)
        self._served.pop(visitor, None)
        self._served[visitor] = tag + weight
        if len(self._served) > _REMEMBERED:
            del self._served[next(iter(self._served))]
        self._running[visitor] = self._running.get(visitor, 0) + weight
        self._busy += weight
        self._num_running += 1

    def _leave(self, visitor: str, weight: int) -> None:
        self._busy -= weight
        self._num_running -= 1
        self._running[visitor] -= weight
        if not self._running[visitor]:
            del self._running[visitor]
        self._let_in_next()

    def _give_up(self, waiter: _Waiter) -> None:
        if waiter in self._waiting.get(waiter.visitor, ()):
            self._remove(waiter)
            self._let_in_next()

    def _remove(self, waiter: _Waiter) -> None:
        own = self._waiting[waiter.visitor]
        own.remove(waiter)
        if not own:
            del self._waiting[waiter.visitor]
        self._num_waiting -= 1
        self._tell_soon()

    def _let_in_next(self) -> None:
        while self._num_waiting:
            following = min(
                (own[0] for own in self._waiting.values()),
                key=lambda waiter: (self._running.get(waiter.visitor, 0), waiter.tag),
            )
            if self._busy + following.weight > self._room:
                return
            self._remove(following)
            if not following.admitted.done():  # else it gives up at this moment
                self._let_in(following.visitor, following.weight, following.tag)
                following.admitted.set_result(None)

    def _order(self) -> list[_Waiter]:
        """Who waits, as they would be let in if all answers took the same time."""
        keyed: list[tuple[int, int, int, _Waiter]] = []
        for visitor, own in self._waiting.items():
            ahead = self._running.get(visitor, 0)
            for waiter in own:
                keyed.append((ahead, waiter.tag, len(keyed), waiter))
                ahead += waiter.weight
        keyed.sort()
        return [waiter for *_, waiter in keyed]

    def _tell_soon(self) -> None:
        if not self._telling:
            self._telling = True
            asyncio.get_running_loop().call_soon(self._tell)

    def _tell(self) -> None:
        self._telling = False
        for number, waiter in enumerate(self._order(), start=1):
            news = (number, self._num_waiting)
            if waiter.on_place is not None and waiter.told != news:
                waiter.told = news
                waiter.on_place(Place(number, self._num_waiting, self._expected_s(number)))

    def _expected_s(self, place: int) -> float:
        mean_s = _GUESS_S if self._mean_s is None else self._mean_s
        return mean_s * place / max(1, self._num_running)

    def _measure(self, took_s: float) -> None:
        self._mean_s = took_s if self._mean_s is None else self._mean_s + _NEWEST * (took_s - self._mean_s)
