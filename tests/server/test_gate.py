"""Places that one holder cannot take from all others."""

from __future__ import annotations

import asyncio

import pytest

from petal_swarm.errors import BusyError
from petal_swarm.net.channel import Channel
from petal_swarm.net.memory import MemoryNetwork, MemoryTransport, VirtualClockLoop
from petal_swarm.net.transport import Stream
from petal_swarm.server.config import SessionLimits
from petal_swarm.server.gate import Shares, StreamGate
from petal_swarm.wire.connection import SESSION_TABLE, Role
from petal_swarm.wire.messages.opening import Opened
from petal_swarm.wire.protocols import SESSION


def taken(shares: Shares, holder: str) -> int:
    count = 0
    while shares.take(holder):
        count += 1
    return count


def test_one_alone_gets_its_limit_and_no_more() -> None:
    assert taken(Shares(100, 30), "a") == 30
    assert taken(Shares(100, 90), "a") == 50, "half of them are for those who come later"


def test_newcomers_always_find_something() -> None:
    shares = Shares(100, 60)
    found = [taken(shares, holder) for holder in "abcd"]
    assert found == [50, 25, 17, 8], "an equal part of half, as long as there are places"
    assert not shares.take("e")
    for _ in range(50):
        shares.give_back("a")
    assert shares.total == 50
    assert shares.take("e")
    shares.give_back("e")
    assert shares.total == 50


def test_places_come_back() -> None:
    shares = Shares(10, 4)
    for _ in range(3):
        assert taken(shares, "a") == 4
        for _ in range(4):
            shares.give_back("a")
    assert shares.total == 0
    assert not shares._held


def test_a_stream_that_is_opened_counts_no_more() -> None:
    gate = StreamGate(SessionLimits(max_opening_of_peer=1))
    with gate.being_opened("a"):
        with pytest.raises(BusyError) as caught, gate.being_opened("a"):
            pass
        assert caught.value.retry_after_s == SessionLimits().open_timeout_s
        with gate.being_opened("b"):
            assert gate.num_opening == 2
    with gate.being_opened("a"):
        pass
    assert gate.num_opening == 0


def test_a_stream_too_many_is_answered_and_ended() -> None:
    async def run() -> None:
        network = MemoryNetwork()
        server, one, other = network.transport(), network.transport(), network.transport()
        gate, leave = StreamGate(SessionLimits(max_streams_of_peer=2)), asyncio.Event()

        async def stay(stream: Stream) -> None:
            await leave.wait()

        await server.serve(SESSION, gate.guarded(SESSION_TABLE, stay))

        async def dial(peer: MemoryTransport) -> Channel:
            stream = await peer.open_stream(server.peer_id, SESSION, timeout_s=5)
            return Channel(stream, SESSION_TABLE, Role.DIALER)

        await dial(one)
        await dial(one)
        third = await dial(one)
        with pytest.raises(BusyError, match="too many streams"):
            await third.expect(Opened, timeout_s=5)
        assert await third.receive() is None
        await dial(other)
        await asyncio.sleep(1)
        assert gate.num_streams == 3
        leave.set()
        await asyncio.sleep(1)
        assert gate.num_streams == 0
        for transport in (one, other, server):
            await transport.close()

    loop = VirtualClockLoop()
    try:
        loop.run_until_complete(run())
    finally:
        loop.close()
