"""Connections that send nothing, too much, or take nothing; on a virtual clock, without sockets."""

from __future__ import annotations

import asyncio
import json
import resource
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from petal_swarm.gateway.guard.config import ConnectionLimits
from petal_swarm.gateway.guard.connections import Connections, GuardedProtocol
from petal_swarm.gateway.refusals import App, Message, Receive, RefusedError, Scope, Send
from petal_swarm.net.memory import VirtualClockLoop

GET = b"GET / HTTP/1.1\r\nHost: here\r\n\r\n"


class Wire(asyncio.Transport):
    """A connection's other side: what was written, and whether it is open.

    While it `is_stuck` it takes nothing; while it `is_full` there is no room for more to be written either.
    """

    def __init__(self, protocol: GuardedProtocol, address: str) -> None:
        super().__init__({"peername": (address, 1), "sockname": ("192.0.2.1", 80)})
        self.protocol = protocol
        self.written = b""
        self.is_open = True
        self.is_stuck = self.is_full = False
        self.is_reading = True
        self._closing = False
        protocol.connection_made(self)

    def write(self, data: Any) -> None:
        self.written += data
        if self.is_full:
            self.protocol.pause_writing()

    def close(self) -> None:
        self._closing = True
        if not self.is_stuck:
            self._lose()

    def abort(self) -> None:
        self._closing = True
        self._lose()

    def is_closing(self) -> bool:
        return self._closing

    def pause_reading(self) -> None:
        self.is_reading = False

    def resume_reading(self) -> None:
        self.is_reading = True

    def receive(self, data: bytes) -> None:
        if not self._closing:
            self.protocol.data_received(data)

    def take(self) -> None:
        self.is_full = False
        self.protocol.resume_writing()

    @property
    def status(self) -> int:
        return int(self.written.split(b" ", 2)[1]) if self.written else 0

    def _lose(self) -> None:
        if self.is_open:
            self.is_open = False
            self.protocol.loop.call_soon(self.protocol.connection_lost, None)


async def hello(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    await send({"type": "http.response.body", "body": b"hello"})


class Host:
    """A server without sockets."""

    def __init__(self, app: App = hello, **limits: Any) -> None:
        self.refused: list[str] = []
        self.connections = Connections(
            ConnectionLimits(**limits), ("10.0.0.1",), lambda error: self.refused.append(error.reason)
        )
        self._config = uvicorn.Config(
            app,  # type: ignore[arg-type]
            ws="none",
            log_config=None,
            access_log=False,
            timeout_keep_alive=self.connections.keep_alive_s,
        )
        self.state = ServerState()

    def connect(self, address: str = "203.0.113.7") -> Wire:
        protocol = self.connections.protocol(
            config=self._config, server_state=self.state, app_state={}, _loop=asyncio.get_running_loop()
        )
        return Wire(protocol, address)


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        runner.run(work())


def error_of(wire: Wire) -> str:
    head, _, body = wire.written.partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    assert int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]) == len(body)
    return str(json.loads(body)["error"]["code"])


def test_who_says_nothing_is_closed_without_a_word() -> None:
    async def check() -> None:
        host = Host()
        wire = host.connect()
        await asyncio.sleep(9)
        assert wire.is_open
        await asyncio.sleep(3)
        assert not wire.is_open
        assert not wire.written
        assert len(host.connections) == 0
        assert not host.state.connections

    run(check)


def test_a_head_that_drips_is_refused() -> None:
    async def check() -> None:
        host = Host()
        wire = host.connect()
        await asyncio.sleep(8)
        for byte in GET[:-2]:
            wire.receive(bytes([byte]))
            await asyncio.sleep(1)
        assert not wire.is_open
        assert (wire.status, error_of(wire)) == (408, "request_timeout")
        assert host.refused == ["slow"]

    run(check)


def test_a_connection_is_kept_for_the_next_request_and_then_closed() -> None:
    async def check() -> None:
        wire = Host().connect()
        for _ in range(3):
            wire.receive(GET)
            await asyncio.sleep(70)
        assert wire.written.count(b"hello") == 3
        await asyncio.sleep(10)
        assert not wire.is_open

    run(check)


def test_a_long_answer_has_no_deadline() -> None:
    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(1000)
        await hello(scope, receive, send)

    async def check() -> None:
        wire = Host(slow).connect()
        wire.receive(GET + GET)  # the second waits for the first
        await asyncio.sleep(1500)
        assert wire.is_open
        await asyncio.sleep(550)
        assert wire.written.count(b"hello") == 2
        assert wire.is_open

    run(check)


def test_connections_of_an_address_are_bounded() -> None:
    async def check() -> None:
        host = Host(max_of_address=3)
        wires = [host.connect("2001:db8::1"), host.connect("2001:db8::2"), host.connect("2001:db8::3")]
        refused = host.connect("2001:db8::4")
        assert (refused.status, error_of(refused)) == (503, "overloaded")
        assert b"retry-after: 5" in refused.written.lower()
        refused.receive(GET)
        await asyncio.sleep(0)
        assert not refused.is_open
        assert all(wire.is_open for wire in (*wires, host.connect("2001:db8:0:1::1")))
        wires[0].abort()
        await asyncio.sleep(0)
        assert host.connect("2001:db8::4").is_open
        assert len(host.connections) == 4
        for address in ("127.0.0.1", "10.0.0.1"):  # this machine, and our proxy
            assert all(host.connect(address).is_open for _ in range(10))

    run(check)


def test_when_all_are_taken_the_longest_idle_one_makes_room() -> None:
    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(1000)

    async def check() -> None:
        host = Host(slow, max_connections=3)
        wires = [host.connect(f"203.0.113.{n}") for n in range(3)]
        wires[0].receive(GET)
        fourth = host.connect("203.0.113.4")
        await asyncio.sleep(0)
        assert [wire.is_open for wire in (*wires, fourth)] == [True, False, True, True]
        for wire in (wires[2], fourth):
            wire.receive(GET)
        fifth = host.connect("203.0.113.5")  # everybody else is being answered
        assert not fifth.is_open
        assert error_of(fifth) == "overloaded"
        assert len(host.connections) == 3

    run(check)


@pytest.mark.parametrize(
    "junk",
    [
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"junk\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET \xff\xfe HTTP/1.1\r\nHost: h\r\nContent-Length: x\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_junk_is_refused_and_not_logged(junk: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async def check() -> None:
        wire = Host().connect()
        wire.receive(junk)
        await asyncio.sleep(0)
        assert not wire.is_open
        assert (wire.status, error_of(wire)) == (400, "bad_request")

    run(check)
    assert not caplog.records


@pytest.mark.parametrize("head", [b"GET /", b"GET / HTTP/1.1\r\nX: ", b"GET / HTTP/1.1\r\nX"])
def test_a_head_without_end_is_refused(head: bytes) -> None:
    async def check() -> None:
        host = Host()
        wire = host.connect()
        wire.receive(head)
        for _ in range(40):
            wire.receive(b"a" * 1000)
        await asyncio.sleep(0)
        assert not wire.is_open
        assert (wire.status, error_of(wire)) == (431, "headers_too_large")

    run(check)


def test_too_many_headers_are_refused_at_once() -> None:
    async def check() -> None:
        wire = Host().connect()
        wire.receive(b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 10_000)
        assert wire.status == 431
        assert len(wire.protocol.headers) == 101

    run(check)


def test_trailers_are_thrown_away() -> None:
    seen: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(await receive())
        seen.append({"headers": len(scope["headers"])})
        await hello(scope, receive, send)

    async def check() -> None:
        wire = Host(app).connect()
        wire.receive(b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n")
        wire.receive(b"t: u\r\n" * 500 + b"\r\n")
        await asyncio.sleep(1)
        assert seen == [{"type": "http.request", "body": b"ab", "more_body": False}, {"headers": 2}]
        assert wire.written.endswith(b"hello")

    run(check)


def test_requests_at_once_on_one_connection_are_bounded() -> None:
    async def check() -> None:
        wire = Host().connect()
        wire.receive(GET * 9)
        await asyncio.sleep(1)
        assert wire.written.count(b"hello") == 9
        wire.receive(GET * 1000)
        await asyncio.sleep(1)
        assert not wire.is_open

    run(check)


def test_what_follows_an_early_answer_is_thrown_away_up_to_a_bound() -> None:
    async def check() -> None:
        host = Host(max_request_bytes=1_000_000)
        wire = host.connect()
        wire.receive(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 900000\r\n\r\n")
        await asyncio.sleep(0.1)  # answered before any of the body came
        assert wire.written.endswith(b"hello")
        wire.receive(b"x" * 900_000)
        wire.receive(GET)
        await asyncio.sleep(0.1)
        assert wire.written.count(b"hello") == 2

        wire.receive(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 9000000\r\n\r\n")
        for _ in range(20):
            wire.receive(b"x" * 100_000)
        assert not wire.is_open

        wire = host.connect()
        wire.receive(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 900000\r\n\r\n")
        for _ in range(15):
            wire.receive(b"x")
            await asyncio.sleep(1)
        assert not wire.is_open  # too slow to be waited for

    run(check)


def test_who_takes_nothing_is_cut_off() -> None:
    ended: list[str] = []

    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not ended:
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
            if scope["app_gone"]():
                ended.append("gone")
            await asyncio.sleep(1)

    async def check() -> None:
        host = Host(endless)
        wire = host.connect()
        wire.receive(GET)
        wire.protocol.scope["app_gone"] = lambda: not wire.is_open  # type: ignore[typeddict-unknown-key]
        await asyncio.sleep(1)
        wire.is_full = True
        await asyncio.sleep(20)
        wire.take()  # slow, but alive
        await asyncio.sleep(5)
        wire.is_full = True
        await asyncio.sleep(28)
        assert wire.is_open
        await asyncio.sleep(5)
        assert not wire.is_open
        assert ended == ["gone"]
        assert len(host.connections) == 0

    run(check)


def test_a_closed_connection_that_takes_nothing_ends_too() -> None:
    async def check() -> None:
        host = Host()
        wire = host.connect()
        wire.receive(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        wire.is_stuck = True
        await asyncio.sleep(20)
        assert wire.is_closing()
        assert wire.is_open
        await asyncio.sleep(15)
        assert not wire.is_open

    run(check)


def test_nothing_is_looked_at_while_nobody_is_connected() -> None:
    async def check() -> None:
        host = Host()
        for _ in range(2):
            wire = host.connect()
            assert host.connections._timer is not None
            wire.abort()
            await asyncio.sleep(2)
            assert host.connections._timer is None

    run(check)


def test_as_many_files_may_be_open_as_connections() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard))
        wanted = Connections(ConnectionLimits(max_connections=500)).raise_file_limit()
        assert wanted == min(500, hard - 256)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(756, hard)
        assert Connections(ConnectionLimits(max_connections=100)).raise_file_limit() == 100
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(756, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_refusals_are_told() -> None:
    refused: list[RefusedError] = []

    async def check() -> None:
        host = Host()
        host.connections.on_refusal = refused.append
        host.connect().receive(b"junk\r\n\r\n")

    run(check)
    assert [error.reason for error in refused] == ["not_http"]
