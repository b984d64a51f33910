"""Sessions for named peers only."""

from __future__ import annotations

import asyncio
import logging

import pytest

from petal_swarm.errors import ConfigError, NotAllowedError
from petal_swarm.net.channel import Channel
from petal_swarm.net.memory import MemoryNetwork, VirtualClockLoop
from petal_swarm.net.transport import Stream
from petal_swarm.server.allowed import only_for
from petal_swarm.server.config import ServerConfig
from petal_swarm.wire.connection import DIRECTORY_TABLE, Role
from petal_swarm.wire.messages.directory import Ping, Pong


async def _answer(stream: Stream) -> None:
    channel = Channel(stream, DIRECTORY_TABLE, Role.LISTENER)
    while await channel.receive() is not None:
        channel.send(Pong())


def test_others_read_what_to_ask_for(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        network = MemoryNetwork(1)
        server, friend, stranger = (network.transport() for _ in range(3))
        await server.serve("/x/1", only_for([friend.peer_id], _answer))
        for peer in (friend, stranger, stranger):
            channel = Channel(
                await peer.open_stream(server.peer_id, "/x/1", timeout_s=5), DIRECTORY_TABLE, Role.DIALER
            )
            channel.send(Ping())
            if peer is friend:
                assert await channel.expect(Pong, timeout_s=5) == Pong()
            else:
                with pytest.raises(NotAllowedError, match=f"--allow-peer {stranger.peer_id}"):
                    await channel.expect(Pong, timeout_s=5)
            await channel.close()
        [warning] = [record for record in caplog.records if record.levelno == logging.WARNING]
        assert stranger.peer_id in warning.getMessage()

    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        runner.run(asyncio.wait_for(scenario(), 100))


@pytest.mark.parametrize("peer_id", ["", "me", "/ip4/127.0.0.1/tcp/1", "12D3Koo" + "0" * 45])
def test_what_is_no_peer_id_is_refused_at_the_start(peer_id: str) -> None:
    with pytest.raises(ConfigError, match="--allow-peer takes a peer id"):
        ServerConfig(model="m", new_swarm=True, allow_peers=(peer_id,))
