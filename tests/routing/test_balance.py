"""Plans of moves, and the check before each, over random swarms and at the moments that matter."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petal_swarm.errors import ConfigError
from petal_swarm.routing import Move, block_throughputs, check_move, coverage, missing_blocks, plan_moves
from petal_swarm.routing.balance import THRESHOLD, WITNESSES
from petal_swarm.span import Span
from petal_swarm.wire.announcement import Announcement

from .swarms import server

BLOCKS = 12
SPEEDS = st.sampled_from([0.01, 0.01, 0.01, 0.02, 0.05, 0.003])


def host(peer_id: str, start: int, end: int, **fields: object) -> Announcement:
    return server(peer_id, start, end, **{"block_time_s": 0.01, "movable": True, **fields})


@st.composite
def fleets(draw: st.DrawFn, *, largest: int = 24) -> list[Announcement]:
    """Servers of any spans, some fixed, some joining, some on their way."""
    found = []
    for i in range(draw(st.integers(1, largest))):
        start = draw(st.integers(0, BLOCKS - 1))
        span = Span(start, draw(st.integers(start + 1, min(start + 6, BLOCKS))))
        elsewhere = draw(st.integers(0, BLOCKS - len(span)))
        found.append(
            host(
                f"p{i:02}",
                span.start,
                span.end,
                block_time_s=draw(SPEEDS),
                movable=draw(st.sampled_from([True, True, True, False])),
                state=draw(st.sampled_from(["serving"] * 5 + ["joining", "left"])),
                moving_to=draw(st.sampled_from([None] * 5 + [Span(elsewhere, elsewhere + len(span))])),
            )
        )
    return found


def arrived(swarm: Sequence[Announcement], moves: Sequence[Move] = ()) -> list[Announcement]:
    """The swarm when all who move have arrived."""
    targets = {move.peer_id: move.target for move in moves}
    return [
        replace(a, span=targets.get(a.peer_id, a.moving_to or a.span), moving_to=None, state="serving")
        for a in swarm
        if a.state != "left"
    ]


def on_the_way(swarm: Sequence[Announcement], going: Collection[str]) -> list[Announcement]:
    """Those who serve while `going`, and all who mean to move, have left and not arrived."""
    return [a for a in swarm if a.state == "serving" and a.moving_to is None and a.peer_id not in going]


def served(swarm: Sequence[Announcement]) -> list[bool]:
    return [count > 0 for count in coverage(swarm, BLOCKS)]


@settings(max_examples=300, deadline=None)
@given(fleets())
def test_a_plan_opens_no_gap_even_when_all_go_at_once(swarm: list[Announcement]) -> None:
    moves = plan_moves(swarm, BLOCKS)
    before, during = on_the_way(swarm, ()), on_the_way(swarm, {move.peer_id for move in moves})
    assert served(during) == served(before)
    now = [a for a in swarm if a.state == "serving"]
    weakest = min(block_throughputs(now, BLOCKS))
    for was, is_left in zip(
        block_throughputs(before, BLOCKS), block_throughputs(during, BLOCKS), strict=True
    ):
        assert is_left == pytest.approx(was) or is_left >= weakest * (1 - 1e-6)


@settings(max_examples=300, deadline=None)
@given(fleets())
def test_a_plan_fills_gaps_or_raises_the_weakest_block_by_the_threshold(swarm: list[Announcement]) -> None:
    moves = plan_moves(swarm, BLOCKS)
    if not moves:
        return
    old, new = arrived(swarm), arrived(swarm, moves)
    gaps = [len(missing_blocks(s, BLOCKS)) for s in (old, new)]
    weakest = [min(t for t in block_throughputs(s, BLOCKS) if t > 0) for s in (old, new)]
    assert gaps[1] < gaps[0] or (gaps[1] == gaps[0] and weakest[1] >= weakest[0] * (1 + THRESHOLD) * 0.999)


@settings(max_examples=200, deadline=None)
@given(fleets())
def test_only_servers_that_serve_and_may_move_are_named_once_with_their_room(
    swarm: list[Announcement],
) -> None:
    by_id = {a.peer_id: a for a in swarm}
    moves = plan_moves(swarm, BLOCKS)
    assert len({move.peer_id for move in moves}) == len(moves)
    for move in moves:
        peer = by_id[move.peer_id]
        assert (peer.state, peer.movable, peer.moving_to) == ("serving", True, None)
        assert len(move.target) == len(peer.span)
        assert move.target.end <= BLOCKS
        assert move.target != peer.span
    barred = {move.peer_id for move in moves[:1]}
    assert not barred & {move.peer_id for move in plan_moves(swarm, BLOCKS, unmovable=barred)}


@settings(max_examples=200, deadline=None)
@given(fleets(), st.randoms(use_true_random=False))
def test_the_same_announcements_give_the_same_plan(swarm: list[Announcement], rng: random.Random) -> None:
    shuffled = swarm.copy()
    rng.shuffle(shuffled)
    assert plan_moves(shuffled, BLOCKS) == plan_moves(swarm, BLOCKS)


@settings(max_examples=100, deadline=None)
@given(fleets())
def test_plan_after_plan_comes_to_rest(swarm: list[Announcement]) -> None:
    for _ in range(25):
        moves = plan_moves(swarm, BLOCKS)
        swarm = arrived(swarm, moves)
        if not moves:
            return
    raise AssertionError("they move for ever")


@settings(max_examples=200, deadline=None)
@given(fleets(), st.sets(st.integers(0, 23)), st.randoms(use_true_random=False), st.integers(0, 2))
def test_whoever_declares_itself_first_no_gap_opens(
    swarm: list[Announcement], chosen: set[int], rng: random.Random, extent: int
) -> None:
    """Of each two servers that mean to go, the one that said so later has heard the other; not more."""
    there = [a for a in swarm if a.state == "serving" and a.moving_to is None]
    order = [a for i, a in enumerate(there) if i in chosen]
    rng.shuffle(order)
    targets = {a.peer_id: rng.randrange(BLOCKS - len(a.span) + 1) for a in order}
    meaning = {
        a.peer_id: replace(a, moving_to=Span(targets[a.peer_id], targets[a.peer_id] + len(a.span)))
        for a in order
    }
    going = set()
    for position, me in enumerate(order):
        heard = {a.peer_id for a in order[:position]} | {me.peer_id}
        if extent:
            heard |= {a.peer_id for a in order if rng.randrange(extent + 1)}
        view = [meaning[a.peer_id] if a.peer_id in heard else a for a in swarm]
        target = meaning[me.peer_id].moving_to
        assert target is not None
        check = check_move(view, me.peer_id, target, BLOCKS)
        if not check.refusal:
            going.add(me.peer_id)
            assert len(check.witnesses) == len(me.span)
            assert all(0 < len(peers) <= WITNESSES for peers in check.witnesses)
    before = [a for a in swarm if a.state == "serving" and a.moving_to is None]
    assert served([a for a in before if a.peer_id not in going]) == served(before)


def thick(count: int = 5) -> list[Announcement]:
    """`0:4` by `count` servers, `4:8` by one fewer, `8:12` by one."""
    swarm = [host(f"a{i}", 0, 4) for i in range(count)]
    swarm += [host(f"b{i}", 4, 8) for i in range(count - 1)]
    return [*swarm, host("c0", 8, 12)]


def test_the_strong_help_the_weak() -> None:
    assert plan_moves(thick(), BLOCKS) == (Move("a0", Span(8, 12)), Move("a1", Span(8, 12)))


def test_a_gap_is_filled_by_who_leaves_the_weakest_block_strongest() -> None:
    swarm = thick(3)[:-1]
    assert plan_moves(swarm, BLOCKS) == (Move("a0", Span(8, 12)),)
    swarm[0] = replace(swarm[0], block_time_s=0.1)
    assert plan_moves(swarm, BLOCKS) == (Move("a1", Span(8, 12)),)


def test_who_fills_a_gap_comes_from_where_there_are_most() -> None:
    swarm = [host("a0", 0, 4), host("a1", 0, 4), *(host(f"b{i}", 4, 8) for i in range(6))]
    assert plan_moves(swarm, BLOCKS) == (Move("b0", Span(8, 12)), Move("b1", Span(8, 12)))


def test_a_gap_of_two_spans_is_filled_by_two() -> None:
    swarm = [host("a", 0, 4), host("b", 0, 4), host("c", 0, 4)]
    assert {m.target for m in plan_moves(swarm, BLOCKS)} == {Span(4, 8), Span(8, 12)}


def test_who_is_needed_stays() -> None:
    assert plan_moves([host("a", 0, 4), host("b", 4, 8)], BLOCKS) == ()
    assert plan_moves([host("a", 0, 4), host("b", 2, 6), host("c", 2, 6)], 7) == (Move("b", Span(3, 7)),)
    assert plan_moves([host("a", 0, 4), host("b", 2, 6)], 7) == ()


def test_a_small_gain_is_not_worth_a_move() -> None:
    swarm = [host(f"a{i:02}", 0, 6) for i in range(42)] + [host(f"b{i:02}", 6, 12) for i in range(40)]
    assert plan_moves(swarm, BLOCKS) == ()
    assert len(plan_moves(swarm, BLOCKS, threshold=0.02)) == 1
    more = [host(f"z{i}", 0, 6) for i in range(4)]
    assert len(plan_moves([*more, *swarm], BLOCKS)) == 3, "each adds less than 5%, all of them 7.5%"


def test_who_is_on_the_way_counts_where_it_goes() -> None:
    swarm = [host("a", 0, 4), host("b", 0, 4), host("c", 4, 8)]
    assert plan_moves(swarm, BLOCKS) == (Move("a", Span(8, 12)),)
    assert plan_moves([*swarm, host("d", 8, 12, state="left")], BLOCKS) == (Move("a", Span(8, 12)),)
    assert plan_moves([*swarm, host("d", 8, 12, state="joining")], BLOCKS) == ()
    assert plan_moves([*swarm, host("d", 4, 8, moving_to=Span(8, 12))], BLOCKS) == ()


def test_nobody_is_left_to_servers_that_do_not_serve_yet() -> None:
    swarm = [host("a", 0, 4), host("b", 0, 4, state="joining")]
    assert plan_moves(swarm, 8) == ()
    assert check_move([replace(swarm[0], moving_to=Span(4, 8)), swarm[1]], "a", Span(4, 8), 8).refusal


def test_a_plan_has_an_end() -> None:
    swarm = [host(f"a{i:03}", 0, 6) for i in range(60)]
    assert len(plan_moves(swarm, BLOCKS, limit=7)) == 7
    assert len(plan_moves(swarm, BLOCKS)) == 30


def test_absurd_claims_do_not_break_it() -> None:
    liar = host("liar", 0, 4, block_time_s=1e-9)
    beyond = host("beyond", 4, 5000)
    assert plan_moves([liar, beyond, host("a", 0, 4), host("b", 0, 4), host("c", 0, 4)], 8) != ()
    slow = [host(f"s{i}", 0, 4, block_time_s=1e4) for i in range(3)]
    assert [move.target for move in plan_moves(slow, 8)] == [Span(4, 8)]


def test_nobody_at_all() -> None:
    assert plan_moves([], BLOCKS) == ()
    for act in (lambda: plan_moves([], 0), lambda: check_move([host("a", 0, 1)], "a", Span(0, 1), 0)):
        with pytest.raises(ConfigError):
            act()


def meaning_to(peer_id: str, start: int, end: int, target: Span) -> Announcement:
    return host(peer_id, start, end, moving_to=target)


GAP = Span(4, 8)


def test_of_two_who_may_not_both_go_the_first_waits_and_the_other_gives_way() -> None:
    both = [meaning_to("a", 0, 4, GAP), meaning_to("b", 0, 4, GAP)]
    first, second = (check_move(both, peer_id, GAP, 8) for peer_id in "ab")
    assert (first.again, bool(first.refusal)) == (True, True)
    assert (second.again, second.refusal) == (False, "it would not help any more")
    assert not check_move([both[0], host("b", 0, 4)], "a", GAP, 8).refusal


def test_who_comes_too_late_stays() -> None:
    swarm = [meaning_to("a", 0, 4, GAP), host("b", 0, 4), host("c", 4, 8)]
    assert check_move(swarm, "a", GAP, 8).refusal == "it would not help any more"
    assert check_move([swarm[0], host("c", 4, 8)], "a", GAP, 8).refusal


def test_witnesses_stay_themselves() -> None:
    swarm = [meaning_to("b", 0, 4, GAP), host("c", 0, 2), host("d", 2, 4), meaning_to("e", 0, 4, GAP)]
    swarm += [host(f"f{i}", 0, 4) for i in range(5)]
    check = check_move(swarm, "b", GAP, 8)
    assert check.witnesses == (*[("c", "f0", "f1")] * 2, *[("d", "f0", "f1")] * 2)


@pytest.mark.parametrize(
    ("swarm", "why"),
    [
        ([], "not serve"),
        ([meaning_to("a", 0, 4, GAP), host("b", 0, 4)][1:], "not serve"),
        ([replace(meaning_to("a", 0, 4, GAP), state="joining"), host("b", 0, 4)], "not serve"),
        ([meaning_to("a", 0, 9, GAP), host("b", 0, 4)], "no room|does not have"),
        ([meaning_to("a", 0, 3, GAP), host("b", 0, 4)], "no room"),
        ([meaning_to("a", 0, 4, GAP), host("b", 0, 3)], "block 3 needs it"),
    ],
)
def test_reasons_not_to_go(swarm: list[Announcement], why: str) -> None:
    assert any(part in check_move(swarm, "a", GAP, 8).refusal for part in why.split("|"))
