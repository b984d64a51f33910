"""Sockets to listen at, and the life of the HTTP server in an event loop."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import httpx
import pytest

from petal_swarm.errors import ConfigError
from petal_swarm.gateway.app import make_app
from petal_swarm.gateway.config import GatewayConfig
from petal_swarm.gateway.gateway import Gateway
from petal_swarm.gateway.guard.config import ConnectionLimits
from petal_swarm.gateway.guard.connections import Connections
from petal_swarm.gateway.line import Line
from petal_swarm.gateway.serving import HttpServer, listen, url_of
from tests.gateway.scripted import ScriptedSource

ASKED: dict[str, Any] = {"model": "org/tiny", "prompt": "once", "stream": True}


def test_an_address_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen at 127.0.0.1 port {port}: address already in"):
            listen("127.0.0.1", port)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1", "a" * 300])
def test_an_address_of_somebody_else(host: str) -> None:
    with pytest.raises(ConfigError, match=host[:50]):
        listen(host, 0)


def test_where_a_browser_finds_it() -> None:
    with listen("0.0.0.0", 0) as bound:
        assert url_of(bound) == f"http://127.0.0.1:{bound.getsockname()[1]}"


class Served:
    """A gateway with a scripted source on a socket."""

    def __init__(self, source: ScriptedSource) -> None:
        self.gateway = Gateway(source, GatewayConfig(model_name="org/tiny"), line=Line(room=8, max_waiting=8))
        bound = listen("127.0.0.1", 0)
        self.url = url_of(bound)
        self.server = HttpServer(make_app(self.gateway), bound, Connections(ConnectionLimits()))

    async def __aenter__(self) -> Served:
        await self.server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop(0)

    async def stop(self, drain_s: float) -> None:
        await self.server.stop(drain_s, is_idle=self.gateway.is_idle, end=self.gateway.end)


def test_answers_that_run_may_end_and_nobody_else_comes_in() -> None:
    async def scenario() -> None:
        rest = asyncio.Event()
        async with (
            Served(ScriptedSource(("Hello", rest, "!"))) as served,
            httpx.AsyncClient(base_url=served.url) as client,
            client.stream("POST", "/v1/completions", json=ASKED) as answer,
        ):
            parts = answer.aiter_text()
            assert "Hello" in await anext(parts)
            stopping = asyncio.create_task(served.stop(60))
            while True:
                try:
                    await client.get("/health")
                except httpx.TransportError:
                    break
            assert not stopping.done()
            rest.set()
            assert "[DONE]" in "".join([part async for part in parts])
            await stopping

    asyncio.run(scenario())


def test_answers_that_take_too_long_are_told_so() -> None:
    async def scenario() -> None:
        source = ScriptedSource(("Hello", asyncio.Event()))
        async with (
            Served(source) as served,
            httpx.AsyncClient(base_url=served.url) as client,
            client.stream("POST", "/v1/completions", json=ASKED) as answer,
        ):
            parts = answer.aiter_text()
            await anext(parts)
            await served.stop(0)
            assert '"code": "shutting_down"' in "".join([part async for part in parts])
            assert source.started[0].closed == 1

    asyncio.run(scenario())


def test_who_hangs_up_is_noticed() -> None:
    async def scenario() -> None:
        source = ScriptedSource(("Hello", asyncio.Event()))
        async with Served(source) as served:
            async with (
                httpx.AsyncClient(base_url=served.url) as client,
                client.stream("POST", "/v1/completions", json=ASKED) as answer,
            ):
                await anext(answer.aiter_text())
                assert served.gateway.num_running == 1
            await source.started[0].over.wait()
            assert source.started[0].closed == 1

    asyncio.run(scenario())
