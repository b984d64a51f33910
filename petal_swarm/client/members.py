"""The hops of a ring as the client knows them, and how one is opened."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from petal_swarm.client.dialling import Ping, all_or_none, open_channel, unless_silent
from petal_swarm.errors import (
    DeadlineError,
    HopLostError,
    PetalSwarmError,
    ProtocolError,
    RemoteProtocolError,
)
from petal_swarm.net.channel import Channel
from petal_swarm.net.transport import Transport
from petal_swarm.routing.route import Hop
from petal_swarm.wire.connection import SESSION_TABLE
from petal_swarm.wire.messages import Message
from petal_swarm.wire.messages.audit import Recall, Recalled
from petal_swarm.wire.messages.opening import Open, Opened
from petal_swarm.wire.messages.parts import Neighbour
from petal_swarm.wire.messages.repair import Progress, Reroute
from petal_swarm.wire.protocols import SESSION

MAX_RECALLED = 256


class LinkFailedError(PetalSwarmError):
    """A hop could not be connected to its new next one; if not `replayable`, to no other either."""

    def __init__(self, reason: str, *, replayable: bool) -> None:
        super().__init__(reason)
        self.replayable = replayable


@dataclass(eq=False, slots=True)
class Member:
    """One open hop. `link_epoch` is that of the link by which steps come to it."""

    hop: Hop
    channel: Channel
    opened: Opened
    link_epoch: int
    #: Why it is gone, once it is.
    error: PetalSwarmError | None = None
    #: The link into it is gone, though the hop may be there.
    is_cut: bool = False
    is_leaving: bool = False
    _rerouted: dict[int, asyncio.Future[None]] = field(default_factory=dict)
    _probed: dict[int, asyncio.Future[Progress]] = field(default_factory=dict)
    _recalls: dict[int, tuple[list[Recalled], asyncio.Future[None]]] = field(default_factory=dict)

    @property
    def peer_id(self) -> str:
        return self.hop.peer_id

    def neighbour(self) -> Neighbour:
        return neighbour(self.hop)

    async def reroute(self, told: Reroute, timeout_s: float) -> None:
        """Tell the hop of its new neighbours, and wait until it has found them.

        Raises:
            LinkFailedError: it could not.
            HopLostError: it is gone itself.
            DeadlineError: it says nothing.
        """
        answer = self._rerouted[told.epoch] = asyncio.get_running_loop().create_future()
        try:
            if self.error is not None:
                raise self._gone()
            with contextlib.suppress(ProtocolError):  # it has just ended the session
                self.channel.send(told)
            async with asyncio.timeout(timeout_s):
                await answer
        except TimeoutError:
            raise DeadlineError(f"peer {self.peer_id} did not answer within {timeout_s:g} s") from None
        finally:
            del self._rerouted[told.epoch]

    def rerouted(self, epoch: int, error: PetalSwarmError | None = None) -> bool:
        """The answer of the hop has come; whether somebody waits for it."""
        answer = self._rerouted.get(epoch)
        if answer is None:
            return False
        if not answer.done():
            answer.set_result(None) if error is None else answer.set_exception(error)
        return True

    async def probe(self, message: Message, number: int) -> Progress:
        """Send a probe of that number and wait for its answer."""
        answer = self._probed[number] = asyncio.get_running_loop().create_future()
        try:
            if self.error is not None:
                raise self._gone()
            with contextlib.suppress(ProtocolError):
                self.channel.send(message)
            progress: Progress = await answer
            return progress
        finally:
            del self._probed[number]

    def progressed(self, progress: Progress) -> None:
        """A probe was answered."""
        answer = self._probed.get(progress.number)
        if answer is not None and not answer.done():
            answer.set_result(progress)

    async def recall(self, question: Recall, timeout_s: float) -> list[Recalled]:
        """What the hop says of earlier steps; empty if it does not know.

        Raises:
            HopLostError: it is gone.
            DeadlineError: it says nothing.
        """
        found: list[Recalled] = []
        answer = asyncio.get_running_loop().create_future()
        self._recalls[question.number] = (found, answer)
        try:
            if self.error is not None:
                raise self._gone()
            with contextlib.suppress(ProtocolError):
                self.channel.send(question)
            async with asyncio.timeout(timeout_s):
                await answer
        except TimeoutError:
            raise DeadlineError(f"peer {self.peer_id} recalled nothing within {timeout_s:g} s") from None
        finally:
            del self._recalls[question.number]
        return [recalled for recalled in found if recalled.slices]

    def recalled(self, message: Recalled) -> None:
        """A part of an answer has come.

        Raises:
            RemoteProtocolError: more of it than a hop may send.
        """
        found, answer = self._recalls.get(message.number, (None, None))
        if found is None or answer is None:
            return
        if len(found) >= MAX_RECALLED:
            raise RemoteProtocolError(f"peer {self.peer_id} recalls more than it was asked for")
        found.append(message)
        if not message.more and not answer.done():
            answer.set_result(None)

    def lose(self, error: PetalSwarmError) -> None:
        """The hop is gone: nobody need wait for its answers."""
        self.error = error
        waiting: list[asyncio.Future[None] | asyncio.Future[Progress]] = [
            *self._rerouted.values(),
            *self._probed.values(),
            *(answer for _, answer in self._recalls.values()),
        ]
        for answer in waiting:
            if not answer.done():
                answer.set_exception(self._gone())

    def _gone(self) -> HopLostError:
        return HopLostError(f"peer {self.peer_id} is gone: {self.error}", peer_id=self.peer_id)


def neighbour(hop: Hop) -> Neighbour:
    """What others are told of a hop to reach it."""
    return Neighbour(hop.peer_id, hop.addresses)


async def open_hop(transport: Transport, hop: Hop, opening: Open, timeout_s: float, ping: Ping) -> Member:
    """Open one hop; a hop without room may let the session wait for `opening.wait_s` on top of `timeout_s`.

    Raises:
        OpenFailedError: it, or the hop that it shall send to, is unreachable or refuses; or it does not even
            answer a ping, which is known sooner.
    """
    return await unless_silent(hop, _open_hop(transport, hop, opening, timeout_s), ping)


async def _open_hop(transport: Transport, hop: Hop, opening: Open, timeout_s: float) -> Member:
    channel, opened = await open_channel(
        transport,
        hop,
        SESSION,
        SESSION_TABLE,
        opening,
        Opened,
        timeout_s=timeout_s,
        wait_s=opening.wait_s,
    )
    return Member(hop, channel, opened, opening.epoch)


async def open_hops(
    transport: Transport, hops: Sequence[Hop], opening: Callable[[int], Open], timeout_s: float, ping: Ping
) -> list[Member]:
    """Open a whole route at once; `opening(i)` is for hop i. Returns when each is connected to the next.

    Raises:
        OpenFailedError: a hop failed; none stays open.
    """
    return await all_or_none(
        open_hop(transport, hop, opening(index), timeout_s, ping) for index, hop in enumerate(hops)
    )
