"""An engine whose KV cache is int8: the same answers, but for the rounding, through forks and rollbacks."""

from __future__ import annotations

from random import Random

import pytest
import torch

from petal_swarm.engine.engine import Engine
from petal_swarm.span import Span

from .test_engine import Oracle, opened, random_step
from .tiny import WHOLE, Tiny

CLOSE = 0.05


def engines(tiny: Tiny, *sessions: str) -> tuple[Engine, Engine]:
    exact = opened(tiny, *sessions)
    int8 = Engine(tiny.stack, kv_tokens=2048, max_batch_tokens=256, kv_dtype="int8")
    for session in sessions:
        int8.open_session(session, max_length=128)
    return exact, int8


@pytest.mark.parametrize("seed", range(4))
def test_any_interleaving_stays_close(tiny: Tiny, seed: int) -> None:
    random, oracle = Random(seed), Oracle(tiny)
    exact, int8 = engines(tiny, "a", "b")
    distances = []
    for _ in range(25):
        requests = [random_step(random, oracle, name, WHOLE) for name in random.sample(["a", "b"], 2)]
        for request in requests:
            oracle.answer(request)
        for mine, theirs in zip(int8.run(requests), exact.run(requests), strict=True):
            assert mine.hidden is not None
            assert theirs.hidden is not None
            if len(theirs.hidden):
                distances.append(float((mine.hidden - theirs.hidden).norm() / theirs.hidden.norm()))
    assert max(distances) < CLOSE
    assert max(distances) > 1e-4  # or it was not int8


def test_sub_spans_write_to_their_own_blocks(tiny: Tiny) -> None:
    exact, int8 = engines(tiny, "a")
    random, oracle = Random(7), Oracle(tiny)
    for _ in range(4):
        request = random_step(random, oracle, "a", Span(1, 3))
        request.rows = "all"
        oracle.answer(request)
        (mine,), (theirs,) = int8.run([request]), exact.run([request])
        assert mine.hidden is not None
        assert theirs.hidden is not None
        assert torch.allclose(mine.hidden, theirs.hidden, atol=CLOSE * float(theirs.hidden.abs().max()))
