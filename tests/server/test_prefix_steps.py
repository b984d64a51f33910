"""Steps that wait while a prefix is looked for: their order, and neighbours that do not keep to the rules."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from petal_swarm.errors import BadMessageError, HopLostError
from petal_swarm.net.memory import VirtualClockLoop
from petal_swarm.server.prefix_steps import ANSWER_TIMEOUT_S, MAX_QUESTIONS, PrefixSteps, drop_rows
from petal_swarm.span import Slice
from petal_swarm.wire.messages.parts import TensorMeta
from petal_swarm.wire.messages.prefixes import PAGE_TOKENS, FindPrefix, PageKeys, PrefixFound
from petal_swarm.wire.messages.steps import Step

KEY = bytes(32)


class Engine:
    """Holds `pages` pages of any prefix, and writes down what it is asked."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.calls: list[str] = []

    def find_prefixes(self, request: Step, *, spare_last: bool) -> list[PageKeys]:
        self.calls.append(f"find for step {request.step}")
        return [PageKeys(piece.sequence, 0, (KEY,) * self.pages) for piece in request.slices]

    def scoped_keys(self, session: bytes, given: list[PageKeys]) -> list[PageKeys]:
        self.calls.append("scope")
        return list(given)

    def attach(self, session: bytes, known: list[PageKeys]) -> list[PageKeys]:
        return [entry._replace(keys=entry.keys[: self.pages]) for entry in known]


class Owner:
    """A session whose engine is busy until `idle` is set."""

    def __init__(self, upstream: str | None) -> None:
        self.opening = SimpleNamespace(upstream=upstream, epoch=0, session=bytes(16))
        self.idle = asyncio.Event()
        self.idle.set()
        self.handed: list[Step] = []
        self.swallowed: list[Step] = []
        self.freed = 0
        self.freed_rows = 0
        self.error: Exception | None = None

    def request_of(self, step: Step) -> Step:
        return step

    def hand_over(self, step: Step, arrived: float, held_s: float = 0.0) -> None:
        self.handed.append(step)

    def nothing_left(self, step: Step) -> None:
        self.swallowed.append(step)

    def shrunk(self, rows: int, nbytes: int) -> None:
        self.freed += nbytes
        self.freed_rows += rows

    async def settled(self) -> None:
        await self.idle.wait()

    def fail(self, error: Exception, step: int | None = None) -> None:
        self.error = error


class Neighbour:
    """The other end of a push stream."""

    peer_id = "next"

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def send(self, message: Any) -> None:
        self.sent.append(message)


def made(pages: int, upstream: str | None = None) -> tuple[PrefixSteps, Owner, Engine]:
    engine, owner = Engine(pages), Owner(upstream)

    def call(function: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function())
        return future

    compute: Any = SimpleNamespace(engine=engine, call=call)
    return PrefixSteps(owner, compute), owner, engine  # type: ignore[arg-type]


def prompt(number: int, pages: int, sequence: int = 0, rows: Any = "last") -> Step:
    count = pages * PAGE_TOKENS
    return Step(
        number, 0, (Slice(sequence, 0, count),), TensorMeta("float16", (count, 1)), bytes(2 * count), rows
    )


def run(work: Coroutine[Any, Any, None]) -> None:
    loop = VirtualClockLoop()
    try:
        loop.run_until_complete(work)
    finally:
        loop.close()


async def rest() -> None:
    """Let everything run that can."""
    for _ in range(20):
        await asyncio.sleep(0)


def test_a_prompt_waits_for_the_steps_before_it() -> None:
    async def scene() -> None:
        steps, owner, engine = made(pages=2)
        owner.idle.clear()
        first, second = prompt(1, 3), prompt(2, 1, rows="all")
        assert steps.takes(first)
        steps.hold(first, 0.0)
        assert steps.takes(second)
        steps.hold(second, 0.0)
        await rest()
        assert engine.calls == []
        assert owner.handed == []
        owner.idle.set()
        await rest()
        assert owner.handed == [first, second]
        assert first.slices == (Slice(0, 2 * PAGE_TOKENS, PAGE_TOKENS),)
        assert (owner.freed_rows, owner.freed) == (2 * PAGE_TOKENS, 2 * 2 * PAGE_TOKENS)
        assert not steps.takes(prompt(3, 0))

    run(scene())


def test_a_question_waits_for_the_steps_before_it() -> None:
    async def scene() -> None:
        steps, owner, engine = made(pages=2, upstream="a")
        source: Any = Neighbour()
        owner.idle.clear()
        steps.ask(FindPrefix(1, 0, (PageKeys(0, 0, (KEY,) * 3),)), source)
        await rest()
        assert engine.calls == []
        owner.idle.set()
        await rest()
        assert source.sent == [PrefixFound(1, (2,))]

    run(scene())


def test_questions_are_bounded() -> None:
    async def scene() -> None:
        steps, owner, _ = made(pages=2, upstream="a")
        source: Any = Neighbour()
        owner.idle.clear()
        steps.ask(FindPrefix(0, 0, (PageKeys(0, 0, (KEY,)),)), source)
        await rest()  # this one is being answered, the others wait
        for number in range(1, MAX_QUESTIONS + 1):
            steps.ask(FindPrefix(number, 0, (PageKeys(0, 0, (KEY,)),)), source)
        with pytest.raises(BadMessageError):
            steps.ask(FindPrefix(9, 0, (PageKeys(0, 0, (KEY,)),)), source)
        steps.close()

    run(scene())


def test_a_first_hop_is_not_asked() -> None:
    async def scene() -> None:
        steps, _, _ = made(pages=2)
        source: Any = Neighbour()
        with pytest.raises(BadMessageError):
            steps.ask(FindPrefix(0, 0, (PageKeys(0, 0, (KEY,)),)), source)

    run(scene())


def test_who_does_not_answer_is_asked_once() -> None:
    async def scene() -> None:
        steps, owner, _ = made(pages=2)
        following: Any = Neighbour()
        steps.attach_next(following)
        for number in (1, 2, 3):
            steps.hold(prompt(number, 3, sequence=number), 0.0)
        await asyncio.sleep(ANSWER_TIMEOUT_S + 1)
        assert len(owner.handed) == 3
        assert [message.step for message in following.sent] == [1]
        assert all(step.slices[0].position == 0 for step in owner.handed)
        steps.answered(PrefixFound(1, (2,)))  # too late: nobody minds

    run(scene())


def test_an_answer_that_fits_no_question_is_the_next_hops_fault() -> None:
    async def scene() -> None:
        steps, owner, _ = made(pages=2)
        following: Any = Neighbour()
        steps.attach_next(following)
        steps.hold(prompt(1, 3), 0.0)
        await rest()
        steps.answered(PrefixFound(7, (1, 1)))
        await rest()
        assert owner.error is None
        steps.answered(PrefixFound(1, (1, 1)))
        await rest()
        assert isinstance(owner.error, HopLostError)

    run(scene())


def test_what_is_known_whole_is_not_handed_over() -> None:
    async def scene() -> None:
        steps, owner, _ = made(pages=2)
        whole = prompt(1, 2, rows="none")
        steps.hold(whole, 0.0)
        await rest()
        assert owner.swallowed == [whole]
        assert owner.handed == []

    run(scene())


def test_after_the_end_nothing_is_held() -> None:
    async def scene() -> None:
        steps, owner, _ = made(pages=2)
        owner.idle.clear()
        steps.hold(prompt(1, 3), 0.0)
        await rest()
        steps.close()
        await rest()
        steps.hold(prompt(2, 3), 0.0)
        await rest()
        assert steps._task is None
        assert not steps._held
        assert owner.handed == []

    run(scene())


def test_rows_are_dropped_from_the_front_of_each_slice() -> None:
    payload = bytes(range(2 * 7))
    slices = (Slice(0, 0, 3), Slice(4, 2, 2), Slice(1, 0, 2))
    step = Step(1, 0, slices, TensorMeta("float16", (7, 1)), payload)
    assert drop_rows(step, [1, 2, 0])
    assert step.slices == (Slice(0, 1, 2), Slice(1, 0, 2))
    assert bytes(step.payload) == payload[2:6] + payload[10:]
    assert step.tensor == TensorMeta("float16", (4, 1))
    assert drop_rows(step, [0, 0])
    assert not drop_rows(step, [2, 2])
    assert len(step.payload) == 8
