"""The sending side of a link of the ring: steps to the next hop, and again to one that takes its place."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable

from petal_swarm.errors import NetworkError, PetalSwarmError, ProtocolError
from petal_swarm.net.channel import Channel
from petal_swarm.wire.messages.parts import NO_STEP
from petal_swarm.wire.messages.steps import Step
from petal_swarm.wire.step_log import StepLog

#: Larger steps would keep the hops behind the first one waiting.
MAX_REPLAY_ROWS = 512


class Link:
    """A channel to one peer that takes the steps of a session after number `after`, as steps of `epoch`."""

    def __init__(
        self, channel: Channel, epoch: int, after: int, *, stalled: Callable[[Link], None], stall_s: float
    ) -> None:
        self.channel = channel
        self.epoch = epoch
        #: Bytes of payload that were written.
        self.sent_bytes = 0
        self.after = after
        self._stalled = stalled
        self._stall_s = stall_s
        #: What could not be sent yet; None while steps are sent as they come.
        self._backlog: deque[Step] | None = None
        self._pump: asyncio.Task[None] | None = None

    @property
    def is_filling(self) -> bool:
        """Whether the peer is still sent what came earlier."""
        return self._backlog is not None

    def send(self, step: Step) -> None:
        if self._backlog is not None:
            self._backlog.append(step)
            return
        if step.step <= self.after:
            return  # the hop before this one is being filled with what the peer has had from another
        step.epoch = self.epoch
        self.sent_bytes += len(step.payload)
        with contextlib.suppress(ProtocolError):  # it has just ended the stream: its reader says why
            self.channel.send(step)

    def replay(self, steps: deque[Step]) -> None:
        """Send these first, as fast as the peer takes them; what is sent meanwhile waits behind them."""
        if steps:
            self._backlog = steps
            self._pump = asyncio.get_running_loop().create_task(self._work(steps))

    async def _work(self, backlog: deque[Step]) -> None:
        try:
            while backlog:
                step = backlog.popleft()
                step.epoch = self.epoch
                self.sent_bytes += len(step.payload)
                self.channel.send(step)
                if self.channel.congested:
                    async with asyncio.timeout(self._stall_s):
                        await self.channel.drain()
            self._backlog = None
        except (PetalSwarmError, TimeoutError):
            self._stalled(self)

    def close(self) -> None:
        """Send no more. What is under way is dropped; the peer sees the stream end."""
        self._backlog = deque(maxlen=0)
        if self._pump is not None:
            self._pump.cancel()
        self.channel.abort()


class Outbox:
    """Logs each step, and sends it to every link: usually one, none while the next hop is being replaced,
    and two while another one is being filled to take its place.
    """

    def __init__(self, log: StepLog, on_stall: Callable[[Link], None], *, stall_s: float) -> None:
        self.log = log
        self.links: list[Link] = []
        self._dropped_bytes = 0
        self._on_stall = on_stall
        self._stall_s = stall_s

    def send(self, step: Step) -> None:
        """Nobody may change the step or its payload afterwards."""
        self.log.append(step)
        for link in self.links:
            link.send(step)

    def connect(
        self, channel: Channel, epoch: int, *, after: int, done: int = NO_STEP, max_rows: int = 1
    ) -> Link | None:
        """Send `channel` the steps after that number, and all to come; None if some are known no more.

        See `StepLog.after` for `done` and `max_rows`.
        """
        missing = self.log.after(after, done=done, max_rows=min(max_rows, MAX_REPLAY_ROWS))
        if missing is None:
            return None
        link = Link(channel, epoch, after, stalled=self._on_stall, stall_s=self._stall_s)
        self.links.append(link)
        link.replay(deque(missing))
        return link

    def drop(self, link: Link) -> bool:
        """Send nothing more there; whether it was in use."""
        if link not in self.links:
            return False
        self.links.remove(link)
        self._dropped_bytes += link.sent_bytes
        link.close()
        return True

    @property
    def congested(self) -> bool:
        """Whether so much is unsent that `drain` would wait.

        A peer that is being filled holds up nobody: what waits for it is in the log anyway.
        """
        return any(map(self._holds_up, self.links))

    def _holds_up(self, link: Link) -> bool:
        return link.channel.congested and not (link.is_filling and self.log.complete)

    @property
    def sent_bytes(self) -> int:
        """Bytes of payload that were written to any link so far."""
        return self._dropped_bytes + sum(link.sent_bytes for link in self.links)

    @property
    def unsent_bytes(self) -> int:
        """What has not got away, over the link where that is most."""
        return max((link.channel.unsent_bytes for link in self.links), default=0)

    async def drain(self) -> None:
        """Wait until the links have taken what was sent, or are gone."""
        for link in list(filter(self._holds_up, self.links)):
            with contextlib.suppress(NetworkError):  # whoever reads from it hears of it too
                await link.channel.drain()

    async def close(self) -> None:
        """End every link, after what was sent, and free the log."""
        links, self.links = self.links, []
        for link in links:
            if link._pump is not None:
                link._pump.cancel()
        await asyncio.gather(*(link.channel.close() for link in links))
        self.log.close()
