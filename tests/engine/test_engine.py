"""The engine against a plain full forward in transformers, however the tokens came."""

from __future__ import annotations

from random import Random

import pytest
import torch
from torch import Tensor

from petal_swarm.engine.engine import Chunk, Engine
from petal_swarm.engine.steps import StepRequest, StepResult
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
from .tiny import HIDDEN, WHOLE, Tiny, close, rows


def step(
    session: str,
    hidden: Tensor,
    position: int = 0,
    *,
    sequence: int = 0,
    blocks: Span = WHOLE,
    **fields: object,
) -> StepRequest:
    """One slice of one sequence."""
    return StepRequest(session, blocks, (Slice(sequence, position, len(hidden)),), hidden, **fields)  # type: ignore[arg-type]


def opened(tiny: Tiny, *sessions: str, max_length: int = 128, **options: int) -> Engine:
    engine = tiny.engine(**options)
    for session in sessions:
        engine.open_session(session, max_length=max_length)
    return engine


def output(engine: Engine, request: StepRequest) -> Tensor:
    (result,) = engine.run([request])
    assert result.error is None
    assert result.hidden is not None
    assert result.compute_s > 0
    return result.hidden


@pytest.mark.parametrize("seed", range(10))
def test_any_interleaving_is_a_plain_forward(tiny: Tiny, seed: int) -> None:
    random, oracle = Random(seed), Oracle(tiny)
    spans = {f"session-{n}": SPANS[n % 3] for n in range(6)}
    engine = opened(tiny, *spans)
    for turn in range(40):
        blocks = random.choice(SPANS)
        sessions = [name for name, span in spans.items() if span == blocks]
        chosen = random.sample(sessions, random.randint(1, len(sessions)))
        requests = [random_step(random, oracle, session, blocks) for session in chosen]
        batches = [[request] for request in requests] if random.random() < 0.3 else [requests]
        for batch in batches:
            for request, result in zip(batch, engine.run(batch), strict=True):
                assert result.error is None
                assert close(result.hidden, oracle.answer(request)), (turn, request.slices)
        if turn % 10 == 9:
            gone = random.choice(list(spans))
            engine.close_session(gone)
            engine.open_session(gone, max_length=128)
            oracle.forget(gone)
    for session in spans:
        engine.close_session(session)
    assert engine.stats().kv_tokens_free == engine.stats().kv_tokens == 2048


@pytest.mark.parametrize("chunk", [1, 7, 16, 50])
@pytest.mark.parametrize("blocks", SPANS, ids=str)
def test_chunks_are_a_plain_forward(tiny: Tiny, chunk: int, blocks: Span) -> None:
    engine, hidden = opened(tiny, "a"), rows(50)
    parts = [
        output(engine, step("a", hidden[start : start + chunk], start, blocks=blocks))
        for start in range(0, 50, chunk)
    ]
    assert close(torch.cat(parts), tiny.expected(hidden, blocks))


def test_spans_one_after_the_other_are_the_whole(tiny: Tiny) -> None:
    engine, hidden = opened(tiny, "a", "b", "c"), rows(20)
    whole = output(engine, step("a", hidden))
    half = output(engine, step("b", hidden, blocks=Span(0, 2)))
    assert close(output(engine, step("c", half, blocks=Span(2, 4))), whole)
    assert close(whole, tiny.expected(hidden))


def test_blocks_are_not_the_identity(tiny: Tiny) -> None:
    """Or else every comparison above would pass with the cache turned off."""
    hidden = rows(30)
    whole = tiny.expected(hidden)
    assert float((whole - hidden).abs().max()) > 1
    shifted = torch.cat([tiny.expected(hidden[:15]), tiny.expected(hidden[15:])])
    assert float((whole - shifted).abs().max() / whole.abs().max()) > 0.01


def test_rows_that_are_asked_for(tiny: Tiny) -> None:
    hidden = rows(12)
    slices = (Slice(2, 0, 5), Slice(0, 0, 1), Slice(1, 0, 6))
    found = {}
    for which in ("all", "last", "none"):
        engine = opened(tiny, "a")
        found[which] = output(engine, StepRequest("a", WHOLE, slices, hidden, None, which))  # type: ignore[arg-type]
    expected = torch.cat([tiny.expected(part) for part in (hidden[:5], hidden[5:6], hidden[6:])])
    assert close(found["all"], expected)
    assert torch.equal(found["last"], found["all"][[4, 5, 11]])
    assert found["none"].shape == (0, HIDDEN)


def bad_requests() -> dict[str, tuple[StepRequest, type[RemoteError]]]:
    two = (Slice(0, 3, 1), Slice(1, 0, 1))
    return {
        "too few rows": (StepRequest("bad", WHOLE, two, rows(1)), BadTensorError),
        "too many rows": (StepRequest("bad", WHOLE, two, rows(3)), BadTensorError),
        "too narrow": (StepRequest("bad", WHOLE, two, rows(2)[:, 1:]), BadTensorError),
        "one dimension": (StepRequest("bad", WHOLE, two[:1], rows(1)[0]), BadTensorError),
        "three dimensions": (StepRequest("bad", WHOLE, two, rows(2)[None]), BadTensorError),
        "a gap": (step("bad", rows(2), 4), BadMessageError),
        "a gap in a new sequence": (step("bad", rows(2), 1, sequence=7), BadMessageError),
        "a fork of nothing": (step("bad", rows(1), 3, forks=(0, 5)), BadMessageError),
        "over max_length": (step("bad", rows(18), 3), SessionTooLongError),
        "over max_batch_tokens": (step("bad", rows(65)), BadTensorError),
        "no such session": (step("nobody", rows(2)), UnknownSessionError),
        "no room": (step("large", rows(64), 0, sequence=1), CacheFullError),
    }


@pytest.mark.parametrize("name", bad_requests())
@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_bad_request_harms_no_other(tiny: Tiny, name: str, place: int) -> None:
    bad, error = bad_requests()[name]
    engine = opened(tiny, "a", "b", kv_tokens=128, max_batch_tokens=64)
    engine.open_session("bad", max_length=20)
    engine.open_session("large", max_length=112)
    hidden = rows(3, seed=7)
    output(engine, step("bad", hidden))
    output(engine, step("large", rows(64)))
    free = engine.stats().kv_tokens_free
    good = [step("a", rows(5, seed=1)), step("b", rows(9, seed=2))]
    results = engine.run([*good[:place], bad, *good[place:]])
    failed = results.pop(place)
    assert failed.hidden is None
    assert type(failed.error) is error
    for request, result in zip(good, results, strict=True):
        assert close(result.hidden, tiny.expected(request.hidden))
    assert engine.stats().kv_tokens_free == free - 2 * 16
    after = rows(1, seed=8)
    assert close(output(engine, step("bad", after, 3)), tiny.expected(torch.cat([hidden, after]))[3:])


def test_a_step_that_fails_at_a_later_slice_leaves_nothing_behind(tiny: Tiny) -> None:
    engine = opened(tiny, "a", "b", kv_tokens=128)
    prompt, more = rows(20), rows(13, seed=1)
    output(engine, step("a", prompt))
    output(engine, step("b", rows(65)))
    free = engine.kv_tokens_free
    for forks, slices in [
        (None, (Slice(0, 3, 3), Slice(1, 0, 40))),
        ((0, 0), (Slice(0, 18, 3), Slice(1, 20, 40))),
        ((0, 0, 0), (Slice(2, 20, 3), Slice(1, 30, 40))),
    ]:
        (failed,) = engine.run([StepRequest("a", WHOLE, slices, rows(43, seed=1), forks)])
        assert type(failed.error) in (CacheFullError, BadMessageError)
        assert engine.kv_tokens_free == free
    assert close(output(engine, step("a", more, 20)), tiny.expected(torch.cat([prompt, more]))[20:])
    engine.close_session("b")
    engine.close_session("a")
    assert engine.kv_tokens_free == 128


@pytest.mark.parametrize("seed", range(10))
def test_chunks_of_any_size_are_the_step_in_one_piece(tiny: Tiny, seed: int) -> None:
    """Of several sequences, block by block, with others in between."""
    random = Random(seed)
    engine = opened(tiny, "a", "b", "c")
    request = StepRequest("a", WHOLE, (Slice(0, 0, 30), Slice(1, 0, 1), Slice(2, 0, 17)), rows(48))
    request.rows = random.choice(["all", "last", "none"])
    placed = engine.place(request)
    position = 0
    while placed.rows_left:
        other = engine.place(step("b", rows(20, seed=2)))
        chunks = [Chunk(placed, random.randint(1, placed.rows_left)), Chunk(other, 20)]
        batch = engine.begin(random.sample(chunks, 2))
        while not batch.done:
            batch.advance()
            output(engine, step("c", rows(1), position))
            position += 1
        assert close(other.result(), tiny.expected(rows(20, seed=2)))
    assert close(placed.result(), Oracle(tiny).answer(request))
    assert close(
        output(engine, step("c", rows(1, seed=3), position)),
        tiny.expected(torch.cat([rows(1)] * position + [rows(1, seed=3)]))[-1:],
    )


def test_a_retired_session_keeps_its_rows_until_it_is_closed(tiny: Tiny) -> None:
    engine, hidden = opened(tiny, "a"), rows(30)
    placed = engine.place(step("a", hidden))
    batch = engine.begin([Chunk(placed, 30)])
    batch.advance()
    retired = engine.retire_session("a")
    engine.open_session("a", max_length=128)
    assert close(output(engine, step("a", rows(20, seed=1))), tiny.expected(rows(20, seed=1)))
    while not batch.done:
        batch.advance()
    assert close(placed.result(), tiny.expected(hidden))
    engine.close_session(retired)
    engine.close_session("a")
    assert engine.kv_tokens_free == engine.stats().kv_tokens


def test_nothing_but_bad_requests(bloom: Tiny) -> None:
    engine = opened(bloom, "a")
    results = engine.run([step("nobody", rows(1)), step("a", rows(1), 5)])
    assert [type(result.error) for result in results] == [UnknownSessionError, BadMessageError]
    assert engine.run([]) == []
    assert engine.stats().block_time_s == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_a_number_is_refused_and_named(tiny: Tiny, value: float) -> None:
    engine = opened(tiny, "a", "b", "c")
    poison, good = rows(20), rows(20, seed=5)
    poison[14] = value
    poison[17, 3] = value
    slices = (Slice(4, 0, 12), Slice(2, 0, 8))
    requests = [StepRequest("a", WHOLE, slices, poison), step("b", good), step("c", rows(3) * value)]
    results = engine.run(requests)
    assert [type(result.error) for result in results] == [BadTensorError, type(None), BadTensorError]
    assert str(results[0].error) == "hidden state of sequence 2 at position 2 is not finite"
    assert str(results[2].error) == "hidden state of sequence 0 at position 0 is not finite"
    assert close(results[1].hidden, tiny.expected(good))
    assert engine.stats().kv_tokens - engine.stats().kv_tokens_free == 32, "those of b"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_large_numbers_are_numbers(bloom: Tiny, dtype: torch.dtype) -> None:
    """Though their sum is none."""
    hidden = torch.full((2, HIDDEN), torch.finfo(dtype).max, dtype=dtype)
    assert not hidden.sum().isfinite()
    (result,) = opened(bloom, "a").run([step("a", hidden)])
    assert result.error is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_taken_as_they_come(bloom: Tiny, dtype: torch.dtype) -> None:
    engine = opened(bloom, "a", "b")
    hidden = rows(6).to(dtype)
    results = engine.run([step("a", hidden), step("b", rows(6))])
    assert close(results[0].hidden, bloom.expected(hidden.float()))
    assert close(results[1].hidden, bloom.expected(rows(6)))


def test_inputs_are_not_written_to(tiny: Tiny) -> None:
    engine, hidden = opened(tiny, "a", "b"), rows(6)
    output(engine, step("a", hidden))
    engine.run([step("a", hidden, 6), step("b", hidden)])
    assert torch.equal(hidden, rows(6))


def test_beams_share_what_they_have_in_common(tiny: Tiny) -> None:
    engine, prompt = opened(tiny, "a"), rows(40)
    output(engine, step("a", prompt))
    used = engine.stats().kv_tokens - engine.stats().kv_tokens_free
    tails = rows(4, seed=3)
    slices = tuple(Slice(beam, 40, 1) for beam in range(4))
    found = output(engine, StepRequest("a", WHOLE, slices, tails, (0,) * 4, "last"))
    for beam in range(4):
        whole = torch.cat([prompt, tails[beam : beam + 1]])
        assert close(found[beam], tiny.expected(whole)[-1])
    assert engine.stats().kv_tokens - engine.stats().kv_tokens_free == used + 3 * 16


def test_a_fork_rolled_back_to_a_page_leaves_the_other_alone(tiny: Tiny) -> None:
    engine, prompt = opened(tiny, "a"), rows(32)
    output(engine, step("a", prompt))
    output(engine, step("a", rows(16, seed=1), 16, sequence=1, forks=(0, 0)))
    after = rows(1, seed=2)
    found = output(engine, step("a", after, 32))
    assert close(found, tiny.expected(torch.cat([prompt, after]))[-1:])


def test_seeded_figures_are_moved_on_by_real_steps(bloom: Tiny) -> None:
    engine = opened(bloom, "a")
    engine.seed(1000.0, 2.0)
    assert (engine.stats().block_time_s, engine.stats().prefill_tokens_per_s) == (1000.0, 2.0)
    with pytest.raises(AttributeError):
        engine.stats().sessions = 1  # type: ignore[misc]
    output(engine, step("a", rows(1)))
    assert engine.stats().block_time_s == pytest.approx(900.0, rel=0.01)
    output(engine, step("a", rows(40), 1))
    assert engine.stats().prefill_tokens_per_s > 2.0


def test_stats_follow_the_sessions(bloom: Tiny) -> None:
    engine = bloom.engine(kv_tokens=100)
    assert (engine.stats().kv_tokens, engine.stats().kv_tokens_free, engine.stats().sessions) == (96, 96, 0)
    engine.open_session("a", max_length=96)
    output(engine, step("a", rows(17)))
    assert (engine.stats().kv_tokens_free, engine.stats().sessions) == (64, 1)
    engine.close_session("a")
    engine.close_session("a")
    assert (engine.stats().kv_tokens_free, engine.stats().sessions) == (96, 0)
    with pytest.raises(CacheFullError):
        engine.open_session("b", max_length=97)


def test_only_few_rows_tell_what_a_block_takes(bloom: Tiny) -> None:
    engine = opened(bloom, "a", "b")
    output(engine, step("a", rows(40)))
    assert engine.stats().block_time_s == 0
    assert engine.stats().prefill_tokens_per_s > 0
    output(engine, step("a", rows(10), 40))
    assert engine.stats().block_time_s == 0
    output(engine, step("a", rows(1), 50))
    block_time_s = engine.stats().block_time_s
    assert block_time_s > 0
    engine.run([step(name, rows(3), 51 if name == "a" else 0) for name in "ab"])
    assert engine.stats().block_time_s == block_time_s


def test_chunks_tell_how_fast_prefill_is(bloom: Tiny) -> None:
    engine = opened(bloom, "a")
    placed = engine.place(step("a", rows(100), blocks=Span(1, 3)))
    assert engine.stats().prefill_tokens_per_s == 0
    batch = engine.begin([Chunk(placed, 50)])
    took = batch.advance() + batch.advance()
    assert batch.compute_s == took
    assert engine.stats().prefill_tokens_per_s == pytest.approx(50 / took / 2), "half of the span"


def test_results_are_of_their_own_request(bloom: Tiny) -> None:
    """In the order of the requests, each with the whole batch's time."""
    engine = opened(bloom, *"abc")
    results: list[StepResult] = engine.run([step(name, rows(n + 1)) for n, name in enumerate("abc")])
    assert [len(result.hidden) for result in results if result.hidden is not None] == [1, 2, 3]
    assert len({result.compute_s for result in results}) == 1
