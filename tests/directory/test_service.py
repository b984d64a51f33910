"""The answering side of the `directory` protocol, over a pair of streams without a network."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from petal_swarm.directory.memory import MemoryDirectory, MemoryRegistry
from petal_swarm.directory.records import read_record, sign_record
from petal_swarm.directory.service import MAX_LOOKUPS_OF_PEER, DirectoryService
from petal_swarm.errors import BadMessageError, BusyError, NetworkError, RemoteError, StreamClosedError
from petal_swarm.net.channel import Channel
from petal_swarm.net.identity import Identity
from petal_swarm.wire.connection import DIRECTORY_TABLE, SESSION_TABLE, Role
from petal_swarm.wire.messages import encode
from petal_swarm.wire.messages.directory import MAX_ANNOUNCEMENTS, Listing, ListRequest, Ping, Pong
from petal_swarm.wire.messages.opening import PushOpen

from .samples import MODEL, START_S, Clock, PairedStream, announcement, stream_pair

ALICE = Identity.generate()


class Directory(MemoryDirectory):
    """Records as the test says."""

    answer: list[bytes] | Exception | None = None

    async def records(self, model: str) -> list[bytes]:
        if isinstance(self.answer, Exception):
            raise self.answer
        return await super().records(model) if self.answer is None else self.answer


def serve(
    scenario: Callable[[Channel, PairedStream], Coroutine[Any, Any, None]],
    *,
    answer: list[bytes] | Exception | None = None,
    idle_timeout_s: float = 5.0,
) -> None:
    """Play a dialer's part; the handler must have returned, and closed the stream, soon after."""

    async def run() -> None:
        directory = Directory(MemoryRegistry(now=Clock()), identity=ALICE)
        await directory.announce(announcement(ALICE), ttl_s=12)
        directory.answer = answer
        service = DirectoryService(directory, idle_timeout_s=idle_timeout_s)
        dialer, listener = stream_pair()
        handler = asyncio.create_task(service.handle(listener))
        async with asyncio.timeout(5):
            await scenario(Channel(dialer, DIRECTORY_TABLE, Role.DIALER), dialer)
            dialer.abort()
            await handler
        assert listener.closed

    asyncio.run(run())


def test_several_requests_on_one_stream() -> None:
    async def scenario(channel: Channel, _: PairedStream) -> None:
        for _ in range(3):
            channel.send(Ping())
            await channel.expect(Pong, timeout_s=1)
            channel.send(ListRequest(MODEL))
            listing = await channel.expect(Listing, timeout_s=1)
            [record] = listing.records
            assert read_record(record, now=START_S)[0] == announcement(ALICE)
            channel.send(ListRequest("unknown"))
            assert (await channel.expect(Listing, timeout_s=1)).records == ()

    serve(scenario)


def test_a_listing_is_bounded() -> None:
    record = sign_record(announcement(ALICE), ALICE, expires_at=START_S + 12)

    async def scenario(channel: Channel, _: PairedStream) -> None:
        channel.send(ListRequest(MODEL))
        assert len((await channel.expect(Listing, timeout_s=1)).records) == MAX_ANNOUNCEMENTS

    serve(scenario, answer=[record] * (MAX_ANNOUNCEMENTS + 1))


@pytest.mark.parametrize(
    ("failure", "kind"), [(NetworkError("nobody there"), RemoteError), (TimeoutError(), BusyError)]
)
def test_a_failing_directory_is_an_answer_and_ends_the_stream(
    failure: Exception, kind: type[RemoteError]
) -> None:
    async def scenario(channel: Channel, _: PairedStream) -> None:
        channel.send(ListRequest(MODEL))
        with pytest.raises(kind):
            await channel.expect(Listing, timeout_s=1)
        assert await channel.receive() is None

    serve(scenario, answer=failure)


@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 64,
        b"\x00\x00\x00\x01\x00\x00\x00\x00\xc1",
        b"".join(map(bytes, encode(PushOpen(b"\x00" * 16, 0)))),
        b"".join(map(bytes, encode(Pong()))),
    ],
)
def test_what_the_protocol_does_not_allow_is_answered_by_an_error(data: bytes) -> None:
    async def scenario(_: Channel, stream: PairedStream) -> None:
        stream.write(data)
        # A table in which a listener may send an error first, whatever was asked.
        answers = Channel(stream, SESSION_TABLE, Role.DIALER)
        with pytest.raises(BadMessageError):
            await answers.expect(Listing, timeout_s=1)
        assert await answers.receive() is None

    serve(scenario)


def test_a_stream_that_ends_inside_a_frame_is_survived() -> None:
    async def scenario(_: Channel, stream: PairedStream) -> None:
        stream.write(b"\x00\x00")

    serve(scenario)


def test_an_idle_stream_is_ended() -> None:
    async def scenario(channel: Channel, _: PairedStream) -> None:
        with pytest.raises(StreamClosedError):
            await channel.expect(Pong, timeout_s=2)

    serve(scenario, idle_timeout_s=0.01)


def test_one_peer_does_not_take_all_lookups() -> None:
    async def run() -> None:
        asked, all_ask, answering = 0, asyncio.Event(), asyncio.Event()

        class Slow(MemoryDirectory):
            async def records(self, model: str) -> list[bytes]:
                nonlocal asked
                asked += 1
                if asked > MAX_LOOKUPS_OF_PEER:
                    all_ask.set()
                await answering.wait()
                return []

        service = DirectoryService(Slow(MemoryRegistry(now=Clock())))
        channels, handlers = [], []

        def dial(peer_id: str) -> Channel:
            dialer, listener = stream_pair()
            listener.peer_id = peer_id
            handlers.append(asyncio.create_task(service.handle(listener)))
            channels.append(Channel(dialer, DIRECTORY_TABLE, Role.DIALER))
            channels[-1].send(ListRequest(MODEL))
            return channels[-1]

        greedy = [dial("greedy") for _ in range(MAX_LOOKUPS_OF_PEER)]
        with pytest.raises(BusyError, match="wait for the answers") as caught:
            await dial("greedy").expect(Listing, timeout_s=5)
        assert caught.value.retry_after_s
        modest = dial("modest")
        await asyncio.wait_for(all_ask.wait(), 5)
        answering.set()
        for channel in (*greedy, modest, dial("greedy")):
            await channel.expect(Listing, timeout_s=5)
        for channel in channels:
            channel.abort()
        await asyncio.gather(*handlers)
        assert service._asking == {}

    asyncio.run(run())
