"""The gateway on a socket: uvicorn in the event loop that the swarm's client lives in."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator

import uvicorn
from starlette.types import ASGIApp

from petal_swarm.errors import ConfigError
from petal_swarm.gateway.guard.connections import Connections

#: For those who were told that it is over to say so to their visitors, and for these to take it.
LAST_WORDS_S = 1.5
POLL_S = 0.05
BACKLOG = 1024


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound to an address of this machine, not listening yet; port 0 is any.

    Raises:
        ConfigError: the address is not one of this machine, or somebody has it already.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        why = (getattr(error, "strerror", None) or str(error)).lower()
        raise ConfigError(f"--host {host} is neither an address nor a known name: {why}") from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        bound.close()
        why = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"cannot listen at {host} port {port}: {why.lower()}; choose another with --port"
        ) from None
    return bound


def url_of(bound: socket.socket) -> str:
    """Where a browser finds what listens there."""
    host, port = bound.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class HttpServer:
    """Serves an application from `start` to `stop`, in the running event loop."""

    def __init__(self, app: ASGIApp, bound: socket.socket, connections: Connections) -> None:
        config = uvicorn.Config(
            app,
            http=connections.protocol,  # type: ignore[arg-type] # called like the class that uvicorn expects
            ws="none",
            lifespan="off",
            loop="none",
            interface="asgi3",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=BACKLOG,
            timeout_keep_alive=connections.keep_alive_s,
            timeout_graceful_shutdown=None,
        )
        self._server = _Server(config)
        self._bound = bound
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Serve from now on."""
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._bound]))
        starting = asyncio.create_task(self._server.listening.wait())
        await asyncio.wait((self._serving, starting), return_when=asyncio.FIRST_COMPLETED)
        starting.cancel()
        if self._serving.done():
            self._serving.result()

    async def stop(self, drain_s: float, *, is_idle: Callable[[], bool], end: Callable[[], None]) -> None:
        """Take no new connections, wait until `is_idle`, `drain_s` at most, `end` what still runs, and close
        all connections. Idempotent. Cancelling skips the waiting.
        """
        serving, self._serving = self._serving, None
        if serving is None:
            return
        self._server.should_exit = True
        try:
            await _until(is_idle, drain_s)
        finally:
            end()
            await _until(is_idle, LAST_WORDS_S)
            for connection in list(self._server.server_state.connections):
                connection.transport.close()  # what watches, and who is slow to read
            await asyncio.wait((serving,), timeout=LAST_WORDS_S)
            self._server.force_exit = True
            for connection in list(self._server.server_state.connections):
                connection.transport.abort()
            await serving


async def _until(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline_s = asyncio.get_running_loop().time() + timeout_s
    # Once in a process's life, as uvicorn does beside it.
    while not condition() and asyncio.get_running_loop().time() < deadline_s:  # noqa: ASYNC110
        await asyncio.sleep(POLL_S)


class _Server(uvicorn.Server):
    """Leaves signals to the program, and tells when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()
