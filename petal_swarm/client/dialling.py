"""Opening hops, whatever for: of who is silent one hears early, and of a route all hops stay open or none."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, Protocol, TypeAlias, TypeVar

from petal_swarm.errors import BusyError, CacheFullError, HopLostError, NetworkError, PetalSwarmError
from petal_swarm.net.channel import Channel
from petal_swarm.net.transport import Transport
from petal_swarm.routing.route import Hop
from petal_swarm.span import Span
from petal_swarm.wire.connection import Role, Table
from petal_swarm.wire.messages.opening import Open
from petal_swarm.wire.messages.tuning import TrainOpen

HOP_LOST_GRACE_S = 0.2


class OpenFailedError(PetalSwarmError):
    """A hop of `span` could not be opened: `peer_id` is to be avoided."""

    def __init__(self, peer_id: str, span: Span, error: PetalSwarmError) -> None:
        super().__init__(str(error))
        self.peer_id = peer_id
        self.span = span
        self.error = error

    @property
    def is_unreachable(self) -> bool:
        """Whether the network is to blame, or somebody who has just gone."""
        return isinstance(self.error, (NetworkError, HopLostError))

    @property
    def is_full(self) -> bool:
        """Whether waiting may help."""
        return isinstance(self.error, (CacheFullError, BusyError))


class HasChannel(Protocol):
    """What an opened hop has."""

    @property
    def channel(self) -> Channel: ...


Answer = TypeVar("Answer")
OpenHop = TypeVar("OpenHop", bound=HasChannel)

#: Whether a server answers at all, whatever it is busy with; it may take a second or two to say no.
Ping: TypeAlias = Callable[[Hop], Awaitable[bool]]


async def open_channel(
    transport: Transport,
    hop: Hop,
    protocol: str,
    table: Table,
    opening: Open | TrainOpen,
    answer: type[Answer],
    *,
    timeout_s: float,
    wait_s: float = 0.0,
) -> tuple[Channel, Answer]:
    """A stream to the hop on which `opening` was answered; that may take `wait_s` longer than the rest.

    Raises:
        OpenFailedError: it, or the hop that it shall send to, is unreachable or refuses.
    """
    channel: Channel | None = None
    try:
        stream = await transport.open_stream(
            hop.peer_id, protocol, addresses=hop.addresses, timeout_s=timeout_s
        )
        channel = Channel(stream, table, Role.DIALER)
        channel.send(opening)
        return channel, await channel.expect(answer, timeout_s=timeout_s + wait_s)
    except BaseException as error:
        if channel is not None:
            channel.abort()
        if not isinstance(error, PetalSwarmError):
            raise
        # A hop that reports the loss of its next one is not the one to avoid.
        lost = opening.next if isinstance(error, HopLostError) else None
        raise OpenFailedError(lost.peer_id if lost else hop.peer_id, hop.span, error) from error


async def unless_silent(hop: Hop, opening: Coroutine[Any, Any, OpenHop], ping: Ping) -> OpenHop:
    """What `opening` opens.

    Raises:
        OpenFailedError: that failed; or the hop does not even answer a ping, which is known sooner.
    """
    attempt = asyncio.create_task(opening)
    pinging = asyncio.ensure_future(ping(hop))
    try:
        await asyncio.wait({attempt, pinging}, return_when=asyncio.FIRST_COMPLETED)
        if not attempt.done() and not pinging.result():
            silent = HopLostError(f"peer {hop.peer_id} is silent", peer_id=hop.peer_id)
            raise OpenFailedError(hop.peer_id, hop.span, silent)
        return await attempt
    finally:
        pinging.cancel()
        attempt.cancel()
        await asyncio.gather(attempt, pinging, return_exceptions=True)


async def all_or_none(openings: Iterable[Coroutine[Any, Any, OpenHop]]) -> list[OpenHop]:
    """What all of them open, at once.

    Raises:
        OpenFailedError: a hop failed; none stays open.
    """
    attempts = [asyncio.create_task(opening) for opening in openings]
    try:
        return list(await asyncio.gather(*attempts))
    except BaseException as error:
        if isinstance(error, OpenFailedError) and isinstance(error.error, HopLostError):
            await asyncio.wait(attempts, timeout=HOP_LOST_GRACE_S)  # it may be telling why itself
        for attempt in attempts:
            attempt.cancel()
        for outcome in await asyncio.gather(*attempts, return_exceptions=True):
            if not isinstance(outcome, BaseException):
                outcome.channel.abort()
            elif isinstance(outcome, OpenFailedError) and isinstance(error, OpenFailedError):
                error = _more_telling(error, outcome)
        raise error from None


def _more_telling(first: OpenFailedError, second: OpenFailedError) -> OpenFailedError:
    """Of two failures of one opening, the one that is not merely the other's consequence."""
    return second if isinstance(first.error, HopLostError) else first
