"""Carries attacks out over any transport."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from petal_swarm.errors import PetalSwarmError
from petal_swarm.net.channel import Channel
from petal_swarm.net.transport import Stream, Transport
from petal_swarm.wire.connection import DIRECTORY_TABLE, Role
from petal_swarm.wire.messages.directory import Ping, Pong
from petal_swarm.wire.protocols import DIRECTORY, SESSION, TRAIN, TRAIN_PUSH
from tests.hostile_frames import Attack, Target

ANSWER_S = 1.0
#: A server is expected to have ended a stream that was ended here by then, or to have answered.
END_S = 5.0


class HostilePeer:
    """One peer's attacks. Streams that it holds open stay so until `let_go`; at most `max_held`."""

    def __init__(self, transport: Transport, *, max_held: int = 50) -> None:
        self._transport = transport
        self._max_held = max_held
        self._held: list[Stream] = []
        self.frames_sent = 0
        self.streams_opened = 0
        self.unreachable = 0

    async def carry_out(self, target: Target, attack: Attack) -> None:
        """Send what there is, whatever comes back."""
        try:
            async with self._companion(target, attack):
                stream = await self._dial(target, attack.protocol)
                await self._talk(stream, attack)
        except PetalSwarmError:
            self.unreachable += 1

    async def ping(self, target: Target, timeout_s: float) -> float:
        """Seconds until the server answers.

        Raises:
            PetalSwarmError: it does not within `timeout_s`.
        """
        loop = asyncio.get_running_loop()
        started = loop.time()
        channel = Channel(await self._dial(target, DIRECTORY), DIRECTORY_TABLE, Role.DIALER)
        try:
            channel.send(Ping())
            await channel.expect(Pong, timeout_s=timeout_s)
            return loop.time() - started
        finally:
            channel.abort()

    def let_go(self) -> None:
        """End what is held."""
        for stream in self._held:
            stream.abort()
        self._held.clear()

    async def _dial(self, target: Target, protocol: str) -> Stream:
        stream = await self._transport.open_stream(
            target.peer_id, protocol, addresses=target.addresses, timeout_s=END_S
        )
        self.streams_opened += 1
        return stream

    @contextlib.asynccontextmanager
    async def _companion(self, target: Target, attack: Attack) -> AsyncIterator[None]:
        """The stream of a session, or of a run, that a push needs."""
        if attack.companion is None:
            yield
            return
        stream = await self._dial(target, TRAIN if attack.protocol == TRAIN_PUSH else SESSION)
        stream.write(attack.companion)
        self.frames_sent += 1
        try:
            await _hear(stream, ANSWER_S)
            yield
        finally:
            stream.abort()

    async def _talk(self, stream: Stream, attack: Attack) -> None:
        for number, frame in enumerate(attack.frames):
            stream.write(frame)
            self.frames_sent += 1
            if number == 0 and attack.reads:
                await _hear(stream, ANSWER_S)  # an honest peer would wait, too, and longer
        if attack.ending == "hold" and len(self._held) < self._max_held:
            self._held.append(stream)
            return
        if attack.ending != "abort" and attack.reads:
            await _hear_out(stream, ANSWER_S)
        if attack.ending == "close":
            await stream.close()
        else:
            stream.abort()


async def _hear(stream: Stream, timeout_s: float) -> bytes:
    """What comes next; nothing if that is the end, or does not come in time."""
    with contextlib.suppress(TimeoutError, PetalSwarmError):
        async with asyncio.timeout(timeout_s):
            return await stream.read()
    return b""


async def _hear_out(stream: Stream, timeout_s: float) -> None:
    """Read on until the server ends the stream, or has nothing more to say for a moment."""
    with contextlib.suppress(TimeoutError, PetalSwarmError):
        async with asyncio.timeout(timeout_s):
            while await stream.read():
                pass
