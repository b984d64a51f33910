"""Chunk sizes and turns from measured times; no clock in here either."""

from __future__ import annotations

import pytest

from petal_swarm.engine.pace import (
    ACTIVE_S,
    BLOCK_SHARE,
    COMPANY,
    IDLE_BLOCK_S,
    IDLE_BLOCKS,
    LINGER,
    LINGER_IN_ALL,
    MIN_ROWS,
    MOST_PREFILL_SHARE,
    PREFILL_SHARE,
    Company,
    Pace,
    prefill_share,
    smooth,
)

MAX_ROWS = 2048


def decoding(pace: Pace, now_s: float, elapsed_s: float = 0.024, *, share: float = PREFILL_SHARE) -> None:
    pace.decoded(now_s, elapsed_s, 12, prefill_share=share)


def test_before_anything_was_measured_a_chunk_is_a_whole_batch() -> None:
    pace = Pace(MAX_ROWS)
    decoding(pace, 0.0)
    assert pace.chunk_rows(0.0) == MAX_ROWS


def test_a_block_of_a_chunk_is_short_beside_a_decode_batch() -> None:
    pace = Pace(MAX_ROWS, row_s=0.0001)
    decoding(pace, 5.0, 0.04)
    assert pace.chunk_rows(5.0) == pace.chunk_rows(5.0 + ACTIVE_S / 2) == 96
    assert 96 * pace.row_s <= 0.04 * BLOCK_SHARE < (96 + MIN_ROWS) * pace.row_s


def test_a_chunk_is_never_tiny_nor_larger_than_a_batch() -> None:
    pace = Pace(MAX_ROWS, row_s=1.0)
    decoding(pace, 0.0)
    assert pace.chunk_rows(0.0) == MIN_ROWS
    assert Pace(4, row_s=1.0).chunk_rows(0.0) == 4
    assert Pace(MAX_ROWS, row_s=1e-9).chunk_rows(0.0) == MAX_ROWS


def test_when_nobody_decodes_chunks_are_large_but_bounded() -> None:
    pace = Pace(MAX_ROWS, row_s=0.0005)
    decoding(pace, 0.0)
    assert pace.chunk_rows(ACTIVE_S) == int(IDLE_BLOCK_S / 0.0005) // MIN_ROWS * MIN_ROWS


def test_blocks_that_take_long_for_one_row_get_more_rows() -> None:
    pace = Pace(MAX_ROWS, row_s=0.01, block_s=0.2)
    assert pace.chunk_rows(0.0) == int(IDLE_BLOCKS * 0.2 / 0.01) // MIN_ROWS * MIN_ROWS


def test_chunks_settle_where_a_block_takes_what_it_may() -> None:
    """What a block takes is linear in its rows; the cost of one row depends on the chunk."""
    pace = Pace(MAX_ROWS, row_s=0.00005)
    for _ in range(100):
        decoding(pace, 0.0)
        rows = pace.chunk_rows(0.0)
        pace.prefilled(0.0015 + 0.00005 * rows, rows)
    assert 0.024 * BLOCK_SHARE * 0.8 < 0.0015 + 0.00005 * rows <= 0.024 * BLOCK_SHARE


def test_chunks_shrink_as_the_context_grows() -> None:
    pace = Pace(MAX_ROWS)
    sizes = []
    for context in range(0, 8000, 100):
        decoding(pace, 0.0)
        rows = pace.chunk_rows(0.0) if context else 64
        pace.prefilled(rows * (0.00005 + 1e-8 * context), rows)
        sizes.append(rows)
    assert sizes[5] > 2 * sizes[-1]


def test_prefill_is_owed_a_share_of_the_time_it_waited() -> None:
    pace = Pace(MAX_ROWS)
    assert not pace.owes_prefill
    decoding(pace, 0.0, 0.03)
    assert pace.owes_prefill
    pace.prefilled(0.9 * 0.03 * PREFILL_SHARE, 16)
    assert pace.owes_prefill
    pace.prefilled(0.2 * 0.03 * PREFILL_SHARE, 16)
    assert not pace.owes_prefill


def test_prefill_neither_saves_up_nor_is_owed_what_it_did_not_wait_for() -> None:
    pace = Pace(MAX_ROWS)
    decoding(pace, 0.0, 0.03)
    pace.prefilled(100.0, 16)
    decoding(pace, 0.0, 0.03)
    assert pace.owes_prefill
    decoding(pace, 0.0, 0.03, share=0.0)
    assert not pace.owes_prefill


def test_decode_figures() -> None:
    pace = Pace(MAX_ROWS)
    decoding(pace, 0.0, 0.024)
    assert (pace.decode_s, pace.block_s) == pytest.approx((0.024, 0.002))
    decoding(pace, 0.0, 0.048)
    assert pace.decode_s == pytest.approx(0.0264)


def test_estimates() -> None:
    pace = Pace(MAX_ROWS, row_s=0.001, decode_s=0.02)
    assert pace.estimate_s(0, 0, 12) == 0
    assert pace.estimate_s(3, 0, 12) == pytest.approx(0.06)
    assert pace.estimate_s(3, 100, 12) == pytest.approx(0.06 + 1.2)


def test_whoever_decodes_alone_waits_for_nobody() -> None:
    company = Company()
    assert company.linger_s(0.0, 1, 0.02) == 0
    company.decoded(0.02, ["a"])
    assert company.linger_s(0.04, 1, 0.02) == 0


def test_a_batch_waits_for_those_who_decode_too() -> None:
    company = Company()
    company.decoded(0.0, ["a", "b"])
    company.decoded(0.1, ["b", "c"])
    for ready in (1, 2):
        assert company.linger_s(0.1, ready, 0.1) == pytest.approx(0.1 * LINGER)
    assert company.linger_s(0.1, 3, 0.1) == 0
    company.left("a")
    assert company.linger_s(0.1, 2, 0.1) == 0


def test_no_batch_waits_for_long() -> None:
    company = Company()
    company.decoded(0.0, "abcdef")
    now, waited = 0.05, 0.0
    while (linger := company.linger_s(now + waited, 1, 0.02)) > 0.0:
        waited += linger
    assert waited == pytest.approx(0.02 * LINGER_IN_ALL)
    company.decoded(0.08, "a")
    assert company.linger_s(0.08, 1, 0.02) > 0, "the next one may wait again"


def test_who_stays_away_is_not_waited_for() -> None:
    company = Company()
    company.decoded(0.0, "ab")
    company.decoded(1.0, "a")
    assert company.linger_s(0.02 * COMPANY - 0.001, 1, 0.02) > 0
    assert company.linger_s(1.0, 1, 0.02) == 0


def test_smoothing() -> None:
    assert smooth(0.0, 5.0) == 5.0
    assert smooth(1.0, 2.0) == pytest.approx(1.1)


def test_work_waits_for_others_to_have_their_share() -> None:
    pace = Pace(1024)
    assert pace.work_due_s < 0
    pace.worked(10.0, 2.0)
    assert pace.work_due_s == pytest.approx(16.0)


def test_work_uses_idle_time_unless_steps_would_wait_for_it() -> None:
    pace = Pace(1024)
    pace.worked(0.0, 0.1)
    assert pace.spares_time(0.0), "nobody decodes"
    for number in range(60):
        decoding(pace, number * 0.3, 0.01)
    assert not pace.spares_time(60 * 0.3), "a piece takes a third of the time between steps"
    pace.worked(60 * 0.3, 0.07)
    assert pace.spares_time(60 * 0.3)
    pace.worked(60 * 0.3, 0.1)
    assert not pace.spares_time(59 * 0.3 + 0.9)
    assert pace.spares_time(59 * 0.3 + ACTIVE_S), "nobody decodes any more"


def test_a_pause_in_decoding_is_no_time_between_steps() -> None:
    pace = Pace(1024)
    for now_s in (0.0, 0.02, 0.04, 100.0, 100.02):
        decoding(pace, now_s, 0.01)
    pace.worked(100.02, 0.006)
    assert not pace.spares_time(100.02)


def test_prompts_go_before_the_few_who_decode_if_they_are_of_the_same_peer() -> None:
    assert prefill_share(["a"], []) == 0.0
    assert prefill_share(["a"] * 4, ["a"] * 6) == 1.5
    assert prefill_share(["a"] * 4, ["a"]) == PREFILL_SHARE
    assert prefill_share(["a"], ["a"] * 30) == MOST_PREFILL_SHARE
    # Who decodes and nothing else does not wait for other people's prompts.
    assert prefill_share(["a"], ["b"] * 30) == PREFILL_SHARE
    assert prefill_share(["a", "b"], ["b"] * 30) == PREFILL_SHARE
    assert prefill_share(["a", "a", "b"], ["a"] * 4 + ["b"] * 3) == 2.0
