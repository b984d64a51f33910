"""Admission without a clock: who gets in, who waits, who comes next."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petal_swarm.errors import BusyError, CacheFullError
from petal_swarm.server.admission import Admission, Request
from petal_swarm.server.config import SessionLimits

KV_TOKENS = 100


class Desk:
    """An `Admission` that is told the same number of free tokens until that is changed."""

    def __init__(self, **limits: float) -> None:
        self.admission = Admission(KV_TOKENS, SessionLimits(**limits))  # type: ignore[arg-type]
        self.free = KV_TOKENS
        self._count = 0

    def request(self, peer: str, max_length: int) -> Request:
        self._count += 1
        return Request(self._count.to_bytes(16, "big"), peer, max_length)

    def enter(self, peer: str, max_length: int, *, may_wait: bool = True) -> tuple[Request, bool]:
        request = self.request(peer, max_length)
        return request, self.admission.enter(request, self.free, may_wait=may_wait)

    def opened(self, peer: str, max_length: int) -> Request:
        request, entered = self.enter(peer, max_length)
        assert entered
        return request

    def waiting(self, peer: str, max_length: int) -> Request:
        request, entered = self.enter(peer, max_length)
        assert not entered
        return request

    def admit(self) -> list[Request]:
        return self.admission.admit(self.free)


def test_tokens_in_use_and_tokens_promised_both_count() -> None:
    desk = Desk()
    first = desk.opened("a", 80)
    desk.opened("b", 80)
    assert desk.admission.tokens_available(desk.free) == 40, "twice 100 may be promised"
    with pytest.raises(CacheFullError, match="40 of 100 tokens free, the session wants 50"):
        desk.enter("c", 50, may_wait=False)
    desk.free = 30
    assert desk.admission.tokens_available(desk.free) == 30
    with pytest.raises(CacheFullError, match="30 of 100 tokens free, the session wants 40"):
        desk.enter("c", 40, may_wait=False)
    desk.opened("c", 30)
    desk.free = 100
    desk.admission.leave(first)
    assert desk.admission.tokens_available(desk.free) == 90


def test_what_can_never_fit_does_not_wait() -> None:
    desk = Desk()
    with pytest.raises(CacheFullError, match=r"100 of 100 tokens free, .* raise --kv-tokens"):
        desk.enter("a", 101)
    assert desk.admission.num_waiting == 0


def test_peers_take_turns() -> None:
    desk = Desk()
    desk.free = 0
    a1, a2, a3 = (desk.waiting("a", 10) for _ in range(3))
    b1, b2 = (desk.waiting("b", 10) for _ in range(2))
    c1 = desk.waiting("c", 10)
    desk.free = 100
    assert desk.admit() == [a1, b1, c1, a2, b2, a3]
    assert desk.admission.num_waiting == 0


def test_small_ones_do_not_overtake_a_big_one() -> None:
    desk = Desk()
    desk.free = 50
    big = desk.waiting("a", 60)
    small = desk.waiting("b", 10)
    assert desk.admit() == []
    assert desk.admission.tokens_available(desk.free) == 0, "nor do those who come later"
    with pytest.raises(CacheFullError, match="2 sessions waiting"):
        desk.enter("c", 10, may_wait=False)
    desk.free = 60
    assert desk.admit() == [big, small]


def test_who_gives_up_at_the_head_has_had_its_turn() -> None:
    """Or a peer that always has another request for too much would stay at the head."""
    desk = Desk()
    desk.free = 20
    first, second = desk.waiting("a", 90), desk.waiting("a", 90)
    small = desk.waiting("b", 10)
    desk.admission.leave(first)
    assert desk.admit() == [small]
    desk.free = 90
    assert desk.admit() == [second]


def test_who_gives_up_elsewhere_changes_no_turn() -> None:
    desk = Desk()
    desk.free = 0
    a1, b1, b2 = desk.waiting("a", 10), desk.waiting("b", 10), desk.waiting("b", 10)
    desk.admission.leave(b1)
    desk.admission.leave(b1)  # a second time changes nothing
    c1 = desk.waiting("c", 10)
    desk.free = 100
    assert desk.admit() == [a1, b2, c1]


def test_no_more_sessions_than_allowed() -> None:
    desk = Desk(max_sessions=2)
    first = desk.opened("a", 1)
    desk.opened("a", 1)
    with pytest.raises(BusyError, match="has 2 sessions"):
        desk.enter("b", 1, may_wait=False)
    third = desk.waiting("b", 1)
    assert desk.admit() == []
    desk.admission.leave(first)
    assert desk.admit() == [third]


def test_who_has_as_many_sessions_as_allowed_keeps_nobody_else_waiting() -> None:
    desk = Desk(max_sessions_of_peer=2)
    first = desk.opened("a", 1)
    desk.opened("a", 1)
    with pytest.raises(BusyError, match="you have 2 sessions here"):
        desk.enter("a", 1, may_wait=False)
    third = desk.waiting("a", 1)
    assert desk.admission.tokens_available(desk.free) == KV_TOKENS
    desk.opened("b", 1)
    desk.free = 0
    fourth = desk.waiting("b", 1)
    assert desk.admission.next_in_turn is fourth
    desk.free = KV_TOKENS
    assert desk.admit() == [fourth]
    desk.admission.leave(first)
    assert desk.admit() == [third]


def test_a_peer_with_a_hundred_sessions_and_one_with_one() -> None:
    """Whose turn it is has nothing to do with how many each has, or wants."""
    desk = Desk(max_sessions=101, max_waiting=200, max_waiting_of_peer=100)
    for _ in range(100):
        desk.opened("many", 1)
    desk.free = 0
    for _ in range(100):
        desk.waiting("many", 1)
    only = desk.waiting("one", 1)
    desk.free = KV_TOKENS
    assert len(desk.admit()) == 1
    assert desk.admission.next_in_turn is only, "there is room for one, and it was the other's turn"


def test_shares_of_the_cache() -> None:
    """What may be taken from whom: nothing that would leave the taken-from with less than its share."""
    desk = Desk()
    large = [desk.opened("a", 40) for _ in range(4)]
    small = desk.opened("b", 30)
    assert desk.admission.over_share() == [], "nobody waits"
    desk.waiting("c", 20)
    assert desk.admission.over_share() == [request.key for request in large], "160 - 40 are over 100 / 3"
    for request in large[:3]:
        desk.admission.leave(request)
    desk.free = 0
    assert desk.admission.over_share() == [], "40 - 40 are not"
    desk.admission.leave(small)


def test_who_has_a_share_takes_none_from_others() -> None:
    desk = Desk()
    for _ in range(3):
        desk.opened("a", 40)
    desk.opened("b", 60)
    desk.waiting("b", 30)
    assert desk.admission.over_share() == []


def test_the_queue_has_bounds() -> None:
    desk = Desk(max_waiting=5, max_waiting_of_peer=2)
    desk.free = 0
    for _ in range(2):
        desk.waiting("a", 10)
    with pytest.raises(BusyError, match="2 of them yours"):
        desk.enter("a", 10)
    for peer in "bcd":
        desk.waiting(peer, 10)
    with pytest.raises(BusyError, match="5 sessions wait"):
        desk.enter("e", 10)


actions = st.lists(
    st.tuples(st.sampled_from(["enter", "leave", "free"]), st.integers(0, 5), st.integers(1, 120)),
    max_size=60,
)


@settings(deadline=None, derandomize=True)
@given(actions=actions)
def test_whatever_happens_promises_are_kept(actions: list[tuple[str, int, int]]) -> None:
    desk = Desk(max_sessions=4, max_waiting=6, max_waiting_of_peer=2)
    inside: list[Request] = []
    queue: list[Request] = []
    for action, which, size in actions:
        if action == "enter":
            try:
                request, entered = desk.enter(f"peer-{which}", size)
                (inside if entered else queue).append(request)
            except (CacheFullError, BusyError):
                pass
        elif action == "free":
            desk.free = min(size, KV_TOKENS)
        elif pool := (inside if which % 2 else queue):
            desk.admission.leave(pool.pop(size % len(pool)))
        for request in desk.admit():
            queue.remove(request)
            inside.append(request)
            assert request.max_length <= desk.free
        assert desk.admission.num_waiting == len(queue)
        assert len(inside) <= 4
        assert sum(request.max_length for request in inside) <= 2 * KV_TOKENS
    for request in inside:
        desk.admission.leave(request)
    desk.free = KV_TOKENS
    while queue:  # nobody waits for ever
        admitted = desk.admit()
        assert admitted
        for request in admitted:
            queue.remove(request)
            desk.admission.leave(request)
