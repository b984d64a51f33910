"""The `session` and `push` protocols of a server: opening sessions, finding them, ending them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any, TypeVar

from petal_swarm.engine.compute import Compute
from petal_swarm.engine.prefixes import PrefixScope
from petal_swarm.errors import (
    BadMessageError,
    BusyError,
    HopLostError,
    IdleError,
    NetworkError,
    PetalSwarmError,
    StreamClosedError,
    UnknownSessionError,
    WrongModelError,
    WrongSpanError,
)
from petal_swarm.net.channel import Channel
from petal_swarm.net.transport import Stream, Transport
from petal_swarm.server.admission import Request
from petal_swarm.server.config import SessionLimits
from petal_swarm.server.hosted import HostedSession, Overhead, error_message
from petal_swarm.server.waiting_room import LOOK_S, WaitingRoom
from petal_swarm.wire.connection import PUSH_TABLE, SESSION_TABLE, Role
from petal_swarm.wire.messages import Neighbour, Open, Opened, PushOpen
from petal_swarm.wire.protocols import PUSH
from petal_swarm.wire.tensors import dtype_name

logger = logging.getLogger(__name__)
T = TypeVar("T")

_LEAVING = "this server is leaving the swarm"


class SessionHost:
    """All sessions of one server."""

    def __init__(
        self, compute: Compute, transport: Transport, *, model_key: str, limits: SessionLimits
    ) -> None:
        self._compute = compute
        self._transport = transport
        self._model_key = model_key
        self._limits = limits
        self._sessions: dict[bytes, HostedSession] = {}
        self._arrivals: dict[bytes, asyncio.Event] = {}
        self._changed = asyncio.Event()
        self._room = WaitingRoom(compute, limits, self._end_longest_idle)
        self._loop = asyncio.get_running_loop()
        self._looks_for_steps: asyncio.TimerHandle | None = None
        self._opening = 0
        self._freeing = 0
        self._salt = secrets.token_bytes(16)
        self.overhead = Overhead()
        self.draining = False

    @property
    def num_sessions(self) -> int:
        return len(self._sessions)

    @property
    def tokens_available(self) -> int:
        """The largest `max_length` that a new session would get now without waiting."""
        return self._room.tokens_available

    async def drained(self) -> None:
        """Wait until no session is left. Set `draining` first, or new ones will keep coming."""
        self._room.refuse_all(BusyError(_LEAVING))
        while self._sessions:
            self._changed.clear()
            await self._changed.wait()

    def end_all(self, error: PetalSwarmError) -> None:
        """End the sessions that are left with `error`, let nobody in, and look after nothing any more."""
        self.draining = True
        self._room.refuse_all(error)
        for session in self._sessions.values():
            session.fail(error)
        if self._looks_for_steps is not None:
            self._looks_for_steps.cancel()

    async def handle_session(self, stream: Stream) -> None:
        """One client's session, from its `open` to the end of the stream."""
        channel = Channel(stream, SESSION_TABLE, Role.LISTENER)
        async with _answering_errors(channel):
            with self._being_opened():
                opening = await channel.expect(Open, timeout_s=self._limits.open_timeout_s)
            async with self._open(opening, channel) as session:
                channel.send(self._opened())
                await self._run(session, channel)

    async def handle_push(self, stream: Stream) -> None:
        """The steps that a previous hop pushes into one session."""
        channel = Channel(stream, PUSH_TABLE, Role.LISTENER)
        async with _answering_errors(channel):
            with self._being_opened():
                opening = await channel.expect(PushOpen, timeout_s=self._limits.open_timeout_s)
                session = await self._find(opening, channel.peer_id)
            channel.send(self._opened())
            try:
                await session.take_steps(channel)
            except Exception as error:
                session.fail(error)
                raise

    @contextlib.contextmanager
    def _being_opened(self) -> Iterator[None]:
        """A stream that costs something and has not shown yet what for."""
        if self._opening >= self._limits.max_opening:
            raise BusyError("too many streams are being opened here; try again later")
        self._opening += 1
        try:
            yield
        finally:
            self._opening -= 1

    @contextlib.asynccontextmanager
    async def _open(self, opening: Open, channel: Channel) -> AsyncIterator[HostedSession]:
        """A session from admission to release, connected to its next hop."""
        self._check(opening)
        session = HostedSession(
            opening, channel, compute=self._compute, limits=self._limits, overhead=self.overhead
        )
        request = Request(opening.session, channel.peer_id, opening.max_length)
        self._sessions[opening.session] = session
        self._announce_arrival(opening.session)
        if self._looks_for_steps is None:
            self._looks_for_steps = self._loop.call_later(LOOK_S, self._look_for_steps)
        try:
            await _while_there(channel, self._prepare(session, request))
            yield session
        finally:
            await session.close()
            session.admitted.set()
            del self._sessions[opening.session]
            self._changed.set()
            self._room.leave(request)
            self._wake_when_freed()

    async def _prepare(self, session: HostedSession, request: Request) -> None:
        """Wait for room, open the session in the engine and connect it to its next hop."""
        opening = session.opening
        wait_s = min(opening.wait_s, self._limits.max_wait_s)
        await self._room.enter(request, wait_s=wait_s)
        engine = self._compute.engine
        scope = self._prefix_scope(opening) if opening.share_prefixes else None
        opened = self._compute.call(
            lambda: engine.open_session(opening.session, max_length=opening.max_length, scope=scope)
        )
        async with asyncio.timeout(self._limits.open_timeout_s):
            await asyncio.wrap_future(opened)
        session.admitted.set()
        if opening.next is not None:
            session.attach_next(await self._dial_next(opening, opening.next, wait_s))

    def _prefix_scope(self, opening: Open) -> PrefixScope:
        """With whom a session shares prefixes: the first hop trusts what it computed, others one peer each.

        The salt makes keys those of this process: after a restart its weights may be quantized otherwise, and
        hops behind it must not take what they hold for the same.
        """
        named = f"{opening.span} {opening.upstream or ''}".encode()
        return PrefixScope(self._salt + named, hashes=opening.upstream is None)

    def _wake_when_freed(self) -> None:
        """Look again who fits once the compute thread has freed the cache of the session that has ended."""
        self._freeing += 1

        def freed(_: asyncio.Future[None]) -> None:
            self._freeing -= 1
            self._room.wake()

        asyncio.wrap_future(self._compute.call(lambda: None)).add_done_callback(freed)

    def _look_for_steps(self) -> None:
        """While there are sessions: make room for steps that wait for it, of which nobody is told."""
        self._looks_for_steps = None
        if not self._sessions:
            return
        if self._compute.steps_waiting_for_room:
            self._end_longest_idle()
        self._looks_for_steps = self._loop.call_later(LOOK_S, self._look_for_steps)

    def _end_longest_idle(self) -> None:
        """Others wait for room, with a session or a step of one: end the session that was idle longest, if
        that is long. One at a time: what it frees may be enough.
        """
        if self._freeing or any(session.ended for session in self._sessions.values()):
            return
        longest = max(self._sessions.values(), key=lambda session: session.idle_s)
        limit_s = self._limits.idle_when_full_s
        if longest.idle_s >= limit_s:
            longest.fail(IdleError(f"the session was idle for {limit_s:g} s, and others wait for its room"))

    async def _run(self, session: HostedSession, channel: Channel) -> None:
        """Serve the session until the client leaves or something fails."""
        first = session.opening.upstream is None
        work = [
            asyncio.create_task(session.take_steps(channel) if first else session.watch_client()),
            asyncio.create_task(session.wait_ended()),
            asyncio.create_task(session.watch_idle()),
        ]
        if session.opening.next is not None:
            work.append(asyncio.create_task(session.watch_next()))
        try:
            done, _ = await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)
        for task in done:
            task.result()

    def _check(self, opening: Open) -> None:
        if self.draining:
            raise BusyError(_LEAVING)
        if opening.model != self._model_key:
            raise WrongModelError(f"this server hosts {self._model_key}, not {opening.model}")
        span = self._compute.engine.stack.span
        if not span.covers(opening.span):
            raise WrongSpanError(f"this server hosts blocks {span}, not {opening.span}")
        if opening.session in self._sessions:
            raise BadMessageError("a session of this id is open already")

    def _opened(self) -> Opened:
        engine = self._compute.engine
        return Opened(
            dtype=dtype_name(engine.stack.dtype),
            max_batch_tokens=engine.max_batch_tokens,
            kv_tokens_free=engine.stats().kv_tokens_free,
        )

    async def _dial_next(self, opening: Open, following: Neighbour, wait_s: float) -> Channel:
        """A push stream to the next hop, which answers when it has room too: at most `wait_s` later."""
        try:
            stream = await self._transport.open_stream(
                following.peer_id, PUSH, addresses=following.addresses, timeout_s=self._limits.dial_timeout_s
            )
        except PetalSwarmError as error:
            # Without the reason: a client could have this server scan a network for it.
            logger.info("no way to %s: %s", following.peer_id, error)
            raise HopLostError(f"no way to the next hop {following.peer_id}") from error
        channel = Channel(stream, PUSH_TABLE, Role.DIALER)
        try:
            channel.send(PushOpen(opening.session, opening.epoch))
            await channel.expect(Opened, timeout_s=self._limits.open_timeout_s + wait_s)
        except BaseException as error:
            channel.abort()
            if not isinstance(error, PetalSwarmError):
                raise
            raise HopLostError(f"the next hop {following.peer_id} refused: {error}") from error
        return channel

    async def _find(self, opening: PushOpen, peer_id: str) -> HostedSession:
        """The session of a push stream, which may arrive before the client's `open`, and before there is
        room for the session.
        """
        if opening.session not in self._sessions:
            arrival = self._arrivals.setdefault(opening.session, asyncio.Event())
            try:
                async with asyncio.timeout(self._limits.open_timeout_s):
                    await arrival.wait()
            except TimeoutError:
                if self._arrivals.get(opening.session) is arrival:
                    del self._arrivals[opening.session]
        session = self._sessions.get(opening.session)
        if session is not None:
            await session.admitted.wait()
        if (
            session is None
            or session.ended
            or session.opening.upstream != peer_id
            or session.opening.epoch != opening.epoch
        ):
            # One answer for all three, so that nobody learns of others' sessions.
            raise UnknownSessionError("no session of this id expects steps from you")
        return session

    def _announce_arrival(self, session: bytes) -> None:
        arrival = self._arrivals.pop(session, None)
        if arrival is not None:
            arrival.set()


@contextlib.asynccontextmanager
async def _answering_errors(channel: Channel) -> AsyncIterator[None]:
    """Tell the peer of an error where that is still possible; nothing of it reaches other sessions."""
    try:
        yield
    except (PetalSwarmError, TimeoutError) as error:
        level = logging.DEBUG if isinstance(error, NetworkError) else logging.INFO
        logger.log(level, "stream from %s ended: %s", channel.peer_id, error)
        with contextlib.suppress(PetalSwarmError):
            channel.send(error_message(error))
    except Exception:
        logger.exception("stream from %s failed", channel.peer_id)
        with contextlib.suppress(PetalSwarmError):
            channel.send(error_message(RuntimeError()))


async def _while_there(channel: Channel, work: Coroutine[Any, Any, T]) -> T:
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
