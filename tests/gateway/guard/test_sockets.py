"""The guard on a real socket: crowds of connections that say nothing, or nonsense, beside one that asks."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest

from petal_swarm.gateway.guard import ConnectionLimits, Guard, GuardConfig
from petal_swarm.gateway.refusals import Receive, Scope, Send
from petal_swarm.gateway.serving import HttpServer, listen, url_of
from tests.gateway.guard.asking import Echo

V1 = "/v1/completions"


class Site:
    """A guarded `Echo` on loopback."""

    def __init__(self, echo: Echo | None = None, **limits: Any) -> None:
        self.echo = echo or Echo()
        self.guard = Guard(GuardConfig(connections=ConnectionLimits(**limits)))
        self._bound = listen("127.0.0.1", 0)
        self.url = url_of(self._bound)
        self._server = HttpServer(self.guard.wrap(self.echo), self._bound, self.guard.connections)
        self._streams = AsyncExitStack()

    async def __aenter__(self) -> Site:
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._streams.aclose()
        await self._server.stop(5.0, is_idle=lambda: True, end=lambda: None)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection that is closed at the end."""
        reader, writer = await asyncio.open_connection(*self._bound.getsockname())
        self._streams.callback(writer.close)
        return reader, writer

    async def say(self, data: bytes) -> bytes:
        """What is answered until the connection ends."""
        reader, writer = await self.connect()
        writer.write(data)
        try:
            return await reader.read()
        except ConnectionError:  # it was closed while some of this was on its way
            return b""


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await work()

    asyncio.run(main())


def test_idle_connections_make_room_for_one_that_asks() -> None:
    async def check() -> None:
        async with Site(max_connections=100) as site:
            idle = [await site.connect() for _ in range(400)]
            async with httpx.AsyncClient(base_url=site.url) as client:
                answer = await client.post(V1, content=b"hello")
                assert answer.text == "127.0.0.1 5"
                assert len(site.guard.connections) <= 100
                begun = [await site.connect() for _ in range(200)]
                for _, writer in begun:
                    writer.write(b"GET / HTTP/1.1\r\nHost: ")
                assert (await client.post(V1, content=b"again")).status_code == 200
            assert len(site.guard.connections) <= 100
            assert idle[0][0].at_eof() or not await idle[0][0].read()

    run(check)


def test_a_large_body_is_answered_not_cut_off() -> None:
    """The refusal would be lost if the connection were closed while the visitor still sends."""

    async def parts() -> Any:
        for _ in range(100):
            yield b"x" * 100_000

    async def check() -> None:
        async with Site() as site, httpx.AsyncClient(base_url=site.url) as client:
            for content in (b"x" * 10_000_000, parts()):
                answer = await client.post(V1, content=content)
                assert answer.status_code == 413
                assert answer.json()["error"]["code"] == "request_too_large"
            assert (await client.post(V1, content=b"hello")).text == "127.0.0.1 5"
            assert site.echo.bodies == [b"hello"]

    run(check)


def test_junk_on_the_wire_does_no_harm() -> None:
    async def check() -> None:
        async with Site() as site:
            for junk in (b"\x16\x03\x01\x02\x00\x01\x00", b"junk\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"):
                head, _, body = (await site.say(junk)).partition(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 400 ")
                assert json.loads(body)["error"]["code"] == "bad_request"
            await site.say(b"GET / HTTP/1.1\r\n" + b"x" * 1_000_000)
            await site.say(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n" * 1000)
            async with httpx.AsyncClient(base_url=site.url) as client:
                assert (await client.post(V1, content=b"hello")).status_code == 200
        assert len(site.guard.connections) == 0

    run(check)


class Patient(Echo):
    """Answers nothing, and notes who leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = asyncio.Event()
        self.left = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        self.asked.set()
        assert (await receive())["type"] == "http.disconnect"
        self.left.set()


@pytest.mark.parametrize("at_once", [True, False])
def test_who_leaves_is_missed_whatever_else_he_has_sent(at_once: bool) -> None:
    async def check() -> None:
        patient = Patient()
        async with Site(patient) as site:
            request = b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\nhi"
            _, writer = await site.connect()
            writer.write(request * (2 if at_once else 1))
            await patient.asked.wait()
            if not at_once:
                writer.write(request)
                await writer.drain()
            writer.close()
            await patient.left.wait()

    run(check)
