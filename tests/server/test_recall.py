"""What is said of earlier steps is bounded, and made only as far as it is sent."""

from __future__ import annotations

import pytest

from petal_swarm.server import recall
from petal_swarm.server.recall import Receipts, answer
from petal_swarm.span import Slice
from petal_swarm.wire.messages import Recall, Step, TensorMeta
from petal_swarm.wire.step_log import LogBudget, StepLog

COLUMNS = 8
ROWS = 4


def log_of(steps: int) -> StepLog:
    log = LogBudget(1 << 30).new_log()
    for number in range(steps):
        meta = TensorMeta("float32", (ROWS, COLUMNS))
        log.append(Step(number, 0, (Slice(0, number * ROWS, ROWS),), meta, bytes(meta.nbytes)))
    return log


def test_steps_are_joined_and_numbered_as_asked_for() -> None:
    (only,) = answer(Recall(3, False, 2, 5), log_of(10), Receipts())
    assert (only.number, only.step, only.more) == (3, 5, False)
    assert only.slices == (Slice(0, 2 * ROWS, 4 * ROWS),)


def test_what_is_not_known_has_no_slices() -> None:
    (only,) = answer(Recall(0, False, 20, 30), log_of(10), Receipts())
    assert (only.slices, only.more) == ((), False)


@pytest.mark.parametrize(("limit", "value"), [("MAX_MESSAGES", 3), ("MAX_BYTES", 3 * ROWS * COLUMNS * 4)])
def test_a_whole_long_log_is_not_made_at_once(
    monkeypatch: pytest.MonkeyPatch, limit: str, value: int
) -> None:
    monkeypatch.setattr(recall, limit, value)
    monkeypatch.setattr(recall, "MAX_ROWS", ROWS)
    answers = list(answer(Recall(0, False, 0, 1000), log_of(1000), Receipts()))
    assert [kept.step for kept in answers] == [0, 1, 2]
    assert [kept.more for kept in answers] == [True, True, False]


def test_steps_of_a_log_are_joined_as_they_are_taken() -> None:
    log = log_of(100)
    joined = log.between(0, 99, max_rows=ROWS)
    assert next(joined).step == 0
    log.give_up()
    assert len(list(joined)) == 1, "the one that was looked at to see that the first ends there"
