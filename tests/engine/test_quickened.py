"""An engine that decodes by kernels, interpreted, and as graphs: the answers are those of transformers."""

from __future__ import annotations

from random import Random

import pytest
import torch

from tests import kernel_interpreter

kernel_interpreter.require()

from petal_swarm.engine.engine import Engine  # noqa: E402
from petal_swarm.engine.steps import StepRequest  # noqa: E402
from petal_swarm.models import stack  # noqa: E402
from petal_swarm.models.kernels import start  # noqa: E402
from petal_swarm.models.kernels.decoding import Recorded  # noqa: E402
from petal_swarm.span import Slice  # noqa: E402

from .oracle import SPANS, Oracle  # noqa: E402
from .tiny import Tiny, close, rows  # noqa: E402

SESSIONS = ("a", "b", "c")


class Replays:
    """Stands for CUDA graphs."""

    def __init__(self, device: torch.device) -> None:
        self.count = 0

    def __call__(self, compute, given) -> Recorded:
        found = compute(given).clone()

        def replay() -> None:
            self.count += 1
            found.copy_(compute(given))

        return Recorded(given, found, replay)


@pytest.fixture
def engine(tiny: Tiny, monkeypatch) -> Engine:
    monkeypatch.setattr(stack, "ready", lambda device: True)
    monkeypatch.setattr(start, "CudaRecorder", Replays)
    monkeypatch.setattr(start, "prove", lambda *arguments: True)
    monkeypatch.setattr(tiny.stack, "decoder", None)  # and again afterwards
    engine = tiny.engine(kv_tokens=512)
    engine.quicken()
    return engine


def test_decoding_among_prompts_and_forks(tiny, engine):
    random, oracle = Random(0), Oracle(tiny)
    for session in SESSIONS:
        engine.open_session(session, max_length=64)
    steps = [
        StepRequest(s, SPANS[0], (Slice(0, 0, 15 + n),), rows(15 + n, n)) for n, s in enumerate(SESSIONS)
    ]
    for step in steps:
        (result,) = engine.run([step])
        assert close(result.hidden, oracle.answer(step))
    for turn in range(3):
        batch = []
        for session in random.sample(SESSIONS, random.randint(1, 3)):
            forks = (0, 0) if turn == 1 else None
            sequences = 2 if forks or len(oracle.sequences(session)) > 1 else 1
            length = oracle.length(session, 0)
            slices = tuple(Slice(sequence, length, 1) for sequence in range(sequences))
            hidden = rows(sequences, random.randrange(1 << 30))
            batch.append(StepRequest(session, SPANS[0], slices, hidden, forks))
        for step, result in zip(batch, engine.run(batch), strict=True):
            assert result.error is None
            assert close(result.hidden, oracle.answer(step))
    assert engine.stack.decoder is not None
    assert engine.stack.decoder._recorder.count == 3
