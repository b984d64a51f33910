"""What is replayed leaves the same state behind as what was sent."""

from __future__ import annotations

import random

import pytest

from petal_swarm.span import Slice
from petal_swarm.wire.messages.parts import NO_STEP, TensorMeta
from petal_swarm.wire.messages.steps import Step
from petal_swarm.wire.step_log import LogBudget, StepLog

ROW_BYTES = 8


def step(number: int, *slices: tuple[int, int, int], forks: tuple[int, ...] | None = None) -> Step:
    """A step whose rows say which step, sequence and position they are of."""
    pieces = tuple(Slice(*piece) for piece in slices)
    payload = b"".join(
        bytes((number, piece.sequence, piece.position + offset, *bytes(ROW_BYTES - 3)))
        for piece in pieces
        for offset in range(piece.length)
    )
    rows = sum(piece.length for piece in pieces)
    return Step(number, 0, pieces, TensorMeta("float32", (rows, 2)), payload, forks=forks)


def log_of(*steps: Step, limit_bytes: int = 1 << 20) -> StepLog:
    log = LogBudget(limit_bytes).new_log()
    for each in steps:
        log.append(each)
    return log


def apply(steps: list[Step]) -> dict[int, list[bytes]]:
    """The rows of each sequence after these steps: the rules of the protocol, word by word."""
    sequences: dict[int, list[bytes]] = {}
    for each in steps:
        if each.forks is not None:
            sequences = {index: list(sequences[source]) for index, source in enumerate(each.forks)}
        offset = 0
        for sequence, position, length in each.slices:
            rows = sequences.setdefault(sequence, [])
            assert position <= len(rows)
            del rows[position:]
            for _ in range(length):
                rows.append(bytes(each.payload[offset : offset + ROW_BYTES]))
                offset += ROW_BYTES
        assert offset == len(each.payload)
    return sequences


def random_steps(rng: random.Random, count: int) -> list[Step]:
    steps: list[Step] = []
    lengths = [0] * rng.randint(1, 4)
    for number in range(count):
        forks = None
        if number and rng.random() < 0.15:
            forks = tuple(rng.randrange(len(lengths)) for _ in range(rng.randint(1, 4)))
            lengths = [lengths[source] for source in forks]
        slices = []
        used = rng.randint(1, len(lengths)) if number else len(lengths)
        for sequence in rng.sample(range(len(lengths)), used):
            back = rng.randint(0, lengths[sequence]) if rng.random() < 0.2 else 0
            position, length = lengths[sequence] - back, rng.choice((1, 1, 1, 5))
            slices.append((sequence, position, length))
            lengths[sequence] = position + length
        steps.append(step(number, *slices, forks=forks))
    return steps


@pytest.mark.parametrize("seed", range(60))
def test_a_replay_leaves_the_same_state(seed: int) -> None:
    rng = random.Random(seed)
    steps = random_steps(rng, 30)
    log = log_of(*steps)
    done = rng.randint(NO_STEP, 29)
    replayed = log.after(NO_STEP, done=done, max_rows=rng.choice((1, 4, 16, 1000)))
    assert replayed is not None
    assert apply(replayed) == apply(steps)
    assert [each for each in replayed if each.step > done] == steps[done + 1 :]
    numbers = [each.step for each in replayed]
    assert numbers == sorted(set(numbers))


def test_decoding_is_joined_to_prompts() -> None:
    steps = [step(0, (0, 0, 5)), *(step(number, (0, 4 + number, 1)) for number in range(1, 40))]
    log = log_of(*steps)
    (whole,) = log.after(NO_STEP, done=39, max_rows=1000)
    assert whole.slices == (Slice(0, 0, 44),)
    assert (whole.step, whole.rows) == (39, "none")
    assert [each.tensor.shape[0] for each in log.after(NO_STEP, done=39, max_rows=16)] == [16, 16, 12]
    assert log.after(30, done=35, max_rows=16)[0].slices == (Slice(0, 35, 5),)


def test_only_what_is_missing() -> None:
    steps = [step(number, (0, number, 1)) for number in range(5)]
    log = log_of(*steps)
    assert log.after(2) == steps[3:]
    assert log.after(4) == []
    assert log.after(9) == []


def test_a_log_that_begins_behind_a_shared_prefix() -> None:
    log = log_of(step(0, (0, 16, 4)), step(1, (0, 20, 1)))
    assert not log.complete
    assert log.after(NO_STEP) is None
    assert log.after(1) == [], "nothing is missing there"


def test_past_the_budget_the_largest_gives_up() -> None:
    budget = LogBudget(6000)
    small, large = budget.new_log(), budget.new_log()
    small.append(step(0, (0, 0, 1)))
    for number in range(20):
        large.append(step(number, (0, number, 1)))
    assert small.complete
    assert not large.complete
    assert budget.used_bytes == small.nbytes
    small.close()
    assert budget.used_bytes == 0
