"""Requests to an ASGI application without a server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from petal_swarm.gateway.refusals import App, Message, Receive, Scope, Send


@dataclass
class Answer:
    """What came back; status 0 if nothing did."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def code(self) -> str:
        """Of OpenAI's error object."""
        error = json.loads(self.body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return str(error["code"])


async def ask(
    app: App,
    method: str = "GET",
    path: str = "/",
    *,
    headers: dict[str, str] | None = None,
    parts: Iterable[bytes | float | None] = (b"",),
    client: str = "203.0.113.7",
) -> Answer:
    """The answer to a request; its body comes in `parts`: bytes, pauses (s), None where he leaves."""
    scope: dict[str, Any] = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "scheme": "http",
        "client": (client, 1),
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in (headers or {}).items()],
    }
    coming = list(parts)
    answer = Answer()

    async def receive() -> Message:
        if not coming:  # the visitor listens
            await asyncio.get_running_loop().create_future()
        part = coming.pop(0)
        if part is None:
            return {"type": "http.disconnect"}
        if isinstance(part, float):
            await asyncio.sleep(part)
            return await receive()
        more = any(isinstance(each, bytes) for each in coming)
        return {"type": "http.request", "body": part, "more_body": more}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            assert not answer.status
            answer.status = message["status"]
            answer.headers = {name.decode(): value.decode("latin-1") for name, value in message["headers"]}
        else:
            answer.body += message["body"]

    await app(scope, receive, send)
    return answer


class Echo:
    """Answers with the visitor's name and the length of the body; notes what it was asked."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        message = await receive()
        body = message["body"]
        assert not message["more_body"]
        self.bodies.append(body)
        text = f"{scope['state']['visitor'].name} {len(body)}".encode()
        await send(
            {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]}
        )
        await send({"type": "http.response.body", "body": text})
