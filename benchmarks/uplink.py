"""How well servers measure their line, through a proxy that makes it as slow and as far as is said.

    python -m benchmarks.uplink [--lines 5,50 20,20 100,5 100,80]

Two servers of the tiny model over p2pd; all between them goes through the proxy, both ways. A line is its
rate in Mbit/s and its delay one way in ms.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from benchmarks.harness import STOP_TIMEOUT_S, checkpoint, start_server, workspace

CHUNK_BYTES = 16 << 10
#: What a line takes before whoever sends has to wait: a router's buffer.
BUFFERED_S = 0.05
MEASURED_WITHIN_S = 60.0


class Line:
    """One TCP port that leads to another, at so many bytes a second each way, `delay_s` late."""

    def __init__(self, target: int, bytes_per_s: float, delay_s: float) -> None:
        self._target = target
        self._bytes_per_s = bytes_per_s
        self._delay_s = delay_s
        self.port = free_port()
        threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True).start()

    async def _run(self) -> None:
        server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        await server.serve_forever()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward, back = await asyncio.open_connection("127.0.0.1", self._target)
        await asyncio.gather(self._pump(reader, back), self._pump(onward, writer))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        on_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def deliver() -> None:
            while True:
                due_s, data = await on_way.get()
                await asyncio.sleep(max(0.0, due_s - loop.time()))
                if not data:
                    writer.close()
                    return
                writer.write(data)

        delivery = asyncio.create_task(deliver())
        free_s = loop.time()
        data = b"begin"
        while data:
            data = await reader.read(CHUNK_BYTES)
            free_s = max(free_s, loop.time()) + len(data) / self._bytes_per_s
            on_way.put_nowait((free_s + self._delay_s, data))
            await asyncio.sleep(max(0.0, free_s - loop.time() - BUFFERED_S))
        await delivery


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def announced(model: Path, address: str) -> list[float]:
    """What the servers say of their lines, in Mbit/s."""
    command = [
        sys.executable,
        "-m",
        "petal_swarm.cli.status",
        str(model),
        "--json",
        "--initial-peers",
        address,
    ]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return [peer["bandwidth_bytes_per_s"] / 125e3 for peer in json.loads(found.stdout)["peers"]]


def measure(model: Path, mbit: float, delay_ms: float) -> list[float]:
    port = free_port()
    line = Line(port, mbit * 125e3, delay_ms / 1e3)
    options = ("--threads", "1", "--kv-tokens", "4096")
    behind = start_server(
        model, "0:4", [], *options, "--announce", f"/ip4/127.0.0.1/tcp/{line.port}", port=port
    )
    address = behind.address.replace(f"/{port}/", f"/{line.port}/")
    running = [behind, start_server(model, "4:8", [address], *options)]
    try:
        deadline = time.monotonic() + MEASURED_WITHIN_S
        while True:
            rates = announced(model, running[1].address)
            if (len(rates) == 2 and all(rates)) or time.monotonic() > deadline:
                return rates
            time.sleep(1.0)
    finally:
        for server in running:
            server.process.send_signal(signal.SIGTERM)
        for server in running:
            server.process.wait(STOP_TIMEOUT_S)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--lines", nargs="+", default=["5,50", "20,20", "100,5", "100,80"], metavar="MBIT,MS")
    arguments = parser.parse_args()
    with workspace() as folder:
        path = checkpoint("tiny", folder)
        for line in arguments.lines:
            mbit, delay_ms = map(float, line.split(","))
            rates = ", ".join(f"{rate:.3g}" for rate in measure(path, mbit, delay_ms))
            print(f"{mbit:g} Mbit/s, {delay_ms:g} ms one way: announced {rates} Mbit/s", flush=True)


if __name__ == "__main__":
    main()
