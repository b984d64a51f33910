"""Decode batches by kernels, interpreted, and as graphs: the same numbers as by the CPU's own way."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch

from tests import kernel_interpreter

kernel_interpreter.require()

from tiny_models import Local, error, make, tokens  # noqa: E402

from petal_swarm.models.kernels import decoding, start  # noqa: E402
from petal_swarm.models.kernels.decoding import Decoder, Recorded, SpanShape  # noqa: E402
from petal_swarm.models.kernels.paged import Positions  # noqa: E402
from petal_swarm.models.packed_adapters import Segment  # noqa: E402
from petal_swarm.models.packing import KVPool, PackedBatch, PackedSlice  # noqa: E402
from petal_swarm.span import Span  # noqa: E402

LENGTHS = (20, 7, 33)
HOMES = (0, 64, 128)
SEQUENCES = [tokens(length, seed) for seed, length in enumerate(LENGTHS)]


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def bloom(tmp_path_factory) -> Local:
    return local_model(tmp_path_factory, "bloom")


def local_model(factory, name: str) -> Local:
    path = factory.mktemp(name)
    with torch.inference_mode(False):
        make(name).save_pretrained(path)
    return Local(path)


class Replays:
    """Records by remembering what to compute: the numbers may change, their places may not."""

    def __init__(self) -> None:
        self.made: list[int] = []
        self.error: Exception | None = None
        self.room = True

    def __call__(self, compute: Callable[[torch.Tensor], torch.Tensor], given: torch.Tensor):
        if self.error is not None:
            raise self.error
        if not self.room:
            return None
        found = compute(given).clone()
        self.made.append(len(given))
        return Recorded(given, found, lambda: found.copy_(compute(given)))


def decoder_for(local: Local, pool: KVPool, recorder: Replays | None = None) -> Decoder:
    stack = local.stack
    slopes = None if not stack._alibi else next(iter(stack._masks.values()))._slopes
    rotation = None if stack._rotary is None else stack._rotary.run(0, pool.tokens).squeeze(1)
    shape = SpanShape(stack._heads, stack._windows, Positions(slopes, rotation))
    return Decoder(shape, pool, torch.device("cpu"), recorder)


def new_pool(local: Local, kv_dtype: str = "auto") -> KVPool:
    config, span = local.checkpoint.config, local.stack.span
    pool = KVPool.allocate(config, span, 256, torch.float32, "cpu", kv_dtype)
    for pair in pool.pairs:
        pair.fill_(-1 if kv_dtype == "int8" else torch.nan)
    return pool


def prompts(local: Local, pool: KVPool, spare: int) -> None:
    """All but the last `spare` tokens of each sequence."""
    for ids, home in zip(SEQUENCES, HOMES, strict=True):
        count = len(ids) - spare
        batch = PackedBatch.build([PackedSlice(0, count, 0, ((home, home + count),))])
        local.stack.forward(local.ends.embed(ids[:count]), batch, pool, local.stack.span)


def step(local: Local, numbers: tuple[int, ...], spare: int = 0) -> tuple[torch.Tensor, PackedBatch]:
    slices = []
    for row, number in enumerate(numbers):
        end = LENGTHS[number] - spare
        slices.append(PackedSlice(row, 1, end - 1, ((HOMES[number], HOMES[number] + end),)))
    ids = torch.stack([SEQUENCES[number][LENGTHS[number] - spare - 1] for number in numbers])
    return local.ends.embed(ids), PackedBatch.build(slices)


@pytest.mark.parametrize(
    ("name", "kv_dtype"),
    [("bloom-post-norm", "auto"), ("mistral-window", "int8"), ("qwen2-window", "auto"), ("qwen3", "auto")],
)
def test_a_span(name, kv_dtype, tmp_path_factory):
    local = local_model(tmp_path_factory, name)
    span = Span(1, 3)  # of qwen2-window's, with both kinds of windows
    own, theirs = new_pool(local, kv_dtype), new_pool(local, kv_dtype)
    for pool in (own, theirs):
        prompts(local, pool, 1)
    hidden, batch = step(local, (2, 0, 1))
    expected = local.stack.forward(hidden, batch, theirs, span)
    before = hidden.clone()
    found = decoder_for(local, own).run(local.stack._blocks, hidden, batch, span.start, span.end)
    assert found is not None
    assert error(found, expected) < (1e-4 if kv_dtype == "auto" else 0.02)
    assert torch.equal(hidden, before)
    if kv_dtype == "auto":
        assert error(own.pairs[1][:, :, :20], theirs.pairs[1][:, :, :20]) < 1e-4


def test_graphs_are_filled_up_and_replayed(bloom):
    recorder = Replays()
    own, theirs = new_pool(bloom), new_pool(bloom)
    for pool in (own, theirs):
        prompts(bloom, pool, 2)
    decoder = decoder_for(bloom, own, recorder)
    decoder.sizes = (1, 4)
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    for numbers, spare in (((0, 1, 2), 1), ((1, 0), 0), ((2,), 0)):
        hidden, batch = step(bloom, numbers, spare)
        expected = bloom.stack.forward(hidden, batch, theirs, bloom.stack.span)
        found = decoder.run(bloom.stack._blocks, hidden, batch, 0, 3)
        assert found is not None
        kept.append((found, expected))
    for found, expected in kept:  # what was handed out stays as it was
        assert error(found, expected) < 1e-4
    assert recorder.made == [4, 1]
    assert torch.equal(own.pairs[0].isnan(), theirs.pairs[0].isnan())
    decoder.close()
    assert decoder.num_graphs == 0


def test_not_everything_is_for_it(bloom):
    decoder = decoder_for(bloom, new_pool(bloom), Replays())
    decoder.sizes, decoder.unrecorded = (1, 2), False
    hidden, batch = step(bloom, (0, 1, 2))
    assert decoder.run(bloom.stack._blocks, hidden, batch, 0, 3) is None
    prompt = PackedBatch.build([PackedSlice(0, 3, 0, ((0, 3),))])
    assert decoder.run(bloom.stack._blocks, hidden, prompt, 0, 3) is None
    odd = PackedBatch.build([PackedSlice(0, 1, 4, ((3, 8),))])
    assert decoder.run(bloom.stack._blocks, hidden[:1], odd, 0, 3) is None
    _, adapted = step(bloom, (0,))
    adapted.lora = (Segment(0, 1, ()),)
    assert decoder.run(bloom.stack._blocks, hidden[:1], adapted, 0, 3) is None


def test_there_are_not_more_graphs_than_allowed(bloom, monkeypatch):
    monkeypatch.setattr(decoding, "_MOST_GRAPHS", 2)
    recorder, pool = Replays(), new_pool(bloom)
    prompts(bloom, pool, 1)
    decoder = decoder_for(bloom, pool, recorder)
    hidden, batch = step(bloom, (1,))
    for first in (0, 1, 0, 2, 0, 1):
        decoder.run(bloom.stack._blocks, hidden, batch, first, first + 1)
        assert decoder.num_graphs <= 2
    assert len(recorder.made) == 4  # the first and the last make room, what was used in between does not


@pytest.mark.parametrize("trouble", ["error", "no room"])
def test_what_cannot_be_recorded_is_launched(bloom, trouble, caplog):
    recorder = Replays()
    recorder.room, recorder.error = False, RuntimeError("not now\nlong trace") if trouble == "error" else None
    own, theirs = new_pool(bloom), new_pool(bloom)
    for pool in (own, theirs):
        prompts(bloom, pool, 1)
    hidden, batch = step(bloom, (0, 2, 1))
    expected = bloom.stack.forward(hidden, batch, theirs, bloom.stack.span)
    decoder = decoder_for(bloom, own, recorder)
    with caplog.at_level(logging.WARNING, decoding.__name__):
        found = [decoder.run(bloom.stack._blocks, hidden, batch, 0, 3) for _ in range(2)]
    for result in found:
        assert result is not None
        assert error(result, expected) < 1e-4
    told = ["decoding goes on without CUDA graphs: not now"] if trouble == "error" else []
    assert [record.getMessage() for record in caplog.records] == told


def test_a_stack_asks_its_decoder_first(bloom):
    pool = new_pool(bloom)
    prompts(bloom, pool, 1)
    hidden, batch = step(bloom, (0, 1))
    expected = bloom.stack.forward(hidden, batch, pool, Span(1, 3))
    recorder = Replays()
    bloom.stack.decoder = decoder_for(bloom, pool, recorder)
    try:
        assert error(bloom.stack.forward(hidden, batch, pool, Span(1, 3)), expected) < 1e-4
        assert recorder.made == [2]
        bloom.stack.forward(hidden, batch, new_pool(bloom), Span(1, 3))
        nothing = (None,) * len(bloom.stack._adapted._parts)
        batch.lora = (Segment(0, 2, nothing),)  # without a graph, since it would hold this adapter
        assert error(bloom.stack.forward(hidden, batch, pool, Span(1, 3)), expected) < 1e-4
        assert bloom.stack._adapted.segments is batch.lora
        assert recorder.made == [2]
    finally:
        bloom.stack.decoder = None
    bloom.stack.quicken(pool)
    assert bloom.stack.decoder is None  # no device, no kernels


class Times:
    """How long plain steps, graphs and kernels alone take, in this order for each size."""

    def __init__(self, *times_s: float) -> None:
        self._times_s = list(times_s)

    def __call__(self, work: Callable[[], object]) -> float:
        work()
        return self._times_s.pop(0)


def trial_of(local: Local, pool: KVPool, off: float = 0.0) -> start.Trial:
    def plain(hidden, batch, first, last):
        return local.stack.forward(hidden, batch, pool, Span(first, last)) * (1 + off)

    config = local.checkpoint.config
    blocks = local.stack._blocks[:2]
    return start.Trial(blocks, plain, config.hidden_size, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(
    ("times_s", "sizes", "unrecorded", "used"),
    [
        ((2, 1, 3), (1,), False, True),
        ((2, 3, 1), (), True, True),
        ((1, 2, 3), (), False, False),
    ],
)
def test_only_what_is_faster_is_kept(bloom, times_s, sizes, unrecorded, used, monkeypatch):
    monkeypatch.setattr(start, "_CONTEXT", 32)
    monkeypatch.setattr(start, "SIZES", (1, 2))  # so much of the pool is filled
    pool = new_pool(bloom)
    decoder = decoder_for(bloom, pool, Replays())
    decoder.sizes = (1, 32)  # for the last one the pool has no room
    assert start.prove(decoder, trial_of(bloom, pool), Times(*times_s)) == used
    assert decoder.sizes == sizes
    assert decoder.unrecorded == unrecorded


@pytest.mark.parametrize("kind", ["kernels", "graph"])
def test_what_gives_other_numbers_is_not_used(bloom, kind, caplog):
    pool, recorder = new_pool(bloom), Replays()
    if kind == "graph":

        def spoilt(compute, given):
            return Recorded(given, compute(given) * 1.01, lambda: None)

        recorder = spoilt
    decoder = decoder_for(bloom, pool, recorder)
    with caplog.at_level(logging.WARNING, start.__name__):
        assert not start.prove(decoder, trial_of(bloom, pool, 0.01 if kind == "kernels" else 0.0), Times())
    assert decoder.num_graphs == 0
    (record,) = caplog.records
    assert record.getMessage().startswith("no decoding by kernels on this device: a ")
