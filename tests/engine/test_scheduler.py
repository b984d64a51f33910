"""Which steps share a batch, who goes first, and who has to wait."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from petal_swarm.engine.scheduler import QUANTUM, Job, Portion, Scheduler
from petal_swarm.engine.steps import StepRequest
from petal_swarm.span import Slice, Span

LIMIT = 64
HERE, THERE = Span(0, 4), Span(1, 3)


def job(name: int, session: str, tokens: int = 1, *, blocks: Span = HERE, peer: str = "") -> Job[int]:
    return Job(StepRequest(session, blocks, (Slice(0, 0, tokens),), torch.empty(tokens, 1), peer=peer), name)


def beam(name: int, session: str, size: int, peer: str = "") -> Job[int]:
    slices = tuple(Slice(n, 5, 1) for n in range(size))
    return Job(StepRequest(session, HERE, slices, torch.empty(size, 1), peer=peer), name)


def filled(*jobs: Job[int]) -> Scheduler[int]:
    scheduler: Scheduler[int] = Scheduler(LIMIT)
    for each in jobs:
        scheduler.add(each)
    return scheduler


def shown(portions: list[Portion[int]]) -> dict[int, int]:
    return {portion.job.owner: portion.rows for portion in portions}


def end(scheduler: Scheduler[int], portions: list[Portion[int]]) -> None:
    for portion in portions:
        if portion.job.rows_left:
            scheduler.put_back(portion.job)
        else:
            scheduler.finish(portion.job)


def decodes(scheduler: Scheduler[int]) -> list[list[int]]:
    """All decode batches until none is left."""
    found = []
    while portions := scheduler.next_decodes():
        found.append(list(shown(portions)))
        end(scheduler, portions)
    assert not scheduler.decodes_ready
    return found


@pytest.mark.parametrize(
    ("jobs", "expected"),
    [
        ([], []),
        ([job(0, "a")], [[0]]),
        ([job(0, "a"), job(1, "b"), job(2, "c")], [[0, 1, 2]]),
        ([job(0, "a"), job(1, "a"), job(2, "b"), job(3, "a")], [[0, 2], [1], [3]]),
        ([job(0, "a"), job(1, "b", blocks=THERE), job(2, "c")], [[0, 2], [1]]),
        ([beam(0, "a", 40), beam(1, "b", 40), beam(2, "c", 24)], [[0, 2], [1]]),
    ],
)
def test_decode_batches(jobs: list[Job[int]], expected: list[list[int]]) -> None:
    assert decodes(filled(*jobs)) == expected


def test_a_decode_step_over_the_limit_runs_alone() -> None:
    scheduler: Scheduler[int] = Scheduler(40)
    for each in (job(0, "a"), beam(1, "b", 60), job(2, "c")):
        scheduler.add(each)
    assert decodes(scheduler) == [[0, 2], [1]]


def test_decode_and_prefill_are_batched_apart() -> None:
    scheduler = filled(job(0, "a", 20), job(1, "b"), job(2, "c", 20))
    assert shown(scheduler.next_prefills(LIMIT)) == {0: 20, 2: 20}
    assert shown(scheduler.next_decodes()) == {1: 1}
    assert not scheduler.prefill_ready
    assert not scheduler.decodes_ready


def test_a_session_runs_one_step_at_a_time_in_order() -> None:
    scheduler = filled(job(0, "a", 30), job(1, "a"), job(2, "a"))
    assert not scheduler.decodes_ready
    first = scheduler.next_prefills(20)
    assert not scheduler.prefill_ready
    assert not scheduler.decodes_ready
    scheduler.put_back(first[0].job)
    assert not scheduler.decodes_ready
    scheduler.finish(scheduler.next_prefills(20)[0].job)
    assert decodes(scheduler) == [[1], [2]]


def test_decoding_peers_take_turns() -> None:
    """One peer has far more sessions than fit."""
    scheduler = filled(*(beam(n, f"a{n}", 8, "alice") for n in range(20)), beam(20, "b", 8, "bob"))
    assert 20 in decodes(scheduler)[0]
    scheduler = filled(*(beam(n, f"a{n}", 8, "alice") for n in range(20)))
    for n in range(20, 30):
        scheduler.add(beam(n, f"b{n}", 8, "bob"))
    assert [Counter(number < 20 for number in batch) for batch in decodes(scheduler)[:2]] == [
        {True: 4, False: 4}
    ] * 2


def test_a_peer_with_a_hundred_sessions_and_one_with_one() -> None:
    """The one waits for a batch, not for a hundred sessions; and gets half of what is prefilled."""
    scheduler = filled(*(beam(n, f"a{n}", 8, "many") for n in range(100)))
    end(scheduler, scheduler.next_decodes())
    for turn in range(10):
        scheduler.add(beam(200 + turn, "b", 8, "one"))
        portions = scheduler.next_decodes()
        assert 200 + turn in shown(portions), "in the very next batch"
        end(scheduler, portions)
    scheduler = filled(
        *(job(n, f"a{n}", 100, peer="many") for n in range(100)), job(200, "b", 1000, peer="one")
    )
    for _ in range(30):
        portions = scheduler.next_prefills(LIMIT)
        assert shown(portions)[200] == LIMIT // 2
        end(scheduler, portions)


def test_nobody_is_crowded_out_by_sessions_of_many_spans() -> None:
    """A peer whose every session has blocks of its own fills a batch with each, not all batches."""
    scheduler = filled(*(job(n, f"a{n}", blocks=Span(n, 20), peer="alice") for n in range(10)))
    end(scheduler, scheduler.next_decodes())
    for turn in range(5):
        scheduler.add(job(100 + turn, "b", blocks=Span(10, 20), peer="bob"))
        for _ in range(2):
            portions = scheduler.next_decodes()
            end(scheduler, portions)
            if 100 + turn in shown(portions):
                break
        else:
            pytest.fail("bob waited for more than one batch of alice's")


def prefill(scheduler: Scheduler[int], rows: int) -> dict[int, int]:
    portions = scheduler.next_prefills(rows)
    end(scheduler, portions)
    return shown(portions)


def test_a_prompt_runs_in_chunks() -> None:
    scheduler = filled(job(0, "a", 100))
    assert [prefill(scheduler, rows) for rows in (30, 50, 200)] == [{0: 30}, {0: 50}, {0: 20}]
    assert len(scheduler) == 0


def test_a_batch_is_never_over_the_limit() -> None:
    assert prefill(filled(job(0, "a", 100), job(1, "b", 100)), 10 * LIMIT) == {0: LIMIT}


def test_prefill_is_shared_between_peers_not_sessions() -> None:
    scheduler = filled(
        *(job(n, f"a{n}", 1000, peer="alice") for n in range(5)), job(5, "b", 1000, peer="bob")
    )
    for _ in range(10):
        assert prefill(scheduler, 64) == {0: 32, 5: 32}


def test_a_peers_sessions_run_in_order_of_arrival() -> None:
    scheduler = filled(job(0, "a", 20), job(1, "b", 20), job(2, "c", 60))
    assert [prefill(scheduler, 32) for _ in range(4)] == [{0: 20, 1: 12}, {1: 8, 2: 24}, {2: 32}, {2: 4}]


def test_what_one_peer_does_not_need_others_get() -> None:
    scheduler = filled(job(0, "a", 10, peer="alice"), job(1, "b", 100, peer="bob"))
    assert prefill(scheduler, 64) == {0: 10, 1: 54}


def test_more_peers_than_a_batch_has_room_for() -> None:
    """Each gets its quantum; those left out go first the next time."""
    scheduler = filled(*(job(n, f"s{n}", 160, peer=f"peer-{n}") for n in range(7)))
    got = Counter[int]()
    for turn in range(1, 15):
        got.update(prefill(scheduler, 3 * QUANTUM))
        assert max(got.values()) - min(got[n] for n in range(7)) <= QUANTUM, turn
    assert sum(got.values()) == 14 * 3 * QUANTUM


def test_a_newcomer_is_not_owed_the_past() -> None:
    scheduler = filled(job(0, "a", 10_000, peer="alice"))
    for _ in range(20):
        prefill(scheduler, LIMIT)
    scheduler.add(job(1, "b", 10_000, peer="bob"))
    assert prefill(scheduler, LIMIT) == {0: 32, 1: 32}


def test_prompts_of_different_spans_take_turns() -> None:
    scheduler = filled(
        job(0, "a", 1000, peer="alice"),
        job(1, "b", 1000, peer="bob", blocks=THERE),
        job(2, "c", 1000, peer="carol"),
    )
    got = Counter[int]()
    for _ in range(30):
        portions = prefill(scheduler, 32)
        assert set(portions) in ({0}, {2}, {0, 2}, {1})
        got.update(portions)
    assert max(got.values()) - min(got.values()) <= 32


def test_a_parked_step_lets_others_pass_and_keeps_its_place() -> None:
    scheduler = filled(job(0, "a", 20), job(1, "b"), job(2, "b"), job(3, "c"))
    for portion in [*scheduler.next_prefills(10), *scheduler.next_decodes()]:
        if portion.job.owner != 3:
            scheduler.park(portion.job)
        else:
            scheduler.finish(portion.job)
    assert not scheduler.decodes_ready
    assert not scheduler.prefill_ready
    assert [parked.owner for parked in scheduler.parked] == [0, 1]
    assert (scheduler.decode_steps, scheduler.prefill_rows) == (2, 20)
    scheduler.add(job(4, "d"))
    for parked in scheduler.parked:
        scheduler.unpark(parked)
    assert decodes(scheduler) == [[1, 4], [2]]
    assert prefill(scheduler, 64) == {0: 20}


def test_clearing_returns_every_step_once() -> None:
    scheduler = filled(job(0, "a", 20), job(1, "b"), job(2, "b"), job(3, "c"), job(4, "d", 40))
    (parked, running) = [portion.job for portion in scheduler.next_decodes()]
    scheduler.park(parked)
    scheduler.next_prefills(10)
    assert scheduler.num_parked == 1
    assert running.owner == 3
    assert [each.owner for each in scheduler.clear()] == [0, 1, 2, 3, 4]
    assert (len(scheduler), scheduler.num_parked) == (0, 0)
    assert (scheduler.decode_steps, scheduler.prefill_rows) == (0, 0)
    assert not scheduler.decodes_ready
    assert not scheduler.prefill_ready
    scheduler.add(job(5, "b"))
    assert decodes(scheduler) == [[5]]


def test_discarded_steps_do_not_run() -> None:
    scheduler = filled(job(0, "a"), job(1, "b"), job(2, "a"), job(3, "c", 20), job(4, "d"))
    (parked,) = (
        p.job for p in scheduler.next_decodes() if p.job.owner == 4 and scheduler.park(p.job) is None
    )
    for session in ("c", "d", "unknown"):
        assert scheduler.discard(session) is None
    running = scheduler.discard("a")
    assert running is not None
    assert running.owner == 0
    assert running.dropped
    assert (scheduler.decode_steps, scheduler.prefill_rows, len(scheduler)) == (0, 0, 1)
    assert not parked.dropped


def test_a_session_may_come_back_while_its_old_step_is_in_a_batch() -> None:
    scheduler = filled(job(0, "a", 30), job(1, "b", 30))
    old = scheduler.next_prefills(40)
    scheduler.discard("a")
    scheduler.discard("b")
    scheduler.add(job(2, "a"))
    scheduler.add(job(3, "a"))
    end(scheduler, old)
    assert decodes(scheduler) == [[2], [3]]
    assert len(scheduler) == 0


jobs = st.tuples(
    st.sampled_from("abcdef"), st.sampled_from([1, 1, 2, 9, 40, LIMIT, 200]), st.sampled_from([HERE, THERE])
)
moves = st.one_of(
    jobs, st.sampled_from(["decode", "prefill", "end", "park", "unpark"]), st.sampled_from("abc")
)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(moves=st.lists(moves, max_size=60))
def test_every_row_runs_once_in_the_order_of_its_session(moves: list[object]) -> None:
    """Whatever comes, ends, is parked or is closed in between; one letter closes a session."""
    scheduler: Scheduler[int] = Scheduler(LIMIT)
    expected: dict[str, list[list[int]]] = {}  # session -> [number, rows to come] of each step
    batch: list[Portion[int]] = []
    parked: set[str] = set()
    number = 0

    def check_taken(portions: list[Portion[int]]) -> None:
        assert len({portion.job.request.session for portion in portions}) == len(portions)
        assert len({portion.job.request.blocks for portion in portions}) <= 1
        assert len(portions) <= 1 or sum(portion.rows for portion in portions) <= LIMIT
        for taken, rows in portions:
            head = expected[str(taken.request.session)][0]
            assert head[0] == taken.owner
            assert 0 < rows <= head[1]
            assert taken.request.session not in parked

    def finish() -> None:
        for taken, rows in batch:
            queue = expected.get(str(taken.request.session), [])
            if queue and queue[0][0] == taken.owner:
                queue[0][1] -= rows
                if not queue[0][1]:
                    queue.pop(0)
        end(scheduler, batch)
        batch.clear()

    for move in moves:
        if isinstance(move, tuple):
            session, tokens, blocks = move
            expected.setdefault(session, []).append([number, tokens])
            scheduler.add(job(number, session, tokens, blocks=blocks, peer=session))
            number += 1
        elif move in ("decode", "prefill") and not batch:
            batch = scheduler.next_decodes() if move == "decode" else scheduler.next_prefills(24)
            check_taken(batch)
        elif move == "end":
            finish()
        elif move == "park" and batch and not batch[-1].job.dropped:
            taken = batch.pop().job
            scheduler.park(taken)
            parked.add(str(taken.request.session))
            expected[str(taken.request.session)][0][1] = taken.rows  # a step is parked before its first row
        elif move == "unpark":
            for waiting in scheduler.parked:
                scheduler.unpark(waiting)
            parked.clear()
        elif move in expected:
            scheduler.discard(move)
            del expected[str(move)]
            parked.discard(str(move))
        assert len(scheduler) == sum(bool(queue) for queue in expected.values())
    finish()
    for waiting in scheduler.parked:
        scheduler.unpark(waiting)
    parked.clear()
    while any(expected.values()):
        batch = scheduler.next_decodes() or scheduler.next_prefills(24)
        assert batch, "something waits, so something runs"
        check_taken(batch)
        finish()
    assert (len(scheduler), scheduler.decode_steps, scheduler.prefill_rows) == (0, 0, 0)
