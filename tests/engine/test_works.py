"""Work in pieces: turns of peers, ends, failures."""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import CancelledError, Future

import pytest

from petal_swarm.engine.works import Work, Works
from petal_swarm.errors import BadTensorError, PassGoneError, RemoteError


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Desk:
    """Works whose pieces take as long as they say, and a log of them."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.works = Works()
        self.log: list[str] = []
        self.closed: list[str] = []

    def pieces(
        self, name: str, count: int, piece_s: float, error: Exception | None
    ) -> Generator[None, None, str]:
        try:
            for _ in range(count):
                self.clock.now += piece_s
                self.log.append(name)
                yield
            if error is not None:
                raise error
            return f"{name} is done"
        except GeneratorExit:
            self.closed.append(name)
            raise

    def add(
        self, name: str, peer: str, count: int = 2, piece_s: float = 1.0, error: Exception | None = None
    ) -> Future[str]:
        future: Future[str] = Future()
        self.works.add(Work(self.pieces(name, count, piece_s, error), future, peer))
        return future

    def drain(self) -> None:
        while self.works:
            self.works.advance(self.clock)


@pytest.fixture
def desk() -> Desk:
    return Desk()


def test_what_is_returned_is_the_result(desk: Desk) -> None:
    future = desk.add("a", "A")
    assert desk.works.advance(desk.clock) == 1.0
    assert not future.done()
    desk.drain()
    assert future.result(0) == "a is done"


def test_works_of_a_peer_come_one_after_the_other(desk: Desk) -> None:
    desk.add("first", "A")
    desk.add("second", "A")
    desk.drain()
    assert desk.log == ["first"] * 2 + ["second"] * 2


def test_peers_have_the_same_time_whatever_their_pieces(desk: Desk) -> None:
    desk.add("long", "A", 2, 3.0)
    desk.add("short", "B", 6, 1.0)
    desk.drain()
    assert desk.log == ["long", "short", "short", "short", "long", "short", "short", "short"]


def test_who_comes_later_is_not_owed_the_past(desk: Desk) -> None:
    desk.add("old", "A", 9)
    for _ in range(5):
        desk.works.advance(desk.clock)
    desk.add("new", "B", 4)
    desk.drain()
    assert desk.log[5:] == ["old", "new"] * 4


def test_an_error_is_that_of_the_future(desk: Desk) -> None:
    known, bug = BadTensorError("this"), ValueError("secret")
    futures = [desk.add("a", "A", error=known), desk.add("b", "A", error=bug), desk.add("c", "A")]
    desk.drain()
    assert futures[0].exception(0) is known
    hidden = futures[1].exception(0)
    assert isinstance(hidden, RemoteError)
    assert "secret" not in str(hidden)
    assert futures[2].result(0) == "c is done"


def test_cancelled_work_ends_before_its_next_piece(desk: Desk) -> None:
    future: Future[str] = Future()
    pieces = desk.pieces("a", 5, 1.0, None)
    desk.works.add(Work(pieces, future, "A"))
    other = desk.add("b", "A")
    desk.works.advance(desk.clock)
    assert future.cancel()
    desk.drain()
    assert desk.log == ["a", "b", "b"]
    assert desk.closed == ["a"], "though somebody may still hold the generator"
    pieces.close()
    assert other.result(0) == "b is done"
    with pytest.raises(CancelledError):
        future.result(0)


def test_work_cancelled_in_its_last_piece_has_no_result(desk: Desk) -> None:
    future = desk.add("a", "A", 0, error=PassGoneError("gone"))
    late: Future[str] = desk.add("b", "A", 0)
    assert future.cancel()
    desk.drain()
    assert future.cancelled()
    assert late.done()


def test_everything_fails_at_once(desk: Desk) -> None:
    futures = [desk.add("a", "A"), desk.add("b", "B"), desk.add("c", "B")]
    desk.works.advance(desk.clock)
    error = RemoteError("stopping")
    desk.works.clear(error)
    assert not desk.works
    assert all(future.exception(0) is error for future in futures)
    assert desk.closed == ["a"], "what has begun lets go of what it holds"
