"""Places that one holder cannot take from all others."""

from __future__ import annotations

import pytest

from petal_swarm.errors import BusyError
from petal_swarm.server.config import SessionLimits
from petal_swarm.server.gate import Shares, StreamGate


def taken(shares: Shares, holder: str) -> int:
    count = 0
    while shares.take(holder):
        count += 1
    return count


def test_one_alone_gets_its_limit_and_no_more() -> None:
    assert taken(Shares(100, 30), "a") == 30
    assert taken(Shares(100, 90), "a") == 50, "half of them are for those who come later"


def test_newcomers_always_find_something() -> None:
    shares = Shares(100, 60)
    found = [taken(shares, holder) for holder in "abcd"]
    assert found == [50, 25, 17, 8], "an equal part of half, as long as there are places"
    assert not shares.take("e")
    for _ in range(50):
        shares.give_back("a")
    assert shares.total == 50
    assert shares.take("e")
    shares.give_back("e")
    assert shares.total == 50


def test_places_come_back() -> None:
    shares = Shares(10, 4)
    for _ in range(3):
        assert taken(shares, "a") == 4
        for _ in range(4):
            shares.give_back("a")
    assert shares.total == 0
    assert not shares._held


def test_a_stream_that_is_opened_counts_no_more() -> None:
    gate = StreamGate(SessionLimits(max_opening_of_peer=1))
    with gate.being_opened("a"):
        with pytest.raises(BusyError) as caught, gate.being_opened("a"):
            pass
        assert caught.value.retry_after_s == SessionLimits().open_timeout_s
        with gate.being_opened("b"):
            assert gate.num_opening == 2
    with gate.being_opened("a"):
        pass
    assert gate.num_opening == 0
