"""What the front door answers instead of an answer: OpenAI's error objects, with the right status."""

from __future__ import annotations

import json
import math
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, ClassVar

from petal_swarm.errors import PetalSwarmError

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class RefusedError(PetalSwarmError):
    """A request that is not taken. Message and headers are for the visitor; the class says the rest.

    `reason` is a label for metrics. `retry_after_s` is in how many seconds it may be worth to ask again.
    """

    status: ClassVar[int] = 400
    kind: ClassVar[str] = "invalid_request_error"
    code: ClassVar[str] = "refused"
    reason: ClassVar[str] = "other"

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {"error": {"message": str(self), "type": self.kind, "param": None, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """What goes into the response's head beside its type and length."""
        if self.retry_after_s is None:
            return {}
        return {"retry-after": str(max(1, math.ceil(self.retry_after_s)))}


class WrongHostError(RefusedError):
    """The `Host` is none of ours: a name that somebody else points at this address."""

    status = 403
    code = "host_not_allowed"
    reason = "host"


class CrossSiteError(RefusedError):
    """A page of another site asks, and its origin was not allowed."""

    status = 403
    code = "origin_not_allowed"
    reason = "origin"


class KeyRefusedError(RefusedError):
    """No key, or one that is not known here."""

    status = 401
    code = "invalid_api_key"
    reason = "key"

    def headers(self) -> dict[str, str]:
        return {**super().headers(), "www-authenticate": "Bearer"}


class RateLimitError(RefusedError):
    """The visitor has asked for more than its limits allow."""

    status = 429
    kind = "rate_limit_error"
    code = "rate_limit_exceeded"
    reason = "rate"


class LineFullError(RefusedError):
    """There is no room, and no place to wait for it."""

    status = 429
    kind = "rate_limit_error"
    code = "queue_full"
    reason = "queue_full"


class WaitedTooLongError(LineFullError):
    """Room did not become free in time."""

    code = "queue_timeout"
    reason = "queue_timeout"


class HeadTooLargeError(RefusedError):
    """Too many headers, or too long ones."""

    status = 431
    code = "headers_too_large"
    reason = "head"


class BodyTooLargeError(RefusedError):
    """The body is longer than is taken."""

    status = 413
    code = "request_too_large"
    reason = "body"


class SlowRequestError(RefusedError):
    """Head or body did not come in time."""

    status = 408
    code = "request_timeout"
    reason = "slow"


class NotHttpError(RefusedError):
    """What came is no request."""

    code = "bad_request"
    reason = "not_http"


class TooManyConnectionsError(RefusedError):
    """There is no room for one more connection, or for one more of this address."""

    status = 503
    kind = "server_error"
    code = "overloaded"
    reason = "connections"


class NoRoomForBodyError(RefusedError):
    """The bodies of all visitors together take as much memory as they may."""

    status = 503
    kind = "server_error"
    code = "overloaded"
    reason = "bodies"


class SocketRefusedError(RefusedError):
    """A web socket was asked for; there is none."""

    status = 404
    code = "no_websockets"
    reason = "websocket"


OnRefusal = Callable[[RefusedError], None]


async def send_refusal(send: Send, error: RefusedError) -> None:
    """Answer a request, of which nothing was answered yet, with this error."""
    body = json.dumps(error.body()).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers()}
    await send(
        {
            "type": "http.response.start",
            "status": error.status,
            "headers": [(name.encode(), value.encode("latin-1")) for name, value in headers.items()],
        }
    )
    await send({"type": "http.response.body", "body": body})
