"""What happened between two looks: pure."""

from __future__ import annotations

from dataclasses import replace

import pytest

from petal_swarm.client.changes import KINDS, changes, looks_different
from petal_swarm.client.status import Status, is_busy, public_peer
from petal_swarm.span import Span
from petal_swarm.wire.announcement import Announcement


def peer(peer_id: str, start: int, end: int, **fields: object) -> Announcement:
    figures = {"block_time_s": 0.001, "step_time_s": 0.006, "kv_tokens": 4096, "kv_tokens_free": 1024}
    return Announcement(peer_id=peer_id, model="key", span=Span(start, end), **(figures | fields))


def status(*peers: Announcement, silent: tuple[str, ...] = (), busy: tuple[str, ...] = ()) -> Status:
    rtts_s = {a.peer_id: 0.0123 for a in peers if a.peer_id not in silent}
    return Status("model", "key", 8, peers, rtts_s, frozenset(busy))


LEFT, RIGHT = peer("a", 0, 4, name="alice"), peer("b", 4, 8)
WHOLE = status(LEFT, RIGHT)
CASES = {
    "nothing": (WHOLE, WHOLE, []),
    "joined": (
        status(LEFT),
        WHOLE,
        ["..b joined with blocks 4-7", "blocks 4-7 served again; the model is whole again"],
    ),
    "joined to load": (
        status(LEFT),
        status(LEFT, replace(RIGHT, state="joining")),
        ["..b joined and loads blocks 4-7"],
    ),
    "a record of somebody long gone": (status(LEFT), status(LEFT, RIGHT, silent=("b",)), []),
    "serving": (
        status(replace(LEFT, state="joining"), RIGHT),
        WHOLE,
        ["alice now serves blocks 0-3", "blocks 0-3 served again; the model is whole again"],
    ),
    "leaving": (
        status(LEFT, LEFT, RIGHT),
        status(replace(LEFT, state="joining"), RIGHT),
        ["alice is about to leave blocks 0-3", "nobody serves blocks 0-3"],
    ),
    "left": (WHOLE, status(LEFT), ["..b left", "nobody serves blocks 4-7"]),
    "failed": (
        WHOLE,
        status(LEFT, RIGHT, silent=("a",)),
        ["alice does not answer; it served blocks 0-3", "nobody serves blocks 0-3"],
    ),
    "back": (
        status(LEFT, RIGHT, silent=("a",)),
        WHOLE,
        ["alice answers with blocks 0-3", "blocks 0-3 served again; the model is whole again"],
    ),
    "gone after it failed": (status(LEFT, RIGHT, silent=("a",)), status(RIGHT), ["alice did not come back"]),
    "moving": (WHOLE, status(LEFT, replace(RIGHT, moving_to=Span(0, 4))), ["..b moves to blocks 0-3"]),
    "moved": (
        WHOLE,
        status(LEFT, replace(RIGHT, span=Span(5, 6))),
        ["..b moved from blocks 4-7 to block 5", "nobody serves blocks 4 and 6-7"],
    ),
    "part of a gap closed": (
        status(LEFT),
        status(LEFT, replace(RIGHT, span=Span(6, 8))),
        ["..b joined with blocks 6-7", "blocks 6-7 served again"],
    ),
    "busy": (WHOLE, status(LEFT, RIGHT, busy=("a",)), ["alice is busy"]),
    "free": (status(LEFT, RIGHT, busy=("a",)), WHOLE, ["alice has room again"]),
    "busy, then gone": (
        status(LEFT, RIGHT, busy=("a",)),
        status(RIGHT),
        ["alice left", "nobody serves blocks 0-3"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_happened(case: str) -> None:
    old, new, sentences = CASES[case]
    events = changes(old, new)
    assert [event.sentence for event in events] == sentences
    assert {event.kind for event in events} <= set(KINDS)


def test_events_say_which_blocks_and_whose() -> None:
    joined, closed = changes(status(LEFT), WHOLE)
    assert (joined.kind, joined.peer_id, joined.blocks) == ("joined", "b", (4, 5, 6, 7))
    assert (closed.kind, closed.peer_id, closed.blocks) == ("gap_closed", "", (4, 5, 6, 7))


def test_it_takes_less_to_stay_busy_than_to_become_so() -> None:
    waiting, filling = peer("a", 0, 8, queue_s=1.0), peer("a", 0, 8, kv_tokens_free=500)
    for middling in (waiting, filling):
        assert not is_busy(middling, was=False)
        assert is_busy(middling, was=True)
    assert is_busy(peer("a", 0, 8, queue_s=3.0), was=False)
    assert is_busy(peer("a", 0, 8, kv_tokens_free=0), was=False)
    assert not is_busy(peer("a", 0, 8, kv_tokens_free=4096), was=True)
    assert not is_busy(peer("a", 0, 8, kv_tokens_free=0, state="joining"), was=True)
    assert not is_busy(peer("a", 0, 8, kv_tokens=0, kv_tokens_free=0), was=True)


def test_noise_is_no_difference() -> None:
    again = replace(WHOLE, rtts_s={"a": 0.0124, "b": 0.0122})
    assert looks_different(WHOLE, again) == frozenset()
    near = (
        replace(WHOLE, rtts_s={"a": 0.0001, "b": 0.0123}),
        replace(WHOLE, rtts_s={"a": 0.0009, "b": 0.0123}),
    )
    assert looks_different(*near) == frozenset()


def test_figures_that_have_moved_are_a_difference() -> None:
    assert looks_different(WHOLE, replace(WHOLE, rtts_s={"a": 0.123, "b": 0.0123})) == {"a"}
    assert looks_different(WHOLE, status(LEFT, RIGHT, silent=("a",))) == {"a"}
    assert looks_different(WHOLE, status(LEFT, replace(RIGHT, kv_tokens_free=3000))) == {"b"}
    assert looks_different(status(LEFT), WHOLE) == {"b"}
    assert looks_different(WHOLE, status(LEFT)) == frozenset()


def test_what_everybody_may_see_of_a_server() -> None:
    shown = public_peer(WHOLE, peer("12D3KooWsecret-12345678", 0, 4, addresses=("/ip4/203.0.113.9/tcp/1",)))
    assert shown["id"] == "12345678"
    assert "203.0.113.9" not in str(shown)
    assert "secret" not in str(shown)
    assert shown["load"] == 0.75
