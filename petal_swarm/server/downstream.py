"""Where the results of a hop go when another hop follows: dialling it, feeding it, and noticing its end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeAlias

from petal_swarm.errors import HopLostError, PetalSwarmError, RemoteProtocolError
from petal_swarm.net.channel import Channel
from petal_swarm.net.outbox import Link, Outbox
from petal_swarm.wire.messages import Message
from petal_swarm.wire.messages.error import Error
from petal_swarm.wire.messages.opening import Opened
from petal_swarm.wire.messages.parts import NO_STEP, Neighbour
from petal_swarm.wire.messages.prefixes import PrefixFound
from petal_swarm.wire.messages.repair import Lost, Rerouted
from petal_swarm.wire.step_log import StepLog

logger = logging.getLogger(__name__)

#: A push stream to a neighbour, as of an epoch, and its answer. Raises `HopLostError`.
Dial: TypeAlias = Callable[[Neighbour, int], Awaitable[tuple[Channel, Opened]]]

#: Who is told of so many new neighbours, each within a second of the one before, takes its time: a client
#: that says nothing else would have it dial thousands.
MAX_HASTE = 4
HASTE_S = 1.0
CALM_S = 0.25

GONE = "what was sent before is not known here any more"


class Downstream:
    """The links of one session to its next hop. Lives in the event loop.

    The loss of a link is told with `tell`, and ends nothing: the client may name another next hop.
    `on_change` is called whenever links come or go; `answered` gets the answers about prefixes.
    """

    def __init__(
        self,
        log: StepLog,
        dial: Dial,
        *,
        tell: Callable[[Message], None],
        on_change: Callable[[], None],
        answered: Callable[[PrefixFound], None],
        stall_s: float,
    ) -> None:
        self.outbox = Outbox(log, self._stalled, stall_s=stall_s)
        self._dial = dial
        self._tell = tell
        self._on_change = on_change
        self._answered = answered
        self._tasks: set[asyncio.Task[None]] = set()
        self._rerouted_s = -HASTE_S
        self._haste = 0

    @property
    def is_connected(self) -> bool:
        return bool(self.outbox.links)

    async def connect(
        self, following: Neighbour, epoch: int, *, also: bool = False, done: int = NO_STEP
    ) -> Link:
        """Send everything that `following` lacks to it, and what is to come; `also` to those before it.

        Of steps up to `done` nobody wants the results any more.

        Raises:
            HopLostError: it cannot be reached, refuses, or lacks what is not known here any more.
        """
        channel, opened = await self._dial(following, epoch)
        if not also:
            self._drop_all()
        link = self.outbox.connect(
            channel, epoch, after=opened.last_step, done=done, max_rows=opened.max_batch_tokens
        )
        if link is None:
            channel.abort()
            raise HopLostError(GONE)
        self._watch(link)
        self._on_change()
        return link

    def reroute(self, following: Neighbour, epoch: int, *, also: bool, done: int) -> None:
        """As `connect`, in a task; the client hears `rerouted`, or that the link is lost."""
        known = [
            link
            for link in self.outbox.links
            if link.epoch == epoch and link.channel.peer_id == following.peer_id
        ]
        if known and not also:
            for link in [link for link in self.outbox.links if link not in known]:
                self.outbox.drop(link)
            self._tell(Rerouted(epoch))
            return
        for earlier in self._tasks:
            earlier.cancel()
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._haste = self._haste + 1 if now - self._rerouted_s < HASTE_S else 0
        self._rerouted_s = now
        task = loop.create_task(self._reroute(following, epoch, also, done))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _reroute(self, following: Neighbour, epoch: int, also: bool, done: int) -> None:
        if self._haste > MAX_HASTE:
            await asyncio.sleep(CALM_S)
        try:
            await self.connect(following, epoch, also=also, done=done)
        except PetalSwarmError as error:
            self._tell(self._lost(epoch, str(error)))
        else:
            self._tell(Rerouted(epoch))

    def _drop_all(self) -> None:
        for link in list(self.outbox.links):
            self.outbox.drop(link)

    def _watch(self, link: Link) -> None:
        def on_message(message: Message) -> None:
            if isinstance(message, PrefixFound):
                self._answered(message)
            elif isinstance(message, Error):
                self._lose(link, message.message)
            else:
                raise RemoteProtocolError(f"peer {link.channel.peer_id} sent {message.type!r}")

        def on_end(error: Exception | None) -> None:
            self._lose(link, str(error) if error else "it ended the stream")

        link.channel.subscribe(on_message, on_end)

    def give_up_stuck_links(self) -> None:
        """Results have not got away for too long."""
        for link in [link for link in self.outbox.links if link.channel.unsent_bytes]:
            self._stalled(link)

    def _stalled(self, link: Link) -> None:
        self._lose(link, "it took nothing for too long")

    def _lose(self, link: Link, reason: str) -> None:
        if self.outbox.drop(link):
            logger.info("the next hop %s is gone: %s", link.channel.peer_id, reason)
            self._tell(self._lost(link.epoch, f"the next hop {link.channel.peer_id} is gone: {reason}"))
            self._on_change()

    def _lost(self, epoch: int, reason: str) -> Lost:
        return Lost(epoch, upstream=False, replayable=self.outbox.log.complete, reason=reason)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await self.outbox.close()
