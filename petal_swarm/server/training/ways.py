"""The two ways that a run's results go from a hop: rows to the next one, gradients to the one before."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable

from petal_swarm.errors import NetworkError, ProtocolError
from petal_swarm.net.channel import Channel
from petal_swarm.server.upstream import Output
from petal_swarm.wire.messages.tuning import Backward, Forward


class Way:
    """Sends what passes made to one neighbour, and keeps in mind what there is to send while there is none.

    `message_of` gives the message of a pass, None if it is known no more. Lives in the event loop.
    """

    def __init__(self, message_of: Callable[[int], Forward | Backward | None]) -> None:
        self.channel: Channel | None = None
        #: Bytes of payload that were written.
        self.sent_bytes = 0
        self._message_of = message_of
        self._owed: dict[int, None] = {}
        self._pump: asyncio.Task[None] | None = None

    def send(self, number: int) -> None:
        """What pass `number` made, now or when there is a neighbour."""
        if self.channel is None or self._pump is not None:
            self._owed[number] = None
        else:
            self._write(self.channel, number)

    def owe(self, numbers: Iterable[int]) -> None:
        """Send these, too, to the next neighbour."""
        self._owed.update(dict.fromkeys(numbers))

    def connect(self, channel: Channel) -> None:
        """There is a neighbour: it gets what is owed, as fast as it takes it, and then all else."""
        self.disconnect()
        self.channel = channel
        if self._owed:
            self._pump = asyncio.get_running_loop().create_task(self._fill(channel))

    def disconnect(self) -> None:
        """The neighbour is gone."""
        if self._pump is not None:
            self._pump.cancel()
            self._pump = None
        if self.channel is not None:
            self.channel.abort()
            self.channel = None

    @property
    def unsent_bytes(self) -> int:
        return 0 if self.channel is None else self.channel.unsent_bytes

    @property
    def congested(self) -> bool:
        """Whether results have to wait; not while the neighbour gets what was kept for it anyway."""
        return self.channel is not None and self._pump is None and self.channel.congested

    async def drain(self) -> None:
        """Wait until the neighbour has taken what was sent, or is gone."""
        if self.channel is not None and self._pump is None:
            with contextlib.suppress(NetworkError):  # whoever reads from it hears of it too
                await self.channel.drain()

    async def _fill(self, channel: Channel) -> None:
        with contextlib.suppress(NetworkError):  # whoever reads from it hears of it too
            while self._owed:
                number = next(iter(self._owed))
                del self._owed[number]
                self._write(channel, number)
                if channel.congested:
                    await channel.drain()
        self._pump = None

    def _write(self, channel: Channel, number: int) -> None:
        message = self._message_of(number)
        if message is not None:
            self.sent_bytes += message.tensor.nbytes
            with contextlib.suppress(ProtocolError):  # it has just ended the stream: its reader says why
                channel.send(message)


class Outputs:
    """Several outputs of one thing: all must be able to take results."""

    def __init__(self, *outputs: Output) -> None:
        self._outputs = outputs

    @property
    def congested(self) -> bool:
        return any(output.congested for output in self._outputs)

    async def drain(self) -> None:
        for output in self._outputs:
            await output.drain()
