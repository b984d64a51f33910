"""Who is let in, when, and what those are told who wait; on a virtual clock."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

import pytest

from petal_swarm.errors import ConfigError
from petal_swarm.gateway.line import Line, Place
from petal_swarm.gateway.refusals import LineFullError, WaitedTooLongError
from petal_swarm.net.memory import VirtualClockLoop


def run(work: Coroutine[Any, Any, Any]) -> Any:
    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        return runner.run(work)


class Visits:
    """Visits of a line, each `took_s` long; `log` has who was let in, in order."""

    def __init__(self, line: Line, took_s: float = 1.0) -> None:
        self.line = line
        self.took_s = took_s
        self.log: list[str] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.most_running = 0

    async def visit(self, visitor: str, weight: int = 1, **options: Any) -> None:
        async with self.line.enter(visitor, weight, **options):
            self.log.append(visitor)
            self.most_running = max(self.most_running, self.line.stats.running)
            await asyncio.sleep(self.took_s)

    def start(self, visitor: str, weight: int = 1, **options: Any) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(self.visit(visitor, weight, **options))
        self.tasks.append(task)
        return task

    async def finish(self) -> list[Any]:
        results = await asyncio.gather(*self.tasks, return_exceptions=True)
        assert (self.line.stats.running, self.line.stats.waiting) == (0, 0)
        return list(results)


def test_room_is_never_exceeded_and_all_are_served() -> None:
    async def check() -> None:
        visits = Visits(Line(room=4, max_waiting=100))
        for number in range(50):
            visits.start(f"v{number % 7}", 1 + number % 3)
        assert await visits.finish() == [None] * 50
        assert visits.most_running == 4

    run(check())


def test_one_who_sends_many_waits_behind_himself() -> None:
    async def check() -> None:
        visits = Visits(Line(room=1, max_waiting=100))
        for _ in range(10):
            visits.start("greedy")
        await asyncio.sleep(0.5)
        visits.start("alice")
        visits.start("bob")
        await visits.finish()
        assert visits.log[:4] == ["greedy", "alice", "bob", "greedy"]

    run(check())


def test_visitors_get_equal_shares_of_the_room() -> None:
    async def check() -> None:
        visits = Visits(Line(room=4, max_waiting=100), took_s=1.0)
        for visitor in ("a", "b"):
            for _ in range(20):
                visits.start(visitor)
        await asyncio.sleep(5.5)  # four of a came first, then both share
        assert abs(visits.log.count("a") - visits.log.count("b")) <= 4
        await visits.finish()

    run(check())


def test_who_was_served_before_comes_after_who_was_not() -> None:
    """In turns, not by arrival: both wait, neither has anything under way."""

    async def check() -> None:
        visits = Visits(Line(room=1, max_waiting=100))
        for visitor in ("a", "a", "a", "b", "b", "c"):
            visits.start(visitor)
        await visits.finish()
        assert visits.log == ["a", "b", "c", "a", "b", "a"]

    run(check())


def test_a_heavy_request_is_not_passed_for_ever() -> None:
    async def check() -> None:
        visits = Visits(Line(room=4, max_waiting=100))
        visits.start("a", 3)
        await asyncio.sleep(0.1)
        visits.start("heavy", 4)
        await asyncio.sleep(0.1)
        visits.start("light", 1)  # would fit now
        await asyncio.sleep(0)
        assert visits.line.stats.running == 3
        await visits.finish()
        assert visits.log == ["a", "heavy", "light"]

    run(check())


def test_what_never_fits_is_a_bad_request() -> None:
    async def check() -> None:
        line = Line(room=4, max_waiting=1)
        for weight in (0, 5):
            with pytest.raises(ConfigError, match="at most 4"):
                async with line.enter("a", weight):
                    pass

    run(check())
    with pytest.raises(ConfigError):
        Line(room=0, max_waiting=1)


def test_places_go_down_to_one_and_say_how_long() -> None:
    async def check() -> None:
        visits = Visits(Line(room=1, max_waiting=100), took_s=2.0)
        await visits.visit("first")  # two seconds are measured
        places: list[Place] = []
        for visitor in "abcd":
            visits.start(visitor)
        visits.start("me", on_place=places.append)
        visits.start("after")
        await visits.finish()
        assert [(each.place, each.of) for each in places] == [(4, 5), (3, 4), (2, 3), (1, 2)]
        assert [each.expected_s for each in places] == pytest.approx([8.0, 6.0, 4.0, 2.0])

    run(check())


def test_who_need_not_wait_hears_of_no_place() -> None:
    async def check() -> None:
        places: list[Place] = []
        visits = Visits(Line(room=1, max_waiting=1))
        visits.start("a", on_place=places.append)
        await visits.finish()
        assert not places

    run(check())


def test_a_full_line_refuses_with_a_time() -> None:
    async def check() -> None:
        visits = Visits(Line(room=1, max_waiting=2), took_s=5.0)
        await visits.visit("measured")
        for visitor in "abc":
            visits.start(visitor)
        await asyncio.sleep(0)
        with pytest.raises(LineFullError) as caught:
            await visits.visit("d")
        assert caught.value.retry_after_s == pytest.approx(15.0)
        assert caught.value.headers() == {"retry-after": "15"}
        assert caught.value.status == 429
        assert await visits.finish() == [None] * 3

    run(check())


def test_a_full_line_takes_a_place_from_who_has_most() -> None:
    async def check() -> None:
        visits = Visits(Line(room=1, max_waiting=3))
        for _ in range(4):
            visits.start("greedy")
        await asyncio.sleep(0.5)
        visits.start("alice")
        greedy_again = visits.start("greedy")
        results = await visits.finish()
        assert visits.log == ["greedy", "alice", "greedy", "greedy"]
        assert isinstance(results[3], LineFullError)  # the last of his that waited
        assert isinstance(greedy_again.exception(), LineFullError)

    run(check())


def test_nobody_waits_for_longer_than_the_deadline() -> None:
    async def check() -> None:
        line = Line(room=1, max_waiting=5, max_wait_s=30.0)
        visits = Visits(line, took_s=100.0)
        visits.start("slow")
        await asyncio.sleep(0)
        began_s = asyncio.get_running_loop().time()
        with pytest.raises(WaitedTooLongError, match="within 30 s") as caught:
            await visits.visit("b")
        assert asyncio.get_running_loop().time() - began_s == pytest.approx(30.0)
        assert 1 <= (caught.value.retry_after_s or 0) <= 60
        assert line.stats.waiting == 0
        await visits.finish()

    run(check())


def test_leaving_while_waiting_frees_the_place() -> None:
    async def check() -> None:
        visits = Visits(Line(room=2, max_waiting=5))
        visits.start("a", 2)
        heavy = visits.start("heavy", 2)
        visits.start("light", 1)
        await asyncio.sleep(0.5)
        heavy.cancel()
        await visits.finish()
        assert visits.log == ["a", "light"]

    run(check())


def test_leaving_in_the_moment_of_being_let_in_leaks_nothing() -> None:
    async def check() -> None:
        line = Line(room=1, max_waiting=5)
        visits = Visits(line)

        async def hold() -> None:
            async with line.enter("holder"):
                second = visits.start("second")
                third = visits.start("third")
                await asyncio.sleep(1)
            second.cancel()  # it was let in just now, and has not run since
            with suppress(asyncio.CancelledError):
                await second
            await third

        await hold()
        assert visits.log == ["third"]
        await visits.finish()

    run(check())


def test_a_visit_that_fails_frees_its_room() -> None:
    async def check() -> None:
        line = Line(room=1, max_waiting=0)
        for _ in range(3):
            with pytest.raises(ValueError, match="broken"):
                async with line.enter("a"):
                    raise ValueError("broken")
        assert line.stats.running == 0

    run(check())


def test_memory_of_visitors_is_bounded() -> None:
    """Under a load that never ends, from visitors who never come again."""

    async def check() -> None:
        line = Line(room=1, max_waiting=10)
        visits = Visits(line, took_s=0.1)
        for number in range(3000):
            visits.start(f"v{number}")
            await asyncio.sleep(0.1)
        await visits.finish()
        assert len(line._served) <= 1024
        assert not line._running
        assert not line._waiting

    run(check())


def test_two_hundred_at_once_are_answered_or_refused() -> None:
    async def check() -> None:
        visits = Visits(Line(room=32, max_waiting=100))
        for number in range(200):
            visits.start(f"v{number}")
        results = await visits.finish()
        refused = [each for each in results if isinstance(each, LineFullError)]
        assert results.count(None) == 132
        assert len(refused) == 68
        assert all(each.retry_after_s >= 1 for each in refused)
        assert visits.most_running == 32

    run(check())
