"""Which steps share a batch, and who has to wait."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from petal_swarm.engine.engine import StepRequest
from petal_swarm.engine.scheduler import Scheduler
from petal_swarm.span import Slice, Span

LIMIT = 8
HERE, THERE = Span(0, 4), Span(1, 3)


def step(session: str, tokens: int = 1, blocks: Span = HERE) -> StepRequest:
    return StepRequest(session, blocks, (Slice(0, 0, tokens),), torch.empty(tokens, 1))


def filled(*steps: StepRequest) -> Scheduler[int]:
    scheduler: Scheduler[int] = Scheduler(LIMIT)
    for number, request in enumerate(steps):
        scheduler.add(request, number)
    return scheduler


def batches(scheduler: Scheduler[int]) -> list[list[int]]:
    found = []
    while batch := scheduler.next_batch():
        found.append([job.owner for job in batch])
    assert len(scheduler) == 0
    return found


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([], []),
        ([step("a")], [[0]]),
        ([step("a"), step("b"), step("c")], [[0, 1, 2]]),
        ([step("a"), step("a"), step("b"), step("a")], [[0, 2], [1], [3]]),
        ([step("a"), step("b", blocks=THERE), step("c")], [[0, 2], [1]]),
        ([step("a", 5), step("b", 4), step("c", 3)], [[0, 2], [1]]),
        ([step("a", 20), step("b"), step("c")], [[0], [1, 2]]),
        ([step("a"), step("b", 20), step("c")], [[0, 2], [1]]),
        ([step("a", 8), step("b", 8)], [[0], [1]]),
    ],
)
def test_batches(steps: list[StepRequest], expected: list[list[int]]) -> None:
    assert batches(filled(*steps)) == expected


def test_a_step_does_not_overtake_an_earlier_one_of_its_session() -> None:
    """The first of `b` does not fit; its second, which would, depends on it."""
    assert batches(filled(step("a"), step("b", 8), step("b"), step("c"))) == [[0, 3], [1], [2]]
    assert batches(filled(step("a"), step("b", 1, THERE), step("b"))) == [[0], [1], [2]]


def test_a_large_step_is_not_overtaken_for_ever() -> None:
    scheduler = filled(step("a"), step("large", LIMIT), step("b"))
    assert [job.owner for job in scheduler.next_batch()] == [0, 2]
    for number in range(3, 6):
        scheduler.add(step(f"small-{number}"), number)
    assert [job.owner for job in scheduler.next_batch()] == [1]


def test_discarded_steps_do_not_run() -> None:
    scheduler = filled(step("a"), step("b"), step("a"))
    scheduler.discard("a")
    scheduler.discard("unknown")
    assert len(scheduler) == 1
    assert batches(scheduler) == [[1]]


steps = st.builds(
    step, st.sampled_from("abcd"), st.sampled_from([1, 1, 2, 5, LIMIT, 20]), st.sampled_from([HERE, THERE])
)


@settings(deadline=None, derandomize=True)
@given(moves=st.lists(steps | st.just(None), max_size=40))
def test_every_step_runs_once_in_the_order_of_its_session(moves: list[StepRequest | None]) -> None:
    """`None` takes a batch in between."""
    scheduler: Scheduler[int] = Scheduler(LIMIT)
    waiting: dict[int, StepRequest] = {}
    done: list[int] = []

    def take() -> None:
        batch = scheduler.next_batch()
        assert bool(batch) == bool(waiting)
        if not batch:
            return
        assert batch[0].owner == min(waiting), "the oldest runs"
        requests = [job.request for job in batch]
        assert len({request.session for request in requests}) == len(batch)
        assert len({request.blocks for request in requests}) == 1
        assert len(batch) == 1 or sum(len(request.hidden) for request in requests) <= LIMIT
        for job in batch:
            earlier = [n for n in waiting if n < job.owner and waiting[n].session == job.request.session]
            assert not earlier
            assert waiting[job.owner] is job.request
        for job in batch:
            del waiting[job.owner]
            done.append(job.owner)

    for number, move in enumerate(moves):
        if move is None:
            take()
        else:
            waiting[number] = move
            scheduler.add(move, number)
        assert len(scheduler) == len(waiting)
    while waiting:
        take()
    assert sorted(done) == [number for number, move in enumerate(moves) if move is not None]
