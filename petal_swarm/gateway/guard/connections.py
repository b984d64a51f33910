"""Connections: bounded in all and of each address, with deadlines for those who send or take nothing.

uvicorn bounds neither: it answers 503 once too many are open, but keeps one open for ever on which a head
never ends, or whose peer takes nothing, and lets a head grow without end.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import OrderedDict
from http import HTTPStatus
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from petal_swarm.gateway.guard.addresses import LOCAL, Proxies, group, parse
from petal_swarm.gateway.guard.config import ConnectionLimits
from petal_swarm.gateway.refusals import (
    HeadTooLargeError,
    NotHttpError,
    OnRefusal,
    RefusedError,
    SlowRequestError,
    TooManyConnectionsError,
)

logger = logging.getLogger(__name__)

_LOOK_S = 1.0
#: Requests that one connection may send before the first is answered.
_MAX_PIPELINED = 8
#: For files, and for connections to the swarm.
_OTHER_FILES = 256


def _raw(error: RefusedError) -> bytes:
    """The whole response, for who has sent no request that could be answered."""
    body = json.dumps(error.body()).encode()
    head = {
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Connection": "close",
        **error.headers(),
    }
    lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}"]
    lines += [f"{name}: {value}" for name, value in head.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


class Connections:
    """All connections of a server, in its event loop; `protocol` is uvicorn's `http`.

    When all are taken, a new one takes the place of one that waits for a request to begin or to be whole: of
    the address that has most of these the oldest, so that who has one keeps it. If all are being answered,
    the new one is refused. This machine, and proxies that are trusted, may have any number of them.
    """

    def __init__(
        self,
        limits: ConnectionLimits,
        trusted_proxies: tuple[str, ...] = (),
        on_refusal: OnRefusal = lambda _: None,
    ) -> None:
        self.limits = limits
        self.on_refusal = on_refusal
        self._proxies = Proxies(trusted_proxies)
        self._open: set[GuardedProtocol] = set()
        self._of_address: dict[str, int] = {}
        #: Of each address those without a request under way, longest first, and when they end.
        self._waiting: dict[str, OrderedDict[GuardedProtocol, float]] = {}
        self._max = limits.max_connections
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._open)

    @property
    def keep_alive_s(self) -> int:
        """uvicorn's `timeout_keep_alive`: it never comes to that."""
        return int(self.limits.idle_timeout_s) + 60

    def raise_file_limit(self) -> int:
        """Let this process have as many files open as the connections need, as far as it may; fewer
        connections are taken if it may not. Returns how many.
        """
        try:
            import resource
        except ImportError:  # not on Windows, which has no such limit for sockets
            return self._max
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = self.limits.max_connections + _OTHER_FILES
        if soft != resource.RLIM_INFINITY and soft < wanted:
            soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            self._max = max(1, min(self._max, soft - _OTHER_FILES))
        return self._max

    def protocol(self, **arguments: Any) -> GuardedProtocol:
        """What uvicorn calls for each connection."""
        return GuardedProtocol(self, **arguments)

    def enter(self, protocol: GuardedProtocol) -> bool:
        """A connection was made; False if there is no room for it."""
        address = parse(protocol.client[0]) if protocol.client else None
        name = LOCAL if address is None else group(address)
        bounded = address is not None and not address.is_loopback and not self._proxies.is_trusted(address)
        if bounded and self._of_address.get(name, 0) >= self.limits.max_of_address:
            return False
        if len(self._open) >= self._max and not self._make_room():
            return False
        self._open.add(protocol)
        protocol.address = name
        self._of_address[name] = self._of_address.get(name, 0) + 1
        self.wait(protocol, self.limits.head_timeout_s)
        if self._timer is None:
            self._timer = protocol.loop.call_later(_LOOK_S, self._look, protocol.loop)
        return True

    def leave(self, protocol: GuardedProtocol) -> None:
        """The connection is lost, or about to be; any number of times."""
        if protocol in self._open:
            self._open.discard(protocol)
            self.answer(protocol)
            self._of_address[protocol.address] -= 1
            if not self._of_address[protocol.address]:
                del self._of_address[protocol.address]

    def wait(self, protocol: GuardedProtocol, timeout_s: float) -> None:
        """The connection has no request under way, and has so long to send one, or to go on with it."""
        if protocol in self._open:
            own = self._waiting.setdefault(protocol.address, OrderedDict())
            own[protocol] = protocol.loop.time() + timeout_s
            own.move_to_end(protocol)

    def answer(self, protocol: GuardedProtocol) -> None:
        """A request's head is whole."""
        own = self._waiting.get(protocol.address)
        if own is not None:
            own.pop(protocol, None)
            if not own:
                del self._waiting[protocol.address]

    def _make_room(self) -> bool:
        most = max(self._waiting.values(), key=len, default=None)
        if most is None:
            return False
        oldest = next(iter(most))
        self.leave(oldest)
        oldest.transport.abort()
        return True

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        """One timer for all: one each would cost more, and a second more or less does not matter."""
        now = loop.time()
        late = [each for own in self._waiting.values() for each, until_s in own.items() if until_s <= now]
        for protocol in late:
            protocol.end_idle()
        stuck_s = now - self.limits.write_timeout_s
        for protocol in [each for each in self._open if each.stuck_since_s <= stuck_s]:
            logger.debug("a visitor takes nothing of what was written for it")
            protocol.transport.abort()
        self._timer = loop.call_later(_LOOK_S, self._look, loop) if self._open else None


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's, with bounds. Nothing is added for each part of an answer: whether its deadline has passed is
    seen by when the transport's buffer became full.
    """

    def __init__(self, connections: Connections, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._guard = connections
        self._limits = connections.limits
        self.address = LOCAL
        #: Since when the peer takes nothing; infinity if it does.
        self.stuck_since_s = float("inf")
        self._head_bytes = 0
        self._request_bytes = 0
        self._in_head = False
        self._is_refused = False
        self._has_many_headers = False
        #: Of the requests that came, the one that is answered; uvicorn's `cycle` is the one that came last.
        self._answered: RequestResponseCycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if not self._guard.enter(self):
            self._refuse(TooManyConnectionsError("too many connections; try again later", retry_after_s=5))

    def connection_lost(self, exc: Exception | None) -> None:
        self._guard.leave(self)
        answered = self._answered
        if answered is not None and not answered.response_complete:
            answered.disconnected = True  # uvicorn tells only the last of several that came at once
            answered.message_event.set()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()  # uvicorn's leaves the timer, which holds all this, after a reset

    def data_received(self, data: bytes) -> None:
        """As uvicorn's; but what is sent here may be junk, and is not worth a line in the log each time."""
        if self._is_refused:
            return
        self._request_bytes += len(data)
        if self._request_bytes > self._limits.max_request_bytes:
            self.transport.abort()
            return
        if self._in_head:
            # What one read brings is not counted: it ends in a head or begins one, and is not large.
            self._head_bytes += len(data)
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            return
        except httptools.HttpParserError:
            self._refuse(self._head_too_large() if self._has_many_headers else _not_http())
            return
        if self._in_head and self._head_bytes > self._limits.max_head_bytes:
            self._refuse(self._head_too_large())

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = self._request_bytes = 0
        self._in_head = True
        if self._is_idle:
            self._guard.wait(self, self._limits.head_timeout_s)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:
            return  # a trailer: nobody asked for it
        super().on_header(name, value)
        if len(self.headers) > self._limits.max_headers:
            self._has_many_headers = True
            raise ValueError("too many headers")

    def on_headers_complete(self) -> None:
        self._in_head = False
        if len(self.pipeline) >= _MAX_PIPELINED:
            raise ValueError("too many requests at once")
        is_next = self._is_idle
        super().on_headers_complete()
        if is_next:
            self._answered = self.cycle
        else:
            self.flow.resume_reading()  # else nobody would notice that the visitor leaves
        self._guard.answer(self)

    def on_response_complete(self) -> None:
        self._answered = self.pipeline[-1][0] if self.pipeline else None
        super().on_response_complete()
        if self.transport.is_closing():
            self._close()
        elif self._is_idle:
            # What remains of a body that was refused is thrown away, if it comes as quickly as a head.
            begun = self._in_head or self.cycle.more_body
            self._guard.wait(self, self._limits.head_timeout_s if begun else self._limits.idle_timeout_s)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.stuck_since_s = min(self.stuck_since_s, self.loop.time())

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self.stuck_since_s = float("inf")

    def end_idle(self) -> None:
        """It has waited for too long."""
        if self._in_head:
            self._refuse(SlowRequestError("the request did not come in time"))
        else:
            self._close()

    @property
    def _is_idle(self) -> bool:
        """Whether no request is under way whose head is whole."""
        return self.cycle is None or self.cycle.response_complete

    def _head_too_large(self) -> RefusedError:
        limits = self._limits
        return HeadTooLargeError(
            f"at most {limits.max_headers} headers of {limits.max_head_bytes} bytes in all are taken"
        )

    def _refuse(self, error: RefusedError) -> None:
        if not self._is_refused:
            self._is_refused = True
            self._guard.on_refusal(error)
            if self._is_idle and not self.transport.is_closing():
                self.transport.write(_raw(error))
            self._close()

    def _close(self) -> None:
        """Once what was written is sent; a peer that takes nothing has as long for that as for a part."""
        self.transport.close()
        self.stuck_since_s = min(self.stuck_since_s, self.loop.time())


def _not_http() -> RefusedError:
    return NotHttpError("this is no HTTP/1.1 request, or too many at once")
