"""Answering "can you dial me?", without becoming a tool against anybody else.

Dialled is nothing but the IP address that the asking peer's own connection comes from, at ports that it
names; and nothing is told but at which of them that very peer answered, proven by its key. How a dial
failed, which would tell of other machines behind the same address, is not.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable

from petal_swarm.errors import BusyError
from petal_swarm.net.addresses import ip_address
from petal_swarm.net.knock import knock
from petal_swarm.wire.messages.directory import DialBack, DialedBack
from petal_swarm.wire.messages.error import Error

DIAL_TIMEOUT_S = 4.0
#: At once, for everybody.
MAX_DIALING = 8
#: For each peer, and for each IP address, since peer ids cost nothing.
REQUESTS_OF_PEER, REQUESTS_OF_IP, PER_S = 8, 32, 60.0
MAX_REMEMBERED = 4096

Knock = Callable[[str, int, str], Awaitable[bool]]


class DialBackService:
    """`knock(ip, port, peer_id)` is how it dials: whether that peer answers there, in bounded time."""

    def __init__(
        self,
        knock: Knock | None = None,
        *,
        now: Callable[[], float] = time.monotonic,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._knock = knock or _knock
        self._clock = clock
        self._of_peer = RateLimit(REQUESTS_OF_PEER, PER_S, limit=MAX_REMEMBERED, now=now)
        self._of_ip = RateLimit(REQUESTS_OF_IP, PER_S, limit=MAX_REMEMBERED, now=now)
        self._free = MAX_DIALING

    async def answer(self, request: DialBack, peer_id: str, remote_address: str) -> DialedBack | Error:
        """Dial the peer at the ports it names, where its connection comes from; no other place."""
        ip = ip_address(remote_address)
        if not self._of_peer.allows(peer_id) or (ip is not None and not self._of_ip.allows(ip)):
            return Error(BusyError.code, "you ask too often to be dialled back; try again in a minute")
        ports = tuple(dict.fromkeys(request.ports))
        if ip is None or not ports:
            return DialedBack(remote_address, time_s=self._clock())
        if not self._free:
            return Error(BusyError.code, "too many ask to be dialled back; try again later or elsewhere")
        self._free -= 1
        try:
            answers = await asyncio.gather(*(self._knock(ip, port, peer_id) for port in ports))
        finally:
            self._free += 1
        reached = tuple(port for port, answered in zip(ports, answers, strict=True) if answered)
        return DialedBack(remote_address, ports, reached, self._clock())


class RateLimit:
    """At most `count` events of a key in any `per_s` seconds; the `limit` keys seen last are remembered."""

    def __init__(self, count: int, per_s: float, *, limit: int, now: Callable[[], float]) -> None:
        self._count = count
        self._per_s = per_s
        self._limit = limit
        self._now = now
        self._events: dict[str, deque[float]] = {}

    def allows(self, key: str) -> bool:
        """Whether another event is allowed now; if so, it counts."""
        now_s = self._now()
        events = self._events.pop(key, None) or deque(maxlen=self._count)
        self._events[key] = events
        if len(self._events) > self._limit:
            del self._events[next(iter(self._events))]
        if len(events) == self._count and now_s - events[0] < self._per_s:
            return False
        events.append(now_s)
        return True


async def _knock(ip: str, port: int, peer_id: str) -> bool:
    return await knock(ip, port, peer_id, timeout_s=DIAL_TIMEOUT_S)
