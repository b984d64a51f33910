"""How long a client still sees a server that was killed, and one that left.

python -m benchmarks.leaving
"""

from __future__ import annotations

import asyncio
import os
import signal
import time

import psutil

from benchmarks.harness import checkpoint, servers, workspace
from petal_swarm.client.config import ClientConfig
from petal_swarm.client.swarm import Swarm
from petal_swarm.models.checkpoint import open_checkpoint

GIVE_UP_S = 60.0


async def seconds_until_gone(swarm: Swarm, model: str, remaining: int) -> float:
    """Ask the directory until it lists only `remaining` servers."""
    started = time.perf_counter()
    while len(await swarm.view.announcements(model)) > remaining:
        if time.perf_counter() - started > GIVE_UP_S:
            raise SystemExit("the server is still listed")
        await asyncio.sleep(0.05)
    return time.perf_counter() - started


async def measure(path: str, address: str, victims: list[int]) -> None:
    model = open_checkpoint(path).model_key
    swarm = await Swarm.connect(ClientConfig(initial_peers=(address,)))
    try:
        await asyncio.sleep(5)  # in the middle of a refresh interval
        for process in (psutil.Process(victims[0]), *psutil.Process(victims[0]).children()):
            process.kill()
        print(f"killed (server and daemon): gone after {await seconds_until_gone(swarm, model, 2):.1f} s")
        os.kill(victims[1], signal.SIGTERM)
        print(f"left (SIGTERM): gone after {await seconds_until_gone(swarm, model, 1):.2f} s")
    finally:
        await swarm.close()


def main() -> None:
    with workspace() as folder:
        path = checkpoint("tiny", folder)
        with servers(path, ["0:4", "4:8", "4:8"], "--threads", "1") as running:
            victims = [server.process.pid for server in running[1:]]
            asyncio.run(measure(str(path), running[0].address, victims))


if __name__ == "__main__":
    main()
