"""What people are told when clocks differ."""

from __future__ import annotations

import pytest

from petal_swarm.directory import clocks
from petal_swarm.directory.records import CLOCK_SLACK_S
from petal_swarm.errors import StaleRecordError


def late(peer_id: str, late_s: float) -> StaleRecordError:
    return StaleRecordError(f"announcement of {peer_id} is odd", peer_id, late_s)


@pytest.mark.parametrize(
    ("late_s", "ordinary"),
    [(0.0, True), (CLOCK_SLACK_S, True), (CLOCK_SLACK_S + 0.1, False), (-0.1, False), (-3600.0, False)],
)
def test_a_record_that_is_a_little_late_is_nothing_to_speak_of(late_s: float, ordinary: bool) -> None:
    assert clocks.is_ordinary(late("a", late_s)) is ordinary


def test_one_peer_among_others_is_named() -> None:
    said = clocks.about_records([late("a", 3588), late("b", -3540)], good=1, source="carol")
    assert said == {
        "a": "announcement of a is odd, as told by carol: that peer's clock or this machine's is behind,"
        " or somebody repeats old announcements",
        "b": "announcement of b is odd, as told by carol: that peer's clock or this machine's is ahead,"
        " or somebody repeats old announcements",
    }


@pytest.mark.parametrize(("late_s", "how"), [(3000.0, "50.0 min old"), (-7200.0, "2.0 h in the future")])
def test_if_all_are_wrong_alike_the_fault_may_be_here(late_s: float, how: str) -> None:
    said = clocks.about_records([late("a", late_s), late("b", late_s + 1)], good=0, source="carol")
    [(source, message)] = said.items()
    assert source == "carol"
    assert how in message
    assert "is this machine's clock right?" in message
    assert set(clocks.about_records([late("a", 3600), late("b", -3600)], good=0, source="c")) == {"a", "b"}


def test_offsets() -> None:
    assert clocks.about_offsets({}) is None
    assert clocks.about_offsets({"a": CLOCK_SLACK_S, "b": -CLOCK_SLACK_S}) is None
    one = clocks.about_offsets({"a": 0.1, "b": -3600})
    assert one is not None
    assert "this machine's clock is 1.0 h ahead of that of peer b: yours or theirs is wrong" in one
    assert "50.0 min behind those of all 2 peers" in str(clocks.about_offsets({"a": 3000, "b": 3001}))
    assert "10.0 s behind that of peer a" in str(clocks.about_offsets({"a": 10}))
