"""A run's link to the next hop: dialled, heard, lost, and dialled anew."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeAlias

from petal_swarm.errors import PetalSwarmError, RemoteProtocolError
from petal_swarm.net.channel import Channel
from petal_swarm.server.downstream import CALM_S, HASTE_S, MAX_HASTE
from petal_swarm.server.slow_peers import SlowReader
from petal_swarm.server.training.ways import Way
from petal_swarm.server.upstream import Upstream
from petal_swarm.wire.messages import Message
from petal_swarm.wire.messages.error import Error
from petal_swarm.wire.messages.parts import Neighbour
from petal_swarm.wire.messages.repair import Lost, Rerouted
from petal_swarm.wire.messages.tuning import Backward

logger = logging.getLogger(__name__)

#: A push stream to a neighbour, as of an epoch. Raises `HopLostError`.
Dial: TypeAlias = Callable[[Neighbour, int], Awaitable[Channel]]


class Onward:
    """Rows go over it by `way`, gradients come back by `gradients`. Lives in the event loop.

    The loss of the link is told with `tell`, and ends nothing: the client may name another next hop.
    `on_change` is called whenever it comes or goes.
    """

    def __init__(
        self,
        dial: Dial,
        way: Way,
        gradients: Upstream,
        *,
        tell: Callable[[Message], None],
        on_change: Callable[[], None],
        hear: Callable[[Backward], None],
        slow: SlowReader,
    ) -> None:
        self._dial = dial
        self._way = way
        self._gradients = gradients
        self._tell = tell
        self._on_change = on_change
        self._hear = hear
        self._slow = slow
        self._loop = asyncio.get_running_loop()
        self._epoch = -1
        self._dialling: asyncio.Task[None] | None = None
        self._hearing: asyncio.Task[None] | None = None
        self._rerouted_s = -HASTE_S
        self._haste = 0

    @property
    def is_connected(self) -> bool:
        return self._way.channel is not None

    async def connect(self, following: Neighbour, epoch: int) -> None:
        """Rows go to `following` from now on, those that are owed first.

        Raises:
            HopLostError: it cannot be reached, or refuses.
        """
        channel = await self._dial(following, epoch)
        self._epoch = epoch
        self._way.connect(channel)
        self._hearing = self._loop.create_task(self._take_gradients(channel, epoch))
        self._on_change()

    def relink(self, following: Neighbour, epoch: int) -> None:
        """As `connect`, in a task; the client hears `rerouted`, or that the link is lost.

        Nothing goes to the hop of before any more, or comes from it.
        """
        self._way.disconnect()
        self._gradients.leave()
        self._on_change()
        if self._dialling is not None:
            self._dialling.cancel()
        now = self._loop.time()
        self._haste = self._haste + 1 if now - self._rerouted_s < HASTE_S else 0
        self._rerouted_s = now
        self._dialling = self._loop.create_task(self._relink(following, epoch))

    async def _relink(self, following: Neighbour, epoch: int) -> None:
        if self._haste > MAX_HASTE:
            await asyncio.sleep(CALM_S)
        try:
            await self.connect(following, epoch)
        except PetalSwarmError as error:
            self._tell(Lost(epoch, reason=str(error)))
        else:
            self._tell(Rerouted(epoch))

    async def _take_gradients(self, channel: Channel, epoch: int) -> None:
        def on_message(message: Message) -> None:
            if isinstance(message, Error):
                raise RemoteProtocolError(message.message)  # a reason like any other to do without it
            assert isinstance(message, Backward), "the table allows nothing else"
            self._hear(message)
            self._gradients.throttle()

        reason = "it ended the stream"
        try:
            await self._gradients.take_from(channel, on_message)
        except PetalSwarmError as error:
            reason = str(error)
        if self._way.channel is channel:
            self.lose(reason)

    def lose(self, reason: str) -> None:
        """The next hop is gone, or is to be."""
        channel = self._way.channel
        if channel is None:
            return
        logger.info("the next hop %s of a run is gone: %s", channel.peer_id, reason)
        self._way.disconnect()
        self._gradients.leave()
        self._tell(Lost(self._epoch, reason=f"the next hop {channel.peer_id} is gone: {reason}"))
        self._on_change()

    def cut_off_if_slow(self, now: float) -> None:
        """It began a gradient and does not go on, or takes no rows."""
        way = self._way
        if self._slow.is_too_slow(now, sent_bytes=way.sent_bytes, unsent_bytes=way.unsent_bytes):
            self.lose("it took nothing for too long")
        elif self._gradients.is_too_slow(now):
            self.lose("it sent a part of a gradient and not its rest")

    async def close(self) -> None:
        tasks = [task for task in (self._dialling, self._hearing) if task is not None]
        for task in tasks:
            task.cancel()
        channel = self._way.channel
        self._way.disconnect()
        self._gradients.close()
        await asyncio.gather(*tasks, return_exceptions=True)
        if channel is not None:
            await channel.close()
