"""A swarm that is as a test says, watched and served as by a gateway: the map cannot tell the difference."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from petal_swarm.client.view import ModelRef
from petal_swarm.client.watch import SwarmWatch
from petal_swarm.errors import PeerUnreachableError
from petal_swarm.gateway.pages import page_routes
from petal_swarm.gateway.swarm_api import swarm_routes
from petal_swarm.span import Span
from petal_swarm.wire.announcement import Announcement
from tests.browser.scripted import POLICY


class ScriptedSwarm:
    """A view of servers that a test adds, silences and removes from its own thread."""

    def __init__(self, num_blocks: int, name: str = "tiny/Chatty-1B-Instruct") -> None:
        self.num_blocks = num_blocks
        self.name = name
        self.peers: dict[str, Announcement] = {}
        self.silent: set[str] = set()
        self.is_reachable = True
        self.listeners: list[Any] = []
        self.witnesses: list[Any] = []

    def add(self, peer_id: str, start: int, end: int, **fields: Any) -> None:
        figures = {"block_time_s": 0.002, "step_time_s": 0.001, "kv_tokens": 8192, "kv_tokens_free": 6000}
        values = {**figures, "name": peer_id, **fields}
        self.peers[peer_id] = Announcement(peer_id=peer_id, model="m", span=Span(start, end), **values)

    async def announcements(self, model: str) -> list[Announcement]:
        if not self.is_reachable:
            raise PeerUnreachableError("nobody answers at /ip4/203.0.113.9/tcp/1")
        return list(self.peers.values())

    async def measure(self, peers: Any) -> dict[str, float]:
        return {peer.peer_id: 0.012 for peer in peers if peer.peer_id not in self.silent}

    def watch(self) -> SwarmWatch:
        """Within the loop that serves it."""
        swarm: Any = SimpleNamespace(view=self, transport=SimpleNamespace(peer_id="gateway"))
        watch = SwarmWatch(swarm, ModelRef("m", self.num_blocks, 64), self.name)
        watch._measure = self.measure  # type: ignore[method-assign]
        return watch


class MapSite:
    """Serves `/swarm` from a thread of its own; a context manager."""

    def __init__(self, swarm: ScriptedSwarm) -> None:
        self.swarm = swarm
        self.port = 0
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._started = threading.Event()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        watch = self.swarm.watch()
        routes = [*swarm_routes(watch), *page_routes(), Route("/", _nothing)]
        config = uvicorn.Config(
            _with_policy(Starlette(routes=routes)),
            port=self.port,
            log_level="critical",
            lifespan="off",
            timeout_graceful_shutdown=0,
        )
        self._server = uvicorn.Server(config)
        serving = asyncio.create_task(self._server.serve())
        while not self._server.started:  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.005)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]
        self._started.set()
        await serving
        await watch.close()

    def start(self) -> None:
        self._started.clear()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._thread.start()
        assert self._started.wait(10)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(setattr, self._server, "should_exit", True)
        self._thread.join(10)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/swarm"

    def __enter__(self) -> MapSite:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread.is_alive():
            self.stop()


async def _nothing(request: Request) -> Response:
    return Response()


def _with_policy(app: ASGIApp) -> ASGIApp:
    async def with_policy(scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", POLICY.encode())
                message = {**message, "headers": [*message["headers"], policy]}
            await send(message)

        await app(scope, receive, sending)

    return with_policy
