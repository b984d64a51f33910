"""Training passes through blocks that ranks share out: gradients as of whole blocks, and what others keep."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from petal_swarm.engine.engine import Engine
from petal_swarm.engine.steps import StepRequest
from petal_swarm.engine.training import Passes, PassLimits
from petal_swarm.errors import NotFiniteError, PassGoneError, RemoteError
from petal_swarm.models.adapters import AdapterLayout
from petal_swarm.models.checkpoint import Checkpoint, open_checkpoint
from petal_swarm.models.quantization import Quant
from petal_swarm.models.stack import BlockStack, load_blocks
from petal_swarm.span import Slice, Span

from .test_training import COUNT, LENGTHS, Clock, run
from .test_training import adapter_for as adapter_of_tiny
from .thread_ranks import ThreadRanks
from .tiny import KINDS, WHOLE, Tiny, make, rows

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    made: dict[str, Checkpoint] = {}

    def get(kind: str) -> Checkpoint:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            make(kind, folder)
            made[kind] = open_checkpoint(str(folder))
        return made[kind]

    return get


@pytest.fixture
def ranks(checkpoint: Callable[[str], Checkpoint]) -> Iterator[ThreadRanks]:
    """Of two; llama has a head of keys and values at each."""
    ranks = ThreadRanks(checkpoint("llama"), WHOLE, 2)
    yield ranks
    ranks.stack.close()


def whole(checkpoint: Checkpoint, quant: Quant = "none") -> BlockStack:
    return load_blocks(checkpoint, WHOLE, dtype=torch.float32, quant=quant)


def adapter_for(stack: BlockStack, blocks: Span = WHOLE) -> tuple[AdapterLayout, Tensor]:
    layout, numbers = adapter_of_tiny(Tiny(stack, None), blocks)
    return layout, numbers * 0.3


def near(found: Tensor | None, expected: Tensor | None) -> bool:
    assert found is not None
    assert expected is not None
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm()) < TOLERANCE


def assert_equal_gradients(found: BlockStack, expected: BlockStack, limits: PassLimits | None = None) -> None:
    """Of two peers' passes, of which one begins in between and has other blocks and no adapter."""
    layout, numbers = adapter_for(found)
    results = []
    for stack, own in ((found, limits), (expected, None)):
        passes = Passes(stack, own, piece_rows=lambda: 14)
        forward = passes.forward("a", rows(COUNT), LENGTHS, WHOLE, (layout, numbers), keep=True, peer="A")
        next(forward)
        other = run(passes.forward("b", rows(20, 2), (13, 7), Span(1, 3), keep=True, peer="B"))
        out = run(forward)
        back = passes.backward("a", rows(COUNT, 1))
        next(back)
        of_other, nothing = run(passes.backward("b", rows(20, 3)))
        assert nothing is None
        hidden, grad = run(back)
        for key in "ab":
            passes.forget(key)
        results.append((out, other, of_other, hidden, grad))
    for one, another in zip(results[0][:-1], results[1][:-1], strict=True):
        assert near(one, another)
    split = [layout.split(found.config, own[-1], WHOLE) for own in results]  # type: ignore[arg-type]
    for block in WHOLE.blocks():
        one, another = split[0][block], split[1][block]
        assert near(one.prefix, another.prefix)
        for stem, own in one.lora.items():
            assert near(own.a, another.lora[stem].a), (block, stem, "a")
            assert near(own.b, another.lora[stem].b), (block, stem, "b")


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_one_rank(
    checkpoint: Callable[[str], Checkpoint], kind: str, count: int
) -> None:
    ranks = ThreadRanks(checkpoint(kind), WHOLE, count)
    assert_equal_gradients(ranks.stack, whole(checkpoint(kind)))
    ranks.settle()
    assert [worker.passes.held for worker in ranks.workers] == [0] * (count - 1)
    ranks.stack.close()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_through_int8_are_those_of_one_rank(
    checkpoint: Callable[[str], Checkpoint], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("petal_swarm.models.int8.packing_works", lambda: False)
    monkeypatch.setattr("petal_swarm.models.int8._fused_works", lambda values: False)
    ranks = ThreadRanks(checkpoint(kind), WHOLE, 2, quant="int8")
    assert_equal_gradients(ranks.stack, whole(checkpoint(kind), "int8"))
    ranks.stack.close()


@pytest.mark.parametrize("inputs", [2, 3, 8])
@pytest.mark.parametrize("graphs", [0, 1])
def test_what_was_dropped_is_computed_again(
    checkpoint: Callable[[str], Checkpoint], ranks: ThreadRanks, graphs: int, inputs: int
) -> None:
    """At all ranks; `inputs` counts those that fit."""
    one = PassLimits(activation_bytes=graphs * (1 << 16), input_bytes=inputs * rows(COUNT).nbytes)
    assert_equal_gradients(ranks.stack, whole(checkpoint("llama")), one)
    ranks.settle()
    assert ranks.workers[0].passes.held == 0


def test_others_keep_what_the_leader_keeps(ranks: ThreadRanks) -> None:
    """As many graphs, whatever becomes of a pass: dropped, expired, given up, forgotten, or of one name."""
    clock, adapter = Clock(), adapter_for(ranks.stack)
    passes = Passes(ranks.stack, PassLimits(keep_s=10.0), piece_rows=lambda: 9, clock=clock)
    (worker,) = ranks.workers

    def held() -> tuple[int, int]:
        ranks.settle()
        own = sum(len(group.graphs) for kept in passes._passes.values() for group in kept.groups)
        return own, worker.passes.held

    for key in "abc":
        run(passes.forward(key, rows(COUNT), LENGTHS, WHOLE, adapter, keep=True))
    assert held() == (36, 37)
    passes._passes["a"].drop_graph()
    assert held() == (35, 36)
    passes.forget("a")
    assert held() == (24, 25)
    run(passes.forward("b", rows(5), [5], WHOLE, adapter, keep=True))
    assert held() == (16, 17)
    given_up = passes.forward("d", rows(COUNT), LENGTHS, WHOLE, adapter, keep=True)
    for _ in range(6):
        next(given_up)
    assert held() == (22, 23)
    given_up.close()
    assert held() == (16, 17)
    stopped = passes.backward("c", rows(COUNT))
    next(stopped)
    assert held() == (15, 17)
    stopped.close()
    assert held() == (15, 16)
    clock.now = 11.0
    passes.expire()
    assert held() == (0, 0)
    forgotten = passes.forward("e", rows(COUNT), LENGTHS, WHOLE, adapter, keep=True)
    next(forgotten)
    passes.forget("e")
    run(forgotten)
    run(passes.forward("f", rows(COUNT), LENGTHS, WHOLE, adapter, keep=False))
    assert held() == (0, 0)
    assert worker.passes._passes == {}
    assert worker.passes._last is None


def test_rows_travel_only_where_a_pass_begins(ranks: ThreadRanks) -> None:
    """Two groups, there and back, and the numbers of an adapter once for two passes."""
    adapter, passes = adapter_for(ranks.stack), Passes(ranks.stack, piece_rows=lambda: 14)
    for key in "ab":
        run(passes.forward(key, rows(COUNT), LENGTHS, WHOLE, adapter, keep=True))
        run(passes.backward(key, rows(COUNT)))
    group = ranks.groups[0]
    assert group.shares == 1 + 2 * 4
    meetings = 2 * len(WHOLE) * 2  # two in each block, there and back
    assert group.sums == 2 * (2 * meetings + 1)


def test_passes_and_batches_take_turns(checkpoint: Callable[[str], Checkpoint], ranks: ThreadRanks) -> None:
    """Decoding between two blocks of a pass, as a server does, and a prompt that is spread."""
    found = []
    for stack in (ranks.stack, whole(checkpoint("llama"))):
        engine, passes = Engine(stack, kv_tokens=256, max_batch_tokens=64), Passes(stack)
        engine.open_session("s", max_length=64)
        outs = []

        def step(position: int, count: int, engine: Engine = engine) -> Tensor | None:
            hidden = rows(count, position)
            return engine.run([StepRequest("s", WHOLE, (Slice(0, position, count),), hidden)])[0].hidden

        forward = passes.forward("a", rows(COUNT), LENGTHS, WHOLE, adapter_for(stack), keep=True)
        for position, count in ((0, 12), (12, 1)):
            next(forward)
            outs.append(step(position, count))
        outs.append(run(forward))
        back = passes.backward("a", rows(COUNT, 1))
        for position in (13, 14):
            next(back)
            outs.append(step(position, 1))
        found.append([*outs, *run(back)])
    assert all(near(*pair) for pair in zip(*found, strict=True))


def test_gradients_in_float16_are_scaled_alike(checkpoint: Callable[[str], Checkpoint]) -> None:
    ranks = ThreadRanks(checkpoint("llama"), WHOLE, 2, dtype=torch.float16)
    exact = whole(checkpoint("llama"))
    found = []
    for stack in (ranks.stack, exact):
        passes = Passes(stack, piece_rows=lambda: 14)
        run(passes.forward("a", rows(COUNT, 1), LENGTHS, WHOLE, adapter_for(stack), keep=True))
        found.append(run(passes.backward("a", rows(COUNT, 2) * 1e-9)))
    for narrow, wide in zip(*found, strict=True):
        assert narrow is not None
        assert wide is not None
        assert narrow.dtype is torch.float32
        assert float((narrow - wide).norm() / wide.norm()) < 0.05
    ranks.stack.close()


# -- what goes wrong ---------------------------------------------------------------------------------


def test_a_pass_that_fails_ends_alone(checkpoint: Callable[[str], Checkpoint], ranks: ThreadRanks) -> None:
    layout, numbers = adapter_for(ranks.stack)
    spoiled = numbers.clone()
    layout.split(ranks.stack.config, spoiled, WHOLE)[2].prefix.fill_(math.inf)  # type: ignore[union-attr]
    passes = Passes(ranks.stack)
    with pytest.raises(NotFiniteError, match="block 2"):
        run(passes.forward("a", rows(COUNT), LENGTHS, WHOLE, (layout, spoiled), keep=True))
    run(passes.forward("a", rows(COUNT), LENGTHS, WHOLE, (layout, numbers), keep=True))
    back = passes.backward("a", rows(COUNT))
    next(back)
    passes.forget("a")
    with pytest.raises(PassGoneError):
        run(back)
    ranks.settle()
    assert ranks.workers[0].passes.held == 0
    assert_equal_gradients(ranks.stack, whole(checkpoint("llama")))


def test_a_pass_forgotten_while_blocks_are_computed_again_leaves_nothing(ranks: ThreadRanks) -> None:
    """For want of memory that others' passes take, or because its time is up."""
    limits = PassLimits(activation_bytes=0, input_bytes=rows(COUNT).nbytes)
    passes = Passes(ranks.stack, limits)
    run(passes.forward("a", rows(COUNT), LENGTHS, WHOLE, adapter_for(ranks.stack), keep=True))
    back = passes.backward("a", rows(COUNT))
    next(back)  # the first block of those before the last
    passes.forget("a")
    with pytest.raises(PassGoneError):
        run(back)
    ranks.settle()
    (worker,) = ranks.workers
    assert (worker.passes.held, worker.passes._passes) == (0, {})
    assert not ranks.stack.passes._adapters


def test_others_lost_in_mid_backward_end_it_all_clearly(ranks: ThreadRanks) -> None:
    passes = Passes(ranks.stack)
    for key in "ab":
        run(passes.forward(key, rows(COUNT), LENGTHS, WHOLE, adapter_for(ranks.stack), keep=True))
    back = passes.backward("a", rows(COUNT))
    next(back)
    ranks.lose()
    with pytest.raises(RemoteError, match="a part of this server's blocks is gone"):
        run(back)
    with pytest.raises(RemoteError, match="a part of this server's blocks is gone"):
        run(passes.backward("b", rows(COUNT)))
    with pytest.raises(RemoteError, match="a part of this server's blocks is gone"):
        run(passes.forward("c", rows(COUNT), LENGTHS, WHOLE, keep=True))
    for key in "abc":
        passes.forget(key)
    assert passes.stats() == type(passes.stats())(0, 0, 0)
