"""Buckets, and whose they are; the clock is a number."""

from __future__ import annotations

import pytest

from petal_swarm.errors import ConfigError
from petal_swarm.gateway.guard.accounts import Accounts, Visitor
from petal_swarm.gateway.guard.config import Limits
from petal_swarm.gateway.refusals import RateLimitError


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def accounts(clock: Clock) -> Accounts:
    return Accounts(clock)


def test_requests_are_limited_by_the_minute(accounts: Accounts, clock: Clock) -> None:
    visitor = Visitor("a", Limits(requests_per_min=6))
    for _ in range(6):
        accounts.ask(visitor)
    with pytest.raises(RateLimitError, match="6 requests a minute") as caught:
        accounts.ask(visitor)
    assert caught.value.retry_after_s == pytest.approx(10.0)
    accounts.ask(Visitor("b", visitor.limits))  # another's account
    clock.now += 10.0
    accounts.ask(visitor)
    with pytest.raises(RateLimitError):
        accounts.ask(visitor)


def test_a_pause_earns_a_minute_s_worth_at_most(accounts: Accounts, clock: Clock) -> None:
    visitor = Visitor("a", Limits(requests_per_min=3))
    accounts.ask(visitor)
    clock.now += 1e6
    assert accounts.left(visitor) == (3, None)


def test_without_limits_nothing_is_refused(accounts: Accounts) -> None:
    visitor = Visitor("a", Limits())
    for _ in range(1000):
        accounts.ask(visitor)
    with accounts.reserve(visitor, 10**9), accounts.reserve(visitor, 10**9):
        assert accounts.left(visitor) == (None, None)


def test_what_was_reserved_and_not_used_is_given_back(accounts: Accounts) -> None:
    visitor = Visitor("a", Limits(tokens_per_min=1000))
    with accounts.reserve(visitor, 800) as usage:
        assert accounts.left(visitor) == (None, 200)
        with (
            pytest.raises(RateLimitError, match="1000 tokens a minute") as caught,
            accounts.reserve(visitor, 500),
        ):
            pass
        assert caught.value.retry_after_s == pytest.approx(18.0)
        usage.tokens = 100
    assert accounts.left(visitor) == (None, 900)


def test_tokens_are_given_back_after_a_failure(accounts: Accounts) -> None:
    visitor = Visitor("a", Limits(tokens_per_min=1000, max_requests=1))
    with pytest.raises(ValueError, match="broken"), accounts.reserve(visitor, 800):
        raise ValueError("broken")
    assert accounts.left(visitor) == (None, 1000)
    with accounts.reserve(visitor, 800):
        pass


def test_a_request_of_more_than_a_minute_s_tokens_needs_them_all(accounts: Accounts, clock: Clock) -> None:
    visitor = Visitor("a", Limits(tokens_per_min=1000))
    with accounts.reserve(visitor, 5000) as usage:
        usage.tokens = 1500
        with pytest.raises(RateLimitError), accounts.reserve(visitor, 1):
            pass
    with pytest.raises(RateLimitError) as caught, accounts.reserve(visitor, 5000):
        pass
    assert caught.value.retry_after_s == pytest.approx(90.0)  # the debt is paid first
    clock.now += 90.0
    with accounts.reserve(visitor, 5000):
        pass


def test_requests_at_once_are_limited(accounts: Accounts) -> None:
    visitor = Visitor("a", Limits(max_requests=2))
    with accounts.reserve(visitor, 1), accounts.reserve(visitor, 1):
        with pytest.raises(RateLimitError, match="at most 2") as caught, accounts.reserve(visitor, 1):
            pass
        assert caught.value.headers()["retry-after"] == "2"
    with accounts.reserve(visitor, 1):
        pass


def test_the_oldest_are_forgotten_but_never_one_under_way(clock: Clock) -> None:
    accounts = Accounts(clock, max_visitors=10)
    limits = Limits(requests_per_min=1, max_requests=1)
    busy = Visitor("busy", limits)
    with accounts.reserve(busy, 1):
        for number in range(1000):
            accounts.ask(Visitor(f"v{number}", limits))
        assert len(accounts) == 10
        with pytest.raises(RateLimitError), accounts.reserve(busy, 1):
            pass
        with pytest.raises(RateLimitError):
            accounts.ask(Visitor("v999", limits))


def test_accounts_that_are_as_new_are_forgotten_soon(clock: Clock) -> None:
    accounts = Accounts(clock)
    limits = Limits(requests_per_min=60)
    for number in range(1000):
        accounts.ask(Visitor(f"v{number}", limits))
        clock.now += 1.0
    assert len(accounts) < 10


def test_changed_limits_hold_at_once(accounts: Accounts) -> None:
    with accounts.reserve(Visitor("a", Limits(max_requests=5)), 1):
        with pytest.raises(RateLimitError), accounts.reserve(Visitor("a", Limits(max_requests=1)), 1):
            pass
        accounts.ask(Visitor("a", Limits(requests_per_min=1)))
        with pytest.raises(RateLimitError):
            accounts.ask(Visitor("a", Limits(requests_per_min=1)))


@pytest.mark.parametrize(
    "limits",
    [
        {"requests_per_min": 0},
        {"tokens_per_min": -1},
        {"max_requests": 0},
        {"requests_per_min": float("nan")},
    ],
)
def test_limits_are_positive(limits: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="above 0"):
        Limits(**limits)  # type: ignore[arg-type]
