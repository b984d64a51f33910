"""Where the open sessions of this client are, so that the next one does not queue up behind them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from petal_swarm.routing.route import Route

#: A session without a step for so long is no load, until it has one again.
IDLE_S = 10.0
#: What a server takes to receive a step and answer it, however small the model [measured: 0.1 to 0.3 ms].
MESSAGE_S = 2e-4


class Session(Protocol):
    """What is known of an open session: a `Ring`."""

    @property
    def route(self) -> Route: ...

    @property
    def is_over(self) -> bool: ...

    @property
    def idle_s(self) -> float: ...


class Traffic:
    """Keeps count of this client's sessions at each peer, of those too that are just being opened.

    A row of each session that decodes is in the same batches as those of the next one, and costs about what
    a token of a prompt does, or its message does. Servers announce their load, too, but a second later: by
    then many sessions may have been opened.
    """

    def __init__(self) -> None:
        self._opening: list[Route] = []
        self._sessions: list[Session] = []

    @contextmanager
    def opening(self, route: Route) -> Iterator[None]:
        """While the block runs, a session is about to be opened along `route`."""
        self._opening.append(route)
        try:
            yield
        finally:
            self._opening.remove(route)

    def add(self, session: Session) -> None:
        """It counts at the peers of its route, whichever these are, until it is over."""
        self._sessions.append(session)

    def load_s(self) -> dict[str, float]:
        """By peer id, how many seconds a step will take longer there for what is under way."""
        self._sessions = [session for session in self._sessions if not session.is_over]
        routes = [session.route for session in self._sessions if session.idle_s < IDLE_S]
        load_s: dict[str, float] = {}
        for route in (*self._opening, *routes):
            for hop in route.hops:
                load_s[hop.peer_id] = load_s.get(hop.peer_id, 0.0) + max(hop.token_s, MESSAGE_S)
        return load_s
