"""Who may open a session now, who waits, and in which order. Pure: no clock, no asyncio, no engine.

A session fits if the tokens it asks for are free now, and all open sessions together have not asked for
more than `overcommit` times the KV cache: few use all that they ask for. Those that do not fit wait,
peer after peer in turn, and within a peer in order of arrival. Nobody overtakes: a big session would
otherwise wait behind small ones for ever.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from petal_swarm.errors import BusyError, CacheFullError, RemoteError
from petal_swarm.server.config import SessionLimits


class Request(NamedTuple):
    """A session that wants room for `max_length` tokens; `key` is its id, `peer_id` its client."""

    key: bytes
    peer_id: str
    max_length: int


class Admission:
    """The open sessions of one server and the queue of those that wait.

    Every method that decides is told `tokens_free`: tokens of the KV cache that are not in use now.
    """

    def __init__(self, kv_tokens: int, limits: SessionLimits) -> None:
        self._kv_tokens = kv_tokens
        self._limits = limits
        self._open: dict[bytes, int] = {}
        self._promised = 0
        #: The waiting requests of each peer; the peer whose turn it is comes first.
        self._queues: dict[str, deque[Request]] = {}
        self._waiting = 0

    @property
    def num_waiting(self) -> int:
        return self._waiting

    def tokens_available(self, tokens_free: int) -> int:
        """The largest `max_length` that a session arriving now would get without waiting."""
        if self._waiting or len(self._open) >= self._limits.max_sessions:
            return 0
        return self._room(tokens_free)

    def enter(self, request: Request, tokens_free: int, *, may_wait: bool) -> bool:
        """Open the session (True), or put it into the queue (False).

        Raises:
            CacheFullError: it can never fit, or does not fit now and may not wait.
            BusyError: as many sessions are open, or wait, as this server allows.
        """
        if request.max_length <= self.tokens_available(tokens_free):
            self._let_in(request)
            return True
        if not may_wait or request.max_length > self._kv_tokens:
            raise self.refusal(request, tokens_free)
        mine = len(self._queues.get(request.peer_id, ()))
        if self._waiting >= self._limits.max_waiting or mine >= self._limits.max_waiting_of_peer:
            raise BusyError(f"{self._waiting} sessions wait for room here already, {mine} of them yours")
        self._queues.setdefault(request.peer_id, deque()).append(request)
        self._waiting += 1
        return False

    def admit(self, tokens_free: int) -> list[Request]:
        """Open the waiting sessions whose turn has come and that fit, and return them."""
        admitted = []
        while self._queues and len(self._open) < self._limits.max_sessions:
            peer_id, queue = next(iter(self._queues.items()))
            if queue[0].max_length > self._room(tokens_free):
                break
            request = queue[0]
            self._remove(peer_id, request)
            self._let_in(request)
            admitted.append(request)
        return admitted

    def leave(self, request: Request) -> None:
        """The session has ended, or waits no longer; one that is neither open nor waiting is ignored."""
        promised = self._open.pop(request.key, None)
        if promised is not None:
            self._promised -= promised
        elif request in self._queues.get(request.peer_id, ()):
            self._remove(request.peer_id, request)

    def refusal(self, request: Request, tokens_free: int) -> RemoteError:
        """Why the session is not let in, with what is free and what to do."""
        if len(self._open) >= self._limits.max_sessions:
            return BusyError(f"this server already has {len(self._open)} sessions; try again later")
        room = f"the KV cache has {self._room(tokens_free)} of {self._kv_tokens} tokens free"
        if request.max_length > self._kv_tokens:
            advice = "ask for a smaller max_length or raise --kv-tokens on the server"
        elif self._waiting:
            room += f" and {self._waiting} sessions waiting"
            advice = "wait for longer, or try again later"
        else:
            advice = "ask for a smaller max_length, or try again later"
        return CacheFullError(f"{room}, the session wants {request.max_length}; {advice}")

    def _room(self, tokens_free: int) -> int:
        promisable = int(self._limits.overcommit * self._kv_tokens) - self._promised
        return max(0, min(tokens_free, promisable))

    def _let_in(self, request: Request) -> None:
        self._open[request.key] = request.max_length
        self._promised += request.max_length

    def _remove(self, peer_id: str, request: Request) -> None:
        """Out of the queue. If it was at the head, its peer has had its turn, even if it gave up:
        or a peer that keeps asking for too much would stay in front of all others.
        """
        queue = self._queues[peer_id]
        had_turn = next(iter(self._queues)) == peer_id and queue[0] is request
        queue.remove(request)
        self._waiting -= 1
        if had_turn or not queue:
            del self._queues[peer_id]
            if queue:
                self._queues[peer_id] = queue
