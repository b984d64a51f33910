"""The `session` and `push` protocols of a server: opening sessions, finding them, ending them."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import secrets
from collections.abc import AsyncIterator
from typing import TypeVar

from petal_swarm.engine.adapters import HeldAdapter
from petal_swarm.engine.compute import Compute
from petal_swarm.engine.prefixes import PrefixScope
from petal_swarm.errors import (
    BadMessageError,
    BusyError,
    IdleError,
    PetalSwarmError,
    UnknownSessionError,
)
from petal_swarm.net.channel import Channel
from petal_swarm.net.transport import Stream, Transport
from petal_swarm.server import slow_peers
from petal_swarm.server.adapters import AdapterHost
from petal_swarm.server.admission import Request
from petal_swarm.server.config import SessionLimits
from petal_swarm.server.gate import StreamGate
from petal_swarm.server.hosted import HostedSession
from petal_swarm.server.quotas import Quotas
from petal_swarm.server.results import Overhead, answering_errors
from petal_swarm.server.streams import (
    LEAVING,
    MAX_OPENING_PAYLOAD_BYTES,
    Arrivals,
    check_hosted,
    dial_next,
    until_one_ends,
    while_there,
)
from petal_swarm.server.waiting_room import LOOK_S, WaitingRoom
from petal_swarm.wire.connection import PUSH_TABLE, SESSION_TABLE, Role
from petal_swarm.wire.frames import MAX_PAYLOAD_BYTES
from petal_swarm.wire.messages.opening import Open, Opened, PushOpen
from petal_swarm.wire.messages.parts import DTYPE_BYTES, NO_STEP, Neighbour
from petal_swarm.wire.protocols import PUSH
from petal_swarm.wire.step_log import LogBudget
from petal_swarm.wire.tensors import dtype_name

logger = logging.getLogger(__name__)
T = TypeVar("T")


class SessionHost:
    """All sessions of one server."""

    def __init__(
        self,
        compute: Compute,
        transport: Transport,
        *,
        model_key: str,
        limits: SessionLimits,
        gate: StreamGate,
        adapters: AdapterHost,
    ) -> None:
        self.adapters = adapters
        self._compute = compute
        self._transport = transport
        self._model_key = model_key
        self._limits = limits
        self._sessions: dict[bytes, HostedSession] = {}
        self._arrivals = Arrivals()
        self._changed = asyncio.Event()
        self._room = WaitingRoom(compute, limits, self._make_room)
        self._quotas = Quotas(limits, asyncio.get_running_loop().time)
        self._max_step_bytes = _max_step_bytes(compute)
        self._loop = asyncio.get_running_loop()
        self._looks_for_steps: asyncio.TimerHandle | None = None
        self._looked_s = 0.0
        self._freeing = 0
        self._salt = secrets.token_bytes(16)
        self._logs = LogBudget(limits.max_log_bytes)
        self._gate = gate
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
        """Ask all clients to go elsewhere, and wait until no session is left.

        Set `draining` first, or new ones will keep coming.
        """
        self._room.refuse_all(BusyError(LEAVING))
        for session in self._sessions.values():
            session.announce_leaving()
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
        channel.incoming.max_payload_bytes = MAX_OPENING_PAYLOAD_BYTES
        async with answering_errors(channel):
            with self._gate.being_opened(channel.peer_id):
                opening = await channel.expect(Open, timeout_s=self._limits.open_timeout_s)
            async with self._open(opening, channel) as session:
                if opening.upstream is None:
                    channel.incoming.max_payload_bytes = self._max_step_bytes
                channel.send(self._opened())
                await self._run(session)

    async def handle_push(self, stream: Stream) -> None:
        """The steps that a previous hop pushes into one session."""
        channel = Channel(stream, PUSH_TABLE, Role.LISTENER)
        channel.incoming.max_payload_bytes = MAX_OPENING_PAYLOAD_BYTES
        async with answering_errors(channel):
            with self._gate.being_opened(channel.peer_id):
                opening = await channel.expect(PushOpen, timeout_s=self._limits.open_timeout_s)
                channel.pause()  # or what it sends already would pile up meanwhile
                session = await self._find(opening, channel.peer_id)
            channel.incoming.max_payload_bytes = self._max_step_bytes
            channel.resume()
            channel.send(self._opened(session.last_step))
            await session.take_steps(channel)

    @contextlib.asynccontextmanager
    async def _open(self, opening: Open, channel: Channel) -> AsyncIterator[HostedSession]:
        """A session from admission to release, connected to its next hop."""
        self._check(opening)
        session = HostedSession(
            opening,
            channel,
            compute=self._compute,
            limits=self._limits,
            overhead=self.overhead,
            log=self._logs.new_log(),
            dial=functools.partial(self._dial_next, opening),
            on_reroute=lambda: self._announce_arrival(session),
            usage=self._quotas.open(channel.peer_id),
        )
        request = Request(opening.session, channel.peer_id, opening.max_length)
        self._sessions[opening.session] = session
        self._announce_arrival(session)
        if self._looks_for_steps is None:
            self._looks_for_steps = self._loop.call_later(LOOK_S, self._look_for_steps)
        try:
            stack = self._compute.engine.stack
            using = self.adapters.in_use(channel.peer_id, opening.adapter, opening.span, stack)
            async with using as adapter:
                await while_there(channel, self._prepare(session, request, adapter))
                yield session
        finally:
            await session.close()
            session.admitted.set()
            del self._sessions[opening.session]
            self._changed.set()
            self._room.leave(request)
            self._wake_when_freed()

    async def _prepare(self, session: HostedSession, request: Request, adapter: HeldAdapter | None) -> None:
        """Wait for room, open the session in the engine and connect it to its next hop."""
        opening = session.opening
        wait_s = min(opening.wait_s, self._limits.max_wait_s)
        await self._room.enter(request, wait_s=wait_s)
        engine = self._compute.engine
        scope = self._prefix_scope(opening, adapter) if opening.share_prefixes else None
        opened = self._compute.call(
            lambda: engine.open_session(
                opening.session,
                max_length=opening.max_length,
                scope=scope,
                adapter=None if adapter is None else adapter.served,
            )
        )
        async with asyncio.timeout(self._limits.open_timeout_s):
            await asyncio.wrap_future(opened)
        session.admitted.set()
        await session.connect_next()

    def _prefix_scope(self, opening: Open, adapter: HeldAdapter | None) -> PrefixScope:
        """With whom a session shares prefixes: the first hop trusts what it computed, others one peer each.
        With an adapter, only with those that have the same one.

        The salt makes keys those of this process: after a restart its weights may be quantized otherwise, and
        hops behind it must not take what they hold for the same.
        """
        named = f"{opening.span} {opening.upstream or ''}".encode()
        if adapter is not None:
            named += b" " + adapter.digest
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
        now = self._loop.time()
        if now - self._looked_s >= slow_peers.LOOK_S:
            self._looked_s = now
            for session in self._sessions.values():
                session.cut_off_slow_peers(now)
        if self._compute.steps_waiting_for_room:
            self._end_longest_idle()
        self._looks_for_steps = self._loop.call_later(LOOK_S, self._look_for_steps)

    def _make_room(self) -> None:
        """A session waits for room: end one that idles, or one of a peer that has more than its share."""
        if self._end_longest_idle() or self._is_freeing:
            return
        candidates = [self._sessions[key] for key in self._room.over_share() if key in self._sessions]
        if candidates:
            longest = max(candidates, key=lambda session: session.idle_s)
            reason = "others wait for room, and your sessions here have more than an equal share of it"
            longest.fail(BusyError(reason, retry_after_s=self._room.retry_after_s))

    def _end_longest_idle(self) -> bool:
        """Others wait for room, with a session or a step of one: end the session that was idle longest, if
        that is long. One at a time: what it frees may be enough.
        """
        if self._is_freeing:
            return False
        longest = max(self._sessions.values(), key=lambda session: session.idle_s)
        limit_s = self._limits.idle_when_full_s
        if longest.idle_s < limit_s:
            return False
        longest.fail(IdleError(f"the session was idle for {limit_s:g} s, and others wait for its room"))
        return True

    @property
    def _is_freeing(self) -> bool:
        """Whether a session has ended whose room is not free yet."""
        return self._freeing > 0 or any(session.ended for session in self._sessions.values())

    async def _run(self, session: HostedSession) -> None:
        """Serve the session until the client leaves or something fails."""
        if self.draining:  # it has come while that was said to the others
            session.announce_leaving()
        await until_one_ends(session.serve_client(), session.wait_ended(), session.watch_idle())

    def _check(self, opening: Open) -> None:
        check_hosted(
            opening.model,
            opening.span,
            hosted_model=self._model_key,
            hosted_blocks=self._compute.engine.stack.span,
            draining=self.draining,
        )
        if opening.session in self._sessions:
            raise BadMessageError("a session of this id is open already")

    def _opened(self, last_step: int = NO_STEP) -> Opened:
        engine = self._compute.engine
        return Opened(
            dtype=dtype_name(engine.stack.dtype),
            max_batch_tokens=engine.max_batch_tokens,
            kv_tokens_free=engine.stats().kv_tokens_free,
            last_step=last_step,
        )

    async def _dial_next(self, opening: Open, following: Neighbour, epoch: int) -> tuple[Channel, Opened]:
        """A push stream to the next hop, which answers when it has room too: at most `wait_s` later."""
        wait_s = min(opening.wait_s, self._limits.max_wait_s)
        return await dial_next(
            self._transport,
            following,
            PushOpen(opening.session, epoch),
            Opened,
            protocol=PUSH,
            table=PUSH_TABLE,
            dial_timeout_s=self._limits.dial_timeout_s,
            answer_timeout_s=self._limits.open_timeout_s + wait_s,
        )

    async def _find(self, opening: PushOpen, peer_id: str) -> HostedSession:
        """The session of a push stream, which may arrive before the client's `open` or `reroute`, and before
        there is room for the session.
        """

        def expecting() -> HostedSession | None:
            session = self._sessions.get(opening.session)
            if session is None or (session.upstream.peer_id, session.upstream.epoch) != (
                peer_id,
                opening.epoch,
            ):
                return None
            return session

        if expecting() is None:
            await self._arrivals.wait(opening.session, opening.epoch, self._limits.open_timeout_s)
        session = expecting()
        if session is not None:
            await session.admitted.wait()
            session = expecting()
        if session is None or session.ended:
            # One answer for all, so that nobody learns of others' sessions.
            raise UnknownSessionError("no session of this id expects steps from you")
        return session

    def _announce_arrival(self, session: HostedSession) -> None:
        self._arrivals.announce(session.opening.session, session.upstream.epoch)


def _max_step_bytes(compute: Compute) -> int:
    """The largest payload that a step for this server may have: twice that of the largest step in the widest
    dtype, so that who sends a little too much is told what the limit is.
    """
    engine = compute.engine
    step_bytes = engine.max_batch_tokens * engine.stack.config.hidden_size * max(DTYPE_BYTES.values())
    return min(max(2 * step_bytes, 1 << 20), MAX_PAYLOAD_BYTES)
