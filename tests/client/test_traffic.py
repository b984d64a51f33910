"""Own sessions count as load from before they are open until they are over."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from petal_swarm.client.traffic import IDLE_S, MESSAGE_S, Traffic
from petal_swarm.routing import Hop, Route
from petal_swarm.span import Span


@dataclass
class FakeRing:
    route: Route
    is_over: bool = False
    idle_s: float = 0.0


def route(*peers: str) -> Route:
    return Route(tuple(Hop(peer, Span(i, i + 1), token_s=0.25) for i, peer in enumerate(peers)), 1.0)


def test_sessions_count_while_they_are_opened_open_and_in_use() -> None:
    traffic = Traffic()
    with traffic.opening(route("a", "b")), traffic.opening(route("a")):
        assert traffic.load_s() == {"a": 0.5, "b": 0.25}
    with pytest.raises(OSError, match="refused"), traffic.opening(route("a")):
        raise OSError("refused")
    assert traffic.load_s() == {}
    one, other = FakeRing(route("a", "b")), FakeRing(route("b"))
    traffic.add(one)
    traffic.add(other)
    assert traffic.load_s() == {"a": 0.25, "b": 0.5}
    one.route = route("c", "b")  # repaired
    other.idle_s = IDLE_S
    assert traffic.load_s() == {"c": 0.25, "b": 0.25}
    other.idle_s = 0.0
    one.is_over = True
    assert traffic.load_s() == {"b": 0.25}


def test_a_session_is_some_load_however_fast_the_server_says_it_is() -> None:
    traffic = Traffic()
    with traffic.opening(Route((Hop("a", Span(0, 1), token_s=0.0),), 1.0)):
        assert traffic.load_s() == {"a": MESSAGE_S}
