"""What is said of earlier steps is bounded, and made only as far as it is sent."""

from __future__ import annotations

import hashlib

import pytest

from petal_swarm.server import recall
from petal_swarm.server.recall import Receipts, answer
from petal_swarm.span import Slice
from petal_swarm.wire.messages.audit import Recall
from petal_swarm.wire.messages.parts import TensorMeta
from petal_swarm.wire.messages.steps import Step
from petal_swarm.wire.step_log import LogBudget, StepLog

COLUMNS = 8
ROWS = 4


def log_of(steps: int) -> StepLog:
    log = LogBudget(1 << 30).new_log()
    for number in range(steps):
        meta = TensorMeta("float32", (ROWS, COLUMNS))
        log.append(Step(number, 0, (Slice(0, number * ROWS, ROWS),), meta, bytes(meta.nbytes)))
    return log


def test_steps_as_asked_for() -> None:
    answers = list(answer(Recall(3, False, 2, 5), log_of(10), None))
    assert [(kept.number, kept.step, kept.more) for kept in answers] == [
        (3, 2, True),
        (3, 3, True),
        (3, 4, True),
        (3, 5, False),
    ]
    assert answers[1].slices == (Slice(0, 3 * ROWS, ROWS),)


def test_received_steps_come_with_a_digest_of_all() -> None:
    receipts, digest = Receipts(), hashlib.blake2b(digest_size=16)
    for step in log_of(30).between(0, 29):
        receipts.keep(step)
        digest.update(step.payload)
    kept = list(answer(Recall(3, True, 0, 100), log_of(0), receipts))
    assert [each.step for each in kept] == list(range(14, 30)), "the last sixteen"
    assert kept[-1].digest == digest.digest()
    (nothing,) = answer(Recall(3, True, 0, 100), log_of(9), None)
    assert not nothing.slices


def test_what_is_not_known_has_no_slices() -> None:
    (only,) = answer(Recall(0, False, 20, 30), log_of(10), None)
    assert (only.slices, only.more) == ((), False)


@pytest.mark.parametrize(("limit", "value"), [("MAX_STEPS", 3), ("MAX_BYTES", 3 * ROWS * COLUMNS * 4)])
def test_a_whole_long_log_is_not_sent_at_once(
    monkeypatch: pytest.MonkeyPatch, limit: str, value: int
) -> None:
    monkeypatch.setattr(recall, limit, value)
    answers = list(answer(Recall(0, False, 0, 1000), log_of(1000), None))
    assert [kept.step for kept in answers] == [0, 1, 2]
    assert [kept.more for kept in answers] == [True, True, False]
