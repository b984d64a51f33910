"""Streams between members of a private swarm, and what everybody else gets."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest

from petal_swarm.errors import (
    BadMessageError,
    PrivateSwarmError,
    RemoteProtocolError,
    StrangerError,
    StreamClosedError,
)
from petal_swarm.net import private
from petal_swarm.net.channel import Channel
from petal_swarm.net.memory import Link, MemoryNetwork, MemoryTransport, VirtualClockLoop
from petal_swarm.net.private import PrivateStream, PrivateTransport
from petal_swarm.net.swarm_key import Side, SwarmKey
from petal_swarm.net.transport import Stream, Transport
from petal_swarm.wire.connection import DIRECTORY_TABLE, Role
from petal_swarm.wire.messages import encode
from petal_swarm.wire.messages.directory import ListRequest, Ping, Pong
from petal_swarm.wire.messages.error import Error
from petal_swarm.wire.proof import HEAD, member_frame

KEY, OTHER_KEY = SwarmKey(b"k" * 32), SwarmKey(b"o" * 32)
X = "/x/1"


class Room:
    """Peers of one memory network, one of which listens and keeps what its handler was given."""

    def __init__(self, listener_key: SwarmKey | None) -> None:
        self.network = MemoryNetwork(3, Link(latency_s=0.01))
        self.loop = asyncio.get_running_loop()
        self.handled: list[Stream] = []
        self.listener = self.peer(listener_key)

    def peer(self, key: SwarmKey | None) -> Transport:
        transport = self.network.transport()
        return PrivateTransport(transport, key) if key else transport

    async def serve(self, handler: Callable[[Stream], Awaitable[None]]) -> None:
        async def noting(stream: Stream) -> None:
            self.handled.append(stream)
            await handler(stream)

        await self.listener.serve(X, noting)

    async def dial(self, dialer: Transport) -> Stream:
        return await dialer.open_stream(self.listener.peer_id, X, timeout_s=5)


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        runner.run(asyncio.wait_for(scenario(), 1000))


async def echo(stream: Stream) -> None:
    while data := await stream.read():
        stream.write(data)


async def answer_pings(stream: Stream) -> None:
    channel = Channel(stream, DIRECTORY_TABLE, Role.LISTENER)
    try:
        while await channel.receive() is not None:
            channel.send(Pong())
    except RemoteProtocolError as error:
        channel.send(Error(BadMessageError.code, str(error)))


async def ping(stream: Stream, timeout_s: float = 1.0) -> None:
    channel = Channel(stream, DIRECTORY_TABLE, Role.DIALER)
    channel.send(Ping())
    assert await channel.expect(Pong, timeout_s=timeout_s) == Pong()


def test_members_hear_each_other_without_a_further_round_trip() -> None:
    async def scenario() -> None:
        room = Room(KEY)
        await room.serve(echo)
        member = room.peer(KEY)
        stream = await room.dial(member)
        sent_at = room.loop.time()
        stream.write(b"ab", b"c")
        assert await stream.read() == b"abc"
        assert room.loop.time() - sent_at == pytest.approx(0.02)
        assert (stream.peer_id, room.handled[0].peer_id) == (room.listener.peer_id, member.peer_id)
        stream.write(b"more")
        assert await stream.read() == b"more"
        await stream.close()

    run(scenario)


def test_members_subscribe() -> None:
    """Before the proof has come, and after; with bytes that came along with it, and without."""

    async def scenario() -> None:
        room = Room(KEY)

        async def subscriber(stream: Stream) -> None:
            ended = asyncio.Event()
            stream.subscribe(lambda data: stream.write(data) if data else ended.set())
            await ended.wait()

        await room.serve(subscriber)
        for reads_first in (False, True):
            stream = await room.dial(room.peer(KEY))
            got: list[bytes] = []
            stream.write(b"one")
            if reads_first:
                got.append(await stream.read())
            stream.subscribe(got.append)
            await asyncio.sleep(1)
            stream.write(b"two")
            await asyncio.sleep(1)
            stream.pause()
            stream.write(b"three")
            await asyncio.sleep(1)
            assert got == [b"one", b"two"]
            stream.resume()
            await asyncio.sleep(1)
            await stream.close()
            await asyncio.sleep(1)
            assert got == [b"one", b"two", b"three", b""]

    run(scenario)


def test_what_came_along_with_the_proof_is_not_lost() -> None:
    async def scenario() -> None:
        room = Room(KEY)
        got: list[bytes] = []

        async def subscriber(stream: Stream) -> None:
            stream.subscribe(got.append)
            await asyncio.sleep(1)

        await room.serve(subscriber)
        member = room.network.transport()
        stream = await member.open_stream(room.listener.peer_id, X, timeout_s=5)
        stream.write(member_frame(KEY.proof(Side.DIALER, X, member.peer_id, room.listener.peer_id)), b"one")
        stream.write(b"two")
        await asyncio.sleep(0.5)
        assert got == [b"one", b"two"]

    run(scenario)


def test_no_memory_is_taken_for_a_payload_that_a_stranger_announces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private, "FrameDecoder", None)
    head = b"".join(map(bytes, encode(Ping())))
    assert private._told(head[:4] + b"\x04\0\0\0" + head[8:]) == private.IN_OPEN_SWARM


@pytest.mark.parametrize("key", [None, OTHER_KEY])
def test_a_stranger_is_told_so_and_never_reaches_the_handler(
    key: SwarmKey | None, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        room = Room(KEY)
        await room.serve(answer_pings)
        stranger = room.peer(key)
        expected = (
            pytest.raises(StrangerError, match="another key")
            if key
            else pytest.raises(PrivateSwarmError, match=r"this swarm is private.*--swarm-key FILE")
        )
        started = room.loop.time()
        for _ in range(3):
            with expected:
                await ping(await room.dial(stranger))
        assert room.loop.time() - started < 1
        assert room.handled == []
        [warning] = [record for record in caplog.records if record.levelno == logging.WARNING]
        assert warning.getMessage() == (
            f"refused peer {stranger.peer_id}: it has {'another' if key else 'no'} swarm key"
        )

    run(scenario)


def test_an_open_listener_is_not_believed() -> None:
    async def scenario() -> None:
        room = Room(None)
        await room.serve(answer_pings)
        with pytest.raises(StrangerError, match=r"is in no private swarm: leave out --swarm-key"):
            await ping(await room.dial(room.peer(KEY)))

    run(scenario)


def test_a_liar_is_not_believed_however_it_answers() -> None:
    """Also with the dialler's own proof sent back, and with its own proof of another stream."""

    async def scenario() -> None:
        room = Room(None)
        member = room.peer(KEY)
        ends = (X, member.peer_id, room.listener.peer_id)
        lies = [
            b"".join(map(bytes, encode(Pong()))),
            member_frame(KEY.proof(Side.DIALER, *ends)),
            member_frame(KEY.proof(Side.LISTENER, "/x/2", *ends[1:])),
            member_frame(OTHER_KEY.proof(Side.LISTENER, *ends)),
            b"\0\0\0\x05\xff\xff\xff\xff" + b"x" * 80,
        ]
        for lie in lies:

            async def answer(stream: Stream, lie: bytes = lie) -> None:
                stream.write(lie)
                await stream.read()

            await room.listener.serve(X, answer)
            stream = await room.dial(member)
            for _ in range(2):
                with pytest.raises(StrangerError):
                    await stream.read()
            with pytest.raises(StreamClosedError):
                await stream.drain()
            subscribed: list[bytes] = []
            (await room.dial(member)).subscribe(subscribed.append)
            await asyncio.sleep(1)
            assert subscribed == [b""]

    run(scenario)


def test_a_proof_that_was_seen_is_no_use_to_others() -> None:
    """Mallory listens, a member dials her: what it sends gets her into no other member."""

    async def scenario() -> None:
        room = Room(KEY)
        await room.serve(answer_pings)
        seen: list[bytes] = []
        mallory = room.peer(None)

        async def note(stream: Stream) -> None:
            seen.append(await stream.read())

        await mallory.serve(X, note)
        stream = await room.peer(KEY).open_stream(mallory.peer_id, X, timeout_s=5)
        await asyncio.sleep(1)
        await stream.close()
        replayed = await room.dial(mallory)
        replayed.write(seen[0], *encode(Ping()))
        await asyncio.sleep(1)
        assert room.handled == []
        assert seen[0].startswith(HEAD)

    run(scenario)


def test_every_split_of_the_first_bytes() -> None:
    async def scenario() -> None:
        room = Room(KEY)
        await room.serve(answer_pings)
        member = room.network.transport()
        proof = member_frame(KEY.proof(Side.DIALER, X, member.peer_id, room.listener.peer_id))
        whole = proof + b"".join(map(bytes, encode(Ping())))
        for cut in range(len(whole) + 1):
            stream = await member.open_stream(room.listener.peer_id, X, timeout_s=5)
            stream.write(whole[:cut])
            await asyncio.sleep(1)
            stream.write(whole[cut:])
            got = b""
            while len(got) < len(proof) + 1:
                got += await stream.read()
            assert got.startswith(
                member_frame(KEY.proof(Side.LISTENER, X, member.peer_id, room.listener.peer_id))
            )
            stream.abort()

    run(scenario)


def test_a_wrong_byte_is_refused_before_the_rest_is_waited_for() -> None:
    async def scenario() -> None:
        room = Room(KEY)
        await room.serve(answer_pings)
        member = room.network.transport()
        started = room.loop.time()
        for wrong in range(0, len(HEAD), 7):
            stream = await member.open_stream(room.listener.peer_id, X, timeout_s=5)
            stream.write(HEAD[:wrong] + bytes([HEAD[wrong] ^ 1]))
            assert b"private-swarm" in await stream.read()
            stream.abort()
        assert room.loop.time() - started < 1
        assert room.handled == []

    run(scenario)


def test_silence_costs_a_place_for_a_while_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private, "MAX_UNPROVED", 2)

    async def scenario() -> None:
        room = Room(KEY)
        await room.serve(answer_pings)
        mute = room.network.transport()
        silent = [await mute.open_stream(room.listener.peer_id, X, timeout_s=5) for _ in range(2)]
        silent[0].write(HEAD)
        with pytest.raises(StreamClosedError):
            await ping(await room.dial(room.peer(KEY)))
        await asyncio.sleep(private.PROOF_TIMEOUT_S + 1)
        for stream in silent:
            with pytest.raises(StreamClosedError):
                await stream.read()
        await ping(await room.dial(room.peer(KEY)))
        assert len(room.handled) == 1

    run(scenario)


def test_a_dialler_that_goes_away_again_is_nobodys_fault(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        room = Room(KEY)
        await room.serve(answer_pings)
        for end in ("close", "abort"):
            stream = await room.network.transport().open_stream(room.listener.peer_id, X, timeout_s=5)
            await (stream.close() if end == "close" else asyncio.sleep(0, stream.abort()))
            await asyncio.sleep(1)
        assert room.handled == []

    run(scenario)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_listener_that_ends_without_a_word() -> None:
    async def scenario() -> None:
        room = Room(None)

        async def leave(stream: Stream) -> None:
            await stream.read()

        await room.serve(leave)
        with pytest.raises(StreamClosedError):
            await ping(await room.dial(room.peer(KEY)))
        got: list[bytes] = []
        (await room.dial(room.peer(KEY))).subscribe(got.append)
        await asyncio.sleep(1)
        assert got == [b""]

    run(scenario)


def test_cancelling_a_read_loses_nothing() -> None:
    async def scenario() -> None:
        room = Room(KEY)

        async def slowly(stream: Stream) -> None:
            await asyncio.sleep(5)
            stream.write(b"late")
            await stream.read()

        await room.serve(slowly)
        stream = await room.dial(room.peer(KEY))
        for _ in range(3):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(1):
                    await stream.read()
        assert await stream.read() == b"late"

    run(scenario)


def test_the_rest_is_the_inner_streams() -> None:
    async def scenario() -> None:
        room = Room(KEY)
        await room.serve(echo)
        stream = await room.dial(room.peer(KEY))
        assert isinstance(stream, PrivateStream)
        assert stream.unsent_bytes == stream._stream.unsent_bytes > 0
        await stream.drain()
        stream.abort()
        with pytest.raises(StreamClosedError):
            await stream.drain()
        listener = room.listener
        assert isinstance(listener, PrivateTransport)
        assert listener.addresses() == listener._transport.addresses()
        address = listener.addresses()[0]
        assert await room.peer(KEY).connect(address, timeout_s=5) == listener.peer_id
        await listener.close()
        assert isinstance(listener._transport, MemoryTransport)
        assert room.network.find(listener.peer_id) is None

    run(scenario)


def test_what_a_stranger_sent_after_its_first_bytes_is_dropped() -> None:
    async def scenario() -> None:
        room = Room(KEY)
        await room.serve(answer_pings)
        stranger = room.peer(None)
        stream = await room.dial(stranger)
        stream.write(*encode(ListRequest("model")))
        stream.write(b"x" * 100_000)
        with pytest.raises(PrivateSwarmError):
            await Channel(stream, DIRECTORY_TABLE, Role.DIALER).expect(Pong, timeout_s=1)

    run(scenario)
