"""Bodies of requests: bounded each and in all, and come in time, before anything else sees them."""

from __future__ import annotations

import asyncio

from petal_swarm.gateway.guard.config import GuardConfig
from petal_swarm.gateway.guard.entrance import header
from petal_swarm.gateway.refusals import (
    App,
    BodyTooLargeError,
    Message,
    NoRoomForBodyError,
    OnRefusal,
    Receive,
    RefusedError,
    Scope,
    Send,
    SlowRequestError,
    send_refusal,
)

_RETRY_S = 5.0
KIB = 1 << 10


class _GoneError(Exception):
    """The visitor left in the middle of the body."""


class Bodies:
    """Reads each body whole and hands it on as one message; later messages are the server's.

    What a body takes is counted until its request is answered, since what was made of it lives as long.
    A body that is refused is not read further: the connection's limits say how much of it is thrown away.
    """

    def __init__(self, app: App, config: GuardConfig, on_refusal: OnRefusal) -> None:
        self._app = app
        self._config = config
        self._on_refusal = on_refusal
        self._nbytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the bodies of all requests under way."""
        return self._nbytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        body = _Body()
        try:
            try:
                self._check_announced(scope)
                async with asyncio.timeout(self._config.body_timeout_s):
                    await self._read(body, receive)
            except TimeoutError:
                raise SlowRequestError(
                    f"the body did not come within {self._config.body_timeout_s:g} s"
                ) from None
        except RefusedError as error:
            self._give_back(body)
            self._on_refusal(error)
            await send_refusal(send, error)
        except BaseException as error:
            self._give_back(body)
            if not isinstance(error, _GoneError):
                raise
        else:
            try:
                await self._app(scope, body.then(receive), send)
            finally:
                self._give_back(body)

    def _check_announced(self, scope: Scope) -> None:
        announced = header(scope, b"content-length")
        # A server passes digits on and nothing else; thousands of them are no number that Python reads.
        if announced is not None and announced.isdigit():
            self._check(int(announced[:20]))

    def _check(self, nbytes: int) -> None:
        if nbytes > self._config.max_body_bytes:
            raise BodyTooLargeError(f"a body of at most {self._config.max_body_bytes / KIB:g} KiB is taken")

    async def _read(self, body: _Body, receive: Receive) -> None:
        more = True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                raise _GoneError
            part = message.get("body", b"")
            self._check(body.nbytes + len(part))
            if self._nbytes + len(part) > self._config.max_bodies_bytes:
                raise NoRoomForBodyError(
                    "too many large requests at once; try again later", retry_after_s=_RETRY_S
                )
            self._nbytes += len(part)
            body.add(part)
            more = message.get("more_body", False)

    def _give_back(self, body: _Body) -> None:
        self._nbytes -= body.nbytes


class _Body:
    def __init__(self) -> None:
        self.nbytes = 0
        self._parts = bytearray()

    def add(self, part: bytes) -> None:
        self._parts += part
        self.nbytes += len(part)

    def then(self, receive: Receive) -> Receive:
        """This body, whole, and after it what `receive` says."""
        whole: Message | None = {"type": "http.request", "body": bytes(self._parts), "more_body": False}
        self._parts.clear()

        async def receive_whole() -> Message:
            nonlocal whole
            if whole is not None:
                message, whole = whole, None
                return message
            return await receive()

        return receive_whole
