"""Who may open a session now, who waits, and in which order. Pure: no clock, no asyncio, no engine.

A session fits if the tokens it asks for are free now, and all open sessions together have not asked for
more than `overcommit` times the KV cache: few use all that they ask for. Those that do not fit wait,
peer after peer in turn, and within a peer in order of arrival. Nobody overtakes: a big session would
otherwise wait behind small ones for ever. Only who has as many sessions as one peer may have, and so waits
for one of its own to end, keeps nobody else waiting.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from petal_swarm.errors import BusyError, CacheFullError, RemoteError
from petal_swarm.server.config import SessionLimits


class Request(NamedTuple):
    """A session that wants room for `max_length` tokens; `key` is its id, `peer_id` its client."""

    key: bytes
    peer_id: str
    max_length: int


@dataclass(slots=True)
class _Held:
    """The open sessions of one peer, and the tokens promised to them."""

    sessions: int = 0
    tokens: int = 0


class Admission:
    """The open sessions of one server and the queue of those that wait.

    Every method that decides is told `tokens_free`: tokens of the KV cache that are not in use now.
    """

    def __init__(self, kv_tokens: int, limits: SessionLimits) -> None:
        self.kv_tokens = kv_tokens
        self._limits = limits
        self._open: dict[bytes, Request] = {}
        self._promised = 0
        self._held: dict[str, _Held] = {}
        #: The waiting requests of each peer; the peer whose turn it is comes first.
        self._queues: dict[str, deque[Request]] = {}
        self._waiting = 0

    @property
    def num_open(self) -> int:
        return len(self._open)

    @property
    def num_waiting(self) -> int:
        return self._waiting

    @property
    def next_in_turn(self) -> Request | None:
        """Who gets the next room; None if nobody waits but for sessions of its own to end."""
        for peer_id, queue in self._queues.items():
            if self._may_have_one(peer_id):
                return queue[0]
        return None

    def tokens_available(self, tokens_free: int) -> int:
        """The largest `max_length` that a session of a newcomer would get now without waiting."""
        if self._is_full or self.next_in_turn is not None:
            return 0
        return self._room(tokens_free)

    def enter(self, request: Request, tokens_free: int, *, may_wait: bool) -> bool:
        """Open the session (True), or put it into the queue (False).

        Raises:
            CacheFullError: it can never fit, or does not fit now and may not wait.
            BusyError: as many sessions are open, or wait, as this server allows.
        """
        mine = len(self._queues.get(request.peer_id, ()))
        fits = request.max_length <= self.tokens_available(tokens_free)
        if fits and not mine and self._may_have_one(request.peer_id):
            self._let_in(request)
            return True
        if not may_wait or request.max_length > self.kv_tokens:
            raise self.refusal(request, tokens_free)
        if self._waiting >= self._limits.max_waiting or mine >= self._limits.max_waiting_of_peer:
            raise BusyError(f"{self._waiting} sessions wait for room here already, {mine} of them yours")
        self._queues.setdefault(request.peer_id, deque()).append(request)
        self._waiting += 1
        return False

    def admit(self, tokens_free: int) -> list[Request]:
        """Open the waiting sessions whose turn has come and that fit, and return them."""
        admitted: list[Request] = []
        while not self._is_full and (request := self.next_in_turn) is not None:
            if request.max_length > self._room(tokens_free):
                break
            self._remove(request)
            self._let_in(request)
            admitted.append(request)
        return admitted

    def leave(self, request: Request) -> None:
        """The session has ended, or waits no longer; one that is neither open nor waiting is ignored."""
        opened = self._open.pop(request.key, None)
        if opened is not None:
            self._promised -= opened.max_length
            held = self._held[opened.peer_id]
            held.sessions -= 1
            held.tokens -= opened.max_length
            if not held.sessions:
                del self._held[opened.peer_id]
        elif request in self._queues.get(request.peer_id, ()):
            self._remove(request)

    def over_share(self) -> list[bytes]:
        """Open sessions that could end in favour of who is next: without them, their peers would still
        be promised an equal share of the cache. None if who is next has its own share already.
        """
        following = self.next_in_turn
        if following is None:
            return []
        share = self.kv_tokens / len(self._held.keys() | self._queues.keys())
        if self._tokens_of(following.peer_id) >= share:
            return []
        return [
            key
            for key, request in self._open.items()
            if request.peer_id != following.peer_id
            and self._held[request.peer_id].tokens - request.max_length >= share
        ]

    def refusal(self, request: Request, tokens_free: int) -> RemoteError:
        """Why the session is not let in, with what is free and what to do."""
        if self._is_full:
            return BusyError(f"this server already has {len(self._open)} sessions; try again later")
        if not self._may_have_one(request.peer_id):
            most = self._limits.max_sessions_of_peer
            return BusyError(f"you have {most} sessions here, and no peer may have more; end one first")
        room = f"the KV cache has {self._room(tokens_free)} of {self.kv_tokens} tokens free"
        if request.max_length > self.kv_tokens:
            advice = "ask for a smaller max_length or raise --kv-tokens on the server"
        elif self._waiting:
            room += f" and {self._waiting} sessions waiting"
            advice = "wait for longer, or try again later"
        else:
            advice = "ask for a smaller max_length, or try again later"
        return CacheFullError(f"{room}, the session wants {request.max_length}; {advice}")

    @property
    def _is_full(self) -> bool:
        return len(self._open) >= self._limits.max_sessions

    def _tokens_of(self, peer_id: str) -> int:
        held = self._held.get(peer_id)
        return held.tokens if held else 0

    def _may_have_one(self, peer_id: str) -> bool:
        """Whether the peer has fewer sessions than one peer may have."""
        held = self._held.get(peer_id)
        return held is None or held.sessions < self._limits.max_sessions_of_peer

    def _room(self, tokens_free: int) -> int:
        promisable = int(self._limits.overcommit * self.kv_tokens) - self._promised
        return max(0, min(tokens_free, promisable))

    def _let_in(self, request: Request) -> None:
        self._open[request.key] = request
        self._promised += request.max_length
        held = self._held.setdefault(request.peer_id, _Held())
        held.sessions += 1
        held.tokens += request.max_length

    def _remove(self, request: Request) -> None:
        """Out of the queue. If it was next, its peer has had its turn, even if it gave up: or a peer that
        keeps asking for too much would stay in front of all others.
        """
        had_turn = self.next_in_turn is request
        queue = self._queues[request.peer_id]
        queue.remove(request)
        self._waiting -= 1
        if had_turn or not queue:
            del self._queues[request.peer_id]
            if queue:
                self._queues[request.peer_id] = queue
