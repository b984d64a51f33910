"""Channels over a stream of bytes that the test holds in its hands."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from petal_swarm.errors import (
    BusyError,
    DeadlineError,
    LocalProtocolError,
    RemoteError,
    RemoteProtocolError,
    StreamClosedError,
)
from petal_swarm.net.channel import Channel
from petal_swarm.net.memory import VirtualClockLoop
from petal_swarm.net.transport import WRITE_HIGH_WATER_BYTES, Buffer, Receiver
from petal_swarm.span import Slice
from petal_swarm.wire.connection import DIRECTORY_TABLE, PUSH_TABLE, Role
from petal_swarm.wire.messages import Message, encode
from petal_swarm.wire.messages.directory import Listing, ListRequest, Ping, Pong
from petal_swarm.wire.messages.error import Error
from petal_swarm.wire.messages.opening import Opened, PushOpen
from petal_swarm.wire.messages.parts import TensorMeta
from petal_swarm.wire.messages.steps import Step


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """On a virtual clock: deadlines pass at once."""
    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        runner.run(asyncio.wait_for(scenario(), 1000))


def data(*messages: Message) -> bytes:
    return b"".join(bytes(buffer) for message in messages for buffer in encode(message))


class HeldStream:
    """What the peer sends is what the test feeds; what is written is kept."""

    peer_id = "peer"

    def __init__(self) -> None:
        self.arrived: asyncio.Queue[bytes | Exception] = asyncio.Queue()
        self.written: list[bytes] = []
        self.unsent_bytes = 0
        self.calls: list[str] = []
        self.receiver: Receiver | None = None

    def feed(self, *parts: bytes | Exception) -> None:
        for part in parts:
            self.arrived.put_nowait(part)

    async def read(self) -> bytes:
        part = await self.arrived.get()
        if isinstance(part, Exception):
            raise part
        return part

    def subscribe(self, receiver: Receiver) -> None:
        self.receiver = receiver

    def write(self, *buffers: Buffer) -> None:
        self.written += map(bytes, buffers)

    def pause(self) -> None:
        self.calls.append("pause")

    def resume(self) -> None:
        self.calls.append("resume")

    async def drain(self) -> None:
        self.calls.append("drain")

    async def close(self) -> None:
        self.calls.append("close")

    def abort(self) -> None:
        self.calls.append("abort")


def dialer() -> tuple[HeldStream, Channel]:
    """A channel that has asked, and waits for the answer."""
    stream = HeldStream()
    channel = Channel(stream, DIRECTORY_TABLE, Role.DIALER)
    channel.send(Ping())
    return stream, channel


def listener() -> tuple[HeldStream, Channel]:
    """A channel that steps may come in on."""
    stream = HeldStream()
    channel = Channel(stream, PUSH_TABLE, Role.LISTENER)
    channel._connection.receive_data(data(PushOpen(bytes(16), 0)))
    assert isinstance(channel._connection.next_event(), PushOpen)
    channel.send(Opened())
    return stream, channel


def step(number: int, payload: bytes = b"\0\0") -> Step:
    meta = TensorMeta("float16", (1, len(payload) // 2))
    return Step(number, 0, (Slice(0, number, 1),), meta, payload)


def test_messages_in_the_order_they_came() -> None:
    async def scenario() -> None:
        stream, channel = listener()
        whole = data(*[step(number) for number in range(5)])
        stream.feed(whole[:7], whole[7:150], whole[150:], b"")
        found = [await channel.receive() for _ in range(6)]
        assert [message.step for message in found[:-1]] == list(range(5))  # type: ignore[union-attr]
        assert found[-1] is None

    run(scenario)


def test_what_is_sent_is_what_the_protocol_says() -> None:
    async def scenario() -> None:
        stream, channel = dialer()
        assert b"".join(stream.written) == data(Ping())
        with pytest.raises(LocalProtocolError):
            channel.send(Ping())
        assert b"".join(stream.written) == data(Ping())
        stream.feed(data(Pong()))
        assert await channel.receive() == Pong()
        channel.send(ListRequest("model"))
        assert b"".join(stream.written) == data(Ping(), ListRequest("model"))

    run(scenario)


def test_cancelling_a_receive_loses_nothing() -> None:
    async def scenario() -> None:
        stream, channel = listener()
        whole = data(step(1))
        for start in range(0, len(whole), 11):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(1):
                    await channel.receive()
            stream.feed(whole[start : start + 11])
        found = await channel.receive()
        assert isinstance(found, Step)

    run(scenario)


def test_the_expected_answer() -> None:
    async def scenario() -> None:
        stream, channel = dialer()
        stream.feed(data(Pong()))
        assert await channel.expect(Pong, timeout_s=1) == Pong()
        channel.send(ListRequest("model"))
        stream.feed(data(Listing((b"record",))))
        assert (await channel.expect(Listing, timeout_s=0)).records == (b"record",)

    run(scenario)


def test_an_error_for_an_answer() -> None:
    async def scenario() -> None:
        for code, kind in (("busy", BusyError), ("from the future", RemoteError)):
            stream, channel = dialer()
            stream.feed(data(Error(code, "try later")))
            with pytest.raises(RemoteError, match="try later") as caught:
                await channel.expect(Pong, timeout_s=1)
            assert type(caught.value) is kind
            assert caught.value.peer_id == "peer"

    run(scenario)


def test_no_answer_in_time() -> None:
    async def scenario() -> None:
        stream, channel = dialer()
        started = asyncio.get_running_loop().time()
        with pytest.raises(DeadlineError, match="peer peer did not answer within 30 s"):
            await channel.expect(Pong, timeout_s=30)
        assert asyncio.get_running_loop().time() - started == pytest.approx(30)
        stream.feed(data(Pong()))
        assert await channel.expect(Pong, timeout_s=30) == Pong(), "late, and not lost"

    run(scenario)


def test_the_end_of_the_stream_for_an_answer() -> None:
    async def scenario() -> None:
        stream, channel = dialer()
        stream.feed(b"")
        with pytest.raises(StreamClosedError, match="before it answered"):
            await channel.expect(Pong, timeout_s=1)
        stream, channel = dialer()
        stream.feed(StreamClosedError("reset"))
        with pytest.raises(StreamClosedError, match="reset"):
            await channel.expect(Pong, timeout_s=1)

    run(scenario)


def test_another_message_for_an_answer() -> None:
    async def scenario() -> None:
        stream, channel = dialer()
        stream.feed(data(Listing()))
        with pytest.raises(RemoteProtocolError, match="peer peer sent 'listing'"):
            await channel.expect(Pong, timeout_s=1)

    run(scenario)


@pytest.mark.parametrize(
    "garbage", [b"\xff" * 9, data(Ping()), data(Pong())[:-1]], ids=["bytes", "state", "cut"]
)
def test_a_peer_that_breaks_the_protocol(garbage: bytes) -> None:
    async def scenario() -> None:
        stream, channel = dialer()
        stream.feed(garbage, b"")
        with pytest.raises(RemoteProtocolError):
            await channel.receive()

    run(scenario)


def test_congestion() -> None:
    async def scenario() -> None:
        stream, channel = dialer()
        for unsent, expected in (
            (0, False),
            (WRITE_HIGH_WATER_BYTES - 1, False),
            (WRITE_HIGH_WATER_BYTES, True),
        ):
            stream.unsent_bytes = unsent
            assert channel.congested is expected
        await channel.drain()
        channel.pause()
        channel.resume()
        await channel.close()
        channel.abort()
        assert stream.calls == ["drain", "pause", "resume", "close", "abort"]
        assert channel.peer_id == "peer"

    run(scenario)


class Subscriber:
    def __init__(self, channel: Channel, *, fails_at: int | None = None) -> None:
        self.steps: list[int] = []
        self.ends: list[Exception | None] = []
        self._fails_at = fails_at
        channel.subscribe(self._message, self.ends.append)

    def _message(self, message: Message) -> None:
        assert isinstance(message, Step)
        if message.step == self._fails_at:
            raise ZeroDivisionError
        self.steps.append(message.step)


def subscribed(**options: Any) -> tuple[Receiver, Subscriber]:
    stream, channel = listener()
    subscriber = Subscriber(channel, **options)
    assert stream.receiver is not None
    return stream.receiver, subscriber


def test_a_subscriber_gets_each_message_as_it_comes() -> None:
    async def scenario() -> None:
        receive, subscriber = subscribed()
        whole = data(step(0), step(1), step(2))
        receive(whole[:-1])
        assert subscriber.steps == [0, 1]
        receive(whole[-1:])
        assert (subscriber.steps, subscriber.ends) == ([0, 1, 2], [])
        receive(b"")
        receive(b"")
        assert (subscriber.steps, subscriber.ends) == ([0, 1, 2], [None])

    run(scenario)


def test_a_subscriber_gets_what_came_before_it() -> None:
    async def scenario() -> None:
        stream, channel = listener()
        stream.feed(data(step(0), step(1), step(2)))
        assert await channel.receive() is not None
        subscriber = Subscriber(channel)
        assert subscriber.steps == [1, 2]

    run(scenario)


def test_a_subscriber_hears_of_a_broken_protocol_once() -> None:
    async def scenario() -> None:
        for garbage in (b"\xff" * 9, data(Ping()), data(step(0))[:-1]):
            receive, subscriber = subscribed()
            receive(garbage)
            receive(b"")
            receive(b"")
            (error,) = subscriber.ends
            assert isinstance(error, RemoteProtocolError)
            receive(data(step(1)))
            assert subscriber.steps == []

    run(scenario)


def test_a_subscriber_that_fails_is_told_and_hears_no_more() -> None:
    async def scenario() -> None:
        receive, subscriber = subscribed(fails_at=1)
        receive(data(step(0), step(1), step(2)))
        receive(b"")
        assert subscriber.steps == [0]
        (error,) = subscriber.ends
        assert isinstance(error, ZeroDivisionError)

    run(scenario)


@pytest.mark.parametrize("subscribes", [False, True])
def test_what_came_before_a_broken_frame_is_not_lost(subscribes: bool) -> None:
    """However the bytes were cut on the way."""

    async def scenario() -> None:
        stream, channel = listener()
        part = data(step(0)) + data(Ping())
        if subscribes:
            subscriber = Subscriber(channel)
            assert stream.receiver is not None
            stream.receiver(part)
            assert isinstance(subscriber.ends[0], RemoteProtocolError)
            assert subscriber.steps == [0]
        else:
            stream.feed(part)
            with pytest.raises(RemoteProtocolError):
                await channel.receive()
            assert isinstance(await channel.receive(), Step)

    run(scenario)
