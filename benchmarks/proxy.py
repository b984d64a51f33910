"""TCP links that can be cut, slowed and broken: one listening port in front of each server.

Runs as a process of its own, `python -m benchmarks.proxy`, which takes one JSON object a line on stdin;
`Proxy` starts and commands it. A server behind it is told `--announce` of the port that listens here.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from typing import Any

CHUNK_BYTES = 1 << 16


@dataclass(eq=False)
class Line:
    """What lies in front of one server. `is_whole` and `delay_s` are of all its connections."""

    target: int
    delay_s: float = 0.0
    is_whole: asyncio.Event = field(default_factory=asyncio.Event)
    connections: set[Connection] = field(default_factory=set)


@dataclass(eq=False)
class Connection:
    """One TCP connection; it may be cut alone, which is a cable between two peers."""

    line: Line
    is_whole: asyncio.Event
    writers: tuple[asyncio.StreamWriter, asyncio.StreamWriter]

    async def pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Bytes one way, as late as the line has it, and none while it is cut."""
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK_BYTES):
                if self.line.delay_s:
                    await asyncio.sleep(self.line.delay_s)
                await self.line.is_whole.wait()
                await self.is_whole.wait()
                writer.write(data)
                await writer.drain()
            writer.write_eof()


class Lines:
    """All lines of one swarm. Lives in the proxy's event loop."""

    def __init__(self) -> None:
        self._lines: dict[int, Line] = {}
        self._servers: list[asyncio.Server] = []

    async def add(self, target: int) -> int:
        """The port that leads to `target` on loopback."""
        line = Line(target)
        line.is_whole.set()
        server = await asyncio.start_server(lambda r, w: self._serve(line, r, w), "127.0.0.1", 0)
        self._servers.append(server)
        port: int = server.sockets[0].getsockname()[1]
        self._lines[port] = line
        return port

    async def delay(self, port: int, seconds: float) -> None:
        """From now on everything through this port takes so much longer, each way."""
        self._lines[port].delay_s = seconds

    async def cut(self, port: int, seconds: float) -> None:
        """Nothing goes through this port for a while, and nobody is told."""
        line = self._lines[port]
        line.is_whole.clear()
        asyncio.get_running_loop().call_later(seconds, line.is_whole.set)

    async def cut_one(self, port: int, seconds: float, which: float) -> bool:
        """The same for one connection of that port, which is chosen by a number below 1."""
        connections = list(self._lines[port].connections)
        if not connections:
            return False
        chosen = connections[int(which * len(connections))]
        chosen.is_whole.clear()
        asyncio.get_running_loop().call_later(seconds, chosen.is_whole.set)
        return True

    async def reset(self, port: int) -> None:
        """All connections through this port break."""
        for connection in list(self._lines[port].connections):
            for writer in connection.writers:
                writer.transport.abort()

    async def _serve(self, line: Line, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            onward, back = await asyncio.open_connection("127.0.0.1", line.target)
        except OSError:
            writer.transport.abort()
            return
        with contextlib.suppress(OSError):  # one of them is closed already: the pumps will see
            for each in (writer, back):
                each.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = Connection(line, asyncio.Event(), (writer, back))
        connection.is_whole.set()
        line.connections.add(connection)
        try:
            # A peer that dies takes the whole connection with it, as the kernel would.
            done = [asyncio.create_task(connection.pump(*way)) for way in ((reader, back), (onward, writer))]
            await asyncio.wait(done, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.cancel()
        finally:
            line.connections.discard(connection)
            for each in (writer, back):
                each.transport.abort()


class Proxy:
    """The proxy's process, commanded from any thread."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "benchmarks.proxy"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        self._lock = threading.Lock()

    def do(self, what: str, *arguments: float) -> Any:
        """Call that method of `Lines` there."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        with self._lock:
            stdin.write(json.dumps([what, *arguments]) + "\n")
            stdin.flush()
            return json.loads(stdout.readline())

    def close(self) -> None:
        """End it, and all connections through it."""
        self._process.kill()
        with self._lock, self._process:
            pass


async def _serve_commands() -> None:
    lines = Lines()
    loop = asyncio.get_running_loop()
    while text := await loop.run_in_executor(None, sys.stdin.readline):
        what, *arguments = json.loads(text)
        print(json.dumps(await getattr(lines, what)(*arguments)), flush=True)


if __name__ == "__main__":
    asyncio.run(_serve_commands())
