"""Peers that fail are left alone for longer each time, and come back."""

from __future__ import annotations

import pytest

from petal_swarm.client import avoidance
from petal_swarm.client.avoidance import FIRST_S, FORGIVE_S, GROWTH, LONGEST_S, Avoidance


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def test_each_failure_costs_more_and_time_heals() -> None:
    clock = Clock()
    peers = Avoidance(now=clock)
    for count in range(3):
        wait_s = peers.failed("a")
        assert wait_s == FIRST_S * GROWTH**count
        assert peers.peers() == {"a"}
        clock.now_s += wait_s - 0.01
        assert peers.peers() == {"a"}
        clock.now_s += 0.02
        assert not peers.peers()
    for _ in range(10):
        longest_s = peers.failed("a")
    assert longest_s == LONGEST_S
    clock.now_s += FORGIVE_S + 1
    assert peers.failed("a") == FIRST_S


def test_to_be_busy_is_no_failure() -> None:
    clock = Clock()
    peers = Avoidance(now=clock)
    peers.busy("a", 30.0)
    assert peers.peers() == {"a"}
    clock.now_s += 31
    assert not peers.peers()
    assert peers.failed("a") == FIRST_S
    peers.busy("b", 1e9)
    clock.now_s += LONGEST_S + 1
    assert not peers.peers(), "nobody can have itself left alone for ever"


def test_a_ban_is_for_good() -> None:
    clock = Clock()
    peers = Avoidance(now=clock)
    peers.ban("a", "it lied")
    clock.now_s += 1e9
    assert peers.peers() == peers.banned == {"a"}


def test_the_oldest_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(avoidance, "MAX_PEERS", 2)
    peers = Avoidance(now=Clock())
    for name in ("a", "b", "a", "c"):
        peers.failed(name)
    assert peers.peers() == {"a", "c"}
