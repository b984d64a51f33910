"""A name for each request to `/v1/`: in the header `X-Request-Id` of whatever is answered, and in the log."""

from __future__ import annotations

import secrets

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "x-request-id"


def request_id_of(scope: Scope) -> str:
    """The id of a request; a new one where `RequestIds` has given it none."""
    known: str | None = scope.get("state", {}).get("request_id")
    return known or f"req_{secrets.token_hex(12)}"


class RequestIds:
    """Stands before everything else, so that refusals and errors have one too."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        request_id = scope.setdefault("state", {})["request_id"] = request_id_of(scope)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).setdefault(HEADER, request_id)
            await send(message)

        await self._app(scope, receive, send_with_id)
