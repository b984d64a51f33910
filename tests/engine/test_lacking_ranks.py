"""Ranks that run out of memory: what one device does then, several do, and no rank is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from petal_swarm.engine.engine import Chunk, Engine
from petal_swarm.engine.steps import StepRequest
from petal_swarm.engine.training import Passes, PassLimits
from petal_swarm.errors import RemoteError
from petal_swarm.models.adapters import AdapterLayout
from petal_swarm.models.checkpoint import Checkpoint, open_checkpoint
from petal_swarm.models.meetings import MeetingError, Meetings
from petal_swarm.models.stack import BlockStack, load_blocks
from petal_swarm.span import Slice

from .test_led_passes import adapter_for, near
from .test_training import COUNT, LENGTHS, run
from .thread_ranks import ThreadRanks
from .tiny import HIDDEN, WHOLE, make, rows

NEVER = 1 << 30
CPU_ERROR = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 99999999999 bytes."


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("llama")
    make("llama", folder)
    return open_checkpoint(str(folder))


@pytest.fixture(scope="module")
def whole(checkpoint: Checkpoint) -> BlockStack:
    return load_blocks(checkpoint, WHOLE, dtype=torch.float32)


@pytest.fixture
def start(checkpoint: Checkpoint) -> Iterator[Callable[..., ThreadRanks]]:
    started: list[ThreadRanks] = []

    def begin(count: int = 2, spread_from: int = NEVER) -> ThreadRanks:
        started.append(ThreadRanks(checkpoint, WHOLE, count, spread_from=spread_from))
        return started[-1]

    yield begin
    for ranks in started:
        ranks.stack.close()


def meetings_of(ranks: ThreadRanks, rank: int) -> Meetings:
    return (ranks.workers[rank - 1]._stack if rank else ranks.stack).meetings


class Lack:
    """A rank has no memory for a block of more than `rows` rows when it has met the others `met` times in it.

    The first `spared` of them get through all the same, and all when it was `refused` `times` times.
    """

    def __init__(
        self, ranks: ThreadRanks, rank: int, met: int, rows: int = 0, *, spared: int = 0, times: int = NEVER
    ) -> None:
        ranks.settle()
        self.refused: list[int] = []
        self._meetings = meetings_of(ranks, rank)
        self._met, self._rows, self._spared, self._times = met, rows, spared, times
        self._now = self._owed = 0
        kind: Any = self._meetings
        kind.block = partial(self._block, kind.block)
        for name in ("sum", "sum_rows", "join_rows"):
            setattr(kind, name, partial(self._meet, getattr(kind, name)))

    def _block(self, block: Callable[..., Tensor], compute: Any, count: int, owed: Any) -> Tensor:
        self._now, self._owed = count, len(owed)
        out = block(compute, count, owed)
        self._now = 0
        return out

    def _meet(self, meet: Callable[..., Any], tensor: Tensor, *out: Tensor) -> Any:
        if self._now and self._meetings._met == self._met:
            self._refuse()
        found = meet(tensor, *out)
        if self._now and self._meetings._met == self._met == self._owed:
            self._refuse()
        return found

    def _refuse(self) -> None:
        rows, self._now = self._now, 0
        if rows <= self._rows:
            return
        if self._spared:
            self._spared -= 1
        elif len(self.refused) < self._times:
            self.refused.append(rows)
            raise RuntimeError(CPU_ERROR)


def engine_of(stack: BlockStack) -> Engine:
    engine = Engine(stack, kv_tokens=1024, max_batch_tokens=256)
    for session in "abc":
        engine.open_session(session, max_length=128)
    return engine


def step(session: str, position: int, count: int, seed: int = 0) -> StepRequest:
    return StepRequest(session, WHOLE, (Slice(0, position, count),), rows(count, seed))


def assert_same(found: Engine, expected: Engine, *requests: StepRequest) -> None:
    for one, another in zip(found.run(requests), expected.run(requests), strict=True):
        assert one.error is None
        assert near(one.hidden, another.hidden)


# -- batches -----------------------------------------------------------------------------------------

WHERE = [(met, NEVER, spared) for met in range(3) for spared in (0, 3)]
WHERE += [(met, 8, spared) for met in range(5) for spared in (0, 3)]
WHERE += [(5, 8, 0)]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("met", "spread_from", "spared"), WHERE)
def test_a_batch_is_tried_again_in_parts(
    start: Callable[..., ThreadRanks], whole: BlockStack, rank: int, met: int, spread_from: int, spared: int
) -> None:
    """Two steps, behind what is in the cache, of which one does not fit alone; then everybody decodes."""
    ranks = start(2, spread_from)
    engines = engine_of(ranks.stack), engine_of(whole)
    assert_same(*engines, step("a", 0, 7), step("b", 0, 3))
    lack = Lack(ranks, rank, met, 20, spared=spared)
    assert_same(*engines, step("a", 7, 40, 1), step("b", 3, 11, 2))
    ranks.settle()
    needed = not rank or (met, spread_from, spared) not in ((2, NEVER, 3), (5, 8, 0))
    assert lack.refused == ([51, 40] if needed else [51]), "of the last block nothing is needed but its sums"
    assert_same(*engines, step("a", 47, 1, 3), step("b", 14, 1, 4), step("c", 0, 5, 5))


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_decoding_goes_on(start: Callable[..., ThreadRanks], whole: BlockStack, rank: int) -> None:
    """In any block; also where another rank lacks memory, too."""
    ranks = start(4)
    engines = engine_of(ranks.stack), engine_of(whole)
    assert_same(*engines, step("a", 0, 7), step("b", 0, 3))
    for number in range(4):
        lacking = {rank, (rank + number) % 4}
        lacks = [Lack(ranks, own, number % 2, spared=number, times=1) for own in lacking]
        assert_same(*engines, step("a", 7 + number, 1, number), step("b", 3 + number, 1, 9 + number))
        ranks.settle()
        assert all(lack.refused == [2] for lack in lacks)


@pytest.mark.parametrize("spread_from", [8, NEVER])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_step_that_does_not_fit_fails_alone(
    start: Callable[..., ThreadRanks], whole: BlockStack, rank: int, spread_from: int
) -> None:
    ranks = start(2, spread_from)
    engines = engine_of(ranks.stack), engine_of(whole)
    assert_same(*engines, step("b", 0, 3))
    Lack(ranks, rank, 1, 10, times=4)
    failed, other = engines[0].run([step("a", 0, 40), step("b", 3, 8, 1)])
    assert type(failed.error) is RemoteError
    assert "no memory left for a step of 40 tokens" in str(failed.error)
    (expected,) = engines[1].run([step("b", 3, 8, 1)])
    assert near(other.hidden, expected.hidden)
    assert_same(*engines, step("a", 0, 40, 2), step("b", 11, 1, 3))
    ranks.settle()
    assert all(not worker._batches for worker in ranks.workers)


@pytest.mark.parametrize("spread_from", [8, NEVER])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_batch_led_by_blocks_ends_where_memory_does(
    start: Callable[..., ThreadRanks], whole: BlockStack, rank: int, spread_from: int
) -> None:
    """Somebody decodes in between; and a batch of which others have a part left is forgotten."""
    ranks = start(2, spread_from)
    found = []
    for stack in (ranks.stack, whole):
        engine = engine_of(stack)
        (first,) = engine.run([step("b", 0, 3)])
        lack = Lack(ranks, rank, 1, 20, spared=1)
        placed = engine.place(step("a", 0, 50, 1))
        batch = engine.begin([Chunk(placed, 50)])
        batch.advance()
        (between,) = engine.run([step("b", 3, 1, 2)])
        while not batch.done:
            batch.advance()
        found.append(
            [first.hidden, between.hidden, placed.result(), engine.run([step("b", 4, 1, 3)])[0].hidden]
        )
        if stack is ranks.stack:
            assert lack.refused == [50, 50, 25]
            assert engine.fitting_rows == 16
    assert all(near(*pair) for pair in zip(*found, strict=True))
    ranks.settle()
    assert all(not worker._batches for worker in ranks.workers)


# -- training ----------------------------------------------------------------------------------------


def held(ranks: ThreadRanks, passes: Passes) -> list[int]:
    """Graphs at the leader, and all that others hold."""
    ranks.settle()
    own = sum(len(group.graphs) for kept in passes._passes.values() for group in kept.groups)
    return [own, *(worker.passes.held for worker in ranks.workers)]


def gradients(stack: BlockStack, passes: Passes | None = None) -> list[Tensor | None]:
    """Of two groups, there and back."""
    passes = passes or Passes(stack, piece_rows=lambda: 14)
    out = run(passes.forward("ok", rows(COUNT), LENGTHS, WHOLE, adapter_for(stack), keep=True))
    found = [out, *run(passes.backward("ok", rows(COUNT, 1)))]
    passes.forget("ok")
    return found


@pytest.fixture(scope="module")
def expected(whole: BlockStack) -> list[Tensor | None]:
    return gradients(whole)


def all_near(found: list[Tensor | None], expected: list[Tensor | None]) -> bool:
    return all(near(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("met", "spared"), [(0, 0), (1, 5), (2, 2), (0, 7), (2, 7)])
def test_a_forward_without_memory_fails_alone(
    start: Callable[..., ThreadRanks], expected: list[Tensor | None], rank: int, met: int, spared: int
) -> None:
    """In any block, also of the second of two groups. Nothing of it is kept by anybody."""
    ranks = start()
    passes = Passes(ranks.stack, piece_rows=lambda: 14)
    lack = Lack(ranks, rank, met, spared=spared, times=1)

    def forward() -> Tensor:
        adapter = adapter_for(ranks.stack)
        return run(passes.forward("a", rows(COUNT), LENGTHS, WHOLE, adapter, keep=True))

    if rank and met == 2 and spared == 7:  # what comes out is right; the way back is missing
        forward()
        assert held(ranks, passes) == [8, 8]
        with pytest.raises(torch.OutOfMemoryError):
            run(passes.backward("a", rows(COUNT)))
        passes.forget("a")
    else:
        with pytest.raises(RuntimeError, match="memory"):
            forward()
    assert len(lack.refused) == 1
    assert held(ranks, passes) == [0, 0]
    assert all_near(gradients(ranks.stack, passes), expected)
    assert held(ranks, passes) == [0, 0]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("met", "spared"), [(0, 0), (1, 1), (2, 2), (2, 3), (1, 6), (2, 7)])
def test_a_backward_without_memory_can_be_run_again(
    start: Callable[..., ThreadRanks], expected: list[Tensor | None], rank: int, met: int, spared: int
) -> None:
    """Wherever it fails, also where only a gradient of an adapter is missing. All have the same graphs."""
    ranks = start()
    passes = Passes(ranks.stack, piece_rows=lambda: 14)
    out = run(passes.forward("a", rows(COUNT), LENGTHS, WHOLE, adapter_for(ranks.stack), keep=True))
    lack = Lack(ranks, rank, met, spared=spared, times=1)
    with pytest.raises(torch.OutOfMemoryError if rank else RuntimeError, match="memory"):
        run(passes.backward("a", rows(COUNT, 1)))
    assert len(lack.refused) == 1
    own, other = held(ranks, passes)
    assert other == own + 1, "the adapter"
    found = run(passes.backward("a", rows(COUNT, 1)))
    passes.forget("a")
    assert all_near([out, *found], expected)
    assert held(ranks, passes) == [0, 0]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("spared", [0, 2, 3, 4])
@pytest.mark.parametrize("met", [0, 2])
def test_what_could_not_be_computed_again_is_kept_by_nobody(
    start: Callable[..., ThreadRanks], expected: list[Tensor | None], rank: int, spared: int, met: int
) -> None:
    """A pass without graphs: blocks are run again to the last, and that is trained through, and so on."""
    ranks = start()
    limits = PassLimits(activation_bytes=0, input_bytes=2 * rows(COUNT).nbytes)
    passes = Passes(ranks.stack, limits, piece_rows=lambda: 14)
    out = run(passes.forward("a", rows(COUNT), LENGTHS, WHOLE, adapter_for(ranks.stack), keep=True))
    Lack(ranks, rank, met, spared=spared, times=1)
    with pytest.raises(RuntimeError, match="memory"):
        run(passes.backward("a", rows(COUNT, 1)))
    own, other = held(ranks, passes)
    assert (own, other) == (0, 1)
    found = run(passes.backward("a", rows(COUNT, 1)))
    passes.forget("a")
    assert all_near([out, *found], expected)


# -- what is told between blocks ---------------------------------------------------------------------


def refuse(*_: object, **__: object) -> Any:
    raise RuntimeError(CPU_ERROR)


def nothing_for(meetings: Meetings, patch: pytest.MonkeyPatch) -> None:
    """Nothing can be taken, nor is more set aside."""
    patch.setattr(meetings, "take", lambda shape, dtype: meetings.attempt(refuse))
    patch.setattr(meetings, "set_aside", refuse)


def test_rows_come_where_there_is_no_memory_to_keep_them(
    start: Callable[..., ThreadRanks], whole: BlockStack, expected: list[Tensor | None]
) -> None:
    ranks = start(2, 8)
    engines = engine_of(ranks.stack), engine_of(whole)
    passes = Passes(ranks.stack, piece_rows=lambda: 14)
    with pytest.MonkeyPatch.context() as patch:
        nothing_for(meetings_of(ranks, 1), patch)
        for count in (1, 40):
            (failed,) = engines[0].run([step("a", 0, count)])
            assert "no memory left" in str(failed.error)
        with pytest.raises(torch.OutOfMemoryError, match=r"ranks \[1\]"):
            run(passes.forward("a", rows(COUNT), LENGTHS, WHOLE, keep=True))
        ranks.settle()
    assert_same(*engines, step("a", 0, 40), step("b", 0, 3))
    assert all_near(gradients(ranks.stack, passes), expected)


@pytest.mark.parametrize("name", ["AdapterState", "Pass", "Gradient"])
def test_a_pass_for_which_others_lack_something_fails(
    start: Callable[..., ThreadRanks],
    expected: list[Tensor | None],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    ranks = start()
    passes = Passes(ranks.stack, piece_rows=lambda: 14)
    with monkeypatch.context() as patch:
        patch.setattr(f"petal_swarm.engine.followed_passes.{name}", refuse)
        with pytest.raises(torch.OutOfMemoryError):
            gradients(ranks.stack, passes)
        assert len(passes._passes) == (name == "Gradient")
        passes.forget("ok")
        assert held(ranks, passes) == [0, 0]
    assert all_near(gradients(ranks.stack, passes), expected)


def served_by(engine: Engine, *, lora: bool) -> Any:
    layout, numbers = adapter_for(engine.stack)
    if not lora:
        layout = AdapterLayout((), layout.prefix_tokens)
        numbers = numbers[: layout.numbers(engine.stack.config, WHOLE)]
    return engine.stack.serve_adapter(layout, numbers, WHOLE)


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("way", ["numbers", "parts", "prefix", "own prefix"])
def test_an_adapter_for_which_there_is_no_memory_fails_its_sessions(
    start: Callable[..., ThreadRanks],
    whole: BlockStack,
    lora: bool,
    way: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Room in the cache is given back; others go on, and the same adapter is of use when there is memory."""
    ranks = start()
    engines = engine_of(ranks.stack), engine_of(whole)
    found = engines[0]
    assert_same(*engines, step("b", 0, 3))
    ranks.settle()
    free, own = found.kv_tokens_free, ranks.workers[0]
    with monkeypatch.context() as patch:
        if way == "numbers":
            patch.setattr("petal_swarm.engine.ranks._PIECE_NUMBERS", 1000)
            nothing_for(own._meetings, patch)
        elif way == "parts":
            patch.setattr(own._stack, "serve_adapter", refuse)
        elif way == "prefix":
            patch.setattr("petal_swarm.models.packing.KVPool.write_prefix", refuse)
        else:
            patch.setattr(own, "_write_prefix", refuse)
        with pytest.raises(torch.OutOfMemoryError):
            found.open_session("adapted", max_length=64, adapter=served_by(found, lora=lora))
        ranks.settle()
    assert found.kv_tokens_free == free
    assert_same(*engines, step("b", 3, 1, 1), step("a", 0, 9, 2))
    for engine in engines:
        engine.open_session("adapted", max_length=64, adapter=served_by(engine, lora=lora))
    assert_same(*engines, step("adapted", 0, 9, 2), step("b", 4, 1, 1))


def test_rows_of_a_missing_adapter_are_not_computed_without_it(
    start: Callable[..., ThreadRanks], whole: BlockStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that has no prefix to write, so that the first to miss it is a step."""
    ranks = start()
    engines = engine_of(ranks.stack), engine_of(whole)
    layout, numbers = adapter_for(ranks.stack)
    layout = AdapterLayout(layout.places)
    numbers = numbers[: layout.numbers(whole.config, WHOLE)]
    with monkeypatch.context() as patch:
        patch.setattr(ranks.workers[0]._stack, "serve_adapter", refuse)
        served = ranks.stack.serve_adapter(layout, numbers, WHOLE)
        engines[0].open_session("adapted", max_length=64, adapter=served)
        failed, plain = engines[0].run([step("adapted", 0, 20), step("a", 0, 9)])
        assert "no memory left for a step of 20 tokens" in str(failed.error)
        assert near(plain.hidden, engines[1].run([step("a", 0, 9)])[0].hidden)


# -- what is something else --------------------------------------------------------------------------


@pytest.mark.parametrize("spread_from", [8, NEVER])
def test_numbers_that_are_not_finite_are_not_a_lack_of_memory(
    start: Callable[..., ThreadRanks], whole: BlockStack, spread_from: int
) -> None:
    """Neither is one of which they were asked before."""
    ranks = start(2, spread_from)
    engines = engine_of(ranks.stack), engine_of(whole)
    for rank in (0, 1):
        Lack(ranks, rank, 1, times=1)
        assert_same(*engines, step("a", 0, 3))
    with torch.inference_mode():
        for count in (1, 9):
            placed = engines[0].place(step("a", 0, count))
            hidden, packed = engines[0]._pack([Chunk(placed, count)])
            bad = torch.full_like(hidden, torch.nan)
            assert ranks.stack.forward(bad, packed, engines[0]._pool, WHOLE).isnan().all()
    assert_same(*engines, step("a", 0, 9), step("b", 0, 3))


def test_other_errors_are_those_of_all_ranks(start: Callable[..., ThreadRanks]) -> None:
    ranks = start()
    engine = engine_of(ranks.stack)

    def fail(_: Tensor) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    ranks.stack.meetings.sum = fail  # type: ignore[method-assign]
    with pytest.raises(RemoteError, match="is gone"):
        engine.run([step("a", 0, 3)])
    with pytest.raises(RemoteError, match="is gone"):
        engine.run([step("b", 0, 3)])


def test_who_cannot_meet_the_others_says_so(start: Callable[..., ThreadRanks]) -> None:
    own = meetings_of(start(), 0)
    with pytest.raises(MeetingError):
        own.block(refuse, (1 << 20) // (HIDDEN * 4) + 1, ("sum", "sum"))


def test_memory_is_given_back_before_the_others_are_met(start: Callable[..., ThreadRanks]) -> None:
    """What a block had allocated is gone when it is known to have failed."""
    own, alive = meetings_of(start(), 0), []

    class Held:
        def __del__(self) -> None:
            alive.append("gone")

    def compute() -> Tensor:
        held = Held()
        assert held
        raise RuntimeError(CPU_ERROR)

    class Group:
        def sum(self, tensor: Tensor) -> None:
            assert tensor.isnan().all()
            alive.append("met")

    own._group = Group()  # type: ignore[assignment]
    assert own.block(compute, 3, ("sum", "sum")).isnan().all()
    assert alive == ["gone", "met", "met"]
