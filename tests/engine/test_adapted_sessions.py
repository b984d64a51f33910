"""Sessions with adapters: several of them, and sessions without, in one packed batch."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from petal_swarm.engine.engine import Chunk, Engine
from petal_swarm.engine.prefixes import PrefixScope
from petal_swarm.engine.steps import StepRequest
from petal_swarm.errors import CacheFullError
from petal_swarm.models.adapters import AdapterLayout, LoraPlace
from petal_swarm.models.families import family_of
from petal_swarm.models.lora import with_lora
from petal_swarm.models.packed_adapters import ServedAdapter
from petal_swarm.models.stack import BlockStack
from petal_swarm.span import Slice, Span

from .oracle import Oracle, random_step
from .tiny import WHOLE, Tiny, close, rows


def layout_of(tiny: Tiny, *, blocks: range = range(4), every: int = 1, prefix: int = 0) -> AdapterLayout:
    """LoRA on each `every`-th projection of the blocks; none with 0."""
    shapes = family_of(tiny.stack.config).block_shapes(tiny.stack.config)
    stems = [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2]
    chosen = stems[::every] if every else []
    return AdapterLayout(
        tuple(LoraPlace(block, stem, 2 + block, 0.7) for block in blocks for stem in chosen), prefix
    )


def numbers_of(tiny: Tiny, layout: AdapterLayout, seed: int) -> Tensor:
    size = layout.numbers(tiny.stack.config, WHOLE)
    return 0.5 * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def served(tiny: Tiny, layout: AdapterLayout, seed: int) -> ServedAdapter:
    return tiny.stack.serve_adapter(layout, numbers_of(tiny, layout, seed), WHOLE)


def alone(tiny: Tiny, layout: AdapterLayout, seed: int) -> Tiny:
    """A stack that has this LoRA in all its blocks, which is tested against PEFT elsewhere."""
    stack = tiny.stack
    own = layout.split(stack.config, numbers_of(tiny, layout, seed), WHOLE)
    blocks = [block.adapted(with_lora(own[n].lora)) for n, block in enumerate(stack._blocks)]
    return Tiny(BlockStack(stack.config, WHOLE, blocks, dtype=stack.dtype), tiny.model)


def step(session: str, position: int, hidden: Tensor, **more: Any) -> StepRequest:
    return StepRequest(session, WHOLE, (Slice(0, position, len(hidden)),), hidden, **more)


def outputs(engine: Engine, *requests: StepRequest) -> list[Tensor]:
    found = []
    for result in engine.run(requests):
        assert result.error is None, result.error
        assert result.hidden is not None
        found.append(result.hidden)
    return found


class Lonely(Oracle):
    """Answers of an engine that has one session only, which was fed everything again in one step."""

    def __init__(self, tiny: Tiny, adapter: ServedAdapter | None) -> None:
        super().__init__(tiny)
        self._engine = tiny.engine()
        self._adapter = adapter

    def answer(self, request: StepRequest) -> Tensor:
        session = str(request.session)
        if request.forks is not None:
            self.fork(session, request.forks)
        parts, row = [], 0
        for piece in request.slices:
            key = (session, piece.sequence)
            before = self.inputs.get(key, rows(0))[: piece.position]
            self.inputs[key] = torch.cat([before, request.hidden[row : row + piece.length]])
            row += piece.length
            self._engine.open_session("s", max_length=200, adapter=self._adapter)
            whole = self.inputs[key]
            asked = StepRequest("s", request.blocks, (Slice(0, 0, len(whole)),), whole)
            expected = outputs(self._engine, asked)[0][piece.position :]
            self._engine.close_session("s")
            parts.append(expected[-1:] if request.rows == "last" else expected)
        return torch.cat(parts)[: None if request.rows != "none" else 0]


def test_each_session_has_its_own_lora(tiny: Tiny) -> None:
    engine = tiny.engine()
    kinds = {"a": (1, 1), "b": (2, 2), "c": (1, 1), "none": None}
    adapters: dict[str, ServedAdapter] = {}
    expected: dict[str, Engine] = {}
    for name, kind in kinds.items():
        twin = tiny
        if kind is None:
            engine.open_session(name, max_length=100)
        else:
            layout = layout_of(tiny, every=kind[1])
            adapter = adapters.setdefault(str(kind), served(tiny, layout, kind[0]))
            engine.open_session(name, max_length=100, adapter=adapter)
            twin = alone(tiny, layout, kind[0])
        expected[name] = twin.engine()
        expected[name].open_session(name, max_length=100)
    plain = tiny.engine()
    for turn, length in enumerate((7, 1, 1, 3)):
        position = (0, 7, 8, 9)[turn]
        requests = [step(name, position, rows(length, seed)) for seed, name in enumerate(kinds)]
        found = outputs(engine, *requests)
        for request, hidden in zip(requests, found, strict=True):
            assert close(hidden, outputs(expected[str(request.session)], request)[0]), request.session
        if not turn:
            plain.open_session("a", max_length=100)
            assert not close(found[0], outputs(plain, requests[0])[0]), "the adapter does something"


@pytest.mark.parametrize("seed", range(3))
def test_random_steps_with_and_without_adapters(tiny: Tiny, seed: int) -> None:
    """Prefixes, LoRA in some blocks, both, and nothing: rolled back, forked and batched at random."""
    random = Random(seed)
    layouts = {
        "prefix": layout_of(tiny, every=0, prefix=5),
        "long": layout_of(tiny, every=0, prefix=33),
        "both": layout_of(tiny, prefix=16),
        "some": layout_of(tiny, blocks=range(1, 2), every=2),
    }
    adapters: dict[str, ServedAdapter | None] = {
        name: served(tiny, layout, number) for number, (name, layout) in enumerate(layouts.items())
    }
    adapters |= {"none": None, "other": adapters["both"]}
    engine = tiny.engine()
    oracles = {name: Lonely(tiny, adapter) for name, adapter in adapters.items()}
    for name, adapter in adapters.items():
        engine.open_session(name, max_length=100, adapter=adapter)
    for _ in range(12):
        chosen = random.sample(sorted(adapters), random.randint(1, len(adapters)))
        requests = [random_step(random, oracles[name], name, WHOLE) for name in chosen]
        for request, hidden in zip(requests, outputs(engine, *requests), strict=True):
            assert close(hidden, oracles[str(request.session)].answer(request)), request.session
    for name in adapters:
        engine.close_session(name)
    assert engine.stats().sessions == 0
    assert engine.kv_tokens_free == engine.stats().kv_tokens


def test_a_prefix_is_kept_once_and_as_long_as_somebody_uses_it(tiny: Tiny) -> None:
    engine = tiny.engine(kv_tokens=160)
    adapter = served(tiny, layout_of(tiny, every=0, prefix=33), 0)
    for name in "ab":
        engine.open_session(name, max_length=16, adapter=adapter)
    assert engine.stats().sessions == 2
    assert engine.kv_tokens_free == 160 - 48
    engine.close_session("a")
    retired = engine.retire_session("b")
    assert engine.kv_tokens_free == 160 - 48
    engine.close_session(retired)
    assert engine.kv_tokens_free == 160
    engine.close_session("b")


def test_a_prefix_for_which_there_is_no_room(tiny: Tiny) -> None:
    engine = tiny.engine(kv_tokens=64)
    engine.open_session("busy", max_length=64)
    outputs(engine, step("busy", 0, rows(40)))
    adapter = served(tiny, layout_of(tiny, prefix=33), 0)
    with pytest.raises(CacheFullError):
        engine.open_session("a", max_length=8, adapter=adapter)
    assert engine.stats().sessions == 1
    engine.close_session("busy")
    engine.open_session("a", max_length=8, adapter=adapter)
    with pytest.raises(CacheFullError):
        engine.open_session("b", max_length=8, adapter=served(tiny, layout_of(tiny, prefix=65), 0))


def test_sessions_of_one_adapter_share_prompts(tiny: Tiny) -> None:
    engine = Engine(tiny.stack, kv_tokens=512, max_batch_tokens=256, prefix_tokens=256)
    adapter = served(tiny, layout_of(tiny, prefix=5), 0)
    scope = PrefixScope(b"adapter", hashes=True)
    prompt = rows(40)
    engine.open_session("a", max_length=64, scope=scope, adapter=adapter)
    first = outputs(engine, step("a", 0, prompt))[0]
    engine.close_session("a")
    engine.open_session("b", max_length=64, scope=scope, adapter=adapter)
    request = step("b", 0, prompt)
    known = engine.attach("b", engine.find_prefixes(request, spare_last=True))
    assert len(known[0].keys) == 2
    assert close(outputs(engine, step("b", 32, prompt[32:]))[0], first[32:])


def test_a_batch_block_by_block_with_another_in_between(tiny: Tiny) -> None:
    """Prefill stops between blocks, and what decodes meanwhile has another adapter."""
    engine = tiny.engine()
    layout = layout_of(tiny)
    for seed, name in enumerate("ab"):
        engine.open_session(name, max_length=64, adapter=served(tiny, layout, seed))
    expected = alone(tiny, layout, 0).engine()
    expected.open_session("a", max_length=64)
    placed = engine.place(step("a", 0, rows(20)))
    batch = engine.begin([Chunk(placed, 20)])
    position = 0
    while not batch.done:
        batch.advance()
        outputs(engine, step("b", position, rows(1)))
        position += 1
    assert close(placed.result(), outputs(expected, step("a", 0, rows(20)))[0])


def test_rows_of_one_adapter_are_multiplied_together(tiny: Tiny) -> None:
    engine = tiny.engine()
    adapters = [served(tiny, layout_of(tiny), 0), served(tiny, layout_of(tiny, every=0, prefix=3), 1)]
    for number in range(5):
        engine.open_session(str(number), max_length=8, adapter=[*adapters, None][number % 3])
    chunks = [Chunk(engine.place(step(str(number), 0, rows(2))), 2) for number in range(5)]
    sorted_chunks = engine._adapted.sorted(chunks)
    assert [chunk.step.request.session for chunk in sorted_chunks] == ["0", "3", "1", "4", "2"]
    (segment,) = engine._adapted.segments(sorted_chunks)
    assert (segment.start, segment.stop) == (0, 4)


def test_part_of_the_blocks(tiny: Tiny) -> None:
    engine = tiny.engine()
    layout, part = layout_of(tiny), Span(1, 3)
    start, stop = layout.bounds(tiny.stack.config, part)
    numbers = numbers_of(tiny, layout, 0)[start:stop]
    adapter = tiny.stack.serve_adapter(layout.of_span(part), numbers, part)
    engine.open_session("a", max_length=64, adapter=adapter)
    expected = alone(tiny, layout, 0).engine()
    expected.open_session("a", max_length=64)
    request = StepRequest("a", part, (Slice(0, 0, 5),), rows(5))
    assert close(outputs(engine, request)[0], outputs(expected, request)[0])
    assert 0 < adapter.nbytes <= 2 * numbers.nbytes
