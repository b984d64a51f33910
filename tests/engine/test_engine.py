"""The engine against a plain full forward in transformers, however the tokens came."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import pytest
import torch
from torch import Tensor

from petal_swarm.engine.engine import Engine, StepRequest, StepResult
from petal_swarm.errors import (
    BadMessageError,
    BadTensorError,
    CacheFullError,
    RemoteError,
    SessionTooLongError,
    UnknownSessionError,
)
from petal_swarm.span import Slice, Span

from .tiny import HIDDEN, WHOLE, Tiny, close, rows

SPANS = [WHOLE, Span(1, 3), Span(3, 4)]


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


class Oracle:
    """What every sequence was fed so far, and so what the next answer has to be."""

    def __init__(self, tiny: Tiny) -> None:
        self._tiny = tiny
        self.inputs: dict[tuple[str, int], Tensor] = {}

    def length(self, session: str, sequence: int) -> int:
        return len(self.inputs.get((session, sequence), ()))

    def sequences(self, session: str) -> list[int]:
        return [sequence for key, sequence in self.inputs if key == session]

    def fork(self, session: str, sources: Sequence[int]) -> None:
        forked = {(session, index): self.inputs[session, source] for index, source in enumerate(sources)}
        for sequence in self.sequences(session):
            del self.inputs[session, sequence]
        self.inputs |= forked

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
            expected = self._tiny.expected(self.inputs[key], request.blocks)[piece.position :]
            parts.append(expected[-1:] if request.rows == "last" else expected)
        return torch.cat(parts)[: None if request.rows != "none" else 0]


def random_step(random: Random, oracle: Oracle, session: str, blocks: Span) -> StepRequest:
    """A next step of a session: sequences grow, roll back and fork as they like."""
    existing = oracle.sequences(session)
    forks = None
    if existing and random.random() < 0.2:
        forks = tuple(random.choices(existing, k=random.randint(1, 3)))
        existing = list(range(len(forks)))
    chosen = random.sample(range(4), random.randint(1, 3))
    slices = []
    for sequence in chosen:
        length = 0
        if sequence in existing:
            length = oracle.length(session, forks[sequence] if forks else sequence)
        back = random.choice([0, 0, 0, random.randint(0, 20), length % 16])
        position = max(0, length - back)
        size = random.choice([1, 1, 2, random.randint(1, 12)])
        slices.append(Slice(sequence, position, min(size, 70 - position)))
    hidden = rows(sum(piece.length for piece in slices), random.randrange(1 << 30))
    return StepRequest(
        session, blocks, tuple(slices), hidden, forks, random.choice(["all", "all", "last", "none"])
    )


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
            oracle.inputs = {key: value for key, value in oracle.inputs.items() if key[0] != gone}
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


def test_a_step_that_fails_halfway_can_be_sent_again(tiny: Tiny) -> None:
    """Positions are absolute: whatever its first slices did to the cache is overwritten."""
    engine = opened(tiny, "a", "b", kv_tokens=128)
    prompt, more = rows(20), rows(13, seed=1)
    output(engine, step("a", prompt))
    output(engine, step("b", rows(65)))
    two = StepRequest("a", WHOLE, (Slice(0, 20, 3), Slice(1, 0, 30)), rows(33, seed=1))
    (failed,) = engine.run([two])
    assert type(failed.error) is CacheFullError
    engine.close_session("b")
    assert close(output(engine, step("a", more, 20)), tiny.expected(torch.cat([prompt, more]))[20:])
    engine.close_session("a")
    assert engine.stats().kv_tokens_free == 128


def test_nothing_but_bad_requests(bloom: Tiny) -> None:
    engine = opened(bloom, "a")
    results = engine.run([step("nobody", rows(1)), step("a", rows(1), 5)])
    assert [type(result.error) for result in results] == [UnknownSessionError, BadMessageError]
    assert engine.run([]) == []
    assert engine.stats().block_time_s == 0


def test_not_a_number_stays_with_whoever_sent_it(tiny: Tiny) -> None:
    engine = opened(tiny, "a", "b", "c")
    poison = rows(20)
    poison[3] = float("nan")
    good = rows(20, seed=5)
    results = engine.run([step("a", poison), step("b", good), step("c", poison * float("inf"))])
    assert close(results[1].hidden, tiny.expected(good))
    for session in "ac":
        engine.close_session(session)
    engine.open_session("d", max_length=128)
    assert close(output(engine, step("d", good)), tiny.expected(good)), "their rows are used again"


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


def test_only_decoding_counts_as_a_blocks_time(bloom: Tiny) -> None:
    engine = opened(bloom, "a")
    output(engine, step("a", rows(40)))
    assert engine.stats().block_time_s == 0
    assert engine.stats().prefill_tokens_per_s > 0
    output(engine, step("a", rows(10), 40))
    assert engine.stats().block_time_s == 0
    output(engine, step("a", rows(1), 50))
    assert engine.stats().block_time_s > 0


def test_results_are_of_their_own_request(bloom: Tiny) -> None:
    """In the order of the requests, each with the whole batch's time."""
    engine = opened(bloom, *"abc")
    results: list[StepResult] = engine.run([step(name, rows(n + 1)) for n, name in enumerate("abc")])
    assert [len(result.hidden) for result in results if result.hidden is not None] == [1, 2, 3]
    assert len({result.compute_s for result in results}) == 1
