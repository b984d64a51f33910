"""The compute thread: who runs what, in which order, and what an error costs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from queue import SimpleQueue

import pytest
import torch

from petal_swarm.engine.compute import (
    RUN_NOW_S,
    RUN_NOW_TOKENS,
    Compute,
    ComputeThread,
    InlineCompute,
)
from petal_swarm.engine.engine import Batch, Chunk, Engine
from petal_swarm.engine.steps import StepRequest, StepResult
from petal_swarm.errors import BadMessageError, CacheFullError, RemoteError
from petal_swarm.span import Slice

from .tiny import WHOLE, Tiny, close, rows

TIMEOUT_S = 20.0
Finished = SimpleQueue[tuple[object, StepResult]]


def step(session: str, count: int = 1, position: int = 0, seed: int = 0) -> StepRequest:
    return StepRequest(session, WHOLE, (Slice(0, position, count),), rows(count, seed))


class Gate:
    """Where the compute thread waits until it is opened; `batches` are the decode batches that came by."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.opened = threading.Event()
        self.batches: list[list[object]] = []

    def wait(self) -> None:
        self.entered.set()
        assert self.opened.wait(TIMEOUT_S)


@pytest.fixture
def engine(bloom: Tiny) -> Engine:
    engine = bloom.engine()
    for session in "abc":
        engine.open_session(session, max_length=64)
    return engine


@pytest.fixture
def compute(engine: Engine) -> Iterator[ComputeThread]:
    compute = ComputeThread(engine)
    compute.start()
    yield compute
    compute.stop()
    assert not any(thread.name == "petal-swarm-compute" for thread in threading.enumerate())


@pytest.fixture
def gate(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """Before every decode batch."""
    gate, compute = Gate(), engine.compute

    def wait(chunks: Sequence[Chunk]) -> float:
        gate.batches.append([chunk.step.request.session for chunk in chunks])
        gate.wait()
        return compute(chunks)

    monkeypatch.setattr(engine, "compute", wait)
    yield gate
    gate.opened.set()


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """Before every block of prefill."""
    gate, advance = Gate(), Batch.advance

    def wait(batch: Batch) -> float:
        gate.wait()
        return advance(batch)

    monkeypatch.setattr(Batch, "advance", wait)
    yield gate
    gate.opened.set()


def collector() -> tuple[Finished, Callable[[object], Callable[[StepResult], None]]]:
    finished: Finished = SimpleQueue()
    return finished, lambda name: lambda result: finished.put((name, result))


def submitted(compute: Compute, request: StepRequest) -> StepResult:
    finished, done = collector()
    compute.submit(request, done("only"))
    return finished.get(timeout=TIMEOUT_S)[1]


def settle(compute: ComputeThread) -> None:
    """Return once the thread is past what it was given, and waits."""
    compute.call(lambda: None).result(TIMEOUT_S)
    with compute._busy:
        pass


def test_steps_are_done_in_the_compute_thread(compute: ComputeThread, bloom: Tiny) -> None:
    threads: SimpleQueue[tuple[str, StepResult]] = SimpleQueue()
    compute.submit(step("a", 5), lambda result: threads.put((threading.current_thread().name, result)))
    name, result = threads.get(timeout=TIMEOUT_S)
    assert name == "petal-swarm-compute"
    assert close(result.hidden, bloom.expected(rows(5)))


def test_running_now_is_the_same_as_waiting(compute: ComputeThread, engine: Engine) -> None:
    engine.block_time_s = RUN_NOW_S / 100
    for position in range(0, 12, 3):
        waited = submitted(compute, step("a", 3, position, seed=position))
        settle(compute)
        now = compute.run_now(step("b", 3, position, seed=position))
        assert now is not None
        assert now.hidden is not None
        assert waited.hidden is not None
        assert torch.equal(now.hidden, waited.hidden)
        engine.block_time_s = RUN_NOW_S / 100


def test_what_does_not_run_now(compute: ComputeThread, engine: Engine) -> None:
    assert compute.run_now(step("a")) is None, "nothing was measured yet"
    engine.block_time_s = RUN_NOW_S / 100
    assert compute.run_now(step("a", RUN_NOW_TOKENS + 1)) is None
    engine.block_time_s = RUN_NOW_S
    assert compute.run_now(step("a")) is None, "a slow block"
    engine.block_time_s = RUN_NOW_S / 100
    assert compute.run_now(step("a", RUN_NOW_TOKENS)) is not None


def test_nothing_runs_now_while_a_step_runs_or_waits(
    compute: ComputeThread, engine: Engine, gate: Gate
) -> None:
    engine.block_time_s = RUN_NOW_S / 100
    finished, done = collector()
    compute.submit(step("a"), done("a"))
    assert gate.entered.wait(TIMEOUT_S)
    assert compute.run_now(step("b")) is None
    compute.submit(step("b"), done("b"))
    assert compute.run_now(step("c")) is None
    gate.opened.set()
    assert [finished.get(timeout=TIMEOUT_S)[0] for _ in "ab"] == ["a", "b"]


def test_an_error_comes_back_from_either_way(compute: ComputeThread, engine: Engine) -> None:
    assert type(submitted(compute, step("a", position=5)).error) is BadMessageError
    settle(compute)
    engine.block_time_s = RUN_NOW_S / 100
    result = compute.run_now(step("a", position=5))
    assert result is not None
    assert type(result.error) is BadMessageError


def test_steps_that_wait_become_one_batch_and_sessions_keep_their_order(
    compute: ComputeThread, gate: Gate, bloom: Tiny
) -> None:
    finished, done = collector()
    compute.submit(step("a"), done(("a", 0)))
    assert gate.entered.wait(TIMEOUT_S)
    for position in range(3):
        for session in "bc":
            compute.submit(step(session, 1, position, seed=position), done((session, position)))
    gate.opened.set()
    results = dict(finished.get(timeout=TIMEOUT_S) for _ in range(7))
    assert gate.batches == [["a"], ["b", "c"], ["b", "c"], ["b", "c"]]
    expected = bloom.expected(torch.cat([rows(1, seed) for seed in range(3)]))
    for position in range(3):
        for session in "bc":
            assert close(results[session, position].hidden, expected[position : position + 1])


def test_a_step_waits_for_the_company_that_is_expected(
    compute: ComputeThread, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate.opened.set()
    scheduler = compute._executor._scheduler
    lingers = threading.Event()

    def linger_s() -> float:
        lingers.set()
        return TIMEOUT_S if scheduler.decodes_ready == 1 else 0.0

    monkeypatch.setattr(compute._executor, "linger_s", linger_s)
    finished, done = collector()
    compute.submit(step("a"), done("a"))
    assert lingers.wait(TIMEOUT_S)
    assert compute.run_now(step("c")) is None
    compute.submit(step("b"), done("b"))
    assert [finished.get(timeout=TIMEOUT_S)[0] for _ in "ab"] == ["a", "b"]
    assert gate.batches == [["a", "b"]]


def test_calls_come_before_waiting_steps(compute: ComputeThread, gate: Gate) -> None:
    _, done = collector()
    order: list[str] = []
    compute.submit(step("a"), done("a"))
    assert gate.entered.wait(TIMEOUT_S)
    compute.submit(step("b"), lambda result: order.append("step"))
    future = compute.call(lambda: order.append("call") or threading.current_thread().name)  # type: ignore[func-returns-value]
    assert not future.done()
    gate.opened.set()
    assert future.result(TIMEOUT_S) == "petal-swarm-compute"
    settle(compute)
    assert order == ["call", "step"]


def test_calls_that_fail_or_are_cancelled(compute: ComputeThread, gate: Gate) -> None:
    with pytest.raises(ZeroDivisionError):
        compute.call(lambda: 1 // 0).result(TIMEOUT_S)
    with pytest.raises(SystemExit):
        compute.call(lambda: exit(1)).result(TIMEOUT_S)
    compute.submit(step("a"), lambda result: None)
    assert gate.entered.wait(TIMEOUT_S)
    called = threading.Event()
    assert compute.call(called.set).cancel()
    gate.opened.set()
    settle(compute)
    assert not called.is_set()


def test_a_call_without_memory_fails_with_a_reason(compute: ComputeThread) -> None:
    """A session that cannot be opened for want of it is told so, and not cut off as by a bug."""

    def lacks() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with pytest.raises(RemoteError, match="no memory left for this; use another server"):
        compute.call(lacks).result(TIMEOUT_S)


def test_the_steps_of_a_closed_session_are_dropped(
    compute: ComputeThread, engine: Engine, gate: Gate
) -> None:
    finished, done = collector()
    compute.submit(step("a"), done("a"))
    assert gate.entered.wait(TIMEOUT_S)
    for session in "bcb":
        compute.submit(step(session), done(session))
    compute.close_session("b")
    compute.close_session("unknown")
    gate.opened.set()
    assert [finished.get(timeout=TIMEOUT_S)[0] for _ in range(2)] == ["a", "c"]
    settle(compute)
    assert gate.batches == [["a"], ["c"]]
    assert finished.empty()
    assert engine.stats().sessions == 2


@pytest.mark.parametrize("inline", [False, True])
def test_a_crash_fails_its_batch_only(
    engine: Engine,
    bloom: Tiny,
    inline: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def crash(chunks: Sequence[Chunk]) -> float:
        raise RuntimeError("secret details of this machine")

    compute: Compute = InlineCompute(engine) if inline else ComputeThread(engine)
    compute.start()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(engine, "compute", crash)
            result = submitted(compute, step("a"))
        assert result.hidden is None
        assert type(result.error) is RemoteError
        assert "RuntimeError" in str(result.error)
        assert "secret" not in str(result.error)
        assert "secret" in caplog.text
        assert close(submitted(compute, step("b", 4)).hidden, bloom.expected(rows(4)))
    finally:
        compute.stop()


def test_a_bug_outside_a_batch_costs_what_is_in_hand_only(
    compute: ComputeThread,
    bloom: Tiny,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    calls: list[object] = []

    def fail(interrupted: Callable[[], bool]) -> None:
        calls.append(interrupted)
        raise ZeroDivisionError("secret details of this machine")

    with monkeypatch.context() as patch:
        patch.setattr(compute._executor, "advance", fail)
        for session in "ab":
            error = submitted(compute, step(session)).error
            assert type(error) is RemoteError
            assert "secret" not in str(error)
        settle(compute)
        assert len(calls) == 3, "once for each that came, and not over and over"
    assert "secret" in caplog.text
    assert close(submitted(compute, step("c", 4)).hidden, bloom.expected(rows(4)))


def test_an_owner_that_fails_harms_no_other(
    compute: ComputeThread, bloom: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(result: StepResult) -> None:
        raise ZeroDivisionError

    compute.submit(step("a"), fail)
    assert close(submitted(compute, step("b", 4)).hidden, bloom.expected(rows(4)))
    assert "ZeroDivisionError" in caplog.text


def test_stopping_drops_what_waits(engine: Engine, gate: Gate) -> None:
    compute = ComputeThread(engine)
    compute.start()
    finished, done = collector()
    compute.submit(step("a"), done("a"))
    assert gate.entered.wait(TIMEOUT_S)
    compute.submit(step("b"), done("b"))
    stopping = threading.Thread(target=compute.stop)
    stopping.start()
    while not compute._stopping:
        pass
    gate.opened.set()
    stopping.join(TIMEOUT_S)
    assert not stopping.is_alive()
    assert finished.get(timeout=TIMEOUT_S)[0] == "a"
    assert finished.empty()
    assert gate.batches == [["a"]]
    compute.stop()


def test_stopping_what_never_started(engine: Engine) -> None:
    ComputeThread(engine).stop()


def test_an_idle_thread_stops_at_once(engine: Engine) -> None:
    compute = ComputeThread(engine)
    compute.start()
    compute.stop()
    assert not compute._thread.is_alive()


def test_the_queue_is_measured_in_seconds(compute: ComputeThread, engine: Engine, gate: Gate) -> None:
    waiting: SimpleQueue[float] = SimpleQueue()

    def done(result: StepResult) -> None:
        waiting.put(compute.queue_s() / (engine.block_time_s * len(WHOLE)))

    assert compute.queue_s() == 0
    compute.submit(step("a"), done)
    assert gate.entered.wait(TIMEOUT_S)
    for position in range(1, 4):
        compute.submit(step("a", 1, position), done)
    gate.opened.set()
    found = [waiting.get(timeout=TIMEOUT_S) for _ in range(4)]
    assert found[1:] == pytest.approx([2, 1, 0])


def test_a_decode_step_does_not_wait_for_the_end_of_a_prompt(
    compute: ComputeThread, engine: Engine, blocks: Gate, bloom: Tiny
) -> None:
    engine.block_time_s = RUN_NOW_S / 100
    finished, done = collector()
    compute.submit(step("a", 40), done("long"))
    assert blocks.entered.wait(TIMEOUT_S)
    assert compute.run_now(step("b")) is None
    compute.submit(step("b"), done("short"))
    opened = compute.call(lambda: engine.open_session("d", max_length=64))
    blocks.opened.set()
    results = [finished.get(timeout=TIMEOUT_S) for _ in range(2)]
    assert [name for name, _ in results] == ["short", "long"]
    opened.result(TIMEOUT_S)
    assert close(results[0][1].hidden, bloom.expected(rows(1)))
    assert close(results[1][1].hidden, bloom.expected(rows(40)))
    assert results[0][1].queued_s > 0, "for the block"


def test_closing_a_session_whose_prompt_is_running(
    compute: ComputeThread, engine: Engine, blocks: Gate
) -> None:
    finished, done = collector()
    compute.submit(step("a", 40), done("gone"))
    assert blocks.entered.wait(TIMEOUT_S)
    compute.close_session("a")
    reopened = compute.call(lambda: engine.open_session("a", max_length=64))
    blocks.opened.set()
    reopened.result(TIMEOUT_S)
    assert submitted(compute, step("a")).error is None
    while not compute._executor.idle:
        settle(compute)
    assert finished.empty()
    assert engine.stats().sessions == 3


def test_stopping_in_the_middle_of_a_prompt(engine: Engine, blocks: Gate) -> None:
    compute = ComputeThread(engine)
    compute.start()
    finished, done = collector()
    compute.submit(step("a", 40), done("a"))
    assert blocks.entered.wait(TIMEOUT_S)
    stopping = threading.Thread(target=compute.stop)
    stopping.start()
    while compute._inbox.empty():
        pass
    blocks.opened.set()
    stopping.join(TIMEOUT_S)
    assert not compute._thread.is_alive()
    assert finished.empty()


def test_a_step_waits_for_room_whichever_way_it_came(bloom: Tiny) -> None:
    engine = bloom.engine(kv_tokens=128)
    for session in "ab":
        engine.open_session(session, max_length=128)
    compute = ComputeThread(engine, cache_wait_s=TIMEOUT_S)
    compute.start()
    try:
        assert submitted(compute, step("a", 128)).error is None
        settle(compute)
        engine.block_time_s = RUN_NOW_S / 100
        assert compute.run_now(step("b")) is None
        finished, done = collector()
        compute.submit(step("b"), done("b"))
        settle(compute)
        assert finished.empty()
        assert compute.steps_waiting_for_room == 1
        assert compute.run_now(step("a", 1, 3)) is None, "the thread would not hear of the room that it makes"
        compute.close_session("a")
        assert close(finished.get(timeout=TIMEOUT_S)[1].hidden, bloom.expected(rows(1)))
        assert compute.steps_waiting_for_room == 0
    finally:
        compute.stop()


@pytest.mark.parametrize("inline", [False, True])
def test_without_room_there_is_an_error_in_the_end(bloom: Tiny, inline: bool) -> None:
    engine = bloom.engine(kv_tokens=128)
    for session in "ab":
        engine.open_session(session, max_length=128)
    compute: Compute = InlineCompute(engine) if inline else ComputeThread(engine, cache_wait_s=0.001)
    compute.start()
    try:
        assert submitted(compute, step("a", 128)).error is None
        assert type(submitted(compute, step("b")).error) is CacheFullError
        assert submitted(compute, step("a", 1, 3)).error is None
        assert submitted(compute, step("b")).error is None
    finally:
        compute.stop()


def test_four_threads_at_once(compute: ComputeThread, engine: Engine, bloom: Tiny) -> None:
    """Steps from several threads, run at once or queued as it happens, never meet in the engine."""
    names = ["a", "b", "c", "d"]
    engine.open_session("d", max_length=64)
    engine.block_time_s = RUN_NOW_S / 100
    outputs: dict[str, list[torch.Tensor]] = {name: [] for name in names}

    def generate(name: str, seed: int) -> None:
        hidden = rows(60, seed)
        for position in range(60):
            request = StepRequest(name, WHOLE, (Slice(0, position, 1),), hidden[position : position + 1])
            result = compute.run_now(request) or submitted(compute, request)
            assert result.hidden is not None, result.error
            outputs[name].append(result.hidden)

    threads = [threading.Thread(target=generate, args=(name, seed)) for seed, name in enumerate(names)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()
    for seed, name in enumerate(names):
        assert close(torch.cat(outputs[name]), bloom.expected(rows(60, seed)))


def test_inline(engine: Engine, bloom: Tiny) -> None:
    compute = InlineCompute(engine)
    compute.start()
    assert close(submitted(compute, step("a", 6)).hidden, bloom.expected(rows(6)))
    assert close(compute.run_now(step("b", 6)).hidden, bloom.expected(rows(6)))
    assert compute.call(lambda: 5).result(0) == 5
    with pytest.raises(ZeroDivisionError):
        compute.call(lambda: 1 // 0).result(0)
    compute.close_session("a")
    assert engine.stats().sessions == 2
    assert compute.queue_s() == 0
    assert compute.steps_waiting_for_room == 0
    compute.stop()


# -- work in pieces ------------------------------------------------------------------------------------


def named_pieces(threads: list[str], count: int) -> Generator[None, None, int]:
    for _ in range(count):
        threads.append(threading.current_thread().name)
        yield
    return count


@pytest.mark.parametrize("inline", [True, False])
def test_work_has_a_result(engine: Engine, inline: bool) -> None:
    compute: Compute = InlineCompute(engine) if inline else ComputeThread(engine)
    compute.start()
    threads: list[str] = []
    assert compute.run_work(named_pieces(threads, 3), "A").result(TIMEOUT_S) == 3
    compute.stop()
    expected = threading.current_thread().name if inline else "petal-swarm-compute"
    assert threads == [expected] * 3
    assert compute.piece_rows() > 0


@pytest.mark.parametrize("inline", [True, False])
def test_work_fails_with_a_typed_error(engine: Engine, inline: bool) -> None:
    compute: Compute = InlineCompute(engine) if inline else ComputeThread(engine)

    def broken() -> Generator[None, None, None]:
        yield
        raise ValueError("a bug")

    compute.start()
    error = compute.run_work(broken(), "A").exception(TIMEOUT_S)
    compute.stop()
    assert type(error) is RemoteError


def test_a_step_does_not_wait_for_the_end_of_work(compute: ComputeThread) -> None:
    """The work ends when the step has its result, and not before."""
    answered = threading.Event()

    def work() -> Generator[None, None, str]:
        while not answered.is_set():
            yield
        return "done"

    future = compute.run_work(work(), "A")
    result = submitted(compute, step("a"))
    assert result.error is None
    answered.set()
    assert future.result(TIMEOUT_S) == "done"


def test_works_fail_when_the_thread_stops(engine: Engine) -> None:
    compute = ComputeThread(engine)
    compute.start()
    started = threading.Event()

    def endless() -> Generator[None, None, None]:
        while True:
            started.set()
            yield

    future = compute.run_work(endless(), "A")
    assert started.wait(TIMEOUT_S)
    compute.stop()
    assert isinstance(future.exception(TIMEOUT_S), RemoteError)
