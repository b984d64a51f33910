"""What runs when, and that it changes no result: steps of many sessions in any order, pauses and closes."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from petal_swarm.engine.engine import Batch, Chunk
from petal_swarm.engine.executor import Executor
from petal_swarm.engine.pace import Pace
from petal_swarm.engine.scheduler import Job
from petal_swarm.engine.steps import PlacedStep, StepRequest, StepResult
from petal_swarm.engine.works import Work
from petal_swarm.errors import (
    BadMessageError,
    BadTensorError,
    CacheFullError,
    RemoteError,
    SessionTooLongError,
    UnknownSessionError,
)
from petal_swarm.span import Slice, Span

from .oracle import SPANS, Oracle, random_step
from .tiny import BLOCKS, WHOLE, Tiny, close, rows


class Steps(Pace):
    """Chunks of a given size, and as many blocks of prefill after a decode batch as asked for."""

    def __init__(self, chunk: int = 1 << 30, owed_blocks: int = 0) -> None:
        super().__init__(1 << 30)
        self.chunk = chunk
        self.owed_blocks = owed_blocks
        self._owed = 0

    @property
    def owes_prefill(self) -> bool:
        return self._owed > 0

    def decoded(self, now_s: float, elapsed_s: float, blocks: int, *, prefill_share: float) -> None:
        self._owed = self.owed_blocks if prefill_share else 0

    def prefilled(self, elapsed_s: float, rows: int) -> None:
        self._owed -= 1

    def chunk_rows(self, now_s: float) -> int:
        return self.chunk


class Bench:
    """An executor on a clock that stands still, with a log of what the engine did."""

    def __init__(
        self, tiny: Tiny, monkeypatch: pytest.MonkeyPatch, pace: Pace | None = None, **options: Any
    ) -> None:
        self.now = 100.0
        self.log: list[Any] = []
        self.results: dict[object, StepResult] = {}
        self.pace = pace or Steps()
        self.engine = tiny.engine(**options)
        self.executor: Executor[object] = Executor(
            self.engine, pace=self.pace, cache_wait_s=10.0, clock=lambda: self.now
        )
        compute, begin, advance = self.engine.compute, self.engine.begin, Batch.advance

        def logged_compute(chunks: list[Chunk]) -> float:
            self.log.append(("decode", {chunk.step.request.session: chunk.rows for chunk in chunks}))
            return compute(chunks)

        def logged_begin(chunks: list[Chunk]) -> Batch:
            self.log.append(("prefill", {chunk.step.request.session: chunk.rows for chunk in chunks}))
            return begin(chunks)

        def logged_advance(batch: Batch) -> float:
            self.log.append("block")
            return advance(batch)

        monkeypatch.setattr(self.engine, "compute", logged_compute)
        monkeypatch.setattr(self.engine, "begin", logged_begin)
        monkeypatch.setattr(Batch, "advance", logged_advance)

    def open(self, *sessions: str, max_length: int = 128) -> None:
        for session in sessions:
            self.engine.open_session(session, max_length=max_length)

    def add(self, request: StepRequest, name: object = None) -> None:
        self.executor.add(Job(request, request.session if name is None else name, self.now))

    def advance(self, interrupted: bool = False) -> list[object]:
        """One turn; the names of the steps that ended."""
        finished = self.executor.advance(lambda: interrupted)
        for owner, result in finished:
            assert owner not in self.results, "a step has one result"
            self.results[owner] = result
        return [owner for owner, _ in finished]

    def drain(self) -> None:
        while self.executor.wait_s() == 0.0:
            self.advance()

    def drain_decodes(self) -> None:
        """Run what decodes; prefill that is under way stays where it is."""
        while self.executor._scheduler.decodes_ready:
            self.advance(interrupted=True)

    def error(self, name: object) -> RemoteError | None:
        error = self.results[name].error
        assert error is None or isinstance(error, RemoteError)
        return error

    def hidden(self, name: object) -> Tensor:
        result = self.results[name]
        assert result.error is None
        assert result.hidden is not None
        return result.hidden


@pytest.fixture
def bench(bloom: Tiny, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(bloom, monkeypatch)


def step(
    session: str, count: int = 1, position: int = 0, *, seed: int = 0, blocks: Span = WHOLE, peer: str = ""
) -> StepRequest:
    return StepRequest(session, blocks, (Slice(0, position, count),), rows(count, seed), peer=peer)


# -- exactness ---------------------------------------------------------------------------------


class Play:
    """Random steps into a bench, and what each has to answer."""

    def __init__(self, bench: Bench, tiny: Tiny, seed: int) -> None:
        self.bench = bench
        self.random = Random(seed)
        self.oracle = Oracle(tiny)
        self.expected: dict[str, deque[tuple[object, Tensor]]] = {}
        self.answered = 0
        self._sessions = {f"session-{n}": SPANS[n % 3] for n in range(7)}
        self._numbers = iter(range(1 << 30))
        for session in self._sessions:
            self._open(session)

    def _open(self, session: str) -> None:
        self.bench.engine.open_session(session, max_length=100)
        self.expected[session] = deque()

    def submit(self) -> None:
        session = self.random.choice(list(self._sessions))
        blocks = self._sessions[session]
        longest = self.random.choice([3, 50])
        request = random_step(self.random, self.oracle, session, blocks, longest=longest, limit=100)
        request.peer = f"peer-{session[-1] in '024'}" if self.random.random() < 0.5 else session
        name = (session, next(self._numbers))
        self.expected[session].append((name, self.oracle.answer(request)))
        self.bench.add(request, name)

    def close(self) -> None:
        session = self.random.choice(list(self._sessions))
        self.bench.executor.close_session(session)
        self.oracle.forget(session)
        self._open(session)

    def advance(self, interrupted: bool) -> None:
        for name in self.bench.advance(interrupted):
            assert isinstance(name, tuple)
            first, answer = self.expected[name[0]].popleft()
            assert name == first, "in order, and not of what was closed"
            assert close(self.bench.hidden(name), answer), name
            self.answered += 1

    def end(self) -> None:
        while not self.bench.executor.idle:
            self.advance(interrupted=False)
        assert not any(self.expected.values())
        for session in self._sessions:
            self.bench.executor.close_session(session)
        stats = self.bench.engine.stats()
        assert (stats.sessions, stats.kv_tokens_free) == (0, stats.kv_tokens)


@pytest.mark.parametrize("owed_blocks", [0, 1, 3])
@pytest.mark.parametrize("seed", range(8))
def test_any_interleaving_is_a_plain_forward(
    tiny: Tiny, seed: int, owed_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pace = Steps(owed_blocks=owed_blocks)
    bench = Bench(tiny, monkeypatch, pace, kv_tokens=1 << 14, max_batch_tokens=256)
    play = Play(bench, tiny, seed)
    always = seed % 2 == 0  # a pause at every boundary of two blocks
    for _ in range(150):
        pace.chunk = play.random.choice([1, 3, 16, 40, 1 << 30])
        chance = play.random.random()
        if chance < 0.4:
            play.submit()
        elif chance < 0.43:
            play.close()
        else:
            play.advance(interrupted=always or play.random.random() < 0.5)
    play.end()
    assert play.answered > 30
    prefills = [index for index, event in enumerate(bench.log) if event[0] == "prefill"]
    assert any(
        isinstance(event, tuple) and event[0] == "decode" and bench.log[index + 1] == "block"
        for index, event in enumerate(bench.log[:-1])
    ), "a prefill batch was paused for a decode batch"
    assert len(prefills) > 5


def test_a_pause_at_every_block_changes_nothing(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tiny, monkeypatch, Steps(chunk=20))
    bench.open("long", "short")
    prompt, tokens = rows(100, seed=1), rows(1 + 100 // 20 * BLOCKS, seed=2)
    bench.add(StepRequest("long", WHOLE, (Slice(0, 0, 100),), prompt))
    for position in range(len(tokens)):
        bench.add(
            StepRequest("short", WHOLE, (Slice(0, position, 1),), tokens[position : position + 1]), position
        )
        assert bench.advance(interrupted=True) == [position]
        bench.advance(interrupted=True)
    assert bench.log[:6] == [
        ("decode", {"short": 1}),
        ("prefill", {"long": 20}),
        "block",
        ("decode", {"short": 1}),
        "block",
        ("decode", {"short": 1}),
    ]
    assert close(bench.hidden("long"), tiny.expected(prompt))
    found = torch.cat([bench.hidden(position) for position in range(len(tokens))])
    assert close(found, tiny.expected(tokens))


# -- who goes first ----------------------------------------------------------------------------


def test_decode_goes_before_prefill(bench: Bench) -> None:
    bench.open("long", "short", "other")
    bench.add(step("long", 40))
    bench.add(step("short"))
    bench.add(step("other"))
    assert bench.advance() == ["short", "other"]
    assert bench.advance() == ["long"]
    assert bench.log == [("decode", {"short": 1, "other": 1}), ("prefill", {"long": 40}), *["block"] * BLOCKS]


def test_prefill_runs_through_when_nobody_interrupts(bench: Bench) -> None:
    bench.pace.chunk = 16  # type: ignore[attr-defined]
    bench.open("long")
    bench.add(step("long", 40))
    assert [bench.advance() for _ in range(3)] == [[], [], ["long"]]
    assert [event for event in bench.log if event != "block"] == [
        ("prefill", {"long": 16}),
        ("prefill", {"long": 16}),
        ("prefill", {"long": 8}),
    ]


def test_what_interrupts_need_not_be_a_decode_step(bench: Bench) -> None:
    """A session that opens, or another prompt: the batch goes on where it was."""
    bench.open("long", "second")
    bench.add(step("long", 40))
    assert bench.advance(interrupted=True) == []
    bench.add(step("second", 20))
    assert bench.advance() == ["long"]
    assert bench.advance() == ["second"]
    assert bench.log.count("block") == 2 * BLOCKS


@pytest.mark.parametrize("owed", [1, 2, 3])
def test_a_stream_of_decode_steps_does_not_starve_prefill(
    bloom: Tiny, monkeypatch: pytest.MonkeyPatch, owed: int
) -> None:
    bench = Bench(bloom, monkeypatch, Steps(owed_blocks=owed))
    bench.open("long", "short")
    bench.add(step("long", 40))
    position = 0
    while "long" not in bench.results:
        if not bench.log or bench.log[-1][0] == "decode" or bench.log[-1] == "block":
            bench.add(step("short", 1, position), ("short", position))
            position += 1
        bench.advance(interrupted=True)
    blocks_between = Counter[int]()
    run = 0
    for event in bench.log:
        if event == "block":
            run += 1
        elif event[0] == "decode":
            blocks_between[run] += 1
            run = 0
    assert set(blocks_between) <= {0, owed}
    assert blocks_between[owed] >= BLOCKS // owed - 1


def test_decode_steps_of_other_blocks_are_a_batch_of_their_own(bench: Bench) -> None:
    bench.open("a", "b", "c")
    for session, blocks in (("a", WHOLE), ("b", Span(1, 3)), ("c", WHOLE)):
        bench.add(step(session, blocks=blocks))
    bench.drain()
    assert bench.log == [("decode", {"a": 1, "c": 1}), ("decode", {"b": 1})]


def test_prefill_of_two_peers_rides_in_one_batch(bench: Bench) -> None:
    bench.pace.chunk = 40  # type: ignore[attr-defined]
    bench.open("a", "b", "c")
    for session, peer in (("a", "alice"), ("b", "alice"), ("c", "bob")):
        bench.add(step(session, 40, peer=peer))
    bench.drain()
    assert [event[1] for event in bench.log if event[0] == "prefill"] == [
        {"a": 24, "c": 16},
        {"a": 16, "c": 24},
        {"b": 40},
    ]


# -- closing -----------------------------------------------------------------------------------


def test_closing_while_paused_waits_for_the_batch(bench: Bench, bloom: Tiny) -> None:
    bench.open("gone", "stays", "new")
    bench.add(step("gone", 40, seed=1, peer="alice"))
    bench.add(step("gone", 1, 40))
    bench.add(step("stays", 40, seed=2, peer="bob"))
    bench.advance(interrupted=True)
    bench.executor.close_session("gone")
    free = bench.engine.kv_tokens_free
    bench.add(step("new", 1, seed=3))
    bench.advance(interrupted=True)
    bench.open("gone")
    bench.add(step("gone", 20, seed=4), "again")
    assert bench.engine.kv_tokens_free == free - 16, "rows that the batch reads are not given away"
    while "stays" not in bench.results:
        bench.advance(interrupted=True)
    assert bench.engine.kv_tokens_free == free - 16 + 48
    bench.drain()
    assert set(bench.results) == {"stays", "new", "again"}
    assert close(bench.hidden("stays"), bloom.expected(rows(40, seed=2)))
    assert close(bench.hidden("again"), bloom.expected(rows(20, seed=4)))
    assert bench.engine.stats().sessions == 3


def test_closing_between_chunks_frees_at_once(bench: Bench) -> None:
    bench.pace.chunk = 16  # type: ignore[attr-defined]
    bench.open("gone")
    bench.add(step("gone", 40))
    bench.advance()
    bench.executor.close_session("gone")
    assert bench.executor.idle
    assert bench.engine.kv_tokens_free == bench.engine.stats().kv_tokens
    bench.drain()
    assert not bench.results


# -- errors ------------------------------------------------------------------------------------


def test_bad_steps_fail_alone(bench: Bench, bloom: Tiny) -> None:
    bench.pace.chunk = 16  # type: ignore[attr-defined]
    bench.open("a", "b", "c", "d")
    poison = rows(40)
    poison[30] = float("nan")
    bench.add(StepRequest("a", WHOLE, (Slice(0, 0, 40),), poison))
    bench.add(step("b", 40, 5))
    bench.add(step("c", 200))
    bench.add(step("nobody", 40))
    bench.add(step("d", 40))
    bench.add(step("nobody else"))
    bench.drain()
    kinds = {name: type(result.error) for name, result in bench.results.items()}
    assert kinds == {
        "a": BadTensorError,
        "b": BadMessageError,
        "c": SessionTooLongError,
        "nobody": UnknownSessionError,
        "nobody else": UnknownSessionError,
        "d": type(None),
    }
    assert "sequence 0 at position 30" in str(bench.error("a"))
    assert close(bench.hidden("d"), bloom.expected(rows(40)))
    assert bench.engine.stats().kv_tokens - bench.engine.kv_tokens_free == 48


class Crash:
    """A block that fails from the `countdown`-th call on, once."""

    def __init__(self, block: Any, countdown: int) -> None:
        self._block = block
        self._countdown = countdown

    def __call__(self, *arguments: Any) -> Tensor:
        self._countdown -= 1
        if self._countdown == 0:
            raise RuntimeError("secret details of this machine")
        output: Tensor = self._block(*arguments)
        return output


@pytest.fixture
def crashing(bloom: Tiny, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    def crash_at(countdown: int) -> None:
        blocks = list(bloom.stack._blocks)
        blocks[2] = Crash(blocks[2], countdown)
        monkeypatch.setattr(bloom.stack, "_blocks", tuple(blocks))

    return crash_at


def test_a_crash_in_a_later_chunk_fails_its_steps_once(
    bench: Bench, bloom: Tiny, crashing: Any, caplog: pytest.LogCaptureFixture
) -> None:
    bench.pace.chunk = 48  # type: ignore[attr-defined]
    bench.open("a", "b", "c", "gone")
    for session in ("a", "gone", "b"):
        bench.add(step(session, 40, peer=session))
    crashing(2)
    assert bench.advance() == []
    assert bench.advance(interrupted=True) == []
    bench.executor.close_session("gone")
    assert bench.advance() == ["a", "b"]
    for name in "ab":
        assert type(bench.error(name)) is RemoteError
        assert "RuntimeError" in str(bench.error(name))
        assert "secret" not in str(bench.error(name))
    assert "secret" in caplog.text
    assert bench.executor.idle
    assert bench.engine.stats().sessions == 3
    bench.add(step("c", 20))
    bench.drain()
    assert close(bench.hidden("c"), bloom.expected(rows(20)))


def test_a_crash_while_decoding_leaves_the_paused_batch_alone(
    bench: Bench, bloom: Tiny, crashing: Any, caplog: pytest.LogCaptureFixture
) -> None:
    bench.open("long", "short")
    bench.add(step("long", 40))
    bench.advance(interrupted=True)
    bench.add(step("short"))
    crashing(1)
    assert bench.advance() == ["short"]
    assert type(bench.error("short")) is RemoteError
    bench.drain()
    assert close(bench.hidden("long"), bloom.expected(rows(40)))


def test_a_result_that_cannot_be_put_together_fails_alone(
    bench: Bench, bloom: Tiny, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    result = PlacedStep.result

    def fail_for_a(step: PlacedStep) -> Tensor:
        if step.request.session == "a":
            raise MemoryError
        return result(step)

    monkeypatch.setattr(PlacedStep, "result", fail_for_a)
    bench.open("a", "b")
    for session in "ba":
        bench.add(step(session, 40, peer=session))
    bench.drain()
    assert type(bench.error("a")) is RemoteError
    assert close(bench.hidden("b"), bloom.expected(rows(40)))
    assert bench.executor.idle


# -- room --------------------------------------------------------------------------------------


@pytest.fixture
def small(bloom: Tiny, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Room for 128 tokens, 96 of which `full` holds."""
    bench = Bench(bloom, monkeypatch, kv_tokens=128)
    bench.open("full", "a", "b", "c")
    bench.add(step("full", 96), "filled")
    bench.drain()
    bench.log.clear()
    return bench


def test_a_step_waits_for_room_and_others_go_on(small: Bench, bloom: Tiny) -> None:
    small.add(step("a", 60, seed=1))
    small.add(step("b", 20, seed=2))
    small.add(step("c", 1, seed=3))
    small.add(step("full", 1, 96))
    small.drain()
    assert set(small.results) == {"filled", "c", "full"}
    assert small.executor.wait_s() == 10.0
    assert not small.executor.idle
    small.now += 4.0
    assert small.executor.wait_s() == 6.0
    assert small.advance() == []
    small.executor.close_session("full")
    assert small.executor.wait_s() == 0.0
    small.drain()
    assert close(small.hidden("a"), bloom.expected(rows(60, seed=1)))
    assert close(small.hidden("b"), bloom.expected(rows(20, seed=2)))
    assert small.results["a"].queued_s == pytest.approx(4.0, abs=0.5)
    assert small.executor.idle


def test_room_goes_to_whoever_waited_longest(small: Bench) -> None:
    small.add(step("a", 60))
    small.drain()
    small.now += 1
    small.add(step("b", 60))
    small.drain()
    small.executor.close_session("full")
    small.drain()
    assert set(small.results) == {"filled", "a", "b"}
    ended = [event[1] for event in small.log if event[0] == "prefill"]
    assert ended == [{"a": 60, "b": 60}]


def test_rolling_back_makes_room(small: Bench) -> None:
    small.add(step("a", 60))
    small.drain()
    assert "a" not in small.results
    small.add(step("full", 1, 10), "rolled back")
    small.drain()
    assert small.error("a") is None


def test_after_a_while_there_is_an_error_that_says_what_is_free(small: Bench, bloom: Tiny) -> None:
    small.add(step("a", 60))
    small.add(step("a", 1, 60), "behind")
    small.drain()
    small.now += 9.9
    assert small.advance() == []
    small.add(step("b", 16, seed=1))
    small.drain()
    assert "a" not in small.results
    small.now += 0.1
    small.drain()
    assert type(small.error("a")) is CacheFullError
    assert "16 of 128 tokens free" in str(small.error("a"))
    assert small.results["a"].queued_s == 10.0
    assert type(small.error("behind")) is BadMessageError, "it comes after what was never placed"
    assert close(small.hidden("b"), bloom.expected(rows(16, seed=1)))
    assert small.engine.kv_tokens_free == 16, "nothing of it was kept"


def test_what_could_never_fit_fails_at_once(small: Bench) -> None:
    small.add(StepRequest("a", WHOLE, (Slice(0, 0, 70), Slice(1, 0, 70)), rows(140)))
    small.add(step("b", 129))
    small.drain()
    assert type(small.error("a")) is CacheFullError
    assert type(small.error("b")) is SessionTooLongError


def test_a_session_that_waits_for_room_can_be_closed(small: Bench) -> None:
    small.add(step("a", 60))
    small.drain()
    small.executor.close_session("a")
    assert small.executor.idle
    assert small.executor.wait_s() is None
    small.executor.close_session("full")
    small.drain()
    assert "a" not in small.results


class Crowd(Bench):
    """Sessions of one page each, which fill the cache and want a second one, all at once."""

    def __init__(self, tiny: Tiny, monkeypatch: pytest.MonkeyPatch, sessions: int) -> None:
        super().__init__(tiny, monkeypatch, kv_tokens=16 * sessions)
        self.names = [f"{number:02}" for number in range(sessions)]
        self.open(*self.names, max_length=32)
        for name in self.names:
            self.add(step(name, 16), ("prompt", name))
        self.drain()
        for name in self.names:
            self.add(step(name, 1, 16), name)
        self.drain()
        assert self.executor.steps_parked == sessions

    def next_ends(self) -> dict[object, bool]:
        """Wait for the next steps to end: whether there was room for each."""
        found: dict[object, bool] = {}
        while not found:
            wait_s = self.executor.wait_s()
            assert wait_s is not None
            self.now += wait_s
            found = {name: self.error(name) is None for name in self.advance()}
        return found


def test_one_step_at_a_time_fails_so_that_others_go_on(bloom: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    crowd = Crowd(bloom, monkeypatch, 4)
    assert crowd.next_ends() == {"03": False}
    assert crowd.now == 110.0
    assert type(crowd.error("03")) is CacheFullError
    crowd.now += 0.5
    crowd.executor.close_session("03")
    assert crowd.next_ends() == {"00": True}
    assert crowd.now == 110.5
    assert crowd.next_ends() == {"02": False}
    assert crowd.now == 111.0
    crowd.executor.close_session("02")
    assert crowd.next_ends() == {"01": True}
    assert crowd.now == 111.0
    assert crowd.executor.idle


def test_without_room_all_fail_in_the_end(bloom: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """One each second while that is possible; nobody waits for more than 30 s."""
    crowd = Crowd(bloom, monkeypatch, 24)
    for number in range(20):
        assert crowd.next_ends() == {crowd.names[-1 - number]: False}
        assert crowd.now == 110.0 + number
    assert crowd.next_ends() == dict.fromkeys(crowd.names[:4], False)
    assert crowd.now == 130.0
    assert crowd.executor.idle
    assert crowd.executor.steps_parked == 0


def test_a_younger_step_keeps_its_own_time(small: Bench) -> None:
    small.add(step("a", 60))
    small.drain()
    small.now += 9.5
    small.add(step("b", 60))
    small.drain()
    small.now += 0.5
    small.drain()
    assert type(small.error("a")) is CacheFullError
    assert "b" not in small.results
    assert small.executor.wait_s() == 9.5


# -- bugs --------------------------------------------------------------------------------------


def test_after_a_bug_nothing_is_left_and_everybody_is_told(
    small: Bench, bloom: Tiny, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    small.open("gone", "bad", max_length=32)
    small.add(step("gone", 16))
    small.add(step("c", 10))
    small.advance(interrupted=True)
    small.executor.close_session("gone")
    small.add(step("c", 1, 10), "behind")
    small.add(step("a", 1), "parked")
    small.drain_decodes()
    small.add(step("bad", 1, 7))
    small.add(step("full", 1, 95), "short")
    assert small.executor.steps_parked == 1

    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("secret details of this machine")

    with monkeypatch.context() as patch:
        patch.setattr(small.pace, "decoded", fail)
        with pytest.raises(ZeroDivisionError) as raised:
            small.advance()
    ended = {owner: result.error for owner, result in small.executor.abandon(raised.value)}
    assert {owner: type(error) for owner, error in ended.items()} == {
        "bad": BadMessageError,
        "c": RemoteError,
        "behind": RemoteError,
        "parked": RemoteError,
        "short": RemoteError,
    }
    assert "secret" not in str(ended["c"])
    assert "secret" in caplog.text
    executor = small.executor
    assert (executor.idle, executor.wait_s(), executor.steps_parked) == (True, None, 0)
    assert executor.queue_s() == 0
    executor.close_session("c")
    assert small.engine.kv_tokens_free == 32, "what the closed session held too"
    small.add(step("b", 20))
    small.drain()
    assert close(small.hidden("b"), bloom.expected(rows(20)))
    assert executor.abandon(ZeroDivisionError()) == []


# -- figures -----------------------------------------------------------------------------------


def test_times_are_told_apart(bench: Bench) -> None:
    bench.open("long", "short")
    bench.add(step("long", 40))
    bench.advance(interrupted=True)
    bench.now += 50.0
    bench.drain()
    result = bench.results["long"]
    assert 0 < result.compute_s < 1
    assert result.queued_s == pytest.approx(50.0 - result.compute_s)


def test_the_queue_is_measured_in_seconds(bloom: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    pace = Pace(256, row_s=0.001, decode_s=0.5)
    bench = Bench(bloom, monkeypatch, pace)
    bench.open("a", "b", "c")
    executor = bench.executor
    assert executor.queue_s() == 0
    for session in "ab":
        for position in range(2):
            bench.add(step(session, 1, position), (session, position))
    assert executor.queue_s() == 2 * 0.5, "two batches of two"
    bench.add(step("c", 100))
    assert executor.queue_s() == pytest.approx(2 * 0.5 + 100 * BLOCKS * 0.001)
    assert executor.queue_s(3, 50) == pytest.approx(3 * 0.5 + 150 * BLOCKS * 0.001)
    bench.drain()
    assert executor.queue_s() == 0


def test_a_decode_batch_waits_for_company_unless_prefill_does(
    bloom: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(bloom, monkeypatch, Pace(256, decode_s=0.5))
    bench.open("a", "b", "long")
    executor = bench.executor
    assert executor.linger_s() == 0, "nothing is there"
    for session in "ab":
        bench.add(step(session), (session, 0))
    assert executor.linger_s() == 0, "nobody else decodes"
    bench.drain()
    bench.add(step("a", 1, 1), ("a", 1))
    assert executor.linger_s() > 0
    bench.add(step("long", 40))
    assert executor.linger_s() == 0
    bench.drain()
    bench.add(step("a", 1, 2), ("a", 2))
    assert executor.linger_s() > 0
    executor.close_session("b")
    assert executor.linger_s() == 0


def test_the_pace_begins_with_what_was_measured(bloom: Tiny) -> None:
    engine = bloom.engine()
    engine.block_time_s, engine.prefill_tokens_per_s = 0.01, 1000.0
    pace = Executor(engine)._pace
    assert (pace.block_s, pace.decode_s, pace.row_s) == pytest.approx((0.01, 0.01 * BLOCKS, 0.001 / BLOCKS))
    pace = Executor(bloom.engine())._pace
    assert (pace.block_s, pace.decode_s, pace.row_s) == (0, 0, 0)


# -- work in pieces ------------------------------------------------------------------------------------


def add_work(bench: Bench, pieces: int, peer: str = "") -> Future[str]:
    """Each piece is in the log."""

    def work() -> Generator[None, None, str]:
        for _ in range(pieces):
            bench.log.append("work")
            yield
        return "done"

    future: Future[str] = Future()
    bench.executor.add_work(Work(work(), future, peer))
    return future


def test_work_is_done_when_nothing_else_waits(bench: Bench) -> None:
    assert bench.executor.wait_s() is None
    future = add_work(bench, 3)
    assert bench.executor.wait_s() == 0.0
    assert not bench.executor.idle
    bench.drain()
    assert future.result(0) == "done"
    assert bench.log == ["work"] * 3
    assert bench.executor.idle


class Timed(Steps):
    """Every batch, block and piece takes a second of the bench's clock; a piece counts `work_s`."""

    def __init__(self, work_s: float = 1.0, **options: int) -> None:
        super().__init__(**options)
        self.work_s = work_s
        self.bench: Bench | None = None

    def tick(self) -> None:
        assert self.bench is not None
        self.bench.now += 1.0

    def decoded(self, now_s: float, elapsed_s: float, blocks: int, *, prefill_share: float) -> None:
        self.tick()
        Pace.decoded(self, now_s, 1.0, blocks, prefill_share=prefill_share)

    def prefilled(self, elapsed_s: float, rows: int) -> None:
        self.tick()
        super().prefilled(elapsed_s, rows)

    def worked(self, now_s: float, elapsed_s: float) -> None:
        self.tick()
        super().worked(now_s + 1.0, self.work_s)


def timed_bench(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, work_s: float) -> Bench:
    pace = Timed(work_s)
    pace.bench = Bench(tiny, monkeypatch, pace)
    return pace.bench


@pytest.mark.parametrize(("work_s", "decodes"), [(0.3, 1), (1.0, 3), (2.0, 6)])
def test_decoding_has_its_share_beside_work(
    bloom: Tiny, monkeypatch: pytest.MonkeyPatch, work_s: float, decodes: int
) -> None:
    """After a piece of work, decode batches for three times as long."""
    bench = timed_bench(bloom, monkeypatch, work_s)
    bench.open("a")
    add_work(bench, 20)
    for number in range(20):
        bench.add(step("a", position=number), number)
        bench.advance()
    kinds = ["w" if entry == "work" else "d" for entry in bench.log]
    assert "".join(kinds).startswith(("w" + "d" * decodes) * 2)


def test_prefill_pauses_for_a_piece_of_work(bloom: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = timed_bench(bloom, monkeypatch, 0.5)
    bench.open("a")
    add_work(bench, 2)
    bench.add(step("a", 70))
    bench.drain()
    blocks = [entry for entry in bench.log if isinstance(entry, str)]
    assert blocks == ["work", "block", "block", "work", "block", "block"]
    assert bench.error("a") is None


def test_work_leaves_the_time_between_steps_alone_while_somebody_decodes(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step would wait for the end of a piece that began just before it came."""
    monkeypatch.setattr(bench.pace, "spares_time", lambda now_s: False)
    add_work(bench, 2)
    bench.advance()
    bench.pace.work_due_s = bench.now + 3.0
    assert bench.executor.wait_s() == 3.0
    bench.advance()
    assert bench.log == ["work"]
    bench.now += 3.0
    assert bench.executor.wait_s() == 0.0
    bench.advance()
    assert bench.log == ["work", "work"]


def test_a_bug_ends_works_too(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    future = add_work(bench, 2)
    bench.executor.abandon(ValueError("a bug"))
    assert isinstance(future.exception(0), RemoteError)
    assert bench.executor.idle


def test_pieces_are_as_small_as_chunks_of_prefill(bloom: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(bloom, monkeypatch, Steps(chunk=48))
    assert bench.executor.piece_rows() == 48
