"""Accounts of peers: who has to wait, and until when."""

from __future__ import annotations

import pytest

from petal_swarm.server.config import SessionLimits
from petal_swarm.server.quotas import Quotas


class Bank:
    """Quotas with a clock that is moved by hand."""

    def __init__(self, **limits: float) -> None:
        self.now = 0.0
        self.quotas = Quotas(SessionLimits(**limits), lambda: self.now)  # type: ignore[arg-type]
        self.woken: list[str] = []

    def wake(self, name: str) -> object:
        return lambda: self.woken.append(name)


def test_bytes_count_over_all_sessions_of_a_peer() -> None:
    bank = Bank(max_bytes_in_flight_of_peer=100)
    one, two, other = bank.quotas.open("a"), bank.quotas.open("a"), bank.quotas.open("b")
    one.take(1, 60)
    assert not two.must_wait
    two.take(1, 60)
    assert one.must_wait
    assert two.must_wait
    assert not other.must_wait
    one.give_back(1, 60)
    assert not two.must_wait


def test_rows_count_over_all_sessions_of_a_peer() -> None:
    bank = Bank(max_queued_tokens_of_peer=100)
    sessions = [bank.quotas.open("a") for _ in range(10)]
    for session in sessions:
        assert not session.must_wait
        session.take(10, 1)
    assert all(session.must_wait for session in sessions)
    assert not bank.quotas.open("b").must_wait


def test_what_a_session_had_under_way_ends_with_it() -> None:
    bank = Bank(max_bytes_in_flight_of_peer=100)
    one, two = bank.quotas.open("a"), bank.quotas.open("a")
    one.reserve(50)
    two.take(5, 100)
    two.close()
    two.close()
    two.give_back(5, 100)
    two.take(5, 100)
    two.reserve(5)
    assert bank.quotas.nbytes == 50
    assert not one.must_wait
    one.close()
    assert (bank.quotas.nbytes, len(bank.quotas)) == (0, 0)


def test_half_a_step_counts_and_is_not_interrupted() -> None:
    """Or two steps, each half read, would wait for each other."""
    bank = Bank(max_bytes_in_flight_of_peer=100)
    one, two, three = (bank.quotas.open("a") for _ in range(3))
    one.reserve(60)
    two.reserve(60)
    assert not one.must_wait
    assert not two.must_wait
    assert three.must_wait
    one.take(6, 60)
    assert one.must_wait, "before its next step"
    assert bank.quotas.nbytes == 120, "it is not counted twice"


def test_while_bytes_are_scarce_who_has_more_than_an_equal_part_waits() -> None:
    bank = Bank(max_bytes_in_flight_of_all=100, max_bytes_in_flight_of_peer=90)
    greedy, modest, newcomer = (bank.quotas.open(peer) for peer in "abc")
    greedy.take(1, 80)
    assert not greedy.must_wait
    modest.take(1, 25)
    assert greedy.must_wait
    assert not modest.must_wait, "25 of 100 for two"
    assert not newcomer.must_wait
    newcomer.take(1, 10)
    newcomer.give_back(1, 10)
    modest.take(1, 25)
    assert modest.must_wait, "50 of 100 for two"


def test_who_waits_is_woken_when_much_is_free_and_not_for_each_step() -> None:
    bank = Bank(max_bytes_in_flight_of_peer=100)
    one, two = bank.quotas.open("a"), bank.quotas.open("a")
    for _ in range(10):
        one.take(1, 10)
    for name in ("one", "two", "two"):
        bank.wake(name)
    one.wake_when_free(bank.wake("one"))  # type: ignore[arg-type]
    two.wake_when_free(bank.wake("two"))  # type: ignore[arg-type]
    for _ in range(5):
        one.give_back(1, 10)
    assert bank.woken == []
    one.give_back(1, 10)
    assert bank.woken == ["one", "two"]
    one.give_back(1, 10)
    assert bank.woken == ["one", "two"], "once"


def test_who_waits_for_others_is_woken_by_them() -> None:
    bank = Bank(max_bytes_in_flight_of_all=100)
    one, two, three = (bank.quotas.open(peer) for peer in "abc")
    for usage, nbytes in ((one, 40), (two, 30), (three, 30)):
        usage.take(1, nbytes)
    assert one.must_wait
    assert not two.must_wait
    one.wake_when_free(bank.wake("one"))  # type: ignore[arg-type]
    two.give_back(1, 30)
    assert bank.woken == []
    three.close()
    assert bank.woken == ["one"]
    assert not one.must_wait


def test_a_peer_that_moves_too_much_pays_in_time() -> None:
    bank = Bank(max_bytes_per_s_of_peer=1000.0)
    one, two, other = bank.quotas.open("a"), bank.quotas.open("a"), bank.quotas.open("b")
    one.take(1, 600)
    one.give_back(1, 600, sent_bytes=400)
    assert not two.must_wait, "a second's worth at once"
    two.take(1, 2000)
    assert one.must_wait
    assert not other.must_wait
    assert one.debt_s == pytest.approx(2.0)
    bank.now = 1.5
    assert one.debt_s == pytest.approx(0.5)
    assert one.must_wait
    bank.now = 2.0
    assert not one.must_wait


def test_a_peer_saves_no_more_than_a_second() -> None:
    bank = Bank(max_bytes_per_s_of_peer=1000.0)
    usage = bank.quotas.open("a")
    bank.now = 1e6
    usage.take(1, 1001 + 10)
    usage.give_back(1, 0)
    assert usage.debt_s == 0.0, "it was refilled before it was looked at"
    usage.take(1, 1500)
    assert usage.debt_s == pytest.approx(0.5)


def test_an_account_ends_with_the_last_session_and_begins_anew() -> None:
    bank = Bank(max_bytes_in_flight_of_peer=100)
    one, two = bank.quotas.open("a"), bank.quotas.open("a")
    one.close()
    assert len(bank.quotas) == 1
    two.close()
    assert len(bank.quotas) == 0
    assert not bank.quotas.open("a").must_wait
