"""Trains of parts over a network of known speed, and peers that do not play along."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import pytest

from petal_swarm.directory.memory import MemoryDirectory, MemoryRegistry
from petal_swarm.directory.service import DirectoryService
from petal_swarm.directory.upload import MAX_BYTES_PER_S, MAX_UPLOADS, UploadService, measure_upload, shown
from petal_swarm.errors import BadMessageError, BusyError, DeadlineError, NetworkError
from petal_swarm.net.channel import Channel
from petal_swarm.net.memory import Link, MemoryNetwork, MemoryTransport, VirtualClockLoop
from petal_swarm.net.transport import Stream
from petal_swarm.wire.connection import DIRECTORY_TABLE, Role
from petal_swarm.wire.messages import encode
from petal_swarm.wire.messages.directory import Ping, Pong, Upload, Uploaded, UploadPart
from petal_swarm.wire.messages.error import Error
from petal_swarm.wire.protocols import DIRECTORY

T = TypeVar("T")
Scenario = Callable[[MemoryTransport, MemoryTransport], Coroutine[Any, Any, T]]


def play(scenario: Scenario[T], link: Link | None = None) -> T:
    """A client, and a server that times uploads, both on a virtual clock."""

    async def run() -> T:
        network = MemoryNetwork(default=link or Link())
        client, server = network.transport(), network.transport()
        uploads = UploadService(now=asyncio.get_running_loop().time)
        service = DirectoryService(MemoryDirectory(MemoryRegistry()), uploads=uploads)
        await server.serve(DIRECTORY, service.handle)
        try:
            return await scenario(client, server)
        finally:
            await client.close()
            await server.close()

    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        return runner.run(run())


async def measured(client: MemoryTransport, server: MemoryTransport) -> float:
    return await measure_upload(client, server.peer_id, server.addresses())


@pytest.mark.parametrize("bytes_per_s", [12.5e3, 125e3, 1.25e6, 5e6])
@pytest.mark.parametrize("latency_s", [0.0, 0.15])
def test_a_line_is_as_fast_as_it_is(bytes_per_s: float, latency_s: float) -> None:
    """Latency delays all parts alike, and says nothing of the speed."""
    assert play(measured, Link(latency_s=latency_s, bytes_per_s=bytes_per_s)) == pytest.approx(
        bytes_per_s, rel=0.01
    )


def test_what_takes_no_time_has_a_bound() -> None:
    assert play(measured) == MAX_BYTES_PER_S


@pytest.mark.parametrize(("bytes_per_s", "sent_s"), [(125e3, 1.3), (125e6, 0.05)])
def test_a_slow_line_is_not_kept_busy(bytes_per_s: float, sent_s: float) -> None:
    """One short train is enough there; through a fast line all of them go in no time."""

    async def scenario(client: MemoryTransport, server: MemoryTransport) -> float:
        started_s = asyncio.get_running_loop().time()
        await measured(client, server)
        return asyncio.get_running_loop().time() - started_s

    assert play(scenario, Link(bytes_per_s=bytes_per_s)) == pytest.approx(sent_s, rel=0.2)


def test_one_that_is_too_slow_is_given_up() -> None:
    with pytest.raises(DeadlineError, match="did not get through within 30 s"):
        play(measured, Link(bytes_per_s=1e3))


def answering(*took_s: float, after_s: float = 0.0, trains: list[int]) -> Callable[[Stream], Any]:
    """A listener that says so of one train after the other."""

    async def handle(stream: Stream) -> None:
        channel = Channel(stream, DIRECTORY_TABLE, Role.LISTENER)
        assert isinstance(await channel.receive(), Ping)
        channel.send(Pong())
        for said_s in took_s:
            upload = await channel.receive()
            assert isinstance(upload, Upload)
            for _ in range(upload.parts):
                await channel.receive()
            trains.append(upload.parts)
            await asyncio.sleep(after_s)
            channel.send(Uploaded(said_s))
        await channel.receive()

    return handle


@pytest.mark.parametrize(
    ("latency_s", "took_s", "trains"),
    [(0.0, (0.26,), 1), (0.1, (0.4, 0.5, 0.6), 3), (0.1, (0.4, 1.3), 2), (1.0, (2.1,), 1)],
)
def test_a_train_lasts_for_some_round_trips(latency_s: float, took_s: tuple[float, ...], trains: int) -> None:
    """Else what is measured over a far and fast line is how TCP begins."""
    seen: list[int] = []

    async def scenario(client: MemoryTransport, server: MemoryTransport) -> float:
        await server.serve(DIRECTORY, answering(*took_s, after_s=3.0, trains=seen))
        return await measured(client, server)

    parts = (4, 32, 128)[trains - 1]
    assert play(scenario, Link(latency_s=latency_s)) == pytest.approx(parts * (32 << 10) / took_s[-1])
    assert seen == [5, 33, 129][:trains]


def test_one_that_ends_it_between_two_trains_is_heard() -> None:
    """Its error may come together with its answer, before the next train begins."""

    async def leaving(stream: Stream) -> None:
        channel = Channel(stream, DIRECTORY_TABLE, Role.LISTENER)
        await channel.receive()
        channel.send(Pong())
        for _ in range(1 + 5):
            await channel.receive()
        stream.write(*encode(Uploaded(0.0)), *encode(Error("busy", "going home")))
        await channel.receive()

    async def scenario(client: MemoryTransport, server: MemoryTransport) -> None:
        await server.serve(DIRECTORY, leaving)
        with pytest.raises(BusyError, match="going home"):
            await measured(client, server)

    play(scenario)


def test_nobody_makes_a_line_slower_than_it_seems_from_here() -> None:
    async def scenario(client: MemoryTransport, server: MemoryTransport) -> float:
        await server.serve(DIRECTORY, answering(3600.0, after_s=0.5, trains=[]))
        return await measured(client, server)

    assert play(scenario) == pytest.approx(4 * (32 << 10) / 0.5)


def test_the_stream_goes_on_afterwards() -> None:
    async def scenario(client: MemoryTransport, server: MemoryTransport) -> None:
        stream = await client.open_stream(server.peer_id, DIRECTORY, timeout_s=1)
        channel = Channel(stream, DIRECTORY_TABLE, Role.DIALER)
        for message in (Upload(2), UploadPart(), UploadPart()):
            channel.send(message)
        assert (await channel.expect(Uploaded, timeout_s=1)).took_s == 0
        channel.send(Ping())
        await channel.expect(Pong, timeout_s=1)

    play(scenario)


def test_something_else_in_between_breaks_the_protocol() -> None:
    async def scenario(client: MemoryTransport, server: MemoryTransport) -> None:
        stream = await client.open_stream(server.peer_id, DIRECTORY, timeout_s=1)
        channel = Channel(stream, DIRECTORY_TABLE, Role.DIALER)
        channel.send(Upload(3))
        stream.write(*encode(Ping()))
        await channel.expect(Uploaded, timeout_s=1)

    with pytest.raises(BadMessageError, match="'ping' is not allowed"):
        play(scenario)


def test_more_parts_than_were_announced_break_the_protocol(caplog: pytest.LogCaptureFixture) -> None:
    """Even if they come together with the last, before anybody could have answered."""

    async def scenario(client: MemoryTransport, server: MemoryTransport) -> None:
        stream = await client.open_stream(server.peer_id, DIRECTORY, timeout_s=1)
        channel = Channel(stream, DIRECTORY_TABLE, Role.DIALER)
        channel.send(Upload(2))
        stream.write(*[buffer for _ in range(3) for buffer in encode(UploadPart())])
        assert (await channel.expect(Uploaded, timeout_s=1)).took_s == 0
        await channel.expect(Pong, timeout_s=1)

    with pytest.raises(BadMessageError, match="more parts of an upload than it said"):
        play(scenario)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_more_than_a_few_at_once_would_measure_each_other() -> None:
    async def scenario(client: MemoryTransport, server: MemoryTransport) -> None:
        async def upload() -> Channel:
            stream = await client.network.transport().open_stream(server.peer_id, DIRECTORY, timeout_s=1)
            channel = Channel(stream, DIRECTORY_TABLE, Role.DIALER)
            channel.send(Upload(2))
            channel.send(UploadPart())
            return channel

        slow = [await upload() for _ in range(MAX_UPLOADS)]
        with pytest.raises(BusyError, match="others are being measured"):
            await measured(client, server)
        slow[0].send(UploadPart())
        await slow[0].expect(Uploaded, timeout_s=1)
        slow[1].abort()  # a place is free again, however it ended
        await asyncio.sleep(0.01)
        other = client.network.transport()
        assert await asyncio.gather(measured(client, server), measured(other, server))

    play(scenario)


@pytest.mark.parametrize("seen_at", ["", "/ip4/192.0.2.7/tcp/4001"])
def test_nobody_takes_all_places(seen_at: str) -> None:
    """Neither a peer by several streams, nor several peers of one address."""

    async def scenario(client: MemoryTransport, server: MemoryTransport) -> None:
        sibling = client.network.transport() if seen_at else client
        client.seen_at = sibling.seen_at = seen_at
        stream = await client.open_stream(server.peer_id, DIRECTORY, timeout_s=1)
        Channel(stream, DIRECTORY_TABLE, Role.DIALER).send(Upload(2))
        with pytest.raises(BusyError, match="others are being measured"):
            await measured(sibling, server)
        assert await measured(client.network.transport(), server)

    play(scenario)


def test_one_who_stops_in_the_middle_is_not_waited_for() -> None:
    async def scenario(client: MemoryTransport, server: MemoryTransport) -> None:
        stream = await client.open_stream(server.peer_id, DIRECTORY, timeout_s=1)
        channel = Channel(stream, DIRECTORY_TABLE, Role.DIALER)
        channel.send(Upload(2))
        channel.send(UploadPart())
        assert await channel.receive() is None

    play(scenario)


def test_servers_of_another_version_say_nothing() -> None:
    async def older(stream: Stream) -> None:
        await Channel(stream, DIRECTORY_TABLE, Role.LISTENER).receive()
        await stream.close()

    async def scenario(client: MemoryTransport, server: MemoryTransport) -> None:
        await server.serve(DIRECTORY, older)
        with pytest.raises(NetworkError, match="ended the stream"):
            await measured(client, server)

    play(scenario)


@pytest.mark.parametrize(
    ("mbit", "text"),
    [
        (1e-5, "0 Mbit/s"),
        (0.5, "0.5 Mbit/s"),
        (38.26, "38.3 Mbit/s"),
        (940, "940 Mbit/s"),
        (999.7, "1 Gbit/s"),
        (2400, "2.4 Gbit/s"),
        (1e5, "100 Gbit/s"),
        (8e9, "8,000,000 Gbit/s"),
    ],
)
def test_rates_are_shown_in_bits(mbit: float, text: str) -> None:
    assert shown(mbit * 125e3) == text
