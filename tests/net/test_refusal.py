"""The reason arrives before the stream ends, and whoever does not listen is not waited for."""

from __future__ import annotations

import asyncio

import pytest

from petal_swarm.errors import BusyError
from petal_swarm.net.channel import Channel
from petal_swarm.net.memory import MemoryNetwork, VirtualClockLoop
from petal_swarm.net.refusal import LINGER_S, refuse
from petal_swarm.net.transport import Stream
from petal_swarm.wire.connection import DIRECTORY_TABLE, Role
from petal_swarm.wire.messages.directory import Ping, Pong


@pytest.mark.parametrize(("ends_after_s", "refused_after_s"), [(0.5, 0.5), (100, LINGER_S)])
def test_what_comes_is_read_until_the_dialler_ends(ends_after_s: float, refused_after_s: float) -> None:
    async def scenario() -> None:
        network = MemoryNetwork(1)
        server, client = network.transport(), network.transport()
        took_s: list[float] = []
        loop = asyncio.get_running_loop()

        async def handler(stream: Stream) -> None:
            started = loop.time()
            await refuse(stream, BusyError, "not now")
            took_s.append(loop.time() - started)

        await server.serve("/x/1", handler)
        stream = await client.open_stream(server.peer_id, "/x/1", timeout_s=5)
        channel = Channel(stream, DIRECTORY_TABLE, Role.DIALER)
        channel.send(Ping())
        with pytest.raises(BusyError, match="not now"):
            await channel.expect(Pong, timeout_s=1)
        await asyncio.sleep(ends_after_s)
        await channel.close()
        await asyncio.sleep(1)
        assert took_s == [pytest.approx(refused_after_s)]

    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        runner.run(asyncio.wait_for(scenario(), 1000))
