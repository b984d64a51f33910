"""What the hosts of sessions and of training share: streams that are opened and awaited."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from petal_swarm.errors import (
    BusyError,
    HopLostError,
    PetalSwarmError,
    StreamClosedError,
    WrongModelError,
    WrongSpanError,
)
from petal_swarm.net.channel import Channel
from petal_swarm.net.transport import Transport
from petal_swarm.span import Span
from petal_swarm.wire.connection import Role, Table
from petal_swarm.wire.messages.opening import PushOpen
from petal_swarm.wire.messages.parts import Neighbour

logger = logging.getLogger(__name__)
T = TypeVar("T")

#: Nothing that opens a stream has a payload; what comes with it is read and forgotten.
MAX_OPENING_PAYLOAD_BYTES = 64 << 10

LEAVING = "this server is leaving the swarm"


def check_hosted(model: str, blocks: Span, *, hosted_model: str, hosted_blocks: Span, draining: bool) -> None:
    """Whether what an `open` asks for is here.

    Raises:
        BusyError, WrongModelError, WrongSpanError: it is not, or this server is leaving.
    """
    if draining:
        raise BusyError(LEAVING)
    if model != hosted_model:
        raise WrongModelError(f"this server hosts {hosted_model}, not {model}")
    if not hosted_blocks.covers(blocks):
        raise WrongSpanError(f"this server hosts blocks {hosted_blocks}, not {blocks}")


def ends(ended: asyncio.Future[None]) -> Callable[[Exception | None], None]:
    """What settles `ended` when a stream that is subscribed to ends: with its error, if it has one."""

    def on_end(error: Exception | None) -> None:
        if ended.done():
            return
        if error is None:
            ended.set_result(None)
        else:
            ended.set_exception(error)

    return on_end


async def until_one_ends(*work: Coroutine[Any, Any, None]) -> None:
    """Run all of `work` until the first is done, whose error is raised; the others are cancelled."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


class Arrivals:
    """Pushes that came before the `open` or `reroute` which tells of them, by session and epoch."""

    def __init__(self) -> None:
        self._awaited: dict[tuple[bytes, int], asyncio.Event] = {}

    def __len__(self) -> int:
        return len(self._awaited)

    def announce(self, session: bytes, epoch: int) -> None:
        """Who expects this push is there now."""
        arrival = self._awaited.pop((session, epoch), None)
        if arrival is not None:
            arrival.set()

    async def wait(self, session: bytes, epoch: int, timeout_s: float) -> None:
        """Return when it is announced, or at the latest after `timeout_s`."""
        awaited = (session, epoch)
        arrival = self._awaited.setdefault(awaited, asyncio.Event())
        try:
            async with asyncio.timeout(timeout_s):
                await arrival.wait()
        except TimeoutError:
            if self._awaited.get(awaited) is arrival:
                del self._awaited[awaited]


async def dial_next(
    transport: Transport,
    following: Neighbour,
    opening: PushOpen,
    answer: type[T],
    *,
    protocol: str,
    table: Table,
    dial_timeout_s: float,
    answer_timeout_s: float,
) -> tuple[Channel, T]:
    """A push stream to the next hop, and its answer.

    Raises:
        HopLostError: it cannot be reached, or refuses.
    """
    try:
        stream = await transport.open_stream(
            following.peer_id, protocol, addresses=following.addresses, timeout_s=dial_timeout_s
        )
    except PetalSwarmError as error:
        # Without the reason: a client could have this server scan a network for it.
        logger.info("no way to %s: %s", following.peer_id, error)
        raise HopLostError(f"no way to the next hop {following.peer_id}") from error
    channel = Channel(stream, table, Role.DIALER)
    try:
        channel.send(opening)
        return channel, await channel.expect(answer, timeout_s=answer_timeout_s)
    except BaseException as error:
        channel.abort()
        if not isinstance(error, PetalSwarmError):
            raise
        raise HopLostError(f"the next hop {following.peer_id} refused: {error}") from error


async def while_there(channel: Channel, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled if the peer ends its stream before: nobody waits for it.

    Raises:
        StreamClosedError: the peer has ended the stream.
        RemoteProtocolError: it sent something instead of waiting.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.create_task(channel.receive())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if leaving.done():
            leaving.result()
            raise StreamClosedError(f"peer {channel.peer_id} left while its session was being opened")
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
