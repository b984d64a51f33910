"""When to come back to a full server."""

from __future__ import annotations

import pytest

from petal_swarm.server.turnover import FIRST_GUESS_S, MAX_RETRY_S, MIN_RETRY_S, Turnover


def test_sessions_that_last_long_make_one_wait_long() -> None:
    turnover = Turnover()
    for _ in range(100):
        turnover.ended(40.0)
    assert turnover.retry_after_s(10, 0) == pytest.approx(4.0)
    assert turnover.retry_after_s(10, 4) == pytest.approx(20.0), "behind four others"
    assert turnover.retry_after_s(1, 0) == pytest.approx(40.0)


def test_it_is_never_no_time_nor_for_ever() -> None:
    turnover = Turnover()
    assert turnover.retry_after_s(0, 0) == FIRST_GUESS_S
    assert turnover.retry_after_s(512, 0) == MIN_RETRY_S
    turnover.ended(1e6)
    assert turnover.retry_after_s(1, 64) == MAX_RETRY_S
