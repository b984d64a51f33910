"""One session along one route: a stream to every hop, steps into the first, answers from the last."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Iterable, Sequence

from petal_swarm.errors import (
    BusyError,
    CacheFullError,
    HopLostError,
    NetworkError,
    PetalSwarmError,
    RemoteProtocolError,
    StreamClosedError,
    remote_error,
)
from petal_swarm.net.channel import Channel
from petal_swarm.net.transport import Transport
from petal_swarm.routing.route import Hop, Route
from petal_swarm.span import Span
from petal_swarm.wire.connection import SESSION_TABLE, Role
from petal_swarm.wire.messages import SESSION_ID_BYTES, Error, Message, Neighbour, Open, Opened, Output, Step
from petal_swarm.wire.protocols import SESSION

HOP_LOST_GRACE_S = 0.2


class OpenFailedError(PetalSwarmError):
    """A hop of `span` could not be opened: `peer_id` is to be avoided. Handled by `Swarm.open_ring`."""

    def __init__(self, peer_id: str, span: Span, error: PetalSwarmError) -> None:
        super().__init__(str(error))
        self.peer_id = peer_id
        self.span = span
        self.error = error

    @property
    def is_full(self) -> bool:
        """Whether waiting may help."""
        return isinstance(self.error, (CacheFullError, BusyError))


class Ring:
    """An open session. Made by `open`; all methods run in the event loop."""

    def __init__(self, route: Route, channels: Sequence[Channel], opened: Sequence[Opened]) -> None:
        self.route = route
        self.max_batch_tokens = min(answer.max_batch_tokens for answer in opened)
        self.dtypes = tuple(answer.dtype for answer in opened)
        self.error: PetalSwarmError | None = None
        self._channels = channels
        self._loop = asyncio.get_running_loop()
        self._pending: dict[int, asyncio.Future[Output]] = {}
        for channel in channels:
            self._listen(channel)

    @classmethod
    async def open(
        cls,
        transport: Transport,
        route: Route,
        *,
        model: str,
        max_length: int,
        timeout_s: float,
        wait_s: float = 0.0,
        share_prefixes: bool = False,
    ) -> Ring:
        """Open the session at every hop at once; returns when each is connected to the next.

        A hop without room may let the session wait for `wait_s`, which comes on top of `timeout_s`.

        Raises:
            OpenFailedError: a hop is unreachable or refuses; none stays open.
        """
        session = secrets.token_bytes(SESSION_ID_BYTES)
        hops: list[Hop | None] = [None, *route.hops, None]
        attempts = []
        for before, hop, after in zip(hops, route.hops, hops[2:], strict=False):
            opening = Open(
                session=session,
                epoch=0,
                model=model,
                span=hop.span,
                max_length=max_length,
                upstream=before.peer_id if before else None,
                next=Neighbour(after.peer_id, after.addresses) if after else None,
                wait_s=wait_s,
                share_prefixes=share_prefixes,
            )
            attempts.append(asyncio.create_task(_open_hop(transport, hop, opening, timeout_s)))
        try:
            answers = await asyncio.gather(*attempts)
        except BaseException as error:
            if isinstance(error, OpenFailedError) and isinstance(error.error, HopLostError):
                await asyncio.wait(attempts, timeout=HOP_LOST_GRACE_S)  # it may be telling why itself
            for attempt in attempts:
                attempt.cancel()
            for outcome in await asyncio.gather(*attempts, return_exceptions=True):
                if isinstance(outcome, tuple):
                    outcome[0].abort()
                elif isinstance(outcome, OpenFailedError) and isinstance(error, OpenFailedError):
                    error = _more_telling(error, outcome)
            raise error from None
        return cls(route, [channel for channel, _ in answers], [opened for _, opened in answers])

    def send(self, step: Step) -> asyncio.Future[Output] | None:
        """Send a step to the first hop; the future is of the last hop's output, None if no rows are wanted.

        Raises:
            PetalSwarmError: why the session has ended.
        """
        if self.error is not None:
            raise self.error
        answer = None
        if step.rows != "none":
            answer = self._pending[step.step] = self._loop.create_future()
        self._channels[0].send(step)
        return answer

    async def exchange(self, steps: Iterable[Step]) -> list[Output | None]:
        """Send steps, all before the first answer is waited for; the output of each that wants rows.

        Steps are taken from the iterable as the network takes them.

        Raises:
            PetalSwarmError: why the session has ended.
        """
        answers = []
        for step in steps:
            answers.append(self.send(step))
            if self._channels[0].congested:
                with contextlib.suppress(NetworkError):  # `_listen` hears of it too
                    await self._channels[0].drain()
        return [None if answer is None else await answer for answer in answers]

    async def close(self) -> None:
        """End the session at every hop. Idempotent; never raises for dead peers."""
        self._fail(StreamClosedError("the session is closed"))
        await asyncio.gather(*(channel.close() for channel in self._channels))

    def _listen(self, channel: Channel) -> None:
        """Take what one hop says: outputs, or why it ended."""

        def on_message(message: Message) -> None:
            if isinstance(message, Error):
                error = remote_error(
                    message.code,
                    message.message,
                    peer_id=channel.peer_id,
                    retry_after_s=message.retry_after_s,
                )
                if not isinstance(error, HopLostError):
                    raise error
                # The lost hop may be telling why itself, on its own stream: that is worth a moment.
                self._loop.call_later(HOP_LOST_GRACE_S, self._fail, error)
                return
            if not isinstance(message, Output) or channel is not self._channels[-1]:
                raise RemoteProtocolError(f"peer {channel.peer_id} sent {message.type!r}")
            answer = self._pending.pop(message.step, None)
            if answer is not None and not answer.done():
                answer.set_result(message)

        def on_end(error: Exception | None) -> None:
            if isinstance(error, PetalSwarmError):
                self._fail(error)
            else:
                reason = f": {error}" if error else ""
                self._fail(HopLostError(f"peer {channel.peer_id} is gone{reason}", peer_id=channel.peer_id))

        channel.subscribe(on_message, on_end)

    def _fail(self, error: PetalSwarmError) -> None:
        if self.error is None:
            self.error = error
        for answer in self._pending.values():
            if not answer.done():
                answer.set_exception(self.error)
                answer.exception()  # seen: the one who waits raises it, if there is one
        self._pending.clear()


async def _open_hop(
    transport: Transport, hop: Hop, opening: Open, timeout_s: float
) -> tuple[Channel, Opened]:
    channel: Channel | None = None
    try:
        stream = await transport.open_stream(
            hop.peer_id, SESSION, addresses=hop.addresses, timeout_s=timeout_s
        )
        channel = Channel(stream, SESSION_TABLE, Role.DIALER)
        channel.send(opening)
        return channel, await channel.expect(Opened, timeout_s=timeout_s + opening.wait_s)
    except BaseException as error:
        if channel is not None:
            channel.abort()
        if not isinstance(error, PetalSwarmError):
            raise
        # A hop that reports the loss of its next one is not the one to avoid.
        lost = opening.next if isinstance(error, HopLostError) else None
        raise OpenFailedError(lost.peer_id if lost else hop.peer_id, hop.span, error) from error


def _more_telling(first: OpenFailedError, second: OpenFailedError) -> OpenFailedError:
    """Of two failures of one opening, the one that is not merely the other's consequence."""
    return second if isinstance(first.error, HopLostError) else first
