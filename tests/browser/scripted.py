"""A gateway that says what a test tells it to, and when: the page cannot tell the difference."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from petal_swarm.gateway.pages import page_routes

#: What the gateway's guard sends with pages; in a test's console every offence against it is an error.
POLICY = "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'; object-src 'none'"
MODEL = {
    "id": "tiny/Chatty-1B-Instruct",
    "has_chat_template": True,
    "context_tokens": 2048,
    "is_adapter": False,
}
CUT = object()  # the connection ends here, without a word


def text(content: str) -> dict[str, Any]:
    """A chunk of a chat's answer."""
    return {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": content}}]}


def plain_text(content: str) -> dict[str, Any]:
    """A chunk of a completion."""
    return {"object": "text_completion", "choices": [{"index": 0, "text": content}]}


def finish(reason: str = "stop") -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]}


def swarm(state: str, **fields: Any) -> dict[str, Any]:
    return {"choices": [], "swarm": {"state": state, **fields}}


def answering(*names: str, repairs: int = 0, **fields: Any) -> dict[str, Any]:
    """The swarm's part of a chunk while these servers, four blocks each, answer."""
    route = [
        {
            "peer_id": f"12D3Koo{name}",
            "name": name,
            "blocks": [4 * i, 4 * i + 4],
            "step_ms": 1.2 + i,
            "total_ms": 90 + 7 * i,
        }
        for i, name in enumerate(names)
    ]
    figures = {"tokens_per_s": 24.3, "first_token_s": 0.18, "prompt_tokens": 31, "new_tokens": 57}
    return swarm("answering", route=route, repairs=repairs, **{**figures, **fields})


class Refusal:
    """An answer that is an error from the start."""

    def __init__(self, status: int, error: dict[str, Any], **headers: str) -> None:
        self.response = JSONResponse(
            {"error": error}, status, {name.replace("_", "-"): v for name, v in headers.items()}
        )


class Answer:
    """A stream that a test feeds: `send` chunks, then `end`."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._chunks: asyncio.Queue[Any] = asyncio.Queue()
        self.left = threading.Event()

    def send(self, *chunks: Any) -> Answer:
        for chunk in chunks:
            self._loop.call_soon_threadsafe(self._chunks.put_nowait, chunk)
        return self

    def end(self) -> None:
        self.send("[DONE]")

    async def stream(self) -> AsyncIterator[str]:
        try:
            while (chunk := await self._chunks.get()) is not CUT:
                yield f"data: {chunk if chunk == '[DONE]' else json.dumps(chunk)}\n\n"
                if chunk == "[DONE]":
                    return
        finally:
            self.left.set()


class ScriptedGateway:
    """Serves in a thread of its own until `close`. `plan` what the next requests get; `requests` has them."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.models = [MODEL]
        self.trouble: str | None = None
        self.about: dict[str, Any] = {}
        self._plans: deque[Answer | Refusal] = deque()
        routes = [
            Route("/api/gateway", self._gateway),
            Route("/health", self._health),
            Route("/v1/chat/completions", self._complete, methods=["POST"]),
            Route("/v1/completions", self._complete, methods=["POST"]),
            *page_routes(),
        ]
        app = Starlette(routes=routes, middleware=[Middleware(_Policy)])
        listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        self._loop = asyncio.new_event_loop()
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=0))
        self._thread = threading.Thread(target=self._run, args=(listening,))
        self._thread.start()

    def plan(self, *chunks: Any) -> Answer:
        """The next request gets these chunks, and what is sent to the answer later."""
        answer = Answer(self._loop)
        self._plans.append(answer)
        return answer.send(*chunks)

    def plan_whole(self, content: str, *before: Any) -> None:
        """The next request gets this as its whole answer."""
        self.plan(*before, text(content), finish()).end()

    def refuse(self, status: int, error: dict[str, Any], **headers: str) -> None:
        self._plans.append(Refusal(status, error, **headers))

    def forget(self) -> None:
        """Between tests."""
        self.requests.clear()
        self.keys.clear()
        self._plans.clear()
        self.models, self.trouble, self.about = [MODEL], None, {}

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join()

    def _run(self, listening: socket.socket) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._server.serve([listening]))

    async def _gateway(self, request: Request) -> Response:
        return JSONResponse(
            {
                "models": self.models,
                "limits": {"max_tokens": 1024},
                "needs_key": False,
                "takes_keys": False,
                "version": "0",
                **self.about,
            }
        )

    async def _health(self, request: Request) -> Response:
        if self.trouble is None:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "unavailable", "reason": self.trouble}, 503)

    async def _complete(self, request: Request) -> Response:
        self.requests.append({"path": request.url.path, **await request.json()})
        self.keys.append(request.headers.get("authorization"))
        plan = self._plans.popleft()
        if isinstance(plan, Refusal):
            return plan.response
        return StreamingResponse(plan.stream(), media_type="text/event-stream")


class _Policy:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += [
                    (b"content-security-policy", POLICY.encode()),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        await self._app(scope, receive, with_policy)
