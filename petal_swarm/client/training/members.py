"""The hops of a lane as the client knows them, and how one is opened."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import TypeAlias

from petal_swarm.client.dialling import open_channel
from petal_swarm.client.members import LinkFailedError
from petal_swarm.errors import DeadlineError, HopLostError, PetalSwarmError, ProtocolError
from petal_swarm.net.channel import Channel
from petal_swarm.net.transport import Transport
from petal_swarm.routing.route import Hop
from petal_swarm.wire.connection import TRAIN_TABLE
from petal_swarm.wire.messages import Message
from petal_swarm.wire.messages.repair import Lost, Probe, Rerouted
from petal_swarm.wire.messages.tuning import PassStates, Relink, TrainOpen, TrainOpened
from petal_swarm.wire.protocols import TRAIN

Answer: TypeAlias = Rerouted | PassStates


@dataclass(eq=False, slots=True)
class TrainMember:
    """One open hop of a lane. `link_epoch` is that of the link into it; `adapters` are those it has got."""

    hop: Hop
    channel: Channel
    opened: TrainOpened
    link_epoch: int
    adapters: set[str] = field(default_factory=set)
    #: Why it is gone, once it is.
    error: PetalSwarmError | None = None
    #: The link into it is gone, though the hop may be there.
    is_cut: bool = False
    _asked: dict[tuple[str, int], asyncio.Future[Answer]] = field(default_factory=dict)

    @property
    def peer_id(self) -> str:
        return self.hop.peer_id

    def send(self, message: Message) -> None:
        """Send, unless the hop has just ended the stream: its reader says why."""
        if self.error is None:
            with contextlib.suppress(ProtocolError):
                self.channel.send(message)

    async def relink(self, told: Relink, timeout_s: float) -> None:
        """Tell the hop of its new neighbours, and wait until it has found them.

        Raises:
            LinkFailedError: it could not.
            HopLostError: it is gone itself.
            DeadlineError: it says nothing.
        """
        await self._ask(told, (Rerouted.type, told.epoch), timeout_s)

    async def probe(self, number: int, timeout_s: float) -> PassStates:
        """How far each pass is.

        Raises:
            HopLostError: it is gone.
            DeadlineError: it says nothing.
        """
        answer = await self._ask(Probe(number), (PassStates.type, number), timeout_s)
        assert isinstance(answer, PassStates)
        return answer

    def answered(self, answer: Answer) -> None:
        """The answer to a question has come."""
        number = answer.epoch if isinstance(answer, Rerouted) else answer.number
        waiting = self._asked.get((answer.type, number))
        if waiting is not None and not waiting.done():
            waiting.set_result(answer)

    def refused(self, lost: Lost) -> bool:
        """The hop could not be linked to its new next one; whether that was asked of it."""
        waiting = self._asked.get((Rerouted.type, lost.epoch))
        if waiting is None:
            return False
        if not waiting.done():
            waiting.set_exception(LinkFailedError(lost.reason, replayable=True))
        return True

    def lose(self, error: PetalSwarmError) -> None:
        """The hop is gone: nobody need wait for its answers."""
        self.error = error
        for answer in self._asked.values():
            if not answer.done():
                answer.set_exception(self._gone())

    async def _ask(self, question: Relink | Probe, key: tuple[str, int], timeout_s: float) -> Answer:
        if self.error is not None:
            raise self._gone()
        waiting: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._asked[key] = waiting
        try:
            self.send(question)
            async with asyncio.timeout(timeout_s):
                return await waiting
        except TimeoutError:
            raise DeadlineError(f"peer {self.peer_id} did not answer within {timeout_s:g} s") from None
        finally:
            del self._asked[key]

    def _gone(self) -> HopLostError:
        return HopLostError(f"peer {self.peer_id} is gone: {self.error}", peer_id=self.peer_id)


async def open_member(transport: Transport, hop: Hop, opening: TrainOpen, timeout_s: float) -> TrainMember:
    """Open one hop of a lane; it answers once it is linked to its next one.

    Raises:
        OpenFailedError: it, or the hop that it shall send to, is unreachable or refuses.
    """
    channel, opened = await open_channel(
        transport, hop, TRAIN, TRAIN_TABLE, opening, TrainOpened, timeout_s=timeout_s
    )
    return TrainMember(hop, channel, opened, opening.epoch)
