"""The engine's ways on a device, taken on the CPU; and a device that runs out of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from petal_swarm.engine.engine import Chunk
from petal_swarm.engine.steps import StepRequest
from petal_swarm.errors import RemoteError
from petal_swarm.models import devices
from petal_swarm.models.stack import BlockStack
from petal_swarm.span import Slice

from . import test_engine
from .test_engine import opened, output, step
from .tiny import WHOLE, Tiny, close, rows


@pytest.mark.parametrize("seed", range(4))
def test_any_interleaving_is_a_plain_forward(tiny: Tiny, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "on_host", lambda device: False)
    test_engine.test_any_interleaving_is_a_plain_forward(tiny, seed)


class Memory:
    """Room for `tokens` at once; says how often a step did not fit, and how often room was made."""

    def __init__(self, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.refused = 0
        self.released = 0
        forward: Callable[..., Iterator[Tensor]] = BlockStack.forward_by_block

        def limited(stack: BlockStack, hidden: Tensor, *rest: object) -> Iterator[Tensor]:
            for number, after in enumerate(forward(stack, hidden, *rest)):
                if number and hidden.shape[0] > tokens:
                    self.refused += 1
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
                yield after

        monkeypatch.setattr(BlockStack, "forward_by_block", limited)
        monkeypatch.setattr("petal_swarm.engine.engine.release_cached", self._release)

    def _release(self, device: torch.device) -> None:
        self.released += 1


def test_without_memory_for_a_batch_its_steps_run_alone(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine, hidden = opened(tiny, *"abc"), rows(40)
    output(engine, step("a", hidden[:10]))
    memory = Memory(20, monkeypatch)
    fork = StepRequest("a", WHOLE, (Slice(0, 10, 1), Slice(1, 10, 1)), hidden[10:12], (0, 0), "all")
    results = engine.run([fork, step("b", hidden[:30]), step("c", hidden[:20], rows="last")])
    assert close(
        results[0].hidden, torch.cat([tiny.expected(hidden[[*range(10), 10 + n]])[-1:] for n in (0, 1)])
    )
    assert results[1].hidden is None
    assert type(results[1].error) is RemoteError
    assert "no memory left for a step of 30 tokens" in str(results[1].error)
    assert close(results[2].hidden, tiny.expected(hidden[:20])[-1:])
    assert (memory.refused, memory.released) == (2, 4)
    assert len(caplog.records) == 1
    assert close(output(engine, step("c", hidden[20:30], 20)), tiny.expected(hidden[:30])[20:])


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
    assert memory.refused == 2
    assert close(placed[0].result(), tiny.expected(hidden[:25])[10:])
    assert "no memory left for a step of 30 tokens" in str(placed[1].error)
    assert close(placed[2].result(), tiny.expected(hidden[:20])[-1:])


def test_what_ran_out_of_memory_does_not_count_as_a_measurement(
    bloom: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = opened(bloom, "a")
    engine.seed(1.0, 2.0)
    Memory(0, monkeypatch)
    engine.run([step("a", rows(1))])
    engine.run([step("a", rows(40))])
    assert (engine.stats().block_time_s, engine.stats().prefill_tokens_per_s) == (1.0, 2.0)
