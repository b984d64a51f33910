"""A visitor's connection while a request of his is worked on: what is sent, and noticing that he is gone."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Send


class Connection:
    """Around the `receive` and `send` of a request whose body was read.

    A visitor is gone if the connection ends; the guard ends those of visitors who read nothing for long.
    """

    def __init__(self, receive: Receive, send: Send, request_id: str) -> None:
        self._receive = receive
        self._send = send
        self._lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.started = False
        self.request_id = request_id

    async def send(self, message: Message) -> None:
        """
        Raises:
            ClientDisconnect: the visitor is gone.
        """
        if self._lost.done():
            raise ClientDisconnect
        try:
            await self._send(message)
        except OSError:
            self._lose()
            raise ClientDisconnect from None

    async def start(self, status: int, headers: dict[str, str]) -> None:
        """Send the status line and the headers, among them the request's id."""
        self.started = True
        headers = {**headers, "X-Request-Id": self.request_id}
        encoded = [
            (name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()
        ]
        await self.send({"type": "http.response.start", "status": status, "headers": encoded})

    async def write(self, data: bytes, *, more: bool = True) -> None:
        """Send a part of the body."""
        await self.send({"type": "http.response.body", "body": data, "more_body": more})

    async def while_there(
        self, work: Coroutine[Any, Any, None], *, unless: asyncio.Future[Exception] | None = None
    ) -> None:
        """Do the work until it is done, the visitor leaves, or `unless` has an error for him.

        In any case it has ended when this returns. Raises what it raises.

        Raises:
            ClientDisconnect: the visitor is gone.
        """
        task = asyncio.ensure_future(work)
        listening = asyncio.ensure_future(self._listen())
        watched: list[asyncio.Future[Any]] = [task, self._lost]
        if unless is not None:
            watched.append(unless)
        try:
            await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
        finally:
            listening.cancel()
            task.cancel()
            await asyncio.gather(task, listening, return_exceptions=True)
        if not task.cancelled():
            task.result()
        elif unless is not None and unless.done():
            raise unless.result()
        else:
            raise ClientDisconnect

    async def _listen(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._lose()

    def _lose(self) -> None:
        if not self._lost.done():
            self._lost.set_result(None)
