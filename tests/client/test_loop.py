"""The client's event loop: whoever calls, from wherever, gets the result, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from petal_swarm.client.loop import LoopThread
from petal_swarm.errors import DeadlineError, StreamClosedError

pytestmark = pytest.mark.timeout(60)

TIMEOUT_S = 20.0
THREAD_NAME = "petal-swarm-client"


@pytest.fixture
def loop() -> Iterator[LoopThread]:
    loop = LoopThread()
    yield loop
    loop.close()


async def echo(value: Any, *, after_s: float = 0.0) -> Any:
    if after_s:
        await asyncio.sleep(after_s)
    return value


async def for_ever(started: threading.Event, ended: threading.Event) -> None:
    started.set()
    try:
        await asyncio.Event().wait()
    finally:
        ended.set()


def in_thread(function: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """Run in a thread; its result or exception is appended to the list."""
    outcome: list[Any] = []

    def target() -> None:
        try:
            outcome.append(function())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    return thread, outcome


def until_driven_in_background(loop: LoopThread) -> None:
    """A timer of the loop fires though nobody calls."""
    fired = threading.Event()
    loop.run(_later(fired), timeout_s=TIMEOUT_S)
    assert fired.wait(TIMEOUT_S)


async def _later(fired: threading.Event) -> None:
    asyncio.get_running_loop().call_later(0.001, fired.set)


def test_the_caller_drives(loop: LoopThread) -> None:
    async def where() -> int:
        return threading.get_ident()

    found = [loop.run(where(), timeout_s=TIMEOUT_S) for _ in range(3)]
    assert found[-1] == threading.get_ident()


def test_timers_run_while_nobody_calls(loop: LoopThread) -> None:
    for _ in range(3):
        until_driven_in_background(loop)


def test_tasks_go_on_between_calls(loop: LoopThread) -> None:
    finished = threading.Event()
    tasks: set[asyncio.Task[None]] = set()

    async def tick() -> None:
        for _ in range(20):
            await asyncio.sleep(0.0001)
        finished.set()

    async def spawn() -> None:
        tasks.add(asyncio.get_running_loop().create_task(tick()))

    loop.run(spawn(), timeout_s=TIMEOUT_S)
    for number in range(20):
        assert loop.run(echo(number), timeout_s=TIMEOUT_S) == number
    assert finished.wait(TIMEOUT_S)


def test_taking_over_from_the_background(loop: LoopThread) -> None:
    for number in range(10):
        until_driven_in_background(loop)
        assert loop.run(echo(number), timeout_s=TIMEOUT_S) == number


def test_a_thread_that_comes_second_follows(loop: LoopThread) -> None:
    started, released = threading.Event(), asyncio.Event()

    async def first() -> str:
        started.set()
        await released.wait()
        return "first"

    async def second() -> str:
        released.set()
        return "second"

    thread, outcome = in_thread(lambda: loop.run(first(), timeout_s=TIMEOUT_S))
    assert started.wait(TIMEOUT_S)
    assert loop.run(second(), timeout_s=TIMEOUT_S) == "second"
    thread.join(TIMEOUT_S)
    assert outcome == ["first"]


def test_a_follower_outlives_the_driver(loop: LoopThread) -> None:
    """When the driving thread is done, somebody else must go on."""
    started, asked, release = threading.Event(), threading.Event(), asyncio.Event()

    async def first() -> str:
        started.set()
        await release.wait()
        return "first"

    async def second() -> str:
        asked.set()
        release.set()
        await asyncio.sleep(0.02)
        return "second"

    thread, outcome = in_thread(lambda: loop.run(first(), timeout_s=TIMEOUT_S))
    assert started.wait(TIMEOUT_S)
    assert loop.run(second(), timeout_s=TIMEOUT_S) == "second"
    thread.join(TIMEOUT_S)
    assert asked.is_set()
    assert outcome == ["first"]


def test_from_a_notebook(loop: LoopThread) -> None:
    """The calling thread already runs a loop, which ours must neither use nor disturb."""

    async def cell() -> list[Any]:
        found = [
            loop.run(echo(number, after_s=0.001 * (number % 2)), timeout_s=TIMEOUT_S) for number in range(6)
        ]
        await asyncio.sleep(0)
        with pytest.raises(DeadlineError):
            loop.run(echo(None, after_s=TIMEOUT_S), timeout_s=0.02)
        with pytest.raises(ZeroDivisionError):
            loop.run(failing(), timeout_s=TIMEOUT_S)
        return found

    assert asyncio.run(cell()) == list(range(6))
    assert loop.run(echo("after"), timeout_s=TIMEOUT_S) == "after"


def test_closed_from_a_notebook() -> None:
    loop = LoopThread()
    started, ended = threading.Event(), threading.Event()

    async def cell() -> None:
        thread, outcome = in_thread(lambda: loop.run(for_ever(started, ended), timeout_s=TIMEOUT_S))
        assert started.wait(TIMEOUT_S)
        loop.close()
        assert ended.is_set()
        thread.join(TIMEOUT_S)
        assert isinstance(outcome[0], StreamClosedError)
        with pytest.raises(StreamClosedError):
            loop.run(echo(1), timeout_s=TIMEOUT_S)

    asyncio.run(cell())
    assert loop._loop.is_closed()


def test_not_from_the_loop_itself(loop: LoopThread) -> None:
    async def nested() -> Any:
        return loop.run(echo(1), timeout_s=TIMEOUT_S)

    async def closing() -> None:
        loop.close()

    for work_inside in (nested, closing):
        with pytest.raises(RuntimeError, match="from the loop itself"):
            loop.run(work_inside(), timeout_s=TIMEOUT_S)
    assert loop.run(echo(2), timeout_s=TIMEOUT_S) == 2


async def failing() -> None:
    await asyncio.sleep(0)
    raise ZeroDivisionError("of the coroutine")


@pytest.mark.parametrize("follows", [False, True])
def test_an_exception_comes_through(loop: LoopThread, follows: bool) -> None:
    with _other_driver(loop, follows), pytest.raises(ZeroDivisionError, match="of the coroutine"):
        loop.run(failing(), timeout_s=TIMEOUT_S)
    assert loop.run(echo(1), timeout_s=TIMEOUT_S) == 1


@pytest.mark.parametrize("follows", [False, True])
def test_a_deadline_cancels(loop: LoopThread, follows: bool) -> None:
    started, ended = threading.Event(), threading.Event()
    with _other_driver(loop, follows), pytest.raises(DeadlineError, match=r"within 0\.05 s"):
        loop.run(for_ever(started, ended), timeout_s=0.05)
    assert started.is_set()
    assert ended.wait(TIMEOUT_S)
    assert loop.run(echo(1), timeout_s=TIMEOUT_S) == 1


def test_a_deadline_that_has_passed_leaves_no_timer(loop: LoopThread) -> None:
    assert loop.run(echo(1), timeout_s=0.01) == 1
    assert loop.run(echo(2, after_s=0.03), timeout_s=TIMEOUT_S) == 2


class _other_driver:  # noqa: N801
    """Meanwhile another thread drives the loop, if `active`."""

    def __init__(self, loop: LoopThread, active: bool) -> None:
        self._loop, self._active = loop, active
        self._release = asyncio.Event()

    def __enter__(self) -> None:
        if self._active:
            started = threading.Event()

            async def drive() -> None:
                started.set()
                await self._release.wait()

            self._thread, self._outcome = in_thread(lambda: self._loop.run(drive(), timeout_s=TIMEOUT_S))
            assert started.wait(TIMEOUT_S)

    def __exit__(self, *_: object) -> None:
        if self._active:

            async def release() -> None:
                self._release.set()

            self._loop.run(release(), timeout_s=TIMEOUT_S)
            self._thread.join(TIMEOUT_S)
            assert self._outcome == [None]


def test_an_interrupt_cancels(loop: LoopThread) -> None:
    started, ended = threading.Event(), threading.Event()

    async def interrupted() -> None:
        asyncio.get_running_loop().call_later(0.001, interrupt)
        await for_ever(started, ended)

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.run(interrupted(), timeout_s=TIMEOUT_S)
    assert ended.is_set()
    assert loop.run(echo(1), timeout_s=TIMEOUT_S) == 1


def test_closing_ends_the_thread() -> None:
    before = threading.active_count()
    loop = LoopThread()
    assert threading.active_count() == before + 1
    until_driven_in_background(loop)
    loop.close()
    assert threading.active_count() == before
    loop.close()
    for _ in range(2):
        with pytest.raises(StreamClosedError, match="closed"):
            loop.run(echo(1), timeout_s=TIMEOUT_S)


def test_closing_one_that_was_never_used() -> None:
    LoopThread().close()


def test_closing_cancels_what_is_left() -> None:
    loop = LoopThread()
    started, ended = threading.Event(), threading.Event()
    tasks: list[asyncio.Task[None]] = []

    async def spawn() -> None:
        tasks.append(asyncio.get_running_loop().create_task(for_ever(started, ended)))

    loop.run(spawn(), timeout_s=TIMEOUT_S)
    loop.close()
    assert tasks[0].cancelled()
    assert started.is_set() == ended.is_set()


def test_closing_while_another_thread_waits() -> None:
    loop = LoopThread()
    started, ended = threading.Event(), threading.Event()
    thread, outcome = in_thread(lambda: loop.run(for_ever(started, ended), timeout_s=TIMEOUT_S))
    assert started.wait(TIMEOUT_S)
    begun = time.perf_counter()
    loop.close()
    thread.join(TIMEOUT_S)
    assert time.perf_counter() - begun < TIMEOUT_S / 4
    assert ended.is_set()
    assert type(outcome[0]) is StreamClosedError


def test_closing_while_a_follower_waits() -> None:
    loop = LoopThread()
    events = [(threading.Event(), threading.Event()) for _ in range(2)]
    outcomes = []
    for started, ended in events:
        outcomes.append(
            in_thread(lambda pair=(started, ended): loop.run(for_ever(*pair), timeout_s=TIMEOUT_S))
        )
        assert started.wait(TIMEOUT_S)
    loop.close()
    for thread, _ in outcomes:
        thread.join(TIMEOUT_S)
    assert all(type(outcome[0]) is StreamClosedError for _, outcome in outcomes)


def test_closing_while_several_call() -> None:
    """Whoever comes too late is told so; nobody is left waiting for a loop that no thread drives."""
    for number in range(30):
        loop = LoopThread()
        begun = threading.Barrier(4)

        def calls(loop: LoopThread = loop, begun: threading.Barrier = begun) -> Exception:
            begun.wait(TIMEOUT_S)
            while True:
                try:
                    loop.run(work(0, 1), timeout_s=TIMEOUT_S)
                except Exception as error:
                    return error

        threads = [in_thread(calls) for _ in range(3)]
        begun.wait(TIMEOUT_S)
        for value in range(number):
            loop.run(work(value, value % 4), timeout_s=TIMEOUT_S)
        started = time.perf_counter()
        loop.close()
        for thread, outcome in threads:
            thread.join(TIMEOUT_S)
            assert type(outcome[0]) is StreamClosedError
        assert time.perf_counter() - started < TIMEOUT_S / 4
        assert loop._loop.is_closed()


def test_calling_a_function_in_the_loop(loop: LoopThread) -> None:
    assert loop.call(lambda: 5) == 5
    with pytest.raises(ZeroDivisionError):
        loop.call(lambda: 1 // 0)
    with _other_driver(loop, True):
        assert loop.call(lambda: 6) == 6
    assert asyncio.run(_in_a_cell(lambda: loop.call(lambda: 7))) == 7


async def _in_a_cell(function: Callable[[], Any]) -> Any:
    return function()


@pytest.mark.parametrize("follows", [False, True])
def test_waiting_for_a_future_of_the_loop(loop: LoopThread, follows: bool) -> None:
    futures: list[asyncio.Future[int]] = []

    async def make() -> None:
        running = asyncio.get_running_loop()
        futures.extend([running.create_future(), running.create_future()])
        running.call_later(0.005, futures[0].set_result, 5)

    loop.run(make(), timeout_s=TIMEOUT_S)
    with _other_driver(loop, follows):
        assert loop.wait(futures[0], timeout_s=TIMEOUT_S) == 5
        assert loop.wait(futures[0], timeout_s=TIMEOUT_S) == 5
        with pytest.raises(DeadlineError):
            loop.wait(futures[1], timeout_s=0.02)
    loop.close()
    with pytest.raises(StreamClosedError):
        loop.wait(futures[0], timeout_s=TIMEOUT_S)
    with pytest.raises(StreamClosedError):
        loop.call(lambda: 5)


def test_without_a_background_thread_nothing_moves() -> None:
    own = asyncio.new_event_loop()
    before = threading.active_count()
    loop = LoopThread(own, background=False)
    assert threading.active_count() == before
    assert loop.run(echo(1, after_s=0.001), timeout_s=TIMEOUT_S) == 1
    loop.close()
    assert own.is_closed()


async def work(value: int, kind: int) -> int:
    """Done at once, after a turn of the loop, after a timer, or in a task of its own."""
    if kind == 1:
        await asyncio.sleep(0)
    elif kind == 2:
        await asyncio.sleep(0.0002)
    elif kind == 3:
        return await asyncio.create_task(work(value, 2))
    return value


@pytest.mark.parametrize("pauses", [False, True])
def test_four_threads_lose_nothing(loop: LoopThread, pauses: bool) -> None:
    """With pauses the background thread keeps coming back, and is sent away by several at once."""

    def calls(seed: int) -> list[int]:
        numbers, pause = random.Random(seed), threading.Event()
        found = []
        for value in range(200):
            found.append(loop.run(work(value, numbers.randrange(4)), timeout_s=TIMEOUT_S))
            if pauses and numbers.random() < 0.1:
                pause.wait(numbers.random() * 0.05)
        return found

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(calls, range(4))) == [list(range(200))] * 4


def test_threads_that_call_at_the_same_moment_while_the_background_drives(loop: LoopThread) -> None:
    """Each asks the background thread to stop; only one may, or the others' calls are stopped too."""
    together = threading.Barrier(4)

    def calls(index: int) -> float:
        slowest = 0.0
        for value in range(25):
            if together.wait(TIMEOUT_S) == 0:
                until_driven_in_background(loop)
            together.wait(TIMEOUT_S)
            begun = time.perf_counter()
            assert loop.run(work(value, index), timeout_s=TIMEOUT_S) == value
            slowest = max(slowest, time.perf_counter() - begun)
        return slowest

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(calls, range(4))) < 0.9, "one waited for a lock that it need not have"
