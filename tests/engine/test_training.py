"""Training passes: gradients whatever was kept, what is kept, and what is refused."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from petal_swarm.engine.graphs import GRAPH_BYTES
from petal_swarm.engine.training import Passes, PassLimits
from petal_swarm.errors import BadTensorError, ConfigError, NotFiniteError, PassGoneError
from petal_swarm.models.adapters import AdapterLayout, LoraPlace
from petal_swarm.models.families import family_of
from petal_swarm.span import Span

from .tiny import HIDDEN, WHOLE, Tiny, close, make, rows

T = TypeVar("T")
LENGTHS = (5, 9, 9)
COUNT = sum(LENGTHS)


def run(pieces: Generator[None, None, T]) -> T:
    """All of them; the result."""
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return end.value


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def adapter_for(tiny: Tiny, blocks: Span = WHOLE) -> tuple[AdapterLayout, Tensor]:
    """LoRA on every projection, and a prefix."""
    config = tiny.stack.config
    shapes = family_of(config).block_shapes(config)
    stems = [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2]
    layout = AdapterLayout(
        tuple(LoraPlace(block, stem, 2, 1.5) for block in blocks.blocks() for stem in stems), 3
    )
    count = layout.numbers(config, blocks)
    return layout, torch.randn(count, generator=torch.Generator().manual_seed(9)) * 0.3


def by_autograd(tiny: Tiny, hidden: Tensor, adapter: Any, blocks: Span, grad: Tensor) -> tuple[Tensor, ...]:
    """Output, gradient of the input, gradient of the numbers; one graph for everything."""
    stack = tiny.stack
    layout, numbers = adapter
    hidden, numbers = hidden.clone().requires_grad_(), numbers.clone().requires_grad_()
    adapters = layout.split(stack.config, numbers, blocks)
    sequences = stack.sequences(LENGTHS, layout.prefix_tokens)
    out = hidden
    for block in blocks.blocks():
        out = stack.forward_trained(block, out, sequences, adapters[block])
    return out.detach(), *torch.autograd.grad(out, [hidden, numbers], grad)


@pytest.mark.parametrize("blocks", [WHOLE, Span(1, 3)])
@pytest.mark.parametrize("piece_rows", [math.inf, 14, 1])
def test_gradients_are_those_of_autograd(tiny: Tiny, blocks: Span, piece_rows: float) -> None:
    adapter = adapter_for(tiny, blocks)
    hidden, grad = rows(COUNT), rows(COUNT, 1)
    expected = by_autograd(tiny, hidden, adapter, blocks, grad)
    passes = Passes(tiny.stack, piece_rows=lambda: piece_rows)
    out = run(passes.forward("a", hidden, LENGTHS, blocks, adapter, keep=True))
    assert close(out, expected[0])
    found = run(passes.backward("a", grad))
    assert close(found[0], expected[1])
    assert close(found[1], expected[2])


# -- what is kept, and what is computed again --------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("input_share", [0.5, 1.0])
def test_dropped_graphs_change_no_gradient(tiny: Tiny, share: float, input_share: float) -> None:
    adapter = adapter_for(tiny)
    hidden, grad = rows(COUNT), rows(COUNT, 1)
    expected = by_autograd(tiny, hidden, adapter, WHOLE, grad)
    whole = kept_bytes(tiny, adapter)
    limits = PassLimits(
        activation_bytes=int(whole * share), input_bytes=int(len(WHOLE) * hidden.nbytes * input_share)
    )
    passes = Passes(tiny.stack, limits, piece_rows=lambda: 9)
    run(passes.forward("a", hidden, LENGTHS, WHOLE, adapter, keep=True))
    assert passes.stats().activation_bytes <= limits.activation_bytes
    assert passes.stats().input_bytes <= limits.input_bytes
    found = run(passes.backward("a", grad))
    assert close(found[0], expected[1])
    assert close(found[1], expected[2])


def kept_bytes(tiny: Tiny, adapter: Any) -> int:
    passes = Passes(tiny.stack)
    run(passes.forward("whole", rows(COUNT), LENGTHS, WHOLE, adapter, keep=True))
    return passes.stats().activation_bytes


def counted_blocks(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Which blocks are computed from now on."""
    computed: list[int] = []
    original = tiny.stack.forward_trained

    def counting(block: int, *arguments: Any) -> Tensor:
        computed.append(block)
        return original(block, *arguments)

    monkeypatch.setattr(tiny.stack, "forward_trained", counting)
    return computed


def test_a_kept_pass_is_computed_once(bloom: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    computed = counted_blocks(bloom, monkeypatch)
    passes = Passes(bloom.stack)
    run(passes.forward("a", rows(COUNT), LENGTHS, WHOLE, keep=True))
    run(passes.backward("a", rows(COUNT, 1)))
    assert computed == [0, 1, 2, 3]


def test_a_block_without_graph_is_computed_again_from_its_input(
    bloom: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = counted_blocks(bloom, monkeypatch)
    passes = Passes(bloom.stack, PassLimits(activation_bytes=0))
    run(passes.forward("a", rows(COUNT), LENGTHS, WHOLE, keep=True))
    run(passes.backward("a", rows(COUNT, 1)))
    assert computed == [0, 1, 2, 3, 3, 2, 1, 0]


def test_inputs_that_were_dropped_too_are_computed_once(bloom: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    computed = counted_blocks(bloom, monkeypatch)
    hidden = rows(COUNT)
    passes = Passes(bloom.stack, PassLimits(activation_bytes=0, input_bytes=hidden.nbytes))
    run(passes.forward("a", hidden, LENGTHS, WHOLE, keep=True))
    run(passes.backward("a", rows(COUNT, 1)))
    assert computed == [0, 1, 2, 3, 0, 1, 2, 3, 2, 1, 0]


@pytest.mark.parametrize("piece_rows", [math.inf, 1])
def test_bytes_of_graphs_are_those_of_the_tensors_that_they_need(bloom: Tiny, piece_rows: float) -> None:
    """BLOOM without LoRA: input, queries, keys, values, attended, middle, and the MLP's inner rows; besides
    mean and deviation of two norms, and a number for each head in attention, all for each token.
    """
    passes = Passes(bloom.stack, piece_rows=lambda: piece_rows)
    run(passes.forward("a", rows(COUNT), LENGTHS, WHOLE, keep=True))
    heads = bloom.stack.config.num_heads
    numbers = HIDDEN * (1 + 3 + 1 + 1 + 4) + 4 + heads
    groups = passes._passes["a"].groups
    masks = sum(plan.mask_bytes for group in groups for plan in group.sequences.values())
    graphs = len(WHOLE) * (COUNT * numbers * 4 + len(groups) * GRAPH_BYTES)
    assert passes.stats().activation_bytes == graphs + masks
    assert masks > 0


def test_memory_is_freed_as_the_backward_goes(bloom: Tiny) -> None:
    passes = Passes(bloom.stack)
    run(passes.forward("a", rows(COUNT), LENGTHS, WHOLE, keep=True))
    sizes = [passes.stats().activation_bytes]
    for _ in passes.backward("a", rows(COUNT, 1)):
        sizes.append(passes.stats().activation_bytes)
    assert sizes == sorted(set(sizes), reverse=True)
    assert sizes[-1] == 0
    assert passes.stats().input_bytes == rows(COUNT).nbytes


def test_a_backward_can_be_run_again_until_the_pass_is_forgotten(bloom: Tiny) -> None:
    passes, adapter = Passes(bloom.stack), adapter_for(bloom)
    run(passes.forward("a", rows(COUNT), LENGTHS, WHOLE, adapter, keep=True))
    first = run(passes.backward("a", rows(COUNT, 1)))
    again = run(passes.backward("a", rows(COUNT, 1)))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    passes.forget("a")
    assert passes.stats() == type(passes.stats())(0, 0, 0)
    with pytest.raises(PassGoneError):
        run(passes.backward("a", rows(COUNT, 1)))


def test_a_pass_of_the_same_name_takes_the_place(bloom: Tiny) -> None:
    passes = Passes(bloom.stack)
    run(passes.forward("a", rows(COUNT), LENGTHS, WHOLE, keep=True))
    run(passes.forward("a", rows(7, 5), [7], WHOLE, keep=True))
    assert run(passes.backward("a", rows(7, 1)))[0].shape == (7, HIDDEN)
    assert passes.stats().passes == 1


def test_without_keep_nothing_is_kept(tiny: Tiny) -> None:
    passes = Passes(tiny.stack)
    out = run(passes.forward("a", rows(COUNT), LENGTHS, WHOLE, keep=False))
    kept = run(passes.forward("b", rows(COUNT), LENGTHS, WHOLE, keep=True))
    assert close(out, kept)
    assert not out.requires_grad
    assert passes.has("b")
    assert not passes.has("a")


def test_passes_expire(bloom: Tiny) -> None:
    clock = Clock()
    passes = Passes(bloom.stack, PassLimits(keep_s=10.0), clock=clock)
    run(passes.forward("a", rows(COUNT), LENGTHS, WHOLE, keep=True))
    clock.now = 6.0
    run(passes.forward("b", rows(COUNT), LENGTHS, WHOLE, keep=True))
    clock.now = 11.0
    passes.expire()
    assert not passes.has("a")
    assert passes.has("b")
    run(passes.backward("b", rows(COUNT)))
    clock.now = 17.0
    passes.expire()
    assert passes.has("b"), "whoever runs a backward may have to run it again"
    pieces = passes.backward("b", rows(COUNT))
    next(pieces)
    clock.now = 26.0
    run(pieces)
    clock.now = 35.0
    passes.expire()
    assert passes.has("b"), "the time counts from its end"


def test_a_forward_that_stopped_expires(bloom: Tiny) -> None:
    clock = Clock()
    passes = Passes(bloom.stack, PassLimits(keep_s=10.0), clock=clock)
    pieces = passes.forward("a", rows(COUNT), LENGTHS, WHOLE, keep=True)
    next(pieces)
    clock.now = 10.0
    passes.expire()
    assert not passes.has("a")


def test_room_is_made_by_the_peer_that_has_most(bloom: Tiny) -> None:
    one = kept_bytes(bloom, None)
    passes = Passes(bloom.stack, PassLimits(activation_bytes=2 * one + one * 5 // 8))
    run(passes.forward("modest", rows(COUNT), LENGTHS, WHOLE, keep=True, peer="A"))
    run(passes.forward("first", rows(COUNT), LENGTHS, WHOLE, keep=True, peer="B"))
    run(passes.forward("second", rows(COUNT), LENGTHS, WHOLE, keep=True, peer="B"))
    kept = {key: own.counted.activation_bytes for key, own in passes._passes.items()}
    assert kept["modest"] == one
    assert kept["second"] == one
    assert one // 2 < kept["first"] <= one * 5 // 8, "two of four graphs, and the masks"
    (group,) = passes._passes["first"].groups
    assert sorted(group.graphs) == [2, 3], "those that the backward needs first"


def test_the_oldest_pass_goes_when_inputs_do_not_fit(bloom: Tiny) -> None:
    size = rows(COUNT).nbytes
    passes = Passes(bloom.stack, PassLimits(activation_bytes=0, input_bytes=2 * size))
    for key in "abc":
        run(passes.forward(key, rows(COUNT), LENGTHS, WHOLE, keep=True))
    assert [passes.has(key) for key in "abc"] == [False, True, True]
    assert passes.stats().input_bytes == 2 * size


def test_a_forgotten_pass_keeps_nothing_more(bloom: Tiny) -> None:
    passes = Passes(bloom.stack)
    pieces = passes.forward("a", rows(COUNT), LENGTHS, WHOLE, keep=True)
    next(pieces)
    passes.forget("a")
    assert close(run(pieces), run(passes.forward("b", rows(COUNT), LENGTHS, WHOLE, keep=False)))
    assert not passes.has("a")


def test_a_forward_that_is_given_up_keeps_nothing(bloom: Tiny) -> None:
    passes = Passes(bloom.stack)
    pieces = passes.forward("a", rows(COUNT), LENGTHS, WHOLE, keep=True)
    next(pieces)
    assert passes.has("a")
    pieces.close()
    assert not passes.has("a")


def test_forgetting_ends_a_backward(bloom: Tiny) -> None:
    passes = Passes(bloom.stack)
    run(passes.forward("a", rows(COUNT), LENGTHS, WHOLE, keep=True))
    pieces = passes.backward("a", rows(COUNT))
    next(pieces)
    passes.forget("a")
    with pytest.raises(PassGoneError):
        run(pieces)


# -- bad input ---------------------------------------------------------------------------------------


def test_rows_that_do_not_fit(bloom: Tiny) -> None:
    passes = Passes(bloom.stack, PassLimits(max_rows=COUNT))
    bad = [(rows(4), [5]), (rows(4)[:, :7], [4]), (rows(0), []), (rows(COUNT + 1), [COUNT + 1])]
    for hidden, lengths in bad:
        with pytest.raises(BadTensorError):
            run(passes.forward("a", hidden, lengths, WHOLE, keep=True))
    run(passes.forward("a", rows(COUNT), LENGTHS, WHOLE, keep=True))
    with pytest.raises(BadTensorError, match="shape"):
        run(passes.backward("a", rows(COUNT - 1)))
    assert passes.has("a")


def test_an_adapter_of_another_size(bloom: Tiny) -> None:
    layout, numbers = adapter_for(bloom)
    with pytest.raises(ConfigError):
        run(Passes(bloom.stack).forward("a", rows(3), [3], WHOLE, (layout, numbers[:-1]), keep=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_none_in_what_comes(bloom: Tiny, bad: float) -> None:
    passes = Passes(bloom.stack)
    spoiled = rows(COUNT)
    spoiled[3, 5] = bad
    with pytest.raises(BadTensorError, match="not finite"):
        run(passes.forward("a", spoiled, LENGTHS, WHOLE, keep=True))
    run(passes.forward("a", rows(COUNT), LENGTHS, WHOLE, keep=True))
    with pytest.raises(BadTensorError, match="gradient"):
        run(passes.backward("a", spoiled))


@pytest.mark.parametrize("keep", [True, False])
def test_the_block_is_named_whose_result_is_not_finite(tiny: Tiny, keep: bool) -> None:
    layout, numbers = adapter_for(tiny)
    span = tiny.stack.span
    layout.split(tiny.stack.config, numbers, span)[2].prefix.fill_(math.inf)  # type: ignore[union-attr]
    passes = Passes(tiny.stack)
    with pytest.raises(NotFiniteError, match="block 2 is not finite"):
        run(passes.forward("a", rows(COUNT), LENGTHS, WHOLE, (layout, numbers), keep=keep))
    assert not passes.has("a")


def test_the_block_is_named_whose_gradient_is_not_finite(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = Passes(tiny.stack)
    run(passes.forward("a", rows(COUNT), LENGTHS, WHOLE, keep=True))
    kept = passes._passes["a"]
    (group,) = kept.groups
    edge = group.graphs[1].leaves[0]
    edge.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(NotFiniteError, match="gradient of block 1"):
        run(passes.backward("a", rows(COUNT)))


@pytest.mark.parametrize("scale", [1e-9, 1e5])
def test_gradients_outside_the_range_of_float16(scale: float, tmp_path: Path) -> None:
    """Those of a mean over many tokens are small; nothing of them may be lost on the way in."""
    found = []
    for dtype in (torch.float32, torch.float16):
        passes = Passes(make("llama", tmp_path, dtype).stack)
        run(passes.forward("a", rows(COUNT, 1), LENGTHS, WHOLE, keep=True))
        found.append(run(passes.backward("a", rows(COUNT, 2) * scale))[0])
    assert found[1].dtype is torch.float32
    assert float((found[1] - found[0]).norm() / found[0].norm()) < 0.02


def test_a_graph_that_is_dropped_is_gone(tmp_path: Path) -> None:
    """What attention results in is saved in its graph, and must not hold that in turn."""
    passes = Passes(make("llama", tmp_path).stack)
    run(passes.forward("a", rows(COUNT), LENGTHS, WHOLE, keep=True))
    (group,) = passes._passes["a"].groups
    rotation = weakref.ref(group.sequences[None]._rotation)  # which graphs refer to
    del group
    passes.forget("a")
    gc.collect()
    assert rotation() is None


def test_masks_are_counted_and_go_with_the_graphs(bloom: Tiny) -> None:
    """A long prefix has masks that are larger than all that is kept of a short sequence."""
    layout = AdapterLayout((), 1000)
    adapter = layout, torch.randn(layout.numbers(bloom.stack.config, WHOLE))
    passes = Passes(bloom.stack, PassLimits(activation_bytes=1 << 20))
    for key in range(20):
        run(passes.forward(key, rows(8), (8,), WHOLE, adapter, keep=True))
    masks = [
        plan.mask_bytes
        for kept in passes._passes.values()
        for group in kept.groups
        for plan in group.sequences.values()
    ]
    assert len(masks) == 20
    assert 0 < sum(masks) <= passes.stats().activation_bytes <= 1 << 20
    found = [run(passes.backward(key, rows(8)))[0] for key in (0, 19)]
    assert close(found[0], found[1])


def test_the_same_numbers_in_another_layout_are_another_adapter(bloom: Tiny) -> None:
    layout, numbers = adapter_for(bloom)
    halved = AdapterLayout(tuple(replace(place, scale=place.scale / 2) for place in layout.places), 3)
    found = []
    for first in (layout, halved):
        passes = Passes(bloom.stack)
        run(passes.forward("a", rows(COUNT), LENGTHS, WHOLE, (first, numbers), keep=True))
        found.append(run(passes.forward("b", rows(COUNT), LENGTHS, WHOLE, (halved, numbers), keep=True)))
    assert torch.equal(*found)


def test_numbers_of_adapters_are_bounded(bloom: Tiny) -> None:
    """The numbers of each step of a client that finishes no pass; those of one step are there once."""
    layout, numbers = adapter_for(bloom)
    passes = Passes(bloom.stack, PassLimits(adapter_bytes=3 * numbers.nbytes))
    run(passes.forward("other", rows(COUNT), LENGTHS, WHOLE, (layout, numbers.clone()), keep=True, peer="B"))
    for step in range(4):
        of_step = numbers.clone()
        for half in "ab":
            adapter = layout, of_step.view(-1)  # a tensor of its own
            run(passes.forward((step, half), rows(COUNT), LENGTHS, WHOLE, adapter, keep=True, peer="A"))
        one, other = (passes._passes[step, half].state for half in "ab")
        assert one is other
    assert [key for key in passes._passes if key != "other"] == [(2, "a"), (2, "b"), (3, "a"), (3, "b")]
    assert passes.has("other")
