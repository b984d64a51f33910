"""The engine's ways on a device, taken on the CPU; and a device that runs out of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from petal_swarm.engine.engine import Chunk
from petal_swarm.engine.executor import Executor, Finished
from petal_swarm.engine.pace import Pace
from petal_swarm.engine.scheduler import Job
from petal_swarm.engine.steps import StepRequest
from petal_swarm.errors import RemoteError
from petal_swarm.models import devices
from petal_swarm.models.stack import BlockStack
from petal_swarm.span import Slice

from . import test_engine
from .test_adapted_sessions import layout_of, served
from .test_engine import opened, output, step
from .tiny import WHOLE, Tiny, close, rows


@pytest.mark.parametrize("seed", range(4))
def test_any_interleaving_is_a_plain_forward(tiny: Tiny, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "on_host", lambda device: False)
    test_engine.test_any_interleaving_is_a_plain_forward(tiny, seed)


CPU_ERROR = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 99999999999 bytes."
ERRORS = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), RuntimeError(CPU_ERROR)]


class Memory:
    """Room for `tokens` at once; says how often a step did not fit, and how often room was made."""

    def __init__(self, tokens: int, monkeypatch: pytest.MonkeyPatch, error: Exception = ERRORS[0]) -> None:
        self.refused: list[int] = []
        self.released = 0
        self.tokens = tokens
        forward: Callable[..., Iterator[Tensor]] = BlockStack.forward_by_block

        def limited(stack: BlockStack, hidden: Tensor, *rest: object) -> Iterator[Tensor]:
            for number, after in enumerate(forward(stack, hidden, *rest)):
                if number and hidden.shape[0] > self.tokens:
                    self.refused.append(hidden.shape[0])
                    raise error
                yield after

        monkeypatch.setattr(BlockStack, "forward_by_block", limited)
        monkeypatch.setattr("petal_swarm.engine.engine.release_cached", self._release)

    def _release(self, device: torch.device) -> None:
        self.released += 1


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "cpu"])
def test_without_memory_for_a_batch_its_steps_run_alone(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    engine, hidden = opened(tiny, *"abc"), rows(40)
    output(engine, step("a", hidden[:10]))
    memory = Memory(20, monkeypatch, error)
    fork = StepRequest("a", WHOLE, (Slice(0, 10, 1), Slice(1, 10, 1)), hidden[10:12], (0, 0), "all")
    results = engine.run([fork, step("b", hidden[:20]), step("c", hidden[:20], rows="last")])
    assert close(
        results[0].hidden, torch.cat([tiny.expected(hidden[[*range(10), 10 + n]])[-1:] for n in (0, 1)])
    )
    assert close(results[1].hidden, tiny.expected(hidden[:20]))
    assert close(results[2].hidden, tiny.expected(hidden[:20])[-1:])
    assert memory.refused == [42]
    assert memory.released == 4
    assert len(caplog.records) == 1
    assert close(output(engine, step("c", hidden[20:30], 20)), tiny.expected(hidden[:30])[20:])


def test_a_step_that_does_not_fit_alone_runs_in_parts(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several sequences, some behind what is in the cache: parts begin and end within any of them."""
    engine, hidden = opened(tiny, "a"), rows(110)
    output(engine, step("a", hidden[:10]))
    memory = Memory(20, monkeypatch)
    slices = (Slice(0, 10, 45), Slice(1, 0, 30), Slice(2, 0, 25))
    parts = [hidden[10:55], hidden[55:85], hidden[85:110]]
    found = output(engine, StepRequest("a", WHOLE, slices, torch.cat(parts)))
    expected = [tiny.expected(hidden[:55])[10:], tiny.expected(parts[1]), tiny.expected(parts[2])]
    assert close(found, torch.cat(expected))
    assert memory.refused == [100, 100, 50, 25]
    memory.refused.clear()
    last = StepRequest("a", WHOLE, (Slice(0, 0, 45), Slice(1, 0, 30)), hidden[:75], rows="last")
    both = [tiny.expected(hidden[:45])[-1:], tiny.expected(hidden[45:75])[-1:]]
    assert close(output(engine, last), torch.cat(both))


def test_parts_of_a_step_have_its_adapter(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, hidden = tiny.engine(), rows(60)
    for session in "ab":
        engine.open_session(session, max_length=64, adapter=served(tiny, layout_of(tiny), 1))
    expected = output(engine, step("a", hidden))
    assert not close(tiny.expected(hidden), expected), "or it changes nothing"
    memory = Memory(20, monkeypatch)
    assert close(output(engine, step("b", hidden)), expected)
    assert memory.refused == [60, 60, 30]


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "cpu"])
def test_a_step_without_memory_for_its_smallest_part_fails_alone(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    engine, hidden = opened(tiny, *"ab"), rows(40)
    memory = Memory(10, monkeypatch, error)
    results = engine.run([step("a", hidden), step("b", hidden[:8])])
    assert type(results[0].error) is RemoteError
    assert "no memory left for a step of 40 tokens" in str(results[0].error)
    assert close(results[1].hidden, tiny.expected(hidden[:8]))
    memory.tokens = 100
    assert close(output(engine, step("a", hidden)), tiny.expected(hidden))


def test_without_memory_for_a_paused_batch_its_chunks_run_alone(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, hidden = opened(tiny, *"abc"), rows(40)
    output(engine, step("a", hidden[:10]))
    memory = Memory(20, monkeypatch)
    steps = [step("a", hidden[10:25], 10), step("b", hidden[:30]), step("c", hidden[:20], rows="last")]
    placed = [engine.place(request) for request in steps]
    batch = engine.begin([Chunk(step, step.rows) for step in placed])
    while not batch.done:
        batch.advance()
    assert memory.refused == [65, 30]
    assert close(placed[0].result(), tiny.expected(hidden[:25])[10:])
    assert close(placed[1].result(), tiny.expected(hidden[:30]))
    assert close(placed[2].result(), tiny.expected(hidden[:20])[-1:])


def test_prefill_goes_on_in_smaller_batches(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until some of them went well: what was in the way may have gone."""
    engine, hidden = opened(tiny, "a", "b", max_length=200, kv_tokens=8192), rows(200)
    executor: Executor[str] = Executor(engine, pace=Pace(256), clock=lambda: 0.0)
    memory = Memory(40, monkeypatch)

    def run(session: str, count: int) -> Tensor:
        executor.add(Job(step(session, hidden[:count]), session, 0.0))
        ended: list[Finished[str]] = []
        while not ended:
            ended = executor.advance(lambda: False)
        assert ended[0].result.error is None
        assert ended[0].result.hidden is not None
        return ended[0].result.hidden

    assert close(run("a", 200), tiny.expected(hidden))
    assert memory.refused == [200, 200, 100, 50]
    assert engine.fitting_rows == 25
    memory.refused.clear()
    assert close(run("b", 200), tiny.expected(hidden))
    assert memory.refused == []
    memory.tokens = 1000
    for _ in range(140):
        run("a", 30)
    assert engine.fitting_rows == engine.max_batch_tokens


def test_a_lack_of_memory_outside_of_the_blocks_is_said_so(
    bloom: Tiny, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = opened(bloom, "a")

    def fail(*_: object) -> None:
        raise RuntimeError(CPU_ERROR)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_pack", fail)
        executor: Executor[str] = Executor(engine, pace=Pace(256), clock=lambda: 0.0)
        for length in (1, 40):
            executor.add(Job(step("a", rows(length)), "a", 0.0))
            (ended,) = executor.advance(lambda: False)
            assert type(ended.result.error) is RemoteError
            assert "no memory left" in str(ended.result.error)
    assert all(record.exc_info is None for record in caplog.records)
    assert close(output(engine, step("a", rows(40))), bloom.expected(rows(40)))


def test_what_ran_out_of_memory_does_not_count_as_a_measurement(
    bloom: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = opened(bloom, "a")
    engine.seed(1.0, 2.0)
    Memory(0, monkeypatch)
    engine.run([step("a", rows(1))])
    engine.run([step("a", rows(40))])
    assert (engine.stats().block_time_s, engine.stats().prefill_tokens_per_s) == (1.0, 2.0)


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (MemoryError(), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_a_lack_of_memory_looks_like(error: Exception, is_one: bool) -> None:
    assert devices.is_out_of_memory(error) is is_one


def test_what_the_allocator_of_a_cpu_says() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert devices.is_out_of_memory(caught.value)
